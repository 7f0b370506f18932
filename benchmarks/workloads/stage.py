"""Stages of the program: image encoders, decoding, filter, post-processing, NMS, matching, box."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from case import Case, Floor, Runs, Skip
from peers import attempt, segment_anything, skimage_box, transformers_sam
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pro2sam_fast
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.ops import unpack_masks
from pro2sam_fast.pipelines.matching import match
from pro2sam_fast.postprocess import Frame, measure_masks, nms
from pro2sam_fast.predictor import encode_image

from . import Options, decoding
from .nms import torchvision_nms
from .postprocess import frame_of, measure_peer, postprocess_floor
from .shared import in_dtype, original, photo, sam, with_full_precision

__all__ = ["cases"]

SAM_TESTS = (
    "tests/models/test_sam.py::test_image_embedding",
    "tests/models/test_image_encoder_cpu.py",
    "tests/models/test_image_encoder_gpu.py",
)
GENERATOR_TESTS = ("tests/test_generator.py", "tests/ops/test_mask_measure.py", "tests/ops/test_nms.py")
MATCHING_TESTS = ("tests/pipelines/test_matching.py", "tests/test_boxes.py")
HEIGHT, WIDTH = 480, 640
# TFLOP of one 1024 x 1024 image, parameters in millions
ENCODERS = {"vit_b": (0.972, 89.7), "vit_l": (2.986, 308.3), "vit_h": (5.961, 637.0), "lite": (None, 3.0)}
DEFAULT_ENCODERS = {"cpu": ("vit_b", "lite"), "cuda": tuple(ENCODERS)}


def cases(options: Options) -> Iterator[Case]:
    for name, batch in [(name, 1) for name in ENCODERS] + [(name, 8) for name in ENCODERS if name != "lite"]:
        yield Case(
            "encoder",
            name if batch == 1 else f"{name} batch {batch}",
            options.dtype,
            SAM_TESTS,
            functools.partial(_encoder, options, name, batch),
            functools.partial(_encoder_floor, options.dtype, name, batch),
            name in DEFAULT_ENCODERS[options.device.type] and (batch == 1 or options.device.type == "cuda"),
        )
    points, frame = 256, frame_of(HEIGHT, WIDTH, 512)  # what lite has
    for what, name, dtype, tests, build, floor in (
        ("decode", f"G={points}", options.dtype, decoding.TESTS, _decode,
         functools.partial(decoding.decode_floor, options.dtype, points, 1024)),
        ("filter", "predicted IoU", "float32", GENERATOR_TESTS, _filter, _filter_floor),
        ("postprocess", "survivors", "float32", GENERATOR_TESTS, _postprocess,
         lambda facts: postprocess_floor(facts["masks"], frame, 128, facts)),
        ("nms", "stable masks", "float32", GENERATOR_TESTS, _nms, lambda facts: Floor()),
        ("match", "with the whole-frame filter", "int64", MATCHING_TESTS, functools.partial(_match, filtered=True),
         _match_floor),
        ("match", "without the whole-frame filter", "int64", MATCHING_TESTS, functools.partial(_match, filtered=False),
         _match_floor),
        ("box", "otsu_union", "bool", MATCHING_TESTS, _box, lambda facts: Floor()),
    ):  # fmt: skip
        yield Case(what, f"lite {HEIGHT}x{WIDTH} {name}", dtype, tests, functools.partial(build, options), floor)


def _encoder_floor(dtype: str, name: str, batch: int, facts) -> Floor:
    tflop, parameters = ENCODERS[name]
    flops = facts["flops"] if tflop is None else batch * tflop * 1e12
    source = "counted by torch.utils.flop_counter" if tflop is None else "products with 25 windows of 14 x 14"
    return Floor({dtype: flops}, 4e6 * parameters, f"{flops / 1e12:.3f} TFLOP, {source}; weights read")


def _encoder(options: Options, name: str, batch: int) -> Runs:
    ours = sam(name, options.device).image_encoder
    size = ours.img_size
    x = torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(0)).to(options.device)

    def call(encoder, wanted: Options = options):
        def run():
            with torch.no_grad(), in_dtype(wanted):
                encoder(x)

        return run

    if name == "lite":
        with FlopCounterMode(display=False) as counter:
            call(ours)()
        reason = "this package's own architecture"
        peers = {"segment_anything": Skip(reason), "transformers": Skip(reason)}
        return Runs({"auto": call(ours)}, peers, {"flops": counter.get_total_flops()}, ("photos", 1))
    peers = {
        **with_full_precision(
            options, "segment_anything", lambda wanted: call(original(name, options.device).image_encoder, wanted)
        ),
        "transformers": attempt(lambda: call(transformers_sam.image_encoder(ours).to(options.device))),
    }
    return Runs({"auto": call(ours)}, peers, units=("photos", batch))


class _Photo(NamedTuple):
    """What the stages after the encoder get for one photo: lite's embedding, prompts, all masks, survivors."""

    embedding: Tensor
    coords: Tensor  # (G, 2) in the input frame
    points: Tensor  # (3G, 2) in pixels
    low_res: Tensor  # (3G, 128, 128)
    iou: Tensor  # (3G,)
    frame: Frame


@functools.cache
def _localizer(device: torch.device):
    return pro2sam_fast.load("lite", device=str(device))


