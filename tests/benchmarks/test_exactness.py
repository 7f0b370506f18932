"""The exactness rows: what is counted, on galleries and logits made up here, and a row from a stand-in part."""

import argparse
import json
import math

import pytest
import torch

from pro2sam_fast.gallery import MaskGallery

CPU = torch.device("cpu")


def gallery(*rows, ratings=None):
    """Masks of one 4 x 100 photo, each so many pixels of the first row from the left."""
    masks = torch.zeros(len(rows), 4, 100, dtype=torch.bool)
    for mask, width in zip(masks, rows):
        mask[0, :width] = True
    return MaskGallery.from_dense(masks, predicted_iou=torch.tensor(ratings or [1.0] * len(rows)))


def test_equal_galleries_agree(bench):
    a = gallery(10, 50, 100)
    found = bench("agreement").twins([(a, a), (gallery(), gallery())], 0.999)
    assert found == {
        "masks": 3, "masks_there": 3, "other_count": 0, "twinless": 0, "twinless_there": 0, "twins": 100.0,
        "twins_there": 100.0, "iou_min": 1.0, "iou_mean": 1.0, "same_order": 100.0, "rating_gap": 0.0,
    }  # fmt: skip


def test_what_differs_is_counted(bench):
    twins = bench("agreement").twins
    ours = gallery(100, 50, 10, ratings=[0.9, 0.8, 0.7])
    theirs = gallery(48, 100, ratings=[0.75, 0.9])
    found = twins([(ours, theirs)], 0.95)
    assert (found["masks"], found["masks_there"], found["other_count"]) == (3, 2, 1)
    assert (found["twinless"], found["twinless_there"]) == (1, 0)
    assert found["twins"] == pytest.approx(200 / 3) and found["twins_there"] == 100
    assert found["same_order"] == 0 and found["rating_gap"] == pytest.approx(0.05)
    ious = [1, 0.96, 10 / 48, 0.96, 1]
    assert found["iou_min"] == pytest.approx(min(ious)) and found["iou_mean"] == pytest.approx(sum(ious) / 5)
    assert twins([(ours, theirs)], 0.999)["twinless"] == 2
    empty = twins([(ours, gallery())], 0.95)
    assert (empty["twins"], empty["twins_there"], empty["iou_min"]) == (0, 100, 0)


def test_distance_of_logits(bench):
    wanted = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
    wrong = torch.tensor([3.0, 4.5]), torch.tensor([0.25])
    found = bench("agreement").distance([(wanted, wanted), (wrong, wanted)])
    assert found["worst_photo_rms"] == pytest.approx(0.1) and found["iou_gap"] == 0.25
    assert found["logits_rms"] == pytest.approx(0.1 / math.sqrt(2))


def test_photos_are_spread_over_the_folders(bench, tmp_path):
    files = [tmp_path / place / "images" / f"{i}.jpg" for place in ("cub10", "coco200") for i in range(6)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    photos = bench("exactness").photos
    assert photos(tmp_path, 4) == files[::3] and photos(tmp_path, 99) == files
    assert len(photos(None, 2)) == 2


def test_autocast_reduces_networks_and_nothing_else(bench):
    pytest.importorskip("segment_anything")
    exactness = bench("exactness")
    model = exactness.original("lite", CPU)
    embedding = torch.randn(1, 256, 32, 32, generator=torch.Generator().manual_seed(0))
    coords = torch.tensor([[100.0, 200.0], [300.0, 50.0]])

    def decoded():
        return exactness._theirs(model, embedding, coords)

    exact = decoded()
    with exactness.autocast(model):
        reduced = decoded()
    assert [x.dtype for x in reduced] == [torch.float32, torch.float32]
    assert 1e-4 < exactness.distance([(reduced, exact)])["logits_rms"] < 0.1
    assert all(map(torch.equal, decoded(), exact))
    ours = exactness._ours(exactness._generator(exactness.sam("lite", CPU), "float32"), embedding, coords)
    assert exactness.distance([(ours, exact)])["logits_rms"] < 1e-5


def test_rows(bench, tmp_path, monkeypatch, capsys):
    run, exactness = bench("run"), bench("exactness")
    monkeypatch.setattr(exactness, "stale_files", lambda: [])
    metrics = {"masks": 3, "iou_min": 0.123456789}
    found = [("masks: ours", "lite", "float32", 2, metrics), ("decoder: ours", "vit_b", "bfloat16", 0, metrics)]
    monkeypatch.setitem(exactness.PARTS, "galleries", lambda files, device: iter(found))
    output, threads = tmp_path / "exactness.jsonl", str(torch.get_num_threads())
    command = ["exactness", "--parts", "galleries", "--photos", "2", "--output", str(output), "--threads", threads]
    assert run.main(command) == 0
    first, second = map(json.loads, output.read_text().splitlines())
    assert (first["kind"], first["case"], first["photos"]) == ("exactness", "masks: ours; example photos", 2)
    assert first["metrics"] == {"masks": 3, "iou_min": 0.123457} and second["case"] == "decoder: ours"
    options = f"--parts galleries --photos 2 --device cpu --threads {threads}"
    assert first["command"] == f"python benchmarks/run.py exactness {options}"
    page = bench("report").render(list(bench("rows").read(tmp_path)))
    assert "## Exactness" in page and "| masks 3, iou_min 0.123457 |" in page and "results/exactness.jsonl#L1" in page
    monkeypatch.setattr(exactness, "stale_files", lambda: ["csrc"])
    assert run.main(command) == 1 and "isn't this checkout" in capsys.readouterr().err


def test_every_part_can_be_asked_for(bench):
    parser = argparse.ArgumentParser()
    bench("exactness").add_arguments(parser)
    assert parser.parse_args([]).parts.split(",") == [*bench("exactness").PARTS]
