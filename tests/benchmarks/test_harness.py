"""run.py and its parts on calls that cost nothing. No test looks at a time."""

import itertools
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    """run.py sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_calls_run_in_turns(bench, monkeypatch):
    measuring = bench("measuring")
    monkeypatch.setattr(measuring, "SHORTEST_SAMPLE_S", 0.0)  # so that a sample is one call
    log = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    samples = measuring.interleaved(calls, CPU, seconds=0.0, least_rounds=4)
    assert "".join(log) == "aabbcc" + 4 * "abc"
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(ms >= 0 for found in samples.values() for ms in found)


def test_a_gpu_is_timed_on_its_own_stream(bench, monkeypatch):
    """Stand-ins; the second call, which records graphs, isn't measured even if the first took long."""
    measuring, gpu, log = bench("measuring"), torch.device("cuda", 1), []
    event = types.SimpleNamespace(record=log.append, synchronize=lambda: None, elapsed_time=lambda end: 2.0)
    monkeypatch.setattr(measuring, "LONG_CALL_S", -1.0)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: types.SimpleNamespace(zero_=lambda: None))
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    samples = measuring.interleaved({"a": lambda: log.append("call")}, gpu, seconds=0.0, least_rounds=1)
    assert samples == {"a": [2.0]} and log == ["call", "call", gpu, "call", gpu]


def test_a_budget_adds_rounds_up_to_a_limit(bench, monkeypatch):
    measuring = bench("measuring")
    monkeypatch.setattr(measuring, "MOST_ROUNDS", 7)
    assert len(measuring.interleaved({"a": int}, CPU, seconds=60.0, least_rounds=1)["a"]) == 7


def test_percentiles(bench):
    percentiles = bench("measuring").percentiles
    assert percentiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    assert percentiles([5.0, 1.0, 4.0, 0.0, 3.0, 2.0]) == {"p20": 1.0, "p50": 2.5, "p80": 4.0}


def test_peak_bytes_sees_what_a_call_allocates_and_frees(bench):
    peak_bytes, size = bench("measuring").peak_bytes, 256 << 20
    found = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if found is None:
        pytest.skip("the peak can't be reset here")
    assert size <= found + (8 << 20) and found < 1.5 * size
    assert peak_bytes(int, CPU) < 32 << 20


@pytest.fixture
def checkout(bench, tmp_path, monkeypatch):
    """A checkout of two files, and the package that was installed from it."""
    rows = bench("rows")
    for top in ("checkout/pro2sam_fast", "site/pro2sam_fast"):
        (tmp_path / top).mkdir(parents=True)
        (tmp_path / top / "__init__.py").write_text("")
    (tmp_path / "checkout/csrc").mkdir()
    (tmp_path / "checkout/csrc/op.cpp").write_text("int x;")
    place = str(tmp_path / "site/pro2sam_fast/__init__.py")
    native = types.SimpleNamespace(sources=rows.native_sources(tmp_path / "checkout"))
    monkeypatch.setattr(rows, "pro2sam_fast", types.SimpleNamespace(__file__=place, _cpu=native))
    return tmp_path / "checkout"


def test_a_package_from_other_sources_is_noticed(bench, checkout):
    stale_files = bench("rows").stale_files
    assert stale_files(checkout) == []
    (checkout / "pro2sam_fast/__init__.py").write_text("x = 1")
    (checkout / "pro2sam_fast/new.py").touch()
    (checkout / "csrc/op.cpp").write_text("int y;")
    assert stale_files(checkout) == ["pro2sam_fast/__init__.py", "pro2sam_fast/new.py", "csrc"]


@pytest.fixture
def run(bench, monkeypatch):
    """run.py with one tiny case; its package is taken as fresh, its tests as green."""
    run, case, measuring = bench("run"), bench("case"), bench("measuring")
    a = torch.ones(64, 64)
    runs = case.Runs(
        {"reference": lambda: a @ a, "cpu/scalar": lambda: a @ a},
        {"einsum": lambda: torch.einsum("ij,jk->ik", a, a), "absent": case.Skip("isn't installed")},
        {"side": 64},
        ("products", 2),
        lambda: {"product": 1.0},
    )
    floor = case.Floor({"float32": 2 * 64**3}, 3 * 4 * 64**2, "one product")
    tiny = case.Case("product", "64x64", "float32", ("tests/ops/test_product.py",), lambda: runs, lambda facts: floor)
    slow = case.Case("product", "slow", "float32", (), lambda: pytest.fail("not asked for"), default=False)
    monkeypatch.setattr(run.workloads, "cases", lambda kind, options: iter((tiny, slow)))
    monkeypatch.setattr(run, "stale_files", lambda source: [])
    monkeypatch.setattr(run, "parity", lambda tests: tests == ["tests/ops/test_product.py"])
    monkeypatch.setattr(run, "ceilings", lambda device, dtypes: {"copy_gb_s": 10.0, "float32_gflop_s": 100.0})
    monkeypatch.setattr(measuring, "MOST_ROUNDS", 3)
    return run


