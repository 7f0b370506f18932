"""What the committed rows and the pages made from them must hold, whatever their numbers are."""

import hashlib
import json
import math
import re

import pytest
import torch

ALWAYS = {"what", "case", "dtype", "commit", "dirty", "device", "threads", "versions", "date", "command"}
QUALITY = {"model", "photos", "metrics"}
RUN = {"kind", "provider", "back_end", "facts", "subject", "host"}
TIMED = {"unit", "p20", "p50", "p80", "n", "peak_bytes"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|home|root|tmp|mnt|Users)\b")


@pytest.fixture(scope="module")
def rows(bench):
    return list(bench("rows").read())


def test_the_pages_match_the_rows(bench, rows):
    report = bench("report")
    if not report.README.exists():
        pytest.skip("no README.md beside the tests")
    assert not report.differences(rows, report.PAGE, report.PLOTS, (report.README, report.CARD))


def test_the_pages_have_every_block(bench):
    report = bench("report")
    text = "".join(path.read_text(encoding="utf-8") for path in (report.README, report.CARD))
    assert [found[2] for found in report.BLOCK.finditer(text)] == [*report.BLOCKS]
    assert text.count("<!-- rows: ") == text.count("<!-- end rows -->") == len(report.BLOCKS)


def test_the_card_speaks_of_the_bundled_weights(bench):
    report = bench("report")
    known = json.loads(report.CARD.with_name("weights.json").read_text(encoding="utf-8"))
    content = report.WEIGHTS.read_bytes()
    assert known == {report.WEIGHTS.name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    assert len(content) <= 25_000_000
    text = report.CARD.read_text(encoding="utf-8")
    assert f"{len(content) / 1e6:.1f} MB" in text and "No rows yet." not in text


def test_the_readme_asks_for_cases_that_exist(bench):
    workloads = bench("workloads")
    options = workloads.Options(device=torch.device("cpu"))
    for _, kind, what, name in bench("report").SPEED:
        assert any((case.what, case.name) == (what, name) for case in workloads.cases(kind, options)), name


def test_every_row_has_its_keys(rows):
    for row in rows:
        if row["what"] in ("accuracy", "study", "exactness"):
            wanted = ALWAYS | QUALITY
        else:
            wanted = ALWAYS | RUN | (set() if "skipped" in row else TIMED)
        assert wanted <= row.keys(), (row["at"], wanted - row.keys())


def test_every_number_can_be_repeated(rows):
    for row in rows:
        assert row["command"].startswith("python benchmarks/"), row["at"]
        assert re.fullmatch("[0-9a-f]{7,40}", row["commit"]), row["at"]
        assert row["device"] and row["versions"]["python"] and row["versions"]["torch"], row["at"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ", row["date"]), row["at"]
        if "p50" in row:
            assert row["unit"] in ("ms", "bytes") and row["n"] >= 1, row["at"]
            assert 0 <= row["p20"] <= row["p50"] <= row["p80"] < math.inf, row["at"]


def test_rows_name_no_place_of_a_machine(rows):
    for row in rows:
        assert not MACHINE_PATH.search(json.dumps(row)), row["at"]
