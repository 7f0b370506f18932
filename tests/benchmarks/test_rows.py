"""What the committed rows and the pages made from them must hold, whatever their numbers are."""

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
    assert not report.differences(rows, report.PAGE, report.PLOTS, report.README)


def test_the_readme_has_every_block(bench):
    report = bench("report")
    text = report.README.read_text(encoding="utf-8")
    assert [found[2] for found in report.BLOCK.finditer(text)] == [*report.BLOCKS]
    assert text.count("<!-- rows: ") == text.count("<!-- end rows -->") == len(report.BLOCKS)


def test_the_readme_asks_for_cases_that_exist(bench):
    workloads = bench("workloads")
    options = workloads.Options(device=torch.device("cpu"))
    for _, kind, what, name in bench("report").SPEED:
        assert any((case.what, case.name) == (what, name) for case in workloads.cases(kind, options)), name


def test_every_row_has_its_keys(rows):
    for row in rows:
        if row["what"] in ("accuracy", "exactness"):
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