def measured(run, path, *more):
    status = run.main(["op", "product", "--output", str(path), "--threads", "1", *more])
    return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_case_becomes_rows(run, tmp_path, capsys):
    status, rows = measured(run, tmp_path / "op.jsonl")
    assert status == 0
    assert [(row["provider"], row["back_end"]) for row in rows] == [
        ("ours", "reference"), ("ours", "cpu/scalar"), ("peer", "einsum"), ("peer", "absent"),
    ]  # fmt: skip
    everywhere = {
        "kind", "what", "case", "dtype", "facts", "commit", "subject", "dirty", "device", "host", "threads",
        "versions", "date", "command",
    }  # fmt: skip
    assert all(everywhere <= row.keys() for row in rows)
    *timed, skipped = rows
    assert skipped["skipped"] == "isn't installed" and "p50" not in skipped
    for row in timed:
        assert {"unit", "n", "rate", "peak_bytes", "ceilings"} <= row.keys()
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["n"] == 3
        assert row["floor"]["bound"] == "compute" and row["floor"]["ms"] == pytest.approx(0.00524)
        assert ("stages" in row) == ("ratios" in row) == (row["provider"] == "ours")
    assert timed[0]["ratios"].keys() == {"einsum"}
    options = "--case 64x64 --device cpu --dtype float32 --threads 1 --seconds 5 --rounds 3"
    assert timed[0]["command"] == f"python benchmarks/run.py op product {options}"
    assert "absent: skipped, isn't installed" in capsys.readouterr().out


def test_rows_are_appended(run, tmp_path):
    assert len(measured(run, tmp_path / "op.jsonl", "--no-peers")[1]) == 2
    assert len(measured(run, tmp_path / "op.jsonl", "--no-peers")[1]) == 4


@pytest.mark.parametrize("reason", ("red tests", "isn't this checkout", "no such case"))
def test_what_can_not_be_trusted_is_not_measured(run, tmp_path, monkeypatch, capsys, reason):
    monkeypatch.setattr(run, "measure", lambda *arguments: pytest.fail("measured"))
    if reason == "red tests":
        monkeypatch.setattr(run, "parity", lambda tests: False)
    if reason == "isn't this checkout":
        monkeypatch.setattr(run, "stale_files", lambda source: ["csrc"])
    case = ["--case", "other"] if reason == "no such case" else []
    status, rows = measured(run, tmp_path / "op.jsonl", *case)
    assert status and not rows
    assert reason in capsys.readouterr().err


def test_red_and_green_tests_are_told_apart(bench, tmp_path):
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)  # has the options that parity names
    (tmp_path / "test_green.py").write_text("def test(): pass")
    (tmp_path / "test_red.py").write_text("def test(): assert False")
    parity = bench("run").parity
    assert parity([str(tmp_path / "test_green.py")])
    assert not parity([str(tmp_path / "test_green.py"), str(tmp_path / "test_red.py")])


def test_the_list_of_cases(run, tmp_path, capsys):
    assert run.main(["op", "--list"]) == 0
    listing = capsys.readouterr().out
    assert "64x64" in listing and "slow   (only by --case or --all)" in listing


def test_a_comparison_with_another_commit(run, tmp_path, monkeypatch):
    """Three rounds in turns; the ratio is the median over the rounds, the rows are those of the median round."""
    times = {"ours": iter((2.0, 1.0, 4.0)), "base": iter((6.0, 5.0, 8.0))}
    turns, commands = [], []

    def elsewhere(arguments, file, path, source):
        side = "base" if path else "ours"
        turns.append(side)
        row = {"what": "product", "case": "64x64", "dtype": "float32", "provider": "ours", "back_end": "reference"}
        return [
            row | {"unit": "ms", "p50": next(times[side]), "n": 1, "command": "python benchmarks/run.py op product"}
        ]

    monkeypatch.setattr(run, "_elsewhere", elsewhere)
    monkeypatch.setattr(subprocess, "check_output", lambda *command, **options: "b" * 10 + "\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    status, rows = measured(run, tmp_path / "op.jsonl", "--base", "HEAD~1")
    assert status == 0 and commands[-1][:3] == ["git", "worktree", "remove"]
    assert turns == [*itertools.islice(itertools.cycle(("ours", "base")), 6)]
    here, there = rows
    assert (here["p50"], there["p50"]) == (2.0, 6.0)
    assert here["ratios"] == {"commit " + "b" * 10: 3.0}
    assert here["command"].endswith("--base " + "b" * 10)
    assert (here["provider"], there["provider"]) == ("ours", "base")


def test_pytest_benchmarks_skips_with_a_reason_without_its_plugin(bench):
    folder = Path(bench("run").__file__).parent
    program = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    options = [
        "-p",
        "no:benchmark",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
        "-k",
        "op and mask_match and 256x256",
    ]
    command = [sys.executable, "-c", program, str(folder), *options]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "1 skipped" in done.stdout and "needs pytest-benchmark" in done.stdout, done.stdout
