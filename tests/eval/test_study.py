"""The commands train and evaluate, from photos on disk to the report."""

import json
import socket
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from pro2sam_fast.api import load
from pro2sam_fast.boxes import iou_exact
from pro2sam_fast.cli import main
from pro2sam_fast.data.localization import ImageFolder
from pro2sam_fast.errors import CheckpointError, ConfigError, DataError
from pro2sam_fast.eval.coarse import external_scores, model_facts
from pro2sam_fast.eval.gallery_cache import GalleryCache
from pro2sam_fast.eval.localization import LocalizationAccuracy
from pro2sam_fast.eval.maps import Predictions
from pro2sam_fast.eval.protocols import PROTOCOLS
from pro2sam_fast.eval.stored import load_maps
from pro2sam_fast.eval.study import Study, _slug
from pro2sam_fast.eval.table import read_records
from pro2sam_fast.models.gtformer import build_gtformer
from pro2sam_fast.models.trained import ModelSpec, build_trained, load_trained


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rows, rng = [], np.random.default_rng(0)
    for c, name in enumerate(("blue", "red")):
        (root / name).mkdir()
        for i in range(3):
            pixels = rng.integers(60, 90, (96, 128, 3)).astype(np.uint8)
            x, y = 8 + 16 * i, 12 + 8 * i
            pixels[y : y + 56, x : x + 64] = (230, 30, 30) if c else (30, 30, 230)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            rows.append(f"{name}/{i}.png,{x},{y},{x + 64},{y + 56}")
    (root / "boxes.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    options = ["--data", "folder", "--root", str(photos), "--arch", "lite", "--epochs", "2", "--batch-size", "3"]
    val = ["--val-root", str(photos), "--val-boxes", str(photos / "boxes.csv")]
    assert main(["train", "gtformer", *options, *val, "--run", str(run), "--device", "cpu"]) == 0
    return run


def test_a_trained_model_localizes(trained, photos):
    model, spec = load_trained(trained)
    assert spec.class_names == ("blue", "red") and spec.arch == "lite" and not model.training
    # the frozen trunk is the bundled one
    bundled = load("lite").coarse.model.patch_embed.trunk.state_dict()
    own = model.patch_embed.trunk.state_dict()
    assert all(torch.equal(own[k], bundled[k]) for k in own)
    localizer = load(coarse=trained, points_per_side=4)
    result = localizer(np.asarray(Image.open(photos / "red" / "0.png")))[0]
    assert result.label_name in ("blue", "red") and result.mask.shape == (96, 128)


def test_a_report(trained, photos, tmp_path, capsys):
    options = ["--data", "folder", "--root", str(photos), "--boxes", str(photos / "boxes.csv"), "--masks"]
    more = [
        "--coarse",
        f"{trained},cam",
        "--protocol",
        "sat,wsoleval",
        "--points-per-side",
        "4",
        "--sam-input",
        "native",
    ]
    galleries = ["--galleries", str(tmp_path / "galleries"), "--ablation", "matching,tokens"]
    for folder in ("first", "second"):
        assert main(["evaluate", *options, *more, *galleries, "--output", str(tmp_path / folder)]) == 0
    assert "report.md" in capsys.readouterr().out
    first, second = (json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("first", "second"))
    assert first == second
    assert [e["protocol"] for e in first["maps"]] == ["sat", "wsoleval"] * 2
    assert len(first["masks"]) == 2 * 4
    assert len(list((tmp_path / "galleries").rglob("*.npz"))) == 6
    for entry in first["maps"] + first["masks"]:
        again = LocalizationAccuracy(entry["protocol"])
        again.merge(read_records(tmp_path / "first" / entry["records"]))
        assert again.compute() == entry["metrics"]
        assert sum(entry["errors"].values()) == pytest.approx(100)
    # classes of a folder the trained model knows; ImageNet's say nothing here
    assert "Top-1 Loc" in first["maps"][0]["metrics"] and "Top-1 Loc" not in first["maps"][2]["metrics"]
    report = (tmp_path / "first" / "report.md").read_text()
    assert "oracle" in report and "protocol `wsoleval`" in report and "similarity bbox" in report
    for head in ("MaxBoxAccV2", "| matching | IoU 50 | IoU 60 |", "| query tokens | parameters (M) |"):
        assert head in report
    curve = np.loadtxt(
        tmp_path / "first" / (first["maps"][0]["records"][:-4] + "_curves.csv"), delimiter=",", skiprows=1
    )
    assert curve.shape == (100, 4)
    with Image.open(tmp_path / "first" / "best_and_worst.jpg") as sheet:
        assert sheet.width > 224


def test_a_threshold_from_other_photos(trained, photos, tmp_path):
    options = ["--data", "folder", "--root", str(photos), "--boxes", str(photos / "boxes.csv"), "--fixed", "0.2,0.5"]
    val = ["--val-root", str(photos), "--val-boxes", str(photos / "boxes.csv")]
    assert main(["evaluate", *options, *val, "--coarse", str(trained), "--output", str(tmp_path)]) == 0
    (entry,) = json.loads((tmp_path / "summary.json").read_text())["maps"]
    assert entry["selection"] == "val_split" and list(entry["fixed"]) == ["0.2", "0.5"]
    assert entry["metrics"]["GT-known"] >= max(metrics["GT-known"] for metrics in entry["fixed"].values())


def test_layouts_of_the_papers_tables(trained, photos, tmp_path):
    run = tmp_path / "weaker"
    options = ["--data", str(photos), "--arch", "lite", "--epochs", "1", "--device", "cpu", "--run", str(run)]
    losses = ["--gate", "none", "--lambda1", "0.5", "--lambda2", "1", "--loss-scheme", "mean_map_only"]
    assert main(["train", "gtformer", *options, *losses]) == 0
    coarse = ["--coarse", f"{trained},{run},rollout:{run},lite", "--ablation", "attention,losses"]
    options = ["--data", str(photos), "--boxes", str(photos / "boxes.csv"), *coarse, "--output", str(tmp_path / "out")]
    assert main(["evaluate", *options]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    attention, losses = (report.split(f"## Ablation: {name}")[1].split("##")[0] for name in ("attention", "losses"))
    assert "| coarse | protocol | foreground from | Top-1 Loc | GT-known |" in attention
    for source in ("the image, gated", "the image, without gate", "attention alone"):
        assert source in attention
    assert f"| {run} | sat | mean_map_only | 0.5 : 1 |" in losses and "| lite |" not in losses
    assert f"| {trained} | sat | official | 1 : 0.5 |" in losses


def test_an_evaluation_from_stored_maps(trained, photos, tmp_path):
    options = ["--data", str(photos), "--boxes", str(photos / "boxes.csv"), "--protocol", "sat,wsoleval"]
    measure = ["--iou-set", "0.3,0.55", "--iou", "exact"]
    table = ["--parquet"] if find_spec("pyarrow") else []
    first = ["--save-maps", "--coarse", str(trained), "--output", str(tmp_path), *table]
    assert main(["evaluate", *options, *measure, *first]) == 0
    (folder,) = (tmp_path / "maps").iterdir()
    assert len(list(folder.rglob("view224/*/*.npy"))) == len(list(folder.rglob("view256/*/*.npy"))) == 6
    again = ["--coarse", f"maps:{folder}", "--output", str(tmp_path / "again")]
    assert main(["evaluate", *options, *measure, *again]) == 0
    reports = (json.loads((p / "summary.json").read_text())["maps"] for p in (tmp_path, tmp_path / "again"))
    for one, other in zip(*reports, strict=True):
        assert one["metrics"] == other["metrics"] and one["sweeps"] == other["sweeps"]
        assert {"box_acc@0.3", "box_acc@0.55"} <= one["metrics"].keys() and "Top-1 Loc" in one["metrics"]
        records = read_records(tmp_path / one["records"])
        if table:
            assert [r.iou for r in read_records((tmp_path / one["records"]).with_suffix(".parquet"))] == [
                r.iou for r in records
            ]
        assert [r.iou for r in records] == [iou_exact(np.array(r.box), r.boxes).max() for r in records]
    assert "IoU counts widths as x1 - x0." in (tmp_path / "report.md").read_text()
    # without the extension, as wsolevaluation's README has it; with another precision and shape
    for path in (folder / "view224").rglob("*.npy"):
        np.save(path.with_name(path.name.replace(".png", "")), np.load(path).astype(np.float64).repeat(2, 0))
        path.unlink()
    data = ImageFolder(photos)
    found = load_maps(folder, data, PROTOCOLS["wsoleval"])
    assert found.maps.dtype == np.float64 and found.maps.shape == (6, 28, 14) and found.sizes[0] == (128, 96)
    np.save(folder / "view224" / "red" / "1.npy", np.zeros((14, 14)))
    with pytest.raises(DataError, match=r"red/1.npy: the map's shape isn't \(28, 14\)"):
        load_maps(folder, data, PROTOCOLS["wsoleval"])
    np.save(folder / "view224" / "red" / "1.npy", np.full((28, 14), np.nan))
    with pytest.raises(DataError, match=r"red/1.npy: expected a two-dimensional array of finite numbers"):
        load_maps(folder, data, PROTOCOLS["wsoleval"])
    (folder / "view224" / "red" / "1.npy").unlink()
    with pytest.raises(DataError, match=r"1 photos have no map, the first is 'red/1.png'"):
        load_maps(folder, data, PROTOCOLS["wsoleval"])


def test_one_image_per_class_and_other_classes(photos, tmp_path, capsys):
    for i, name in enumerate(("tench", "goldfish")):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.open(photos / "red" / f"{i}.png").save(tmp_path / "flat" / f"n0000000{i}_{name}.JPEG")
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "flat"), "--arch", "lite", "--epochs", "1", "--device", "cpu"]
    assert main(["train", "gtformer", *options, "--run", str(run)]) == 0
    assert load_trained(run)[1].class_names == ("n00000000_tench", "n00000001_goldfish")
    options = ["--data", str(photos), "--boxes", str(photos / "boxes.csv"), "--coarse", f"{run},cam:{run}"]
    assert main(["evaluate", *options, "--output", str(tmp_path / "out")]) == 0
    # as many classes, but others
    for entry in json.loads((tmp_path / "out" / "summary.json").read_text())["maps"]:
        assert "GT-known" in entry["metrics"] and "Top-1 Loc" not in entry["metrics"]
    assert "The 2 classes of the data aren't among those of" in (tmp_path / "out" / "report.md").read_text()
    assert main(["evaluate", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "--root DIR is missing" in capsys.readouterr().err


def test_pixels_under_torchrun(photos, tmp_path, monkeypatch):
    """OpenImages' masks, by a process that torchrun started."""
    (tmp_path / "ids").mkdir()
    ids = [p.id for p in ImageFolder(photos).photos]
    for key in ids:
        mask = Image.fromarray(np.asarray(Image.open(photos / key)).max(2).astype(np.uint8) // 200 * 255)
        (tmp_path / key).parent.mkdir(exist_ok=True)
        mask.save(tmp_path / key)
    (tmp_path / "ids" / "image_ids.txt").write_text("\n".join(ids))
    (tmp_path / "ids" / "class_labels.txt").write_text("\n".join(f"{key},0" for key in ids))
    (tmp_path / "ids" / "localization.txt").write_text("\n".join(f"{key},{key}," for key in ids))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    options = ["--data", "wsol", "--root", str(photos), "--boxes", str(tmp_path), "--metadata", str(tmp_path / "ids")]
    masks = ["--masks", "--points-per-side", "4", "--ablation", "matching"]
    assert main(["evaluate", *options, *masks, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert not torch.distributed.is_initialized()
    entries = json.loads((tmp_path / "out" / "summary.json").read_text())["pixels"]
    with np.load(tmp_path / "out" / entries[0]["records"]) as records:
        assert records["ids"].tolist() == ids
        assert (records["foreground"] + records["background"]).sum(1).tolist() == [224 * 224] * 6
    assert 30 < entries[0]["PxAP"] <= 100
    # of matched masks, too, whose scores are 0 and 1 alone
    assert [e["coarse"] for e in entries[:3]] == ["lite", "lite, matched", "lite, similarity bbox, matched"]
    with np.load(tmp_path / "out" / entries[1]["records"]) as records:
        counts = records["foreground"] + records["background"]
        assert (counts[:, [0, -2]].sum(1) == 224 * 224).all() and len(records["ids"]) == 6
    assert 30 < entries[1]["PxAP"] <= 100
    assert "PxAP" in (tmp_path / "out" / "report.md").read_text()


class Counting:
    def __init__(self, generator):
        self.generator, self.sam, self.calls = generator, generator.sam, 0

    def generate(self, images):
        self.calls += 1
        return self.generator.generate(images)


def test_galleries_are_found_by_content(tmp_path, photos):
    generator = Counting(load("lite", points_per_side=2).generator)
    a, b = (np.asarray(Image.open(photos / "red" / f"{i}.png")) for i in (0, 1))
    cache = GalleryCache(generator, tmp_path, {"points_per_side": 2})
    fresh = cache.generate([a, b])
    again = GalleryCache(generator, tmp_path, {"points_per_side": 2}).generate([a.copy(), b])
    assert generator.calls == 2
    for one, two in zip(fresh, again):
        assert one.size == two.size and torch.equal(one.masks, two.masks) and torch.equal(one.points, two.points)
    GalleryCache(generator, tmp_path, {"points_per_side": 3}).generate([a])
    assert generator.calls == 3, "other options, other galleries"
    for number, damaged in enumerate((lambda body: body[:100], lambda body: body[:60] + b"\xff" * 9 + body[69:]), 4):
        for path in tmp_path.rglob("*.npz"):
            path.write_bytes(damaged(path.read_bytes()))
        restored = cache.generate([a])[0]
        assert generator.calls == number and torch.equal(restored.masks, fresh[0].masks)
    GalleryCache(generator, None).generate([a])
    assert generator.calls == 6


def test_scores_of_another_model(photos, tmp_path):
    data = ImageFolder(photos)
    ids = np.array([p.id for p in data.photos])
    np.savez(tmp_path / "scores.npz", ids=ids, logits=np.eye(6, 2, dtype=np.float32))
    assert external_scores(data, str(tmp_path / "scores.npz"))[ids[0]].tolist() == [1, 0]
    np.savez(tmp_path / "scores.npz", ids=ids[:4], logits=np.zeros((4, 2)))
    with pytest.raises(DataError, match="2 photos have no scores"):
        external_scores(data, str(tmp_path / "scores.npz"))
    np.save(tmp_path / "scores.npy", np.zeros((6, 2)))
    (tmp_path / "none.npz").touch()
    (tmp_path / "scores.npz").write_bytes(b"no")
    for name in ("scores.npz", "none.npz", "scores.npy"):
        with pytest.raises(DataError, match="expected an .npz file"):
            external_scores(data, str(tmp_path / name))
    with pytest.raises(ConfigError, match="not both"):
        external_scores(data, "a", "b")
    with pytest.raises(ConfigError, match="timm can't give"):
        external_scores(data, None, "no_such_model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "kind of data must be one of"),
        (["--data", "folder", "--metadata", "m"], "takes no metadata"),
        (["--data", "wsol"], "needs metadata"),
        (["--data", "folder", "--ablation", "matching"], "needs --masks"),
        (["--data", "folder", "--masks", "--ablation", "nothing"], "unknown ablation 'nothing'"),
        (["--data", "folder", "--protocol", "mask"], "mask protocol"),
        (["--data", "folder", "--iou-set", "50"], "must lie in (0, 1], got 50"),
        (["--data", "folder", "--val-list", "x"], "takes no val_list"),
        (["--data", "folder", "--protocol", "best"], "unknown protocol 'best'"),
        (["--data", "folder", "--fixed", "0.3,high"], "--fixed: expected a number, not 'high'"),
        (["--data", "folder", "--iou-set", "nan"], "--iou-set: expected a number, not 'nan'"),
        (["--data", "folder", "--masks", "--sam-input", "big"], "--sam-input must be 'native' or a whole number"),
        (["--data", "folder", "--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_wrong_usage(arguments, message, photos, tmp_path, capsys):
    assert main(["evaluate", "--root", str(photos), "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "folder", "--oracle"], "folder has no test split for --oracle"),
        (["--data", "voc", "--val-root", "x"], "voc takes no other photos"),
        (["--data", "folder", "--pretrained", "deit.pth"], "takes a trunk, not pretrained weights"),
    ],
)
def test_options_of_training_that_would_do_nothing(arguments, message, photos, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "voc" / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (tmp_path / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text("a\n")
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / "voc" / folder).mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>7</xmax><ymax>6</ymax></bndbox>"
    (tmp_path / "voc" / "Annotations" / "a.xml").write_text(f"<a><object><name>red</name>{box}</object></a>")
    Image.open(photos / "red" / "0.png").convert("RGB").save(tmp_path / "voc" / "JPEGImages" / "a.jpg")
    root = tmp_path / "voc" if "voc" in arguments else photos
    options = ["--root", str(root), "--arch", "lite", "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", "gtformer", *arguments, *options]) == 2
    assert message in capsys.readouterr().err


def test_boxes_to_choose_a_threshold_by_are_read(photos, tmp_path, capsys):
    options = ["--data", "folder", "--root", str(photos), "--boxes", str(photos / "boxes.csv")]
    options += ["--val-boxes", str(tmp_path / "none.csv"), "--output", str(tmp_path)]
    assert main(["evaluate", *options]) == 1
    assert "none.csv: can't be read" in capsys.readouterr().err


def test_protocols_of_one_view_share_its_predictions(photos, tmp_path, monkeypatch):
    data, val = (ImageFolder(photos, photos / "boxes.csv") for _ in range(2))
    study, asked = Study(data, tmp_path, protocols=("direct224", "wsoleval"), val=val, device="cpu"), []

    def predict(rules, of):
        asked.append((of is val, rules.resize))
        maps = np.random.default_rng(0).random((6, 14, 14), dtype=np.float32)
        return Predictions([photo.id for photo in of.photos], maps, None, [(128, 96)] * 6)

    monkeypatch.setattr(Study, "_model", lambda self, name: predict)
    study.add_maps("any")
    assert len(study.maps) == 2 and sorted(asked) == [(False, 224), (True, 224)]


def test_files_of_models_with_long_names_stay_apart():
    run = "/data/users/somebody/experiments/localization/2026/november/runs/one"
    assert len({_slug(run), _slug(f"cam:{run}"), _slug(f"gradcam:{run}")}) == 3
    assert _slug("cam:runs/a") == "cam-runs-a" and len(_slug(f"cam:{run}")) == 60


def test_arguments_of_another_program_say_nothing(tmp_path):
    net = build_gtformer("deit_tiny", 2)
    for text in ("model: deit_small\n", "[1", "losses: {scheme: sat, lambda1: a}\n"):
        (tmp_path / "args.yaml").write_text(text)
        assert model_facts(str(tmp_path / "official.pth"), net).keys() == {"attention", "tokens"}


def test_wrong_models(tmp_path):
    with pytest.raises(ConfigError, match="unknown arch 'vgg'"):
        build_trained(ModelSpec("vgg", ("a",)))
    with pytest.raises(ConfigError, match="takes a trunk"):
        build_trained(ModelSpec("lite", ("a",)), True)
    with pytest.raises(CheckpointError, match="no description"):
        load_trained(tmp_path)
