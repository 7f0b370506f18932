"""Output folders: formats, names, atomic files, resuming after an interrupt at any point."""

from __future__ import annotations

import json
import os
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from pro2sam_fast.errors import ConfigError, DataError
from pro2sam_fast.io import Source, atomic_file, write_atomic
from pro2sam_fast.records import OutputNames, RecordLog
from pro2sam_fast.results import Localization, decode_rle
from pro2sam_fast.writers import FORMATS, LocalizationWriter


def result(path, seed=0, height=48, width=64, error=None, name=None, **changes):
    name = os.path.basename(path) if name is None else name
    if error is not None:
        return Localization(path, error=error, name=name)
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(0, width // 2), rng.integers(0, height // 2)
    mask = np.zeros((height, width), bool)
    mask[y0 : y0 + 20, x0 : x0 + 30] = True
    values = {
        "orig_shape": (height, width),
        "box": (float(x0), float(y0), float(x0 + 30), float(y0 + 20)),
        "mask": mask,
        "score": 0.5,
        "label": int(rng.integers(0, 5)),
        "label_score": 0.9,
        "source": "sam",
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "name": name,
    }
    values["label_name"] = f"kind {values['label']}"
    return Localization(path, **{**values, **changes})


def lines(folder):
    return [json.loads(line) for line in (folder / "localizations.jsonl").read_text().splitlines()]


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_all_formats(tmp_path):
    results = [result(f"/p/{index}.jpg", index) for index in range(3)]
    results.insert(1, result("/p/bad.jpg", error="cannot read '/p/bad.jpg'"))
    with LocalizationWriter(tmp_path, formats=FORMATS, masks=True) as writer:
        for one in results:
            writer.write(one)
    assert [record["path"] for record in lines(tmp_path)] == [one.path for one in results]
    assert [record["error"] for record in lines(tmp_path)] == [one.error for one in results]
    assert {path for path in tree(tmp_path) if "/" in path} == {
        *(f"overlays/{index}.jpg" for index in range(3)),
        *(f"masks/{index}.png" for index in range(3)),
        *(f"voc/{index}.xml" for index in range(3)),
        *(f"yolo/labels/{index}.txt" for index in range(3)),
        "yolo/classes.txt",
        "yolo/data.yaml",
    }

    data = COCO(tmp_path / "coco.json")
    assert sorted(data.getImgIds()) == [1, 3, 4]  # line numbers of the log
    for number, one in ((1, results[0]), (3, results[2]), (4, results[3])):
        (annotation,) = data.loadAnns(data.getAnnIds(imgIds=number))
        np.testing.assert_array_equal(data.annToMask(annotation).astype(bool), one.mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == one.box
        assert data.loadCats(annotation["category_id"])[0]["name"] == one.label_name

    one = results[0]
    x0, y0, x1, y1 = one.box
    root = ElementTree.parse(tmp_path / "voc" / "0.xml").getroot()
    corners = [int(root.findtext(f"object/bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax")]
    assert corners == [x0 + 1, y0 + 1, x1, y1]
    assert root.findtext("filename") == "0.jpg" and root.findtext("object/name") == one.label_name
    assert (root.findtext("size/width"), root.findtext("size/height")) == ("64", "48")

    index, *numbers = (tmp_path / "yolo" / "labels" / "0.txt").read_text().split()
    xc, yc, width, height = (float(number) for number in numbers)
    assert int(index) == one.label
    corners = [(xc - width / 2) * 64, (yc - height / 2) * 48, (xc + width / 2) * 64, (yc + height / 2) * 48]
    np.testing.assert_allclose(corners, one.box, atol=1e-3)
    assert (tmp_path / "yolo" / "classes.txt").read_text().splitlines()[one.label] == one.label_name

    tasks = json.loads((tmp_path / "labelstudio.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [f"/data/local-files/?d=p/{index}.jpg" for index in range(3)]
    value = tasks[0]["predictions"][0]["result"][0]["value"]
    assert value["x"] == pytest.approx(100 * x0 / 64) and value["height"] == pytest.approx(100 * 20 / 48)
    with Image.open(tmp_path / "masks" / "0.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask) > 0, one.mask)


def test_nothing_found_is_still_valid(tmp_path):
    with LocalizationWriter(tmp_path, formats=FORMATS) as writer:
        writer.write(result("bad.jpg", error="no"))
    assert json.loads((tmp_path / "coco.json").read_text())["images"] == []
    assert json.loads((tmp_path / "labelstudio.json").read_text()) == []
    assert (tmp_path / "yolo" / "classes.txt").read_text() == ""


def test_without_labels_the_class_is_object(tmp_path):
    with LocalizationWriter(tmp_path, formats=FORMATS, overlay=False) as writer:
        writer.write(result("a.jpg", label=None, label_name=None, label_score=None))
    assert (tmp_path / "yolo" / "classes.txt").read_text() == "object\n"
    assert json.loads((tmp_path / "coco.json").read_text())["categories"] == [{"id": 1, "name": "object"}]
    assert ElementTree.parse(tmp_path / "voc" / "a.xml").findtext("object/name") == "object"


def test_class_names_of_the_model_fix_yolo_indices(tmp_path):
    with LocalizationWriter(tmp_path, formats=["yolo"], class_names=["a", "b: c", "d"]) as writer:
        writer.write(result("a.jpg", label=1))
    assert (tmp_path / "yolo" / "classes.txt").read_text() == "a\nb: c\nd\n"
    assert '  1: "b: c"\n' in (tmp_path / "yolo" / "data.yaml").read_text()


def test_unknown_format(tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'cooc': choose from jsonl, coco"):
        LocalizationWriter(tmp_path, formats=["cooc"])
    assert list(tmp_path.iterdir()) == []


def test_equal_names_stay_apart(tmp_path):
    sources = ["/a/x.jpg", "/b/x.jpg", "/c/X.PNG", "/d/x-2.jpg"]
    with LocalizationWriter(tmp_path) as writer:
        for seed, path in enumerate(sources):
            writer.write(result(path, seed))
    assert sorted(os.listdir(tmp_path / "overlays")) == ["X-3.jpg", "x-2-2.jpg", "x-2.jpg", "x.jpg"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), max_size=30))
@settings(max_examples=60, deadline=None)
def test_claimed_names_are_relative_and_unique(names):
    claim = OutputNames().claim
    claimed = [claim(name) for name in names]
    assert len({name.casefold() for name in claimed}) == len(names)
    for name in claimed:
        assert not os.path.isabs(name) and ".." not in name.split(os.sep) and os.path.basename(name)


def test_odd_names(tmp_path):
    awkward = ["n" * 250 + ".jpg", "ü€ .jpg", "../../up.jpg", "/abs/a.jpg", "sub/deep/p.jpg", ".jpg"]
    awkward += ["a\udcff.jpg", "t\tb\x01.jpg"]
    with LocalizationWriter(tmp_path / "out", formats=FORMATS, masks=True) as writer:
        for seed, name in enumerate(awkward):
            writer.write(result(f"/x/{name}", seed, name=name))
    assert [record["path"] for record in lines(tmp_path / "out")] == [f"/x/{name}" for name in awkward]
    assert len(list((tmp_path / "out" / "overlays").rglob("*.jpg"))) == len(awkward)
    assert os.listdir(tmp_path) == ["out"]
    for path in (tmp_path / "out" / "voc").rglob("*.xml"):
        ElementTree.parse(path)


# atomic files


def test_atomic_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, b"one")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["a.txt"]
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(precious)
    write_atomic(tmp_path / "link", b"new")
    assert precious.read_bytes() == b"mine" and (tmp_path / "link").read_bytes() == b"new"


# resuming


INPUTS = [Source(f"/p/{index}.jpg", f"/p/{index}.jpg", f"{index}.jpg") for index in range(6)]


def outcome(source, index):
    return result(source.path, index, error="cannot read" if index == 2 else None, name=source.name)


def run(folder, *, resume=False, stop=None, inputs=INPUTS, **options):
    with LocalizationWriter(folder, formats=FORMATS, masks=True, resume=resume, **options) as writer:
        for done, source in enumerate(writer.remaining(inputs)):
            if done == stop:
                raise KeyboardInterrupt
            writer.write(outcome(source, inputs.index(source)))


def test_interrupt_keeps_finished_photos_and_resume_completes(tmp_path):
    run(tmp_path / "whole")
    for stop in range(len(INPUTS)):
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, stop=stop)
        assert [record["path"] for record in lines(folder)] == [source.path for source in INPUTS[:stop]]
        json.loads((folder / "coco.json").read_text())
        run(folder, resume=True)
        assert tree(folder) == tree(tmp_path / "whole")
    run(tmp_path / "whole", resume=True)  # nothing left to do
    assert len(lines(tmp_path / "whole")) == len(INPUTS)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_resume_after_a_kill_at_any_byte(tmp_path_factory, data):
    """A killed run leaves a prefix of the log, perhaps within a line, and other files of any later moment."""
    folder = tmp_path_factory.mktemp("kill")
    run(folder)
    expected = tree(folder)
    log = folder / "localizations.jsonl"
    content = log.read_bytes()
    log.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for name in expected:
        if name not in ("localizations.jsonl", "localizations.run.json") and data.draw(st.booleans()):
            done = [os.path.basename(record["path"])[0] for record in lines_of(log)]
            if os.path.basename(name)[0] not in done:
                (folder / name).unlink()
    run(folder, resume=True)
    assert {name: body for name, body in tree(folder).items() if not name.endswith(".old")} == expected


def lines_of(log):
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]


def test_a_kill_between_files_and_record_leaves_no_trace(tmp_path):
    """Files of a photo are written before its record; a temporary left by the kill is replaced on resuming."""
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=3)
    writer = LocalizationWriter(tmp_path / "cut", formats=FORMATS, masks=True, resume=True)
    writer.log.append = lambda record: (_ for _ in ()).throw(SystemExit)
    with pytest.raises(SystemExit):
        for source in writer.remaining(INPUTS):
            writer.write(outcome(source, INPUTS.index(source)))
    writer.log.close()
    run(tmp_path / "cut", resume=True)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_torn_last_line_and_damaged_line(tmp_path):
    run(tmp_path)
    log = tmp_path / "localizations.jsonl"
    content = log.read_bytes()
    log.write_bytes(content + b'{"path": "/p/6.j')
    run(tmp_path, resume=True)
    assert log.read_bytes() == content
    log.write_bytes(content + b"\0\0\0\n")  # a line of zeros, as some file systems leave after a power cut
    run(tmp_path, resume=True)
    assert log.read_bytes() == content
    parts = content.splitlines(keepends=True)
    log.write_bytes(b"".join([parts[0], b"garbage\n", *parts[1:]]))
    with pytest.raises(DataError, match="line 2"):
        run(tmp_path, resume=True)


def test_resume_demands_the_same_options_and_inputs(tmp_path):
    run(tmp_path, config={"model": "lite"})
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="option model was 'lite' and is now 'other'"):
        run(tmp_path, resume=True, config={"model": "other"})
    with pytest.raises(ConfigError, match="input 1 is '/p/1[.]jpg' but line 1"):
        run(tmp_path, resume=True, config={"model": "lite"}, inputs=INPUTS[1:])
    with pytest.raises(ConfigError, match="6 records but there are only 2 inputs"):
        run(tmp_path, resume=True, config={"model": "lite"}, inputs=INPUTS[:2])
    assert tree(tmp_path) == before
    (tmp_path / "localizations.run.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        run(tmp_path, resume=True)
    (tmp_path / "localizations.run.json").unlink()
    with pytest.raises(ConfigError, match="missing"):
        run(tmp_path, resume=True)


def test_a_new_run_sets_the_old_log_aside(tmp_path):
    run(tmp_path)
    old = (tmp_path / "localizations.jsonl").read_bytes()
    run(tmp_path, inputs=INPUTS[:2])
    assert len(lines(tmp_path)) == 2
    assert (tmp_path / "localizations.jsonl.old").read_bytes() == old


def test_one_writer_at_a_time(tmp_path):
    first = RecordLog(tmp_path, "log", {})
    with pytest.raises(ConfigError, match="another run"):
        RecordLog(tmp_path, "log", {})
    first.close()
    RecordLog(tmp_path, "log", {}).close()


def test_resume_without_a_previous_run_starts(tmp_path):
    run(tmp_path, resume=True)
    assert len(lines(tmp_path)) == len(INPUTS)


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="cannot use the output folder"):
        LocalizationWriter(tmp_path / "out")


