"""The command line: records, pictures, exit status, sentences instead of tracebacks, interrupts and kills."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import pro2sam_fast
from pro2sam_fast import api, bench, cli
from pro2sam_fast.commands.parser import tell
from pro2sam_fast.commands.runs import names
from pro2sam_fast.gallery import MaskGallery
from pro2sam_fast.generator import MaskGenerator

spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

KEYS = ["path", "height", "width", "box", "score", "label", "label_name", "label_score"]
KEYS += ["source", "mask", "speed", "error"]
ROOT = Path(pro2sam_fast.__file__).parent.parent


@pytest.fixture
def calls(monkeypatch):
    """Replace the models by toys; gives the arguments that `load` got."""
    calls = []

    def load(*args, **options):
        calls.append((args, options))
        return toy.toy_localizer(max_pixels=options["max_pixels"], candidates=0)

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr(api, "load_sam", lambda *args: (toy.tiny_sam(), {"points_per_side": 2}))
    monkeypatch.setattr(MaskGenerator, "generate", lambda self, images, prepared: toy.BrightRegions().generate(images))
    return calls


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.jpg", "green"), ("sub/a.png", "blue")):
        Image.fromarray(toy.painted(color=color)).save(folder / name, quality=95)
    return folder


@pytest.fixture
def run(tmp_path, calls, capsys):
    def run(*arguments, out="out"):
        output = ["--output", tmp_path / out] if out else []
        status = cli.main([str(argument) for argument in (*arguments, *output)])
        run.stdout, run.stderr = capsys.readouterr()
        assert "Traceback" not in run.stderr
        return status

    return run


def records(folder, name="localizations.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def stable(folder):
    """Contents without timings, which differ between runs."""
    found = contents(folder)
    lines = records(folder)
    found["localizations.jsonl"] = [{**record, "speed": set(record["speed"])} for record in lines]
    return {name: body for name, body in found.items() if not name.endswith(".old")}


def test_localize_a_folder(run, photos, tmp_path):
    before = contents(photos)
    assert run("localize", photos) == 0
    out = tmp_path / "out"
    found = records(out)
    assert [record["path"] for record in found] == [str(photos / name) for name in ("a.png", "b.jpg", "sub/a.png")]
    for record in found:
        assert list(record) == KEYS
        assert (record["height"], record["width"], record["error"], record["source"]) == (60, 90, None, "sam")
        np.testing.assert_allclose(record["box"], [20, 10, 70, 40], atol=1)
        counts = record["mask"]["counts"].encode()
        assert record["mask"]["size"] == [60, 90] and coco.area({"size": [60, 90], "counts": counts}) >= 1500
        assert {"read", "coarse", "gallery", "match", "total"} == set(record["speed"])
    assert [record["label_name"] for record in found] == ["red", "green", "blue"]
    assert files(out) == {
        "localizations.jsonl",
        "localizations.run.json",
        *(f"overlays/{name}.jpg" for name in ("a", "b", "sub/a")),
    }
    with Image.open(out / "overlays" / "a.jpg") as picture:
        assert picture.size == (90, 60)
    assert contents(photos) == before
    assert "3 of 3 photos done, 0 skipped" in run.stdout and "photo" in run.stderr


def test_formats_masks_and_no_overlay(run, photos, tmp_path):
    formats = "jsonl, coco,voc,yolo,labelstudio"
    assert run("localize", photos / "a.png", "--format", formats, "--masks", "--no-overlay") == 0
    assert files(tmp_path / "out") == {
        "localizations.jsonl",
        "localizations.run.json",
        "coco.json",
        "labelstudio.json",
        "masks/a.png",
        "voc/a.xml",
        "yolo/labels/a.txt",
        "yolo/classes.txt",
        "yolo/data.yaml",
    }
    assert (tmp_path / "out" / "yolo" / "classes.txt").read_text() == "red\ngreen\nblue\n"


def test_options_reach_the_model(run, photos, calls):
    options = "--model dir --coarse c.pth --sam vit_h --sam-checkpoint s.pth --device cpu --sam-input 224 --box largest"
    options += " --prompt-threshold 0.3 --points-per-side 16 --drop-full-frame false --dtype bfloat16 --max-pixels 0"
    assert run("localize", photos, *options.split()) == 0
    ((model,), given) = calls[0]
    assert model == "dir" and (given["coarse"], given["sam"], given["sam_checkpoint"]) == ("c.pth", "vit_h", "s.pth")
    chosen = {"sam_input": 224, "box": "largest", "prompt_threshold": 0.3, "points_per_side": 16, "dtype": "bfloat16"}
    chosen |= {"drop_full_frame": False, "max_pixels": None, "device": "cpu"}
    assert {name: given[name] for name in chosen} == chosen
    assert "pred_iou_thresh" not in given


def test_config_file(run, photos, tmp_path, calls):
    (tmp_path / "run.yaml").write_text(
        f"source: [{photos}]\noutput: {tmp_path / 'out'}\nformat: coco\noverlay: false\npoints_per_side: 8\n"
    )
    assert run("localize", "--config", tmp_path / "run.yaml", "--box", "largest", out=None) == 0
    assert files(tmp_path / "out") == {"localizations.jsonl", "localizations.run.json", "coco.json"}
    assert calls[0][1]["points_per_side"] == 8 and calls[0][1]["box"] == "largest"
    (tmp_path / "bad.yaml").write_text("points_per_sid: 8\n")
    with pytest.raises(SystemExit) as caught:
        run("localize", photos, "--config", tmp_path / "bad.yaml")
    assert caught.value.code == 2


# bad input


def make_bad(folder):
    (folder / "bad1.jpg").write_bytes(b"no image")
    (folder / "bad2.jpg").touch()
    (folder / "bad3.png").write_bytes((folder / "a.png").read_bytes()[:60])


def test_skip_records_the_error_and_goes_on(run, photos, tmp_path):
    make_bad(photos)
    assert run("localize", photos, photos / "missing.jpg") == 1
    found = records(tmp_path / "out")
    names = [Path(record["path"]).name for record in found]
    assert names == ["a.png", "b.jpg", "bad1.jpg", "bad2.jpg", "bad3.png", "a.png", "missing.jpg"]
    for record in found:
        assert list(record) == KEYS
        bad = "bad" in record["path"] or "missing" in record["path"]
        assert (record["error"] is not None) == bad
        if bad:
            assert Path(record["path"]).name in record["error"] and record["box"] is None and record["mask"] is None
    assert "3 of 7 photos done, 4 skipped" in run.stdout and run.stderr.count("skipped: cannot read") == 4


def test_raise_stops_but_keeps_finished_photos(run, photos, tmp_path):
    make_bad(photos)
    assert run("localize", photos, "--on-error", "raise") == 1
    assert [Path(record["path"]).name for record in records(tmp_path / "out")] == ["a.png", "b.jpg"]
    assert run.stderr.strip().splitlines()[-1].startswith("pro2sam-fast localize: cannot read")


def test_too_many_pixels_names_the_option(run, photos, tmp_path):
    assert run("localize", photos / "a.png", "--max-pixels", "100") == 1
    assert "max_pixels=100" in records(tmp_path / "out")[0]["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["localize"], "give at least one SOURCE"),
        (["masks"], "give at least one SOURCE"),
        (["localize", "{photos}", "--format", "jpeg"], "unknown format 'jpeg'"),
        (["localize", "{void}"], "holds no image"),
        (["localize", "{photos}/*.gif"], "no file matches"),
        (["localize", "{photos}", "--batch-size", "0"], "--batch-size must be"),
        (["localize", "{photos}", "--sam-input", "big"], "--sam-input must be"),
        (["localize", "{photos}", "--max-pixels", "-1"], "--max-pixels must be"),
    ],
)
def test_wrong_usage(run, photos, tmp_path, arguments, words, calls):
    (tmp_path / "void").mkdir()
    arguments = [one.format(photos=photos, void=tmp_path / "void") for one in arguments]
    assert run(*arguments) == 2
    assert words in run.stderr and len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() and not calls


def test_lists_keep_the_spaces_inside_names():
    assert names(" runs/my run , cam:runs/my run,,") == ["runs/my run", "cam:runs/my run"]


def test_output_is_required(run, photos):
    assert run("localize", photos, out=None) == 2
    assert "--output DIR" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "COMMAND|subcommand"),
        ("localise", "localise.*choose from"),
        ("localize x --fromat coco", "--fromat"),
        ("localize x --on-error no", "--on-error.*'no'.*skip.*raise"),
        ("localize x --points-per-side many", "--points-per-side: expected a whole number, not 'many'"),
        ("localize x --min-score high", "--min-score: expected a number, not 'high'"),
        ("localize x --border-sigma nan", "--border-sigma: expected a number, not 'nan'"),
        ("masks x --batch-size 4", "--batch-size"),
        ("localize x --drop-full-frame 3", "--drop-full-frame: expected true or false"),
        ("masks x --sam vit_x", "--sam.*'vit_x'.*vit_b"),
        ("localize --config missing.yaml", "--config.*missing.yaml"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    message = capsys.readouterr().err
    assert caught.value.code == 2 and re.search(words, message) and message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source: 5", "--config: source must be a path or a list of paths"),
        ("source: [1", "--config: .*line 1"),
        ("points_per_side: many", "--points-per-side: expected a whole number"),
        ("sam: vit_x", "--sam: 'vit_x' not among choices"),
    ],
)
def test_wrong_config_file(tmp_path, text, words, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        cli.main(["localize", "--config", str(tmp_path / "run.yaml")])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and re.search(words, message) and message.count("\n") == 1


def test_config_file_in_another_encoding(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"source: caf\xe9\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["localize", "--config", str(tmp_path / "run.yaml")])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "--config must be a file in UTF-8" in message and message.count("\n") == 1


def test_config_file_with_one_source(run, photos, tmp_path):
    (tmp_path / "run.yaml").write_text(f"source: {photos / 'a.png'}\noutput: {tmp_path / 'out'}\n")
    assert run("localize", "--config", tmp_path / "run.yaml", out=None) == 0
    assert [record["path"] for record in records(tmp_path / "out")] == [str(photos / "a.png")]


def test_strange_file_names(run, photos, tmp_path):
    names = [b"caf\xe9.png", b"line\nbreak.png", b"a b.png", b"\xf0\x9f\x90\xb1.png", b"%s{0}[1].png"]
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    try:
        for name in names:
            Path(os.fsdecode(os.path.join(folder, name))).write_bytes((photos / "a.png").read_bytes())
            Path(os.fsdecode(os.path.join(folder, b"bad" + name))).write_bytes(b"bad")
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    formats = ("--format", "coco,voc,yolo,labelstudio", "--masks")
    assert run("localize", os.fsdecode(folder), *formats, out=os.fsdecode(b"out\xff")) == 1
    found = records(tmp_path / os.fsdecode(b"out\xff"))
    assert {os.fsencode(os.path.basename(one["path"])) for one in found if one["error"] is None} == set(names)
    assert "5 of 10 photos done, 5 skipped" in run.stdout and run.stdout.count("\n") == 1
    assert "badline\\nbreak.png" in run.stderr and "badcaf\\udce9.png" in run.stderr


def test_messages_suit_the_stream():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tell("caf\udce9 \u732b\n", narrow)
    narrow.flush()
    assert narrow.buffer.getvalue() == b"caf\\udce9 \\u732b\\n\n"


def test_unknown_model(photos, tmp_path, capsys):
    assert cli.main(["localize", str(photos), "--output", str(tmp_path / "out"), "--model", "lit"]) == 2
    assert "unknown model 'lit'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(run, photos, tmp_path):
    (tmp_path / "out").write_bytes(b"precious")
    assert run("localize", photos) == 2
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_disk_trouble_is_one_sentence(run, photos, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr("pro2sam_fast.writers.write_atomic", full)
    assert run("localize", photos) == 1
    assert "No space left on device" in run.stderr


# inputs among outputs


def test_output_inside_the_photo_folder(run, photos):
    assert run("localize", photos, "--masks", "--output", photos, out=None) == 0
    before = {name: (photos / name).read_bytes() for name in ("a.png", "b.jpg", "sub/a.png")}
    assert run("localize", photos, "--masks", "--output", photos, out=None) == 0
    assert len(records(photos)) == 3
    assert "left out 6 pictures" in run.stderr
    assert {name: (photos / name).read_bytes() for name in before} == before


def test_an_output_given_as_input_is_not_written_over(run, photos, tmp_path):
    assert run("localize", photos) == 0
    overlay = tmp_path / "out" / "overlays" / "a.jpg"
    before = overlay.read_bytes()
    assert run("localize", overlay) == 2
    assert "refusing to write over the input" in run.stderr and overlay.read_bytes() == before


# interrupts


@pytest.mark.parametrize(
    ("command", "advice"), [("train lite", "interrupted; the same command continues"), ("bench", "interrupted")]
)
def test_interrupt_of_a_command_without_resume(command, advice, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(getattr(cli, command.split()[0]), "run", interrupted)
    assert cli.main(command.split()) == 130
    assert capsys.readouterr().err == f"{advice}\n"


def many(folder, count=6):
    folder.mkdir()
    for index in range(count):
        Image.fromarray(toy.painted(color=list(toy.COLORS)[index % 3])).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes(b"bad")
    return folder


@pytest.mark.parametrize(("at", "batch_size"), [(1, 1), (3, 1), (5, 3)])
def test_interrupt_and_resume(run, tmp_path, monkeypatch, at, batch_size):
    photos = many(tmp_path / "many")
    arguments = ["localize", photos, "--format", "coco,yolo", "--batch-size", batch_size]
    assert run(*arguments, out="whole") == 1
    count = 0

    def interrupted(self, images, whole=toy.BrightRegions.generate):
        nonlocal count
        count += len(images)
        if count >= at:
            raise KeyboardInterrupt
        return whole(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(toy.BrightRegions, "generate", interrupted)
        assert run(*arguments) == 130
        assert "--resume" in run.stderr
    kept = (tmp_path / "out" / "localizations.jsonl").read_bytes()
    assert len(kept.splitlines()) < 6
    assert run(*arguments, "--resume") == 1
    assert (tmp_path / "out" / "localizations.jsonl").read_bytes().startswith(kept)
    assert stable(tmp_path / "out") == stable(tmp_path / "whole")
    assert run(*arguments, "--resume") == 1  # nothing left, the skipped photo still counts
    assert "nothing left to do" in run.stdout


def test_resume_demands_the_same_run(run, tmp_path):
    photos = many(tmp_path / "many")
    run("localize", photos)
    before = contents(tmp_path / "out")
    for changes, words in (
        (["--prompt-threshold", "0.5"], "option prompt_threshold was None and is now 0.5"),
        (["--masks"], "option masks was False and is now True"),
        (["--model", "other"], "option model was 'lite' and is now 'other'"),
    ):
        assert run("localize", photos, "--resume", *changes) == 2
        assert words in run.stderr
    assert run("localize", photos / "1.png", "--resume") == 2
    assert "input 1 is" in run.stderr
    assert contents(tmp_path / "out") == before
    assert run("localize", photos, "--resume", "--batch-size", "2") == 1


CHILD = """
    import importlib.util, sys, time
    from pro2sam_fast import api, cli
    spec = importlib.util.spec_from_file_location("toy", {toy!r})
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    generate = toy.BrightRegions.generate
    def slow(self, images):
        time.sleep(0.2)
        return generate(self, images)
    toy.BrightRegions.generate = slow
    api.load = lambda *args, **options: toy.toy_localizer(candidates=0)
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_kill_at_a_random_moment_then_resume(run, tmp_path):
    photos = many(tmp_path / "many", 8)
    arguments = ["localize", str(photos), "--format", "coco,voc", "--batch-size", "1"]
    assert run(*arguments, out="whole") == 1
    (tmp_path / "child.py").write_text(textwrap.dedent(CHILD.format(toy=str(Path(toy.__file__)))))
    log = tmp_path / "out" / "localizations.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "child.py"), *arguments, "--output", str(tmp_path / "out"), "--resume"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as child:
        while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.stderr.read().decode()
    assert 2 <= len(records_of_whole_lines(log)) < 8
    assert run(*arguments, "--resume") == 1
    assert stable(tmp_path / "out") == stable(tmp_path / "whole")


