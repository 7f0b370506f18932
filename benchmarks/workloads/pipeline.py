"""The whole program, from JPEG files to boxes or galleries, and its start."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from case import Case, Runs, Skip
from peers import attempt, segment_anything, segment_anything_fast, transformers_masks
from PIL import Image

import pro2sam_fast
from pro2sam_fast.api import load, load_sam
from pro2sam_fast.bench import stage_times
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.generator import MaskGenerator
from pro2sam_fast.io import read_image
from pro2sam_fast.models.gtformer import build_gtformer

from . import Options, shared

__all__ = ["cases", "generator_options", "mask_peers"]

TESTS = {"masks": ("tests/test_generator.py",), "localize": ("tests/test_api.py", "tests/test_generator.py")}
HEIGHT, WIDTH = 480, 640
BATCHES = (1, 2, 4, 8, 16, 32)
# Random weights rate no mask well: without filters everybody has all masks to write, more than with real weights.
VIT_OPTIONS = {"points_per_side": 8, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
VIT_CASE = "{} random G=64 filters off batch=1 480x640 JPEG"


def cases(options: Options) -> Iterator[Case]:
    def case(what: str, name: str, build: Callable, *arguments: object, default: bool = True) -> Case:
        build = functools.partial(build, options, *arguments)
        return Case(what, name, options.dtype, TESTS[what], build, default=default)

    on_gpu = options.device.type == "cuda"
    for what, build in (("localize", _localize), ("masks", _masks)):
        for batch in BATCHES:
            default = on_gpu or batch == 1 or (batch == 4 and what == "localize")
            yield case(what, f"lite batch={batch} 480x640 JPEG", build, "lite", batch, True, default=default)
        yield case(what, "lite batch=4 JPEGs as they are", build, "lite", 4, False, default=on_gpu)
    yield case("masks", VIT_CASE.format("vit_b"), _masks, "vit_b", 1, True)
    name = VIT_CASE.format("GTFormer-S + vit_b")
    yield case("localize", name, _localize, "vit_b", 1, True, default=on_gpu)
    tests = TESTS["localize"]
    yield Case("startup", "import, load lite, first 480x640 JPEG", "float32", tests, lambda: _startup(options))


def generator_options(name: str) -> dict[str, object]:
    """Options of the mask generator, ours and segment_anything's alike."""
    return load_sam()[1] if name == "lite" else VIT_OPTIONS


def mask_peers(name: str, options: Options) -> dict[str, Callable[[np.ndarray], object] | Skip]:
    """Other people's calls from an RGB photo to all its masks, with the weights of `shared.sam(name)`."""
    peers = {}
    for package in (segment_anything, segment_anything_fast, transformers_masks):
        call = attempt(functools.partial(package.generator, name, options.device, **generator_options(name)))
        peers[package.__name__.removeprefix("peers.")] = getattr(call, "generate", call)
    if options.dtype != "float32":  # what its users run
        peers["segment_anything in float32"] = peers["segment_anything"]
        peers["segment_anything"] = Skip("its generator turns tensors into NumPy arrays, which have no bfloat16")
    return peers


def _masks(options: Options, name: str, batch: int, resized: bool) -> Runs:
    files, facts = _jpegs(options, batch, resized), {}
    generator = MaskGenerator(shared.sam(name, options.device), dtype=options.dtype, **generator_options(name))

    def ours() -> None:
        galleries = generator.generate([read_image(file) for file in files])
        facts["masks ours"] = sum(map(len, galleries))

    def peer(name: str, call: Callable[[np.ndarray], object]) -> None:
        with _peer_dtype(options, name):
            facts[f"masks {name}"] = sum(len(call(read_image(file))) for file in files)

    peers = _one_by_one(batch, mask_peers(name, options), peer)
    return Runs({"auto": ours}, peers, facts, ("photos", batch))


