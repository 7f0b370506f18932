"""The logic of benchmarks/gpu_suite.py, without a GPU."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks" / "gpu_suite.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_suite"]


def steps(*items):
    """A plan that doesn't look at its answers."""
    for item in items:
        _ = yield item


def python(code):
    return [sys.executable, "-c", code]


def test_every_outcome_is_told_and_only_proof_settles(suite, tmp_path):
    row = json.dumps({"provider": "ours", "back_end": "triton"})
    write = f"open({str(tmp_path / 'rows.jsonl')!r}, 'a').write({row!r} + chr(10))"
    seen = tmp_path / "seen.json"
    sleep = f"{write}; import time; print('begun', flush=True); time.sleep(60)"
    look = f"import shutil; shutil.copy({str(tmp_path / 'summary.json')!r}, {str(seen)!r}); {write}"
    runner = suite.Suite(tmp_path, minutes=1)
    began = time.monotonic()
    runner.run(
        steps(
            suite.Step("fails", python("print('why'); raise SystemExit(3)"), settles=("packing", "match")),
            suite.Step("late", python(sleep), 1.5, settles=("op-rows",), rows=True),
            suite.Step("absent", ["no-such-tool"], absent="no-such-tool isn't here", settles=("memcheck",)),
            suite.Step("not found", ["/no/such/program"]),
            suite.Step("rows", python(look), settles=("stage-rows",), rows=True),
            suite.Step("one missing", python(write), settles=("mask-match-time",), back_ends=("cuda",), rows=True),
            suite.Step("no rows", python(""), settles=("memory-rows",), rows=True),
            suite.Step("passes", python(""), settles=("match",)),
        )
    )
    assert time.monotonic() - began < 20
    summary = json.loads((tmp_path / "summary.json").read_text())
    status = {step["name"]: step["status"] for step in summary["steps"]}
    assert status == {
        "fails": "failed", "late": "late", "absent": "skipped", "not found": "failed", "rows": "passed",
        "one missing": "passed", "no rows": "failed", "passes": "passed",
    }  # fmt: skip
    assert summary["settled"] == ["stage-rows"] and "match" in summary["open"]
    by_name = {step["name"]: step for step in summary["steps"]}
    assert by_name["fails"]["reason"] == "exit status 3" and by_name["fails"]["tail"] == ["why"]
    assert by_name["late"]["rows"] == 1 and by_name["late"]["tail"] == ["begun"]
    assert by_name["absent"]["reason"] == "no-such-tool isn't here"
    assert [step["name"] for step in json.loads(seen.read_text())["steps"]] == ["fails", "late", "absent", "not found"]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    assert "begun" in (tmp_path / "log.txt").read_text()


def test_no_step_begins_after_the_end(suite, tmp_path):
    runner = suite.Suite(tmp_path, minutes=0)
    runner.run(steps(suite.Step("x", python("print(1)"), settles=("packing",))))
    assert [(r.status, r.reason) for r in runner.results] == [("skipped", "no time left")]
    assert runner.settled() == []


def test_skipped_tests_settle_nothing(suite, tmp_path):
    report = tmp_path / "report.xml"
    case, skipped = '<testcase name="test_cuda_equals_cpu">{}</testcase>', "<skipped/>"
    for inside, settled in ((skipped, []), ("", ["packing"]), ("<failure/>", [])):
        report.write_text(f"<testsuite>{case.format(inside)}<testcase name='other'/></testsuite>")
        runner = suite.Suite(tmp_path / "out", minutes=1)
        runner.run(steps(suite.Step("tests", python(""), settles=("packing",), junit=report)))
        assert runner.settled() == settled


def test_the_order_of_a_tests_parameters_does_not_matter(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(suite.PROOF, "packing", ["test_a[float16-0.0012-triton-cuda]"])
    report = tmp_path / "report.xml"
    for name, settled in (("triton-cuda-float16-0.0012", ["packing"]), ("triton-cuda-float16-0.012", [])):
        report.write_text(f"<testsuite><testcase name='test_a[{name}]'/></testsuite>")
        runner = suite.Suite(tmp_path / "out", minutes=1)
        runner.run(steps(suite.Step("tests", python(""), settles=("packing",), junit=report)))
        assert runner.settled() == settled


def test_proofs_are_items(suite):
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"def {name.partition('[')[0]}(" in tests for names in suite.PROOF.values() for name in names)
    items = suite.todo_items()
    assert len(items) == len(set(items)) and set(suite.PROOF) <= set(items)
    assert {f"{kind}-rows" for kind in suite.KINDS} <= set(items)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_the_script_runs_without_a_gpu(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), str(tmp_path), "--device", "cpu", "--no-build"]
    done = subprocess.run([*command, "--only", "driver|memcheck"], capture_output=True, text=True, timeout=60)
    assert "settled: nothing" in done.stdout, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "summary.json"}