def records_of_whole_lines(log):
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]


# segment everything


@pytest.mark.parametrize("ahead", [False, True])
def test_masks(run, photos, tmp_path, monkeypatch, ahead):
    if ahead:  # as on a GPU: photos read and prepared in the background, some in one go
        monkeypatch.setattr("pro2sam_fast.transfer.queues", lambda device: True)
        monkeypatch.setattr("pro2sam_fast.predictor.photos_per_pass", lambda device: 2)
    make_bad(photos)
    assert run("masks", photos) == 1
    out = tmp_path / "out"
    found = records(out, "masks.jsonl")
    assert [Path(record["path"]).name for record in found][:3] == ["a.png", "b.jpg", "bad1.jpg"]
    assert list(found[0]) == ["path", "height", "width", "masks", "speed", "error"]
    assert found[2]["masks"] is None and "bad1.jpg" in found[2]["error"]
    (largest, small) = found[0]["masks"]
    keys = {"segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box"}
    assert set(largest) == keys and largest["area"] == 1500 and small["area"] == 80
    mask = coco.decode({"size": [60, 90], "counts": largest["segmentation"]["counts"].encode()}).astype(bool)
    np.testing.assert_array_equal(mask, toy.mask_of(60, 90, (20, 10, 70, 40)))
    assert {name for name in files(out) if "/" in name} == {f"galleries/{name}.jpg" for name in ("a", "b", "sub/a")}
    assert run("masks", photos, "--resume") == 1
    assert len(records(out, "masks.jsonl")) == 6
    assert run("masks", photos, "--on-error", "raise", "--no-overlay", out="other") == 1
    assert len(records(tmp_path / "other", "masks.jsonl")) == 2 and not (tmp_path / "other" / "galleries").exists()


