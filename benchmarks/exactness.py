"""How exact the masks are: ours against segment_anything with equal weights, bfloat16 against float32, as JSON rows.

    python benchmarks/run.py exactness                          # on examples/images
    python benchmarks/run.py exactness --data DATA --photos 40  # on photos spread over cub10 and coco200 in DATA

The same numbers for segment_anything against itself (another number of points in a batch; under autocast) stand beside
ours: so much the masks move by rounding alone. Rows are appended to benchmarks/results/exactness.jsonl, or to --output.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from agreement import Decoded, Metrics, distance, twins
from peers import segment_anything
from rows import RESULTS, append, environment, stale_files
from torch import Tensor
from workloads import Options
from workloads.pipeline import generator_options
from workloads.shared import original, photo_files, replaced, sam

import pro2sam_fast
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.generator import MaskGenerator, point_grid
from pro2sam_fast.io import read_image

OTHER_BATCH = 16  # segment_anything's default is 64
SAME, SIMILAR = 0.999, 0.95  # least IoU of a mask with its twin: equal arithmetic, mixed precision
MOVE = 2.0  # pixels
SIDE = 8  # points a side of the grids whose logits are compared
VIT_SIDE = 3

Found = Iterator[tuple[str, str, str, int, Metrics]]


def galleries(files: list[Path], device: torch.device) -> Found:
    """Galleries of `lite` with its own options."""
    model, options = sam("lite", device), generator_options("lite")
    full, mixed = (MaskGenerator(model, dtype=dtype, **options) for dtype in ("float32", "bfloat16"))
    theirs = segment_anything.generator("lite", device, **options)
    rebatched = segment_anything.generator("lite", device, points_per_batch=OTHER_BATCH, **options)
    found: dict[str, list[MaskGallery]] = {}
    for image in map(read_image, files):
        found.setdefault("ours", []).extend(full.generate(image))
        found.setdefault("ours bf16", []).extend(mixed.generate(image))
        found.setdefault("theirs", []).append(_gallery(theirs, image))
        found.setdefault("rebatched", []).append(_gallery(rebatched, image))
        with autocast(original("lite", device)):
            found.setdefault("theirs bf16", []).append(_gallery(theirs, image))
    for case, dtype, a, b, least in (
        ("masks: ours against segment_anything", "float32", "ours", "theirs", SAME),
        ("masks: segment_anything in other batches against itself", "float32", "rebatched", "theirs", SAME),
        ("masks: ours against ours in float32", "bfloat16", "ours bf16", "ours", SIMILAR),
        ("masks: segment_anything against itself in float32", "bfloat16", "theirs bf16", "theirs", SIMILAR),
    ):
        yield case, "lite", dtype, len(files), twins(zip(found[a], found[b], strict=True), least)


def logits(files: list[Path], device: torch.device) -> Found:
    """Low-resolution logits of a grid of points on each photo, `lite`."""
    model, theirs = sam("lite", device), original("lite", device)
    full, mixed = (_generator(model, dtype) for dtype in ("float32", "bfloat16"))
    pairs: dict[str, list[tuple[Decoded, Decoded]]] = {"decoder": [], "ours": [], "theirs": []}
    for image in map(read_image, files):
        (embedding,), (mixed_embedding,) = (list(x._decoder.encode(x.prepare(image))) for x in (full, mixed))
        h, w = full.transform.get_preprocess_shape(*image.shape[:2], full.transform.target_length)
        coords = torch.from_numpy(point_grid(SIDE) * [w, h]).to(device)
        exact = _ours(full, embedding, coords)
        pairs["decoder"].append((_ours(mixed, embedding, coords), exact))
        pairs["ours"].append((_ours(mixed, mixed_embedding, coords), exact))
        with autocast(theirs), torch.no_grad():
            resized = torch.from_numpy(full.transform.apply_image(image)).to(device).permute(2, 0, 1)
            reduced = _theirs(theirs, theirs.image_encoder(theirs.preprocess(resized[None])), coords)
        pairs["theirs"].append((reduced, _theirs(theirs, embedding, coords)))
    for case, name in (
        ("logits: our decoder against float32, equal embedding", "decoder"),
        ("logits: our encoder and decoder against float32", "ours"),
        ("logits: segment_anything's encoder and decoder against float32", "theirs"),
    ):
        yield case, "lite", "bfloat16", len(files), distance(pairs[name])


def boxes(files: list[Path], device: torch.device) -> Found:
    """What `lite` localizes."""
    full, mixed = (
        pro2sam_fast.load("lite", device=device, dtype=dtype)([str(file) for file in files])
        for dtype in ("float32", "bfloat16")
    )
    moves = [np.abs(np.subtract(a.box, b.box)).max() for a, b in zip(mixed, full, strict=True)]
    metrics = {
        f"within_{MOVE:g}_px": 100 * np.mean(np.array(moves) <= MOVE),
        "largest_move_px": np.max(moves),
        "same_label": 100 * np.mean([a.label == b.label for a, b in zip(mixed, full, strict=True)]),
    }
    yield "localize: ours against ours in float32", "lite", "bfloat16", len(files), metrics


def decoder(files: list[Path], device: torch.device) -> Found:
    """A few points on one embedding, against segment_anything's decoder in float64.

    ViT-B has random weights and a random embedding, `lite` the first photo.
    """
    random = torch.randn((1, 256, 64, 64), generator=torch.Generator().manual_seed(0)).to(device)
    lite = _generator(sam("lite", device), "float32")
    image = read_image(files[0])
    (embedding,) = lite._decoder.encode(lite.prepare(image))
    h, w = lite.transform.get_preprocess_shape(*image.shape[:2], lite.transform.target_length)
    for name, image, coords in (
        ("vit_b", random, point_grid(VIT_SIDE) * 1024),
        ("lite", embedding, point_grid(SIDE) * [w, h]),
    ):
        coords = torch.from_numpy(coords).to(device)
        model = original(name, device)
        with replaced(model, mask_decoder=_InFloat64(model.mask_decoder)):
            exact = _theirs(model, image, coords)
        for dtype in ("float32", "bfloat16"):
            with autocast(model, enabled=dtype == "bfloat16"):
                theirs = _theirs(model, image, coords)
            ours = _ours(_generator(sam(name, device), dtype), image, coords)
            for who, found in (("ours", ours), ("segment_anything", theirs)):
                case = f"decoder: {who} against segment_anything in float64"
                yield case, name, dtype, int(name == "lite"), distance([(found, exact)])


@contextlib.contextmanager
def autocast(model, enabled: bool = True) -> Iterator[None]:
    """segment_anything's encoder and decoder in bfloat16; Fourier features, resizing and filters stay in float32."""

    def reduced(forward: Callable) -> Callable:
        def call(*arguments, **named):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
                found = forward(*arguments, **named)
            return found.float() if isinstance(found, Tensor) else tuple(x.float() for x in found)

        return call

    encoder, decoder = model.image_encoder, model.mask_decoder
    with replaced(encoder, forward=reduced(encoder.forward)), replaced(decoder, forward=reduced(decoder.forward)):
        yield