def test_record_file_that_cannot_be_written(tmp_path):
    (tmp_path / "localizations.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot use the output folder .*: Is a directory"):
        LocalizationWriter(tmp_path)


# inputs are sacred


def test_inputs_inside_the_output_folder_are_not_written_over(tmp_path):
    (tmp_path / "overlays").mkdir()
    path = tmp_path / "overlays" / "a.jpg"
    path.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "overlays")
    for given_path in (path, tmp_path / "link" / "a.jpg"):
        with (
            pytest.raises(ConfigError, match="refusing to write over"),
            LocalizationWriter(tmp_path, inputs=[str(given_path)]) as writer,
        ):
            writer.write(result("/elsewhere/a.jpg"))
        assert path.read_bytes() == b"precious"
    with LocalizationWriter(tmp_path, inputs=[str(path)]) as writer:
        writer.write(result("/elsewhere/b.jpg"))
    assert path.read_bytes() == b"precious"


def test_masks_decode_from_the_log(tmp_path):
    one = result("/p/a.jpg", 3)
    with LocalizationWriter(tmp_path, overlay=False) as writer:
        writer.write(one)
    np.testing.assert_array_equal(decode_rle(lines(tmp_path)[0]["mask"]), one.mask)
    assert not (tmp_path / "overlays").exists()