def test_masks_goes_on_in_halves_where_memory_ends(run, photos, tmp_path, monkeypatch):
    generate, tried = MaskGenerator.generate, []

    def scarce(self, images, prepared):
        tried.append([image.shape for image in images])
        if len(images) > 1 or images[0].shape[0] > 60:
            raise MemoryError
        return generate(self, images, prepared)

    Image.fromarray(toy.painted(61, 90)).save(photos / "aa.png")
    monkeypatch.setattr(MaskGenerator, "generate", scarce)
    monkeypatch.setattr("pro2sam_fast.predictor.photos_per_pass", lambda device: 4)
    assert run("masks", photos) == 1
    found = records(tmp_path / "out", "masks.jsonl")
    assert [record["masks"] is None for record in found] == [False, True, False, False]
    assert "memory" in found[1]["error"] and [len(shapes) for shapes in tried] == [4, 2, 1, 1, 2, 1, 1]


def test_masks_of_a_photo_without_any(run, tmp_path):
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(tmp_path / "one.png")
    assert run("masks", tmp_path / "one.png") == 0
    assert records(tmp_path / "out", "masks.jsonl")[0]["masks"] == []


# the rest


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("cpu", "cuda", "triton", pro2sam_fast.__version__):
        assert word in output


def test_bench(monkeypatch, capsys):
    found = {"photos_per_s": 1.5}
    given = []
    monkeypatch.setattr(bench, "measure", lambda folder, **options: given.append((folder, options)) or found)
    monkeypatch.setattr(bench, "text", lambda found: f"{found['photos_per_s']} photos/s")
    assert cli.main(["bench"]) == 0
    assert capsys.readouterr().out == "1.5 photos/s\n"
    assert cli.main(["bench", "photos", "--device", "cpu", "--dtype", "bfloat16", "--seconds", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert given == [
        (None, {"device": "auto", "dtype": None, "seconds": 20.0}),
        ("photos", {"device": "cpu", "dtype": "bfloat16", "seconds": 3.0}),
    ]


@pytest.mark.parametrize("command", [[], ["localize"], ["masks"], ["bench"], ["doctor"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    output = capsys.readouterr().out
    assert caught.value.code == 0 and "usage: pro2sam-fast" in output and "%(" not in output and "Literal" not in output
    if command in (["localize"], ["masks"]):
        assert "examples:\n" in output and "--resume" in output and "exit status" in output


def test_help_does_not_load_torch():
    code = "import sys; from pro2sam_fast import cli; cli._parsers(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_gallery_patches_cover_the_masks():
    import torch

    from pro2sam_fast.writers import gallery_patches

    masks = torch.from_numpy(np.random.default_rng(0).random((4, 9, 70)) > 0.97)
    masks[2] = False
    patches = list(gallery_patches(MaskGallery.from_dense(masks)))
    kept = [mask for mask in masks.numpy() if mask.any()]
    assert len(patches) == 3
    for (x, y, patch), mask in zip(patches, kept, strict=True):
        whole = np.zeros_like(mask)
        whole[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
        np.testing.assert_array_equal(whole, mask)