def _generator(model, dtype: str) -> MaskGenerator:
    return MaskGenerator(model, pred_iou_thresh=0.0, dtype=dtype)


@torch.no_grad()
def _ours(generator: MaskGenerator, embedding: Tensor, coords: Tensor) -> Decoded:
    """As MaskGenerator decodes them: coords (G, 2) in the input frame."""
    parts = generator._candidates(embedding, coords)
    low_res, iou = (torch.cat(column) for column in zip(*((part.low_res, part.iou) for part in parts)))
    return low_res.unflatten(0, (-1, 3)), iou.unflatten(0, (-1, 3))


def _theirs(model, embedding: Tensor, coords: Tensor) -> Decoded:
    return tuple(map(torch.cat, zip(*segment_anything.decode(model, embedding, coords))))


class _InFloat64(torch.nn.Module):
    """segment_anything's decoder; prompts are embedded in float32 before it."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder).double()

    def forward(self, multimask_output: bool, **inputs: Tensor) -> Decoded:
        return self.decoder(multimask_output=multimask_output, **{name: x.double() for name, x in inputs.items()})


def _gallery(generator, image: np.ndarray) -> MaskGallery:
    records = generator.generate(image)
    masks = np.stack([record["segmentation"] for record in records] or [np.zeros(image.shape[:2], bool)])
    ratings = torch.tensor([record["predicted_iou"] for record in records])
    return MaskGallery.from_dense(torch.from_numpy(masks[: len(records)]), predicted_iou=ratings)


PARTS = {"galleries": galleries, "logits": logits, "boxes": boxes, "decoder": decoder}


def photos(data: Path | None, count: int) -> list[Path]:
    """`count` photos spread over those of cub10 and coco200 in `data`, or the first ones of examples/images."""
    if data is None:
        return photo_files(Options(torch.device("cpu")))[:count]
    files = [file for place in ("cub10", "coco200") for file in sorted((data / place).rglob("*.jpg"))]
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder that holds cub10 and coco200 (default: examples/images)")
    parser.add_argument("--photos", type=int, default=40, help="how many at most")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "exactness.jsonl")


def run(arguments: argparse.Namespace) -> int:
    if stale := stale_files():
        print(f"run.py: the installed package isn't this checkout ({', '.join(stale[:5])})", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    files = photos(arguments.data, arguments.photos)
    of = "CUB-10 and COCO photos" if arguments.data else "example photos"
    options = "--data DATA " if arguments.data else ""
    options += f"--photos {arguments.photos} --device {arguments.device} --threads {arguments.threads}"
    for part in arguments.parts.split(","):
        for case, model, dtype, count, metrics in PARTS[part](files, device):
            row = {
                "kind": "exactness",
                "what": "exactness",
                "case": f"{case}; {of}" if count else case,
                "model": model,
                "dtype": dtype,
                "photos": count,
                "metrics": {name: float(f"{value:.6g}") for name, value in metrics.items()},
                **environment(device),
                "command": f"python benchmarks/run.py exactness --parts {part} {options}",
            }
            print(json.dumps(row), flush=True)
            append(arguments.output, row)
    return 0