def _localize(options: Options, name: str, batch: int, resized: bool) -> Runs:
    files = _jpegs(options, batch, resized)
    parts = {"device": options.device, "dtype": options.dtype}
    if name != "lite":
        torch.manual_seed(0)
        coarse = build_gtformer("deit_small").to(options.device)
        parts |= {"coarse": coarse, "sam": shared.sam(name, options.device), **generator_options(name)}
    ours, theirs = load(**parts), load(**parts)

    def peer(name: str, call: Callable[[np.ndarray], object]) -> None:
        theirs.generator = _Galleries(call)
        with _peer_dtype(options, name):
            theirs(files, batch_size=batch)

    peers = {f"{peer} for the masks": call for peer, call in mask_peers(name, options).items()}
    return Runs(
        {"auto": lambda: ours(files, batch_size=batch)},
        _one_by_one(batch, peers, peer),
        units=("photos", batch),
        stages=lambda: stage_times(ours, files, batch)[1],
    )


def _peer_dtype(options: Options, name: str) -> torch.autocast:
    return torch.autocast(options.device.type, enabled=False) if "float32" in name else shared.in_dtype(options)


def _one_by_one(batch: int, peers: dict, call: Callable[[str, Callable], None]) -> dict[str, Callable | Skip]:
    """Peers as calls without arguments. None of them takes several photos at a time."""
    if batch > 1:
        reason = "takes one photo at a time; its rate is that of batch=1"
        return {name: peer if isinstance(peer, Skip) else Skip(reason) for name, peer in peers.items()}
    return {
        name: peer if isinstance(peer, Skip) else functools.partial(call, name, peer) for name, peer in peers.items()
    }


class _Galleries:
    """Somebody else's masks in the place of our mask generator."""

    def __init__(self, call: Callable[[np.ndarray], object]):
        self.call = call

    def generate(self, images: list[np.ndarray]) -> list[MaskGallery]:
        return [self._gallery(image) for image in images]

    def _gallery(self, image: np.ndarray) -> MaskGallery:
        found = self.call(image)
        masks = [mask["segmentation"] if isinstance(mask, dict) else mask for mask in found]
        dense = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
        return MaskGallery.from_dense(torch.from_numpy(dense))


def _startup(options: Options) -> Runs:
    (file,) = _jpegs(options, 1, True)
    code = """
import json, resource, sys, time
times = [time.perf_counter()]
def done(): times.append(time.perf_counter())
import pro2sam_fast, torch; torch.set_num_threads(int(sys.argv[1])); from pro2sam_fast.api import load; done()
localizer = load("lite", device=sys.argv[2]); done()
localizer(sys.argv[3]); done()
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([peak, [1e3 * (b - a) for a, b in zip(times, times[1:])]]))
"""
    # not the folder of the caller, which may hold sources without native modules
    place = {"cwd": Path(file).parent, "env": os.environ | {"PYTHONPATH": str(Path(pro2sam_fast.__file__).parents[1])}}
    stages: dict[str, float] = {}
    facts: dict[str, object] = {}

    def start() -> None:
        command = [sys.executable, "-c", code, str(torch.get_num_threads()), str(options.device), file]
        facts["process_peak_bytes"], times = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, check=True, **place).stdout
        )
        stages.update(zip(("import", "load", "first photo"), times))

    return Runs({"auto": start}, facts=facts, stages=lambda: stages)


@functools.cache
def _jpegs(options: Options, count: int, resized: bool) -> list[str]:
    """Files of this many photos, those of the folder again and again; resized to 480x640 in a temporary folder."""
    files = list(itertools.islice(itertools.cycle(shared.photo_files(options)), count))
    if not resized:
        return [str(file) for file in files]
    places = [Path(_folder().name, f"{index}.jpg") for index in range(count)]
    for index, place in enumerate(places):
        if not place.exists():
            Image.fromarray(shared.photo(options, HEIGHT, WIDTH, index)).save(place, quality=95)
    return [str(place) for place in places]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()
