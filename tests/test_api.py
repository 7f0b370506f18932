"""The localizer and the functions in front of it: every kind of source, order, batches, streams, failures, options."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pro2sam_fast
from pro2sam_fast import api
from pro2sam_fast.api import load, localize, option_names
from pro2sam_fast.errors import BackendError, CheckpointError, ConfigError, ImageReadError, Pro2SamError
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.generator import MaskGenerator
from pro2sam_fast.models.gtformer import GTFormer, build_gtformer
from pro2sam_fast.models.lite import WEIGHTS, LabelHead, LiteModel, make_gtformer_lite, make_sam_lite, save_lite
from pro2sam_fast.models.trunk import EfficientNetLite0
from pro2sam_fast.pipelines.matching import NoMaskError, match
from pro2sam_fast.pipelines.pro2sam import Localizer, PhotoNet, resolve_device
from pro2sam_fast.results import Localization
from pro2sam_fast.sharding import check_devices

spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

BOX = (20, 10, 70, 40)


@pytest.fixture(scope="module")
def localizer():
    return toy.toy_localizer()


@pytest.fixture
def folder(tmp_path):
    """Photos of several sizes, one of them damaged."""
    sizes = [(60, 90), (48, 48), (60, 90), (30, 100), (100, 30)]
    for index, (height, width) in enumerate(sizes):
        box = (width // 5, height // 5, width - width // 5, height - height // 5)
        photo = toy.painted(height, width, box, list(toy.COLORS)[index % 3], extra=())
        Image.fromarray(photo).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"not an image")
    return tmp_path


def assert_is_the_object(result, box=BOX, height=60, width=90, color="red"):
    assert result.box == box and all(isinstance(value, float) for value in result.box)
    assert result.orig_shape == (height, width)
    np.testing.assert_array_equal(result.mask, toy.mask_of(height, width, box))
    assert result.source == "sam" and 0.5 < result.score <= 1
    assert result.label_name == color and result.label == list(toy.COLORS).index(color)
    assert 0.5 < result.label_score <= 1
    assert result.error is None


# sources


def test_every_kind_of_source(localizer, tmp_path):
    photo = toy.painted()
    path = tmp_path / "a.png"
    Image.fromarray(photo).save(path)
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    sources = [path, str(path), tmp_path, f"{tmp_path}/*.png", [path], (item for item in [str(path)])]
    for source in [*sources, photo, [photo], Image.fromarray(photo), tensor, tensor / 255, path.read_bytes()]:
        (result,) = localize(source, localizer)
        assert_is_the_object(result)
        expected = None if isinstance(source, (np.ndarray, torch.Tensor, bytes)) else result.path
        assert result.path == expected
    assert localize(path, localizer)[0].path == str(path)
    assert localize([], localizer) == []


def test_result_fields(localizer):
    (result,) = localize(toy.painted(), localizer)
    assert isinstance(result, Localization) and isinstance(result, pro2sam_fast.Localization)
    assert result.mask.dtype == bool and result.coarse.dtype == np.float32 and result.coarse.shape == (28, 28)
    assert set(result.speed) == {"read", "coarse", "gallery", "match", "total"}
    assert result.speed["total"] == pytest.approx(sum(result.speed.values()) - result.speed["total"])
    assert isinstance(result.candidates, MaskGallery) and len(result.candidates) == 2
    np.testing.assert_array_equal(result.candidates.dense()[0].numpy(), result.mask)
    assert result.candidate_scores[0] == np.float32(result.score) > result.candidate_scores[1]
    assert result.plot().size == (90, 60)
    assert pickle.loads(pickle.dumps(result)).box == result.box


def test_upright_coordinates(localizer, tmp_path):
    photo = toy.painted()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter
    Image.fromarray(np.ascontiguousarray(np.rot90(photo, 1))).save(tmp_path / "turned.png", exif=exif)
    (result,) = localize(tmp_path / "turned.png", localizer)
    assert_is_the_object(result)
    assert result.plot().size == (90, 60)


# order, batches, streams, failures


@pytest.mark.parametrize("batch_size", ["auto", 1, 2, 7])
def test_order_and_independence_of_batches(localizer, folder, batch_size):
    results = localize(folder, localizer, batch_size=batch_size, on_error="skip")
    assert [Path(result.path).name for result in results] == [f"{index}.png" for index in range(5)]
    assert [result.error is None for result in results] == [True, True, False, True, True]
    assert "2.png" in results[2].error and results[2].box is None and results[2].mask is None
    for index in (0, 1, 3, 4):
        (alone,) = localize(folder / f"{index}.png", localizer)
        assert alone.box == results[index].box and alone.score == results[index].score
        np.testing.assert_array_equal(alone.mask, results[index].mask)
        np.testing.assert_array_equal(alone.coarse, results[index].coarse)


def test_raise_names_the_file(localizer, folder):
    with pytest.raises(ImageReadError, match=r"2\.png"):
        localize(folder, localizer)
    with pytest.raises(ImageReadError, match="holds no image"):
        (folder / "void").mkdir()
        localize(folder / "void", localizer)
    (result,) = localize(folder / "void", localizer, on_error="skip")
    assert "holds no image" in result.error


def test_stream_yields_finished_photos_before_raising(localizer, folder):
    stream = localize(folder, localizer, stream=True, batch_size=7)
    assert [Path(next(stream).path).name for _ in range(2)] == ["0.png", "1.png"]
    with pytest.raises(ImageReadError, match=r"2\.png"):
        next(stream)


def test_stream_is_lazy_and_forgets(localizer):
    class Photo(np.ndarray):  # arrays proper can't be weakly referenced
        pass

    alive, produced = [], []

    def living():
        return [reference for reference in alive if reference() is not None]

    def photos():
        for _ in range(15):
            photo = toy.painted(extra=()).view(Photo)
            alive.append(weakref.ref(photo))
            produced.append(1)
            yield photo
            del photo

    count = 0
    for count, _ in enumerate(localize(photos(), localizer, stream=True, batch_size=3), 1):
        assert len(produced) <= count + 3
        if len(living()) > 5:
            gc.collect()
        assert len(living()) <= 5
    assert count == 15


def test_photos_are_kept_only_where_they_cannot_be_read_again(localizer, folder):
    listed = localize([folder / "0.png", toy.painted()], localizer)
    assert listed[0].image is None and listed[1].image is not None
    assert next(localize([folder / "0.png"], localizer, stream=True)).image is not None
    for result in listed:
        result.plot()


def test_inputs_are_not_modified(localizer, folder):
    photo = toy.painted()
    copy = photo.copy()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    localize([folder, photo], localizer, on_error="skip")
    np.testing.assert_array_equal(photo, copy)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("case", [{}, {"sam_input": 50}, {"generator": {"crop_n_layers": 1}}])
@pytest.mark.parametrize("short", [False, True])
def test_photos_are_prepared_in_the_background(folder, monkeypatch, case, short):
    """As on a GPU, two photos a pass."""
    options = dict(case)
    torch.manual_seed(0)
    classifier = PhotoNet(torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten()), size=32)
    everything = {"pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
    generator = {"points_per_side": 4, **everything, **options.pop("generator", {})}
    options |= {"generator": generator, "matching": {"drop_full_frame": False}, "device": "cpu"}
    localizer = Localizer(toy.ColorMap(), toy.tiny_sam(), classifier=classifier, **options)
    expected = localizer(folder, on_error="skip", batch_size=3)
    threads, prepare = set(), MaskGenerator.prepare

    def noted(self, image):
        threads.add(threading.current_thread().name.rpartition("_")[0])
        if short:
            raise MemoryError
        return prepare(self, image)

    monkeypatch.setattr(MaskGenerator, "prepare", noted)
    for module in ("decoding", "generator", "pipelines.pro2sam"):
        monkeypatch.setattr(f"pro2sam_fast.{module}.queues", lambda device: True)
    for module in ("decoding", "generator"):
        monkeypatch.setattr(f"pro2sam_fast.{module}.photos_per_pass", lambda device: 2)
    found = localizer(folder, on_error="skip", batch_size=3)
    assert threads == {"pro2sam"} and [result.error is None for result in found] == [True, True, False, True, True]
    for a, b in zip(found, expected, strict=True):
        assert (a.box, a.label, a.label_score, a.score, a.source) == (b.box, b.label, b.label_score, b.score, b.source)
        if a.error is None:
            np.testing.assert_array_equal(a.mask, b.mask)
            np.testing.assert_array_equal(a.coarse, b.coarse)
            assert torch.equal(a.candidates.masks, b.candidates.masks) and len(a.candidates) > 1
            assert torch.equal(a.candidates.points, b.candidates.points)


def test_batches_shrink_where_memory_ends(monkeypatch):
    localizer = toy.toy_localizer()
    tried = []

    def scarce(images, *prepared, whole=localizer.localize_batch):
        tried.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(images)

    monkeypatch.setattr(localizer, "localize_batch", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    results = localizer([toy.painted()] * 6)
    assert len(results) == 6 and tried[0] == 4 and tried[-1] == 1
    with pytest.raises(torch.OutOfMemoryError):
        localizer([toy.painted()] * 6, batch_size=2)


@pytest.mark.parametrize("batch_size", ["auto", 3])
def test_a_photo_that_does_not_fit_the_memory_does_not_take_its_batch_along(monkeypatch, batch_size):
    localizer = toy.toy_localizer()

    def scarce(images, *prepared, whole=localizer.localize_batch):
        if sum(image.size for image in images) > 3 * 60 * 90:
            torch.empty(1 << 60, dtype=torch.uint8)
        return whole(images)

    monkeypatch.setattr(localizer, "localize_batch", scarce)
    photos = [toy.painted(), toy.painted(61, 90), toy.painted()]
    results = localizer(photos, on_error="skip", batch_size=batch_size)
    assert [result.error is None for result in results] == [True, False, True]
    assert "memory" in results[1].error and results[1].orig_shape == (61, 90)


def test_a_photo_that_cannot_be_matched_does_not_take_its_batch_along():
    localizer = toy.toy_localizer(matching={"on_empty": "raise"})
    dark = np.zeros((20, 20, 3), np.uint8)
    results = localizer([toy.painted(), dark, toy.painted()], on_error="skip", batch_size=3)
    assert [result.error is None for result in results] == [True, False, True]
    assert results[1].orig_shape == (20, 20) and "gallery" in results[1].error
    with pytest.raises(NoMaskError):
        localizer([toy.painted(), dark])


# geometry


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 500), (500, 1), (3, 3), (5, 7), (2, 400)])
@pytest.mark.parametrize("value", [0, 250])
def test_tiny_and_thin_photos(localizer, shape, value):
    height, width = shape
    (result,) = localizer(np.full((height, width, 3), value, np.uint8))
    assert result.box == (0, 0, width, height)
    assert result.mask.shape == shape and result.mask.any()
    assert result.source in ("sam", "coarse", "full")
    result.plot()


def test_small_objects_get_their_own_box(localizer):
    photo = toy.painted(40, 40, (5, 6, 11, 12), extra=())  # 36 pixels, fewer than min_region_box
    (result,) = localizer(photo)
    assert result.box == (5, 6, 11, 12)


def test_fallbacks():
    localizer = toy.toy_localizer()
    localizer.generator = type("Nothing", (), {"generate": lambda self, images: [empty(image) for image in images]})()

    def empty(image):
        return MaskGallery.empty(image.shape[:2])

    (coarse,) = localizer(toy.painted())
    assert coarse.source == "coarse" and coarse.score == 0 and coarse.mask.any()
    x0, y0, x1, y1 = coarse.box
    assert abs(x0 - 20) < 5 and abs(y0 - 10) < 5 and abs(x1 - 70) < 5 and abs(y1 - 40) < 5
    (full,) = localizer(np.zeros((30, 40, 3), np.uint8))
    assert full.source == "full" and full.box == (0, 0, 40, 30) and full.mask.all()


@pytest.mark.parametrize("sam_input", [60, 224])
def test_square_sam_input_is_mapped_back(sam_input):
    localizer = toy.toy_localizer(sam_input=sam_input)
    (result,) = localizer(toy.painted())
    assert result.mask.shape == (60, 90) and result.candidates.size == (sam_input, sam_input)
    np.testing.assert_allclose(result.box, BOX, atol=1.6)
    expected = toy.mask_of(60, 90, BOX)
    assert (result.mask & expected).sum() / (result.mask | expected).sum() > 0.93


def test_box_rules():
    photo = toy.painted(100, 100, (10, 10, 60, 60), extra=())
    photo[65:85, 60:85] = toy.COLORS["red"]

    class OneMask:
        def generate(self, images):
            return [MaskGallery.from_dense(torch.from_numpy(image.max(axis=2) > 128)[None]) for image in images]

    for rule, box in (("otsu_union", (10, 10, 85, 85)), ("largest", (10, 10, 60, 60))):
        localizer = toy.toy_localizer(box=rule)
        localizer.generator = OneMask()
        assert localizer(photo)[0].box == box


def test_number_of_candidates():
    photo = toy.painted(extra=[(x, 50, x + 6, 56) for x in range(0, 80, 10)])
    everything = toy.toy_localizer(candidates=None)(photo)[0]
    assert len(everything.candidates) == 9 and (np.diff(everything.candidate_scores) <= 0).all()
    assert len(toy.toy_localizer(candidates=3)(photo)[0].candidates) == 3
    assert len(toy.toy_localizer(candidates=0)(photo)[0].candidates) == 0


# pairs of real networks


@pytest.fixture(scope="module")
def gtformer():
    torch.manual_seed(0)
    return build_gtformer("deit_tiny", num_classes=5)


CHEAP = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


def test_custom_pair(gtformer):
    pair = load(coarse=gtformer, sam=toy.tiny_sam(), device="cpu", class_names=list("abcde"), **CHEAP)
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (result,) = pair(photo)
    small = np.asarray(Image.fromarray(photo).resize((224, 224), Image.Resampling.BILINEAR), np.float32) / 255
    tensor = torch.from_numpy((small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1).float()
    with torch.no_grad():
        output = gtformer(tensor[None])
    np.testing.assert_allclose(result.coarse, output["map"][0], rtol=1e-4, atol=1e-5)
    assert result.label == int(output["logits"].argmax()) and result.label_name == "abcde"[result.label]
    (gallery,) = pair.generator.generate([photo])
    found = match(gallery, torch.from_numpy(result.coarse))
    assert found.source == result.source
    np.testing.assert_array_equal(found.mask, result.mask)


def test_batches_of_real_networks_do_not_change_results(gtformer):
    pair = load(coarse=gtformer, sam=toy.tiny_sam(), device="cpu", **CHEAP)
    rng = np.random.default_rng(1)
    photos = [rng.integers(0, 256, (height, 30, 3), dtype=np.uint8) for height in (20, 45, 30)]
    for one, other in zip(pair(photos, batch_size=1), pair(photos, batch_size=3), strict=True):
        np.testing.assert_array_equal(one.coarse, other.coarse)
        np.testing.assert_array_equal(one.mask, other.mask)
        assert (one.score, one.label, one.label_score) == (other.score, other.label, other.label_score)


def test_external_classifier_leaves_the_map_alone(gtformer):
    class Always3:
        def prepare(self, rgb):
            return torch.zeros(1)

        def __call__(self, batch):
            return torch.tensor([[0.0, 0, 0, 9]]).expand(len(batch), 4)

    options = {"coarse": gtformer, "sam": toy.tiny_sam(), "device": "cpu", **CHEAP}
    photo = toy.painted()
    (own,), (other,) = load(**options)(photo), load(**options, classifier=Always3(), class_names=list("wxyz"))(photo)
    assert other.label == 3 and other.label_name == "z" and own.label_name is None
    np.testing.assert_allclose(other.coarse, own.coarse, atol=1e-6)


@pytest.fixture(scope="module")
def lite_folder(tmp_path_factory):
    """A lite model with random weights, written as training writes it."""
    torch.manual_seed(0)
    trunk = EfficientNetLite0(1000)
    names = [f"thing {index}" for index in range(1000)]
    defaults = {**CHEAP, "prompt_threshold": 0.3, "candidates": 2}
    coarse, sam = make_gtformer_lite(4, trunk), make_sam_lite(trunk)
    folder = tmp_path_factory.mktemp("lite")
    save_lite(folder / "lite.safetensors", LiteModel(coarse, sam, LabelHead(trunk), names, list("abcd"), defaults, {}))
    return folder


def test_model_folder(lite_folder, gtformer):
    model = load(lite_folder, device="cpu")
    assert model.matching == {"prompt_threshold": 0.3} and model.candidates == 2
    assert model.generator.pred_iou_thresh == 0 and len(model.generator.point_grids[0]) == 4
    (result,) = localize(toy.painted(), model)
    assert result.label_name == f"thing {result.label}"
    changed = load(lite_folder / "lite.safetensors", device="cpu", prompt_threshold=0.1, points_per_side=1)
    assert changed.matching == {"prompt_threshold": 0.1} and len(changed.generator.point_grids[0]) == 1
    own = load(lite_folder, device="cpu", classifier="coarse")
    assert own.classifier is None and own.class_names == tuple("abcd")
    other = load(lite_folder, coarse=gtformer, device="cpu")  # SAM and its options from the folder
    assert isinstance(other.coarse, PhotoNet) and other.coarse.model is gtformer
    assert other.matching == {} and len(other.generator.point_grids[0]) == 4
    other = load(lite_folder, sam=toy.tiny_sam(), device="cpu")
    assert other.sam is toy.tiny_sam() and other.matching == {"prompt_threshold": 0.3}
    assert isinstance(other.coarse.model, GTFormer) and len(other.generator.point_grids[0]) == 1024


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the bundled weights aren't built yet")
def test_bundled_model_on_a_real_photo():
    photos = Path(__file__).parent.parent / "examples" / "images"
    results = localize([photos / "cat.jpg", photos / "coffee.jpg"], device="cpu")
    assert len(results) == 2 and all(result.error is None for result in results)
    for result in results:
        height, width = result.orig_shape
        x0, y0, x1, y1 = result.box
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert result.label_name and result.mask.any() and not result.mask.all()
    cat = next(result for result in results if "cat" in Path(result.path).name)
    assert "cat" in cat.label_name.lower()


# bad arguments: one clear sentence


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load("lit"), "unknown model 'lit'"),
        (lambda: load(None), "the model must be a name, a path or a Localizer, not NoneType"),
        (lambda: localize([], object()), "not object"),
        (lambda: load(sam_checkpoint="x.pth"), "sam_checkpoint needs sam"),
        (lambda: api.load_sam(None, "x.pth"), "sam_checkpoint needs sam"),
        (lambda: load("lite", points_per_sid=3), "did you mean 'points_per_side'"),
        (lambda: load("lite", zzz=3), "unknown option 'zzz': choose from"),
        (lambda: load(sam="vit_x"), "unknown SAM 'vit_x'"),
        (lambda: load(sam="vit_h", coarse=toy.ColorMap()), "needs sam_checkpoint"),
        (lambda: load("folder", sam=toy.tiny_sam(), coarse=toy.ColorMap()), "not all three"),
        (lambda: load(sam=toy.tiny_sam(), sam_checkpoint="x", coarse=toy.ColorMap()), "already built"),
        (lambda: load(sam=toy.tiny_sam(), coarse=7), "coarse must be a module"),
        (lambda: load(sam=torch.nn.Identity(), coarse=toy.ColorMap()), "sam must be a model"),
        (lambda: toy.toy_localizer(device="gpu"), "unknown device 'gpu'"),
        (lambda: toy.toy_localizer(device="meta"), "computes nothing"),
        (lambda: toy.toy_localizer(class_names="red"), "class_names must be"),
        (lambda: toy.toy_localizer(class_names=[1, 2]), "class_names must be"),
        (lambda: toy.toy_localizer(sam_input=0), "sam_input must be"),
        (lambda: toy.toy_localizer(sam_input=10**9), "sam_input must be"),
        (lambda: toy.toy_localizer(box="round"), "box must be one of"),
        (lambda: toy.toy_localizer(candidates=-1), "candidates must be"),
        (lambda: toy.toy_localizer(max_pixels=0), "max_pixels must be"),
        (lambda: toy.toy_localizer(min_region_box=1.5), "min_region_box must be"),
        (lambda: toy.toy_localizer(generator={"pred_iou": 1}), "unknown option pred_iou for MaskGenerator"),
        (lambda: toy.toy_localizer(generator={"points_per_side": 0}), "points_per_side"),
        (lambda: toy.toy_localizer(generator={"points_per_side": 10**7}), "points_per_side must be at most"),
        (lambda: toy.toy_localizer(generator={"crop_n_layers": 50}), "crop_n_layers must be at most"),
        (lambda: toy.toy_localizer(matching={"drop_full_frame": "no"}), "drop_full_frame must be"),
        (lambda: toy.toy_localizer(matching={"match_resolution": "half"}), "match_resolution must be"),
        (lambda: toy.toy_localizer(matching={"threshold": 1}), "unknown option threshold for match"),
        (lambda: toy.toy_localizer()([], on_error="ignore"), "on_error must be"),
        (lambda: toy.toy_localizer()([], batch_size=0), "batch_size must be"),
        (lambda: toy.toy_localizer()([], batch_size=True), "batch_size must be"),
        (lambda: localize([], toy.toy_localizer(), device="cpu"), "give device to load"),
        (lambda: localize([], toy.toy_localizer(), box="largest"), "give box to load"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu():
    with pytest.raises(BackendError, match="no device 'cuda'"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 3), ("current_device", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for device in ("auto", "cuda", torch.device("cuda"), "cuda:2"):
        assert resolve_device(device) == torch.device("cuda", 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert check_devices("cuda,1") == ["cuda:2", "cuda:1"]


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['PRO2SAM_TEST_EVIL']}",)


def test_bad_checkpoints(tmp_path, monkeypatch, lite_folder):
    monkeypatch.setenv("PRO2SAM_TEST_EVIL", str(tmp_path / "ran"))
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    (tmp_path / "lite.safetensors").write_bytes((lite_folder / "lite.safetensors").read_bytes()[:1000])
    for name in ("evil.pth", "noise.pth", "none.pth"):
        with pytest.raises(CheckpointError, match=name):
            load(coarse=tmp_path / name, sam=toy.tiny_sam())
        with pytest.raises(CheckpointError, match=name):
            load(coarse=toy.ColorMap(), sam="vit_b", sam_checkpoint=tmp_path / name)
    for broken in (tmp_path, tmp_path / "noise.pth"):
        with pytest.raises(CheckpointError):
            load(broken)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": 5}, "damaged lite metadata"),
        ({"coarse_class_names": []}, "damaged lite metadata"),
        ({"defaults": None}, "damaged lite metadata"),
        ({"class_names": ["a"]}, "does not fit"),
        ({"tensor": float("nan")}, "NaN or infinite values in image_encoder.norm.bias"),
        ({"stranger": 1.0}, "holds 'stranger'"),
    ],
)
def test_damaged_lite_files(tmp_path, lite_folder, change, words):
    tensors = load_file(lite_folder / "lite.safetensors")
    with safe_open(lite_folder / "lite.safetensors", "pt") as file:
        metadata = file.metadata()
    if "tensor" in change:
        tensors["sam.image_encoder.norm.bias"].fill_(change["tensor"])
    elif "stranger" in change:
        tensors["stranger"] = torch.ones(1)
    else:
        metadata |= {name: json.dumps(value) for name, value in change.items()}
    save_file(tensors, tmp_path / "lite.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, device="cpu")
    assert words in str(caught.value) and "lite.safetensors" in str(caught.value)


def test_a_device_that_torch_lacks():
    for device in ("xpu", "mps"):
        try:
            torch.zeros(1, device=device)
        except Exception:
            with pytest.raises(BackendError, match=f"no device '{device}'"):
                resolve_device(device)


# the package


def test_public_names():
    for name in pro2sam_fast.__all__:
        assert getattr(pro2sam_fast, name) is not None
    required = {"localize", "load", "Localizer", "Localization", "MaskGenerator", "MaskGallery", "SamPredictor"}
    assert required | {"backends"} <= set(pro2sam_fast.__all__)
    assert pro2sam_fast._cpu is not None and pro2sam_fast._cuda is not None
    assert issubclass(pro2sam_fast.ImageReadError, Pro2SamError) and set(dir(pro2sam_fast)) >= set(pro2sam_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pro2sam_fast.nonsense  # noqa: B018


def test_import_is_light():
    code = "import sys, pro2sam_fast; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(pro2sam_fast.__file__).parent.parent)


def test_option_names_do_not_overlap():
    names = [name for members in option_names().values() for name in members]
    assert len(names) == len(set(names))
    assert {"points_per_side", "prompt_threshold", "sam_input", "box"} <= set(names)


def test_localizer_is_the_one_class():
    assert pro2sam_fast.Localizer is Localizer