@functools.cache
@torch.no_grad()
def _photo(options: Options) -> _Photo:
    generator = _localizer(options.device).generator
    embedding, _ = encode_image(generator.sam, photo(options, HEIGHT, WIDTH), generator.transform)
    points = generator.point_grids[0] * [WIDTH, HEIGHT]
    coords = torch.from_numpy(generator.transform.apply_coords(points, (HEIGHT, WIDTH))).to(options.device)
    parts = zip(*decoding.plain(generator.sam, embedding, coords))
    low_res, iou = (torch.cat(part).flatten(0, 1) for part in parts)
    points = torch.from_numpy(points.repeat(3, axis=0)).to(options.device)
    return _Photo(embedding, coords, points, low_res, iou, frame_of(HEIGHT, WIDTH, generator.transform.target_length))


def _facts(options: Options) -> dict[str, object]:
    generator = _localizer(options.device).generator
    iou = _photo(options).iou
    facts = {"points": len(iou) // 3, "pred_iou_thresh": generator.pred_iou_thresh}
    return facts | decoding.survivors(iou.unflatten(0, (-1, 3)), generator.pred_iou_thresh)


def _decode(options: Options) -> Runs:
    data, generator = _photo(options), _localizer(options.device).generator
    return Runs(
        {"auto": decoding.ours(options, generator.sam, data.embedding, data.coords, generator.pred_iou_thresh)},
        decoding.peers(options, "lite", data.embedding, data.coords),
        _facts(options),
        ("points", len(data.coords)),
    )


def _filter_floor(facts) -> Floor:
    return Floor(bytes=2 * 4 * 128**2 * facts["masks_kept"], formula="logits of the masks kept read and written")


def _filter(options: Options) -> Runs:
    data, threshold = _photo(options), _localizer(options.device).generator.pred_iou_thresh

    def ours():
        keep = data.iou > threshold
        return data.low_res[keep], data.iou[keep], data.points[keep]

    def theirs():
        model = original("lite", options.device)
        logits = model.postprocess_masks(data.low_res[:, None], data.frame.input_size, data.frame.image_size)[:, 0]
        return lambda: segment_anything.filtered(logits, data.iou, data.points, threshold)

    facts = _facts(options) | {"masks_kept": len(ours()[0]), "segment_anything": "filters logits at the photo's size"}
    return Runs({"auto": ours}, {"segment_anything": attempt(theirs)}, facts)


def _survivors(options: Options) -> tuple[Tensor, Tensor]:
    data, threshold = _photo(options), _localizer(options.device).generator.pred_iou_thresh
    keep = data.iou > threshold
    return data.low_res[keep], data.iou[keep]


def _postprocess(options: Options) -> Runs:
    generator, frame = _localizer(options.device).generator, _photo(options).frame
    low_res, _ = _survivors(options)
    offset, threshold = generator.stability_score_offset, generator.stability_score_thresh
    ours = functools.partial(measure_masks, low_res, frame, generator.sam.mask_threshold, offset, threshold)
    facts = _facts(options) | {"masks": len(low_res), "stability_score_thresh": threshold}
    facts["stability_pass_rate"] = round(len(ours()[0]) / max(len(low_res), 1), 4)
    peers = {"segment_anything": measure_peer(options, "lite", low_res, frame, offset, threshold)}
    return Runs({"auto": ours}, peers, facts, ("masks", len(low_res)))


def _nms(options: Options) -> Runs:
    generator, frame = _localizer(options.device).generator, _photo(options).frame
    low_res, iou = _survivors(options)
    index, _, boxes, _ = measure_masks(
        low_res,
        frame,
        generator.sam.mask_threshold,
        generator.stability_score_offset,
        generator.stability_score_thresh,
    )
    ours = functools.partial(nms, boxes, iou[index], generator.box_nms_thresh)
    peers = {"torchvision": torchvision_nms(boxes, iou[index], generator.box_nms_thresh)}
    return Runs({"auto": ours}, peers, {"boxes": len(boxes), "kept": len(ours())})


@functools.cache
def _matching_inputs(options: Options) -> tuple[MaskGallery, Tensor]:
    localizer = _localizer(options.device)
    image, data = photo(options, HEIGHT, WIDTH), _photo(options)
    gallery = localizer.generator.generate_from_embeddings(data.embedding, [(HEIGHT, WIDTH)])[0]
    coarse = localizer.coarse(localizer.coarse.prepare(image)[None].to(options.device))["map"][0]
    return gallery, coarse.detach()


def _match_floor(facts) -> Floor:
    return Floor(bytes=8 * facts["masks"] * HEIGHT * -(-WIDTH // 64), formula="packed masks read once")


def _match(options: Options, filtered: bool) -> Runs:
    gallery, coarse = _matching_inputs(options)
    ours = functools.partial(match, gallery, coarse, drop_full_frame=filtered)
    dense = unpack_masks(gallery.masks, WIDTH).flatten(1).float()

    def plain():
        enlarged = torch.nn.functional.interpolate(coarse[None, None], size=gallery.size, mode="bilinear")
        query = (enlarged.flatten() > 0.2).float()
        inter = dense @ query
        iou = inter / (dense.sum(1) + query.sum() - inter)
        index = int(iou.argmax())
        return index, dense[index].unflatten(0, gallery.size).bool().cpu().numpy()

    peers = {"dense torch": Skip("has no filter for masks that fill the frame") if filtered else plain}
    return Runs({"auto": ours}, peers, {"masks": len(gallery)})


def _box(options: Options) -> Runs:
    localizer = _localizer(options.device)
    gallery, coarse = _matching_inputs(options)
    found = match(gallery, coarse, **localizer.matching)

    def theirs():
        if skimage_box.otsu_union(found.mask) != found.box():
            raise AssertionError("scikit-image finds another box")
        return lambda: skimage_box.otsu_union(found.mask)

    return Runs({"auto": found.box}, {"scikit-image": attempt(theirs)}, {"source": found.source})
