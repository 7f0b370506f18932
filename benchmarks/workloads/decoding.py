"""Decoding a grid of point prompts into low-resolution masks, with and without the filter by predicted IoU."""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack

import torch
from case import Case, Floor, Runs, Skip
from peers import segment_anything
from torch import Tensor

from pro2sam_fast import MaskGenerator
from pro2sam_fast.generator import point_grid
from pro2sam_fast.models.sam import grid_decoder

from . import Options
from .shared import grid, in_dtype, original, replaced, sam, with_full_precision

__all__ = ["cases", "decode_floor", "ours", "peers", "plain"]

TESTS = ("tests/ops/test_decode_sweeps.py", "tests/models/test_grid_decoder.py", "tests/test_generator.py")
POINTS = (64, 256, 1024, 4096)
DEFAULT_POINTS = {"cpu": (64,), "cuda": (64, 1024)}
# The peers' cost is proportional to the number of points; on a CPU it is seconds for 64.
MOST_PEER_POINTS = {"cpu": 256, "cuda": 4096}
PLAIN_BATCH = {"cpu": 16, "cuda": 64}


def cases(options: Options) -> Iterator[Case]:
    for points in POINTS:
        for share, name in ((0.5, "half of the points survive"), (1.0, "no filter")):
            yield Case(
                "decode",
                f"G={points} {name}",
                options.dtype,
                TESTS,
                functools.partial(_build, options, points, share),
                functools.partial(decode_floor, options.dtype, points, 4096),
                points in DEFAULT_POINTS[options.device.type] and (share < 1 or options.device.type == "cuda"),
            )
    for batch in (1, 8):
        yield Case(
            "gallery",
            f"G=1024 half of the points survive 1024x1024 batch={batch}",
            options.dtype,
            TESTS,
            functools.partial(_gallery, options, 1024, batch),
            default=options.device.type == "cuda",
        )


def decode_floor(dtype: str, points: int, pixels: int, facts: Mapping[str, object]) -> Floor:
    """Of `points` prompts on an embedding of `pixels`; facts: "s" and "s_m", see `survivors`."""
    part = pixels / 4096
    prompt = 51.5e6 + (392.7e6 + 563.6e6 * facts["s"]) * part
    logits = 3 * points * facts["s_m"] * 16 * pixels * 4
    return Floor(
        {dtype: points * prompt + 3.5e9 * part},
        logits + 256 * pixels * 4 + 4.06e6 * 4,
        "rank-56 form: G (51.5 + (392.7 + 563.6 s) P/4096) + 3500 P/4096 MFLOP, s = share of prompts that survive the "
        "filter, P = pixels of the embedding; logits of surviving masks written, embedding and weights read",
    )


def survivors(iou: Tensor, threshold: float) -> dict[str, float]:
    """Shares of prompts (s) and masks (s_m) above the threshold: iou (G, 3). A threshold of 0 keeps all."""
    alive = iou > threshold if threshold > 0 else torch.ones_like(iou, dtype=torch.bool)
    return {"s": round(alive.any(1).float().mean().item(), 4), "s_m": round(alive.float().mean().item(), 4)}


def _build(options: Options, points: int, share: float) -> Runs:
    model = sam("vit_b", options.device)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn((1, 256, 64, 64), generator=generator).to(options.device)
    coords = torch.from_numpy(point_grid(grid(points)) * 1024).to(options.device)
    threshold, facts = _threshold(options, model, embedding, coords, share)
    run = ours(options, model, embedding, coords, threshold)
    return Runs(
        {"auto": run},
        peers(options, "vit_b", embedding, coords),
        facts,
        ("points", points),
        stages=functools.partial(_stages, run) if options.device.type == "cpu" else None,
    )


PARTS = {
    "sweep 0": (grid_decoder, "decode_sweep0"),
    "sweep 1": (grid_decoder, "decode_sweep1"),
    "sweep 2": (grid_decoder, "decode_sweep2"),
    "upscaling": (grid_decoder, "decode_upscale"),
    "bases": (grid_decoder.GridDecoder, "bases"),
}


def _threshold(
    options: Options, model, embedding: Tensor, coords: Tensor, share: float
) -> tuple[float, dict[str, float]]:
    """The threshold that so many prompts survive, and what survives it."""
    threshold, facts = 0.0, {"s": 1.0, "s_m": 1.0}
    if share < 1:
        with in_dtype(options):
            iou = torch.cat([tokens.iou[:, 1:] for tokens in _tokens(model, embedding, coords)]).float()
        threshold = iou.amax(1).quantile(1 - share).item()
        facts = survivors(iou, threshold)
    return threshold, {**facts, "pred_iou_thresh": round(threshold, 5)}


