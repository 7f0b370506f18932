"""The report on a few rows that are made up here."""

import json

import pytest

COMMON = {
    "kind": "op",
    "what": "mask_match",
    "dtype": "int64",
    "facts": {},
    "subject": "First",
    "dirty": False,
    "device": "CPU X",
    "host": {"cpu": "CPU X", "cores": 2, "isa": "avx2"},
    "threads": 2,
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "command": "python benchmarks/run.py op mask_match --device cpu",
}


def row(case="K=1000 512x512", provider="ours", back_end="cpu/avx2", p50=2.0, commit="a" * 10, date="01", **more):
    time = {"unit": "ms", "p20": p50, "p50": p50, "p80": p50, "n": 3, "peak_bytes": 1 << 20}
    names = {"case": case, "provider": provider, "back_end": back_end, "commit": commit}
    return COMMON | names | time | {"date": f"2026-01-{date}T00:00Z"} | more


@pytest.fixture
def read(bench, tmp_path):
    """Rows as they come from a file."""

    def read(*rows):
        (tmp_path / "op.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(bench("rows").read(tmp_path))

    return read


def test_the_newest_row_of_a_case_is_shown(bench, read):
    rows = read(
        row(p50=4.0), row(p50=3.0, date="03", p20=2.5, p80=3.5), row(p50=7.0, date="02"), row("K=2 8x8", p50=5.0)
    )
    assert [found["p50"] for found in bench("tables").newest(rows)] == [3.0, 5.0]
    page = bench("report").render(rows)
    assert "| 3 ms [2.5 – 3.5] |" in page and "results/op.jsonl#L2" in page and "results/op.jsonl#L3" not in page


def test_a_comparison_of_commits_does_not_hide_the_peers(bench, read):
    peers = row(ratios={"dense torch": 8.0})
    based = row(date="02", ratios={"commit bbb": 2.0}, command=COMMON["command"] + " --base bbb")
    assert bench("tables").newest(read(peers, based))[0]["ratios"] == {"dense torch": 8.0}
    assert bench("tables").newest(read(peers, based | {"commit": "c" * 10}))[0]["ratios"] == {"commit bbb": 2.0}


def test_kinds_of_one_name_stay_apart(bench, read):
    assert len(bench("tables").newest(read(row(), row(kind="memory")))) == 2


def test_peers_that_were_skipped_give_their_reason(bench, read):
    skip = {name: value for name, value in row(provider="peer", back_end="other").items() if name in COMMON}
    skip |= {"case": "K=1", "provider": "peer", "back_end": "other", "commit": "a" * 10, "date": "2026-01-01T00:00Z"}
    page = bench("report").render(read(row(), skip | {"skipped": "it needs a GPU | or two"}))
    assert "| other | op mask_match | K=1 | it needs a GPU \\| or two |" in page


def test_every_table_line_is_traceable(bench, read):
    floor = {"fraction": 0.25, "bound": "memory"}
    more = {"rate": {"photos/s": 12.5}, "stages": {"decode": 3.0, "box": 1.0}, "ceilings": {"copy_gb_s": 74.7}}
    page = bench("report").render(read(row(floor=floor, **more)))
    for text in (
        "| M1 | copy_gb_s 74.7 |",
        "25 % (memory)",
        "12.5 photos/s",
        "decode 3 ms (75 %), box 1 ms (25 %)",
        COMMON["command"],
    ):
        assert text in page
    header = ("| machine |", "| M1 | CPU X |", "| case |", "| --- |")
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(header)]
    assert lines and all("results/op.jsonl#L" in line for line in lines)


def test_steps_are_in_the_order_of_their_commits(bench, read):
    slow = row(p50=8.0, commit="a" * 10)
    other = row(p50=9.0, commit="a" * 10, back_end="reference")
    base = row(p50=6.0, commit="b" * 10, date="03", provider="base", back_end="cpu/avx2")
    quick = row(p50=2.0, commit="c" * 10, date="03", subject="Faster", ratios={f"commit {'b' * 10}": 3.1})
    (steps,) = bench("waterfall").histories(read(quick, base, other, slow)).values()
    assert [step["p50"] for step in steps] == [8.0, 6.0, 2.0]
    page = bench("report").render(read(quick, base, other, slow))
    assert "| `ccccccc` | Faster | cpu/avx2 | 2 ms | 4× | 3.1× (in turns) |" in page
    early = base | {"committed": "2025-12-01T00:00:00+00:00"}
    (steps,) = bench("waterfall").histories(read(quick, early, slow)).values()
    assert [step["p50"] for step in steps] == [6.0, 8.0, 2.0]


def test_blocks_of_the_readme_are_made_anew(bench, read):
    report = bench("report")
    text = "before\n<!-- rows: speed -->\nold\n<!-- end rows -->\nafter <!-- rows: none here\n"
    done = report.with_blocks(text, read(row(ratios={"dense torch": 8.0})))
    assert done.startswith("before\n<!-- rows: speed -->\n|  | case |") and "old" not in done
    assert "| K=1000 512x512 | int64 | 2 ms | 8× dense torch | CPU X, 2 threads |" in done
    assert done.endswith("<!-- end rows -->\nafter <!-- rows: none here\n")
    assert report.with_blocks(done, read(row(ratios={"dense torch": 8.0}))) == done
    assert "No rows yet." in report.with_blocks(text, [])


def test_check_says_what_is_out_of_date(bench, read, tmp_path):
    report = bench("report")
    series = {"ours": [[1, 1.0], [4, 4.0]], "other": [[1, 2.0]]}
    facts = {"axis": "points", "series": series, "exponent": {"ours": 1.0, "other": float("nan")}}
    rows = read(row(kind="scaling", facts=facts))
    page, plots = tmp_path / "REPORT.md", tmp_path / "plots"
    assert report.differences(rows, page, plots) == [
        "REPORT.md doesn't match the rows",
        "plots/mask-match-k-1000-512x512-int64-cpu-x-2-cpu-avx2.svg doesn't match its row",
    ]
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install .[bench]")
    arguments = ["--results", str(tmp_path), "--output", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    (plot,) = plots.iterdir()
    before = plot.read_bytes()
    assert report.main(arguments) == 0 and plot.read_bytes() == before
    assert "1.00" in page.read_text() and f"plots/{plot.name}" in page.read_text()
    changed = read(row(kind="scaling", facts=facts | {"axis": "pixels"}))
    assert len(report.differences(changed, page, plots)) == 2
    assert report.differences([], page, plots)[1] == f"plots/{plot.name} has no row"
