"""Peak memory of ops, stages and of the whole program, each in a fresh process."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from case import Case, Runs, Skip
from measuring import peak_bytes
from peers import attempt, segment_anything

from pro2sam_fast import MaskGenerator
from pro2sam_fast.api import load_sam

from . import Options, op, stage
from .shared import grid, photo, sam

__all__ = ["cases", "child"]

# what, case, peers, by default
MEASURED = (
    ("mask_match", "K=1000 512x512", ("dense torch", "pycocotools"), False),
    ("gated_attention", "fwd+bwd B=32 N=201 small", ("materialised", "SDPA, gate outside"), True),
    ("decode", "G=64 half of the points survive", ("segment_anything",), True),
    ("decode", "G=1024 half of the points survive", ("segment_anything",), False),
    ("postprocess", "K=16 3000x4000", ("segment_anything",), True),
    ("nms", "K=10000", ("torchvision",), False),
    ("encoder", "vit_b", ("segment_anything", "transformers"), True),
    ("encoder", "vit_h", ("segment_anything", "transformers"), False),
    ("match", "lite 480x640 without the whole-frame filter", ("dense torch",), False),
)
# points, height, width, by default
PHOTOS = ((256, 1024, 1024, True), (256, 1500, 2250, False), (1024, 3000, 4000, False))
TESTS = ("tests/test_generator.py",)
CHILD = "import sys; from workloads.memory import child; child(sys.argv[1])"


def cases(options: Options) -> Iterator[Case]:
    tests = {(case.what, case.name): case.tests for case in _inside(options)}
    photos = tuple(("masks", _photo_name(*size[:3]), ("segment_anything",), size[3]) for size in PHOTOS)
    for what, name, peers, default in MEASURED + photos:
        build = functools.partial(_measured, options, what, name, peers)
        yield Case(what, name, options.dtype, tests[what, name], build, default=default)


def _inside(options: Options) -> Iterator[Case]:
    """What a fresh process can be asked for."""
    programs = (
        Case("masks", _photo_name(*size[:3]), options.dtype, TESTS, functools.partial(_masks, options, *size[:3]))
        for size in PHOTOS
    )
    return itertools.chain(op.cases(options), stage.cases(options), programs)


def _measured(options: Options, what: str, name: str, peers: tuple[str, ...]) -> Runs:
    ours = _fresh(options, what, name, None)
    return Runs({"auto": ours}, {peer: _fresh(options, what, name, peer) for peer in peers}, unit="bytes")


def _fresh(options: Options, what: str, name: str, peer: str | None) -> Callable[[], int] | Skip:
    request = {
        "device": str(options.device),
        "dtype": options.dtype,
        "images": options.images and str(options.images.resolve()),
        "threads": torch.get_num_threads(),
        "what": what,
        "case": name,
        "peer": peer,
    }
    command = [sys.executable, "-c", CHILD, json.dumps(request)]
    benchmarks = Path(__file__).resolve().parent.parent
    output = subprocess.run(command, cwd=benchmarks, stdout=subprocess.PIPE, text=True, check=False)
    if output.returncode:
        return Skip(f"the process ended with {output.returncode}, perhaps for lack of memory")
    answer = json.loads(output.stdout.splitlines()[-1])
    return Skip(answer) if isinstance(answer, str) else lambda: answer


def child(text: str) -> None:
    """Prints the peak bytes of one call, or why it can't be made, as JSON; `text` is a request of `_fresh`."""
    request = json.loads(text)
    torch.set_num_threads(request["threads"])
    images = request["images"] and Path(request["images"])
    options = Options(torch.device(request["device"]), request["dtype"], images)
    wanted = request["what"], request["case"]
    runs = next(case for case in _inside(options) if (case.what, case.name) == wanted).build()
    # of several back ends of ours the last, which is the quickest of this device
    call = runs.peers[request["peer"]] if request["peer"] else list(runs.ours.values())[-1]
    print(json.dumps(call.reason if isinstance(call, Skip) else peak_bytes(call, options.device)))


def _photo_name(points: int, height: int, width: int) -> str:
    return f"lite G={points} {height}x{width}"


def _masks(options: Options, points: int, height: int, width: int) -> Runs:
    image = photo(options, height, width)
    chosen = load_sam()[1] | {"points_per_side": grid(points)}
    generator = MaskGenerator(sam("lite", options.device), **chosen, dtype=options.dtype)
    # 64 points make 192 masks; float logits, those that pass a filter again, bool masks
    needed = 192 * height * width * 4 * 2.5
    free = torch.cuda.mem_get_info(options.device)[0] if options.device.type == "cuda" else _unused()

    def theirs():
        generator = segment_anything.generator("lite", options.device, **chosen)
        return lambda: generator.generate(image)

    too_much = Skip(f"would take about {needed / 2**30:.0f} GiB, free are {free / 2**30:.0f}")
    return Runs(
        {"auto": lambda: generator.generate([image])},
        {"segment_anything": attempt(theirs) if needed < free else too_much},
    )


def _unused() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