def _gallery(options: Options, points: int, batch: int) -> Runs:
    """From embeddings to galleries: all that `MaskGenerator` does but encoding. Random masks are unstable, so that
    filter is off."""
    model = sam("vit_b", options.device)
    embeddings = torch.randn((batch, 256, 64, 64), generator=torch.Generator().manual_seed(0)).to(options.device)
    coords = torch.from_numpy(point_grid(grid(points)) * 1024).to(options.device)
    threshold, facts = _threshold(options, model, embeddings[:1], coords, 0.5)
    generator = MaskGenerator(model, grid(points), pred_iou_thresh=threshold, stability_score_thresh=0.0,
                              dtype=options.dtype)  # fmt: skip
    sizes = [(1024, 1024)] * batch
    facts["masks"] = len(generator.generate_from_embeddings(embeddings[:1], sizes[:1])[0])
    return Runs(
        {"auto": lambda: generator.generate_from_embeddings(embeddings, sizes)}, facts=facts, units=("photos", batch)
    )


def _stages(run: Callable[[], object], rounds: int = 5) -> dict[str, float]:
    """Milliseconds of the parts of a call, medians; the token layers are what the kernels leave."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        spent: Counter[str] = Counter()
        with ExitStack() as stack:
            for part, (owner, name) in PARTS.items():
                stack.enter_context(replaced(owner, **{name: _timed(getattr(owner, name), part, spent)}))
            start = time.perf_counter()
            run()
            spent["token layers"] = 1e3 * (time.perf_counter() - start) - sum(spent.values())
        for part, value in spent.items():
            found.setdefault(part, []).append(value)
    return {part: statistics.median(values) for part, values in found.items()}


def _timed(function: Callable, part: str, spent: Counter[str]) -> Callable:
    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[part] += 1e3 * (time.perf_counter() - start)
        return result

    return timed


def ours(options: Options, model, embedding: Tensor, coords: Tensor, threshold: float) -> Callable[[], object]:
    """Our decoder, as MaskGenerator runs it, its masks dropped as they come."""
    generator = MaskGenerator(model, pred_iou_thresh=threshold, dtype=options.dtype)
    return _drained(torch.no_grad, lambda: generator._candidates(embedding, coords))


def peers(options: Options, name: str, embedding: Tensor, coords: Tensor) -> dict[str, Callable[[], object] | Skip]:
    """segment_anything in its batches of 64, and our modules without any of the generator's savings."""
    most = MOST_PEER_POINTS[options.device.type]
    if len(coords) > most:
        reason = f"takes long; its cost is proportional to the points, see G={most}"
        return {"segment_anything": Skip(reason), "torch modules": Skip(reason)}

    def theirs(options: Options):
        model = original(name, options.device)
        return _drained(lambda: in_dtype(options), lambda: segment_anything.decode(model, embedding, coords))

    model = sam(name, options.device)
    return {
        **with_full_precision(options, "segment_anything", theirs),
        "torch modules": _drained(lambda: in_dtype(options), lambda: plain(model, embedding, coords)),
    }


@torch.no_grad()
def plain(model, embedding: Tensor, coords: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (n, 3, 4e, 4e) and IoU (n, 3) from our modules, every mask upscaled; coords (G, 2) in the input frame."""
    for tokens in _tokens(model, embedding, coords):
        yield model.mask_decoder.upscale(tokens, slice(1, None)), tokens.iou[:, 1:]


@torch.no_grad()
def _tokens(model, embedding: Tensor, coords: Tensor) -> Iterator:
    image_pe = model.prompt_encoder.get_dense_pe()
    for batch in coords.split(PLAIN_BATCH[coords.device.type]):
        labels = torch.ones(len(batch), 1, dtype=torch.int, device=batch.device)
        with torch.autocast(batch.device.type, enabled=False):  # Fourier features in full precision
            sparse, dense = model.prompt_encoder(points=(batch[:, None], labels), boxes=None, masks=None)
        yield model.mask_decoder.decode_tokens(embedding, image_pe, sparse, dense[:1])


def _drained(context: Callable[[], AbstractContextManager], parts: Callable[[], Iterable]) -> Callable[[], object]:
    def run():
        with context():
            deque(parts(), maxlen=0)

    return run
