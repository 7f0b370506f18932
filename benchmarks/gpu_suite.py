"""Build, tests and benchmarks on a machine with an NVIDIA GPU, without a network.

    benchmarks/gpu_suite.sh OUT_DIR --minutes 25 --commit "$(git describe --always --dirty --abbrev=10 --exclude '*')"

OUT_DIR gets rows.jsonl (a row as soon as it is measured), log.txt (everything printed) and summary.json (replaced after
every step), so a cut-off loses nothing. A step that fails, is late or can't run here doesn't stop the others. The
summary names the items of GPU_TODO.md that were settled: all steps naming an item passed and showed what it asks for.

Needs torch, numpy, pytest, pybind11, cmake, ninja and nvcc for the build and the tests of the ops; the benchmarks also
timm, safetensors, pillow and scipy. Wheels in benchmarks/wheels or --wheels DIR are installed first, each without its
dependencies. Worth carrying if absent: safetensors, pillow, scipy, tqdm, segment_anything (oracle and peer; without it
the generator's tests can't run, and nothing is measured that they stand for), jsonargparse with docstring-parser and
typeshed-client, pycocotools, hypothesis, opencv-python-headless (further tests).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as xml
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-site"
TODO = ROOT / "benchmarks" / "GPU_TODO.md"
REVISION = ROOT / "benchmarks" / "REVISION"
LOG_BYTES_A_STEP = 256 << 10  # OUT_DIR stays small enough to be sent back
TAIL_LINES = 6
MODULES = (
    "torch", "triton", "numpy", "timm", "torchvision", "PIL", "safetensors", "huggingface_hub", "scipy", "tqdm",
    "jsonargparse", "pycocotools", "hypothesis", "segment_anything", "cv2", "skimage", "transformers",
)  # fmt: skip
MACHINE = f"""
import importlib.util, torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPUs", torch.cuda.device_count())
for index in range(torch.cuda.device_count()): print(torch.cuda.get_device_properties(index))
print("absent:", *[name for name in {MODULES} if importlib.util.find_spec(name) is None])
"""
SELF_CHECKS = """
from pro2sam_fast.backends import self_check_table, self_checks
checks = self_checks()
print(self_check_table(checks))
raise SystemExit(not all(checks))
"""
ON_DEVICE = ("cuda_graph_capture", "waits_for_nothing")
# Tests that must have passed, not merely been skipped, before an item counts as settled.
PROOF = {
    "gated-attention": [
        f"test_{name}[{backend}-{dtype}]"
        for name in ("opcheck_on_a_gpu", "cuda_graph_capture", "the_same_bits_every_time")
        for backend in ("cuda", "triton")
        for dtype in ("bfloat16", "float32")
    ],
    "mask-match": [
        f"test_{name}[{backend}]"
        for name in ("opcheck_on_a_gpu", "cuda_graph_capture", "follows_the_current_stream")
        for backend in ("cuda", "triton")
    ],
    "self-checks": [f"test_capture_before_the_first_call[{backend}]" for backend in ("cuda", "triton")],
    "native-context": ["test_a_failed_launch_does_not_fail_the_next", "test_ties_go_to_the_first[cuda]"],
    "devices": [f"test_the_tensors_device_is_the_one_that_runs[{backend}]" for backend in ("cuda", "triton")],
    "packing": ["test_cuda_equals_cpu"],
    "match": ["test_same_result_on_a_gpu"],
    "sharding": ["test_two_processes_on_gpus"],
    "decode-sweeps-op": [
        f"test_parity[{op}-square-float16-triton]" for op in ("sweep0", "sweep1", "sweep2", "upscale")
    ],
    "decode-ahead": [
        "test_tokens_and_masks_in_a_cuda_graph",
        "test_the_whole_chain[float16-0.0012-triton-cuda]",
        "test_prompts_of_several_images[triton-cuda]",
    ],
    "decode-graphs": [f"test_tokens_by_cuda_graphs[{mode}]" for mode in ("no_grad", "inference_mode")],
    "gallery": ["test_gallery_on_a_gpu", "test_a_pass_of_photos_waits_for_nothing"],
    "transfer": [
        "test_one_copy_from_a_gpu",
        "test_uploads_and_readings_in_step_with_a_busy_gpu",
        "test_a_reading_waits_for_nothing_later",
    ],
    **{
        f"{op}-op": [f"test_{name}[{backend}]" for name in ON_DEVICE for backend in ("cuda", "triton")]
        for op in ("mask-measure", "nms", "compact")
    },
    "relative-attention-op": [
        f"test_sizes_of_sam_on_a_gpu[{window}-{d}-torch.{dtype}]"
        for window in (0, 14)
        for d in (64, 80)
        for dtype in ("float32", "bfloat16", "float16")
    ],
    "image-encoder": [
        "test_graphs_follow_the_current_stream_and_the_weights",
        *(f"test_vit_b_at_1024_on_a_gpu[torch.{dtype}]" for dtype in ("float32", "bfloat16", "float16")),
    ],
}
OP_ITEMS = {
    "mask_match": ("mask-match", "native-context", "devices"),
    "packing": ("packing",),
    "self_checks": ("self-checks",),
    "gated_attention": ("gated-attention",),
    "gated_attention_blocks": (),
}
TIMES = {"mask_match": "mask-match-time", "mask_iou": "mask-match-time", "gated_attention": "gated-attention-time"}
DTYPES = {"gated_attention": ("bfloat16", "float32")}  # to measure, if not float32 alone
KINDS = ("op", "pipeline", "stage", "training", "memory", "scaling")


@dataclass
class Step:
    """One command.

    Attributes:
        name: unique.
        command: argument list, run in the root of the tree.
        seconds: limit; less where less is left.
        settles: items of GPU_TODO.md that this step takes part in settling.
        back_ends: ours that must have a row on the device, for benchmarks.
        absent: why the step can't run here.
        environ: environment variables on top.
        junit: where pytest leaves its report.
        rows: the command appends rows, and without one the step failed.
    """

    name: str
    command: list[str]
    seconds: float = 300.0
    settles: tuple[str, ...] = ()
    back_ends: tuple[str, ...] = ()
    absent: str | None = None
    environ: dict[str, str] = field(default_factory=dict)
    junit: Path | None = None
    rows: bool = False


@dataclass
class Result:
    """What became of a step: `status` is passed, failed, late or skipped."""

    name: str
    status: str
    seconds: float
    reason: str = ""
    settles: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    rows: int = 0
    tests: dict[str, int] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


class Suite:
    """Runs steps until the time is up and keeps OUT_DIR true after every one of them."""

    def __init__(self, out: Path, minutes: float):
        self.out = out
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes
        self.results: list[Result] = []
        out.mkdir(parents=True, exist_ok=True)
        self.rows_file = out / "rows.jsonl"

    def run(self, plan: Generator[Step, list[str] | None, None], only: str = "") -> None:
        """Takes steps from the plan; the plan gets each step's lines, or None unless it passed."""
        answer = None
        while True:
            try:
                step = plan.send(answer)
            except StopIteration:
                break
            answer = None
            if re.search(only, step.name):
                result, lines = self._step(step)
                self.results.append(result)
                self._summarise()
                self._print(f"--- {step.name}: {result.status} in {result.seconds:.0f} s {result.reason}")
                answer = lines if result.status == "passed" else None
        self._summarise()

    def settled(self) -> list[str]:
        """Items whose steps all passed with their proof."""
        named = {item for result in self.results for item in result.settles}
        broken = {
            item
            for result in self.results
            for item in (result.settles if result.status != "passed" else result.unproven)
        }
        return [item for item in todo_items() if item in named - broken]

    def _step(self, step: Step) -> tuple[Result, list[str]]:
        result = Result(step.name, "skipped", 0.0, settles=list(step.settles))
        left = self.deadline - time.monotonic()
        if step.absent or left <= 0:
            result.reason = step.absent or "no time left"
            return result, []
        self._print(f"=== {step.name} (at most {min(step.seconds, left):.0f} s)")
        before = len(self._rows())
        started = time.monotonic()
        code, lines = self._execute(step, min(step.seconds, left))
        result.seconds = round(time.monotonic() - started, 1)
        result.status = {0: "passed", None: "late"}.get(code, "failed")
        result.reason = {0: "", None: "stopped at its time limit"}.get(code, f"exit status {code}")
        result.tail = [line[-300:] for line in lines[-TAIL_LINES:]]
        rows = self._rows()[before:]
        result.rows = len(rows)
        self._prove(step, result, rows)
        return result, lines

    def _prove(self, step: Step, result: Result, rows: list[dict]) -> None:
        if step.junit:
            result.tests, passed = read_junit(step.junit)
            proofs = {item: set(map(_unordered, PROOF.get(item, ()))) for item in step.settles}
            result.unproven = [item for item in step.settles if not proofs[item] <= set(map(_unordered, passed))]
            if result.status == "passed" and not passed:
                result.status, result.reason = "skipped", "no test could run here"
        if step.rows and result.status == "passed":
            ours = {row["back_end"] for row in rows if row["provider"] == "ours" and "skipped" not in row}
            if not ours:
                result.status, result.reason = "failed", "no row of ours"
            elif missing := set(step.back_ends) - ours:
                result.unproven, result.reason = list(step.settles), f"no row of {', '.join(sorted(missing))}"

    def _execute(self, step: Step, seconds: float) -> tuple[int | None, list[str]]:
        """Exit status (None: stopped at the limit) and the lines that were printed."""
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(_python_path())} | step.environ
        lines: list[str] = []
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environ, text=True, errors="replace", stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, [str(error)]
        reader = threading.Thread(target=self._tee, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
            reader.join(timeout=5)
        return code, lines

    def _tee(self, stream, lines: list[str]) -> None:
        size = 0
        for line in stream:
            lines.append(line.rstrip("\n"))
            size += len(line.encode())
            if size < LOG_BYTES_A_STEP:
                self._print(lines[-1])

    def _print(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "log.txt").open("a", encoding="utf-8") as f:
            f.write(text + "\n")

    def _rows(self) -> list[dict]:
        if not self.rows_file.exists():
            return []
        found = []
        for line in self.rows_file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # a row cut off by a kill
                continue
        return found

    def _summarise(self) -> None:
        settled = self.settled()
        summary = {
            "revision": REVISION.read_text().strip() if REVISION.exists() else None,
            "seconds": round(time.monotonic() - self.started, 1),
            "settled": settled,
            "open": [item for item in todo_items() if item not in settled],
            "steps": [asdict(result) for result in self.results],
        }
        part = self.out / "summary.json.part"
        part.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(part, self.out / "summary.json")


def todo_items() -> list[str]:
    """Ids of GPU_TODO.md, in its order."""
    return re.findall(r"^\d+\. \*\*([a-z0-9-]+)\*\*", TODO.read_text(encoding="utf-8"), re.MULTILINE)


def read_junit(path: Path) -> tuple[dict[str, int], set[str]]:
    """Counts by outcome and the names of the tests that passed; nothing if pytest left no report."""
    counts, passed = {"passed": 0, "failed": 0, "skipped": 0}, set()
    try:
        found = list(xml.parse(path).iter("testcase"))
    except (OSError, xml.ParseError):
        return counts, passed
    for test in found:
        kinds = {child.tag for child in test}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "passed":
            passed.add(test.get("name"))
    return counts, passed


def _unordered(test: str) -> tuple[str, ...]:
    """A test's name and its parameters in an order of their own: pytest's depends on where they come from."""
    name, _, parameters = test.partition("[")
    return name, *sorted(parameters.removesuffix("]").split("-"))


def plan(arguments: argparse.Namespace, work: Path, out: Path) -> Generator[Step, list[str] | None, None]:
    """The steps, most valuable first."""
    python, device = sys.executable, arguments.device
    on_gpu = device != "cpu"
    yield Step("driver", ["nvidia-smi"], 30, absent=_missing("nvidia-smi"))
    if not arguments.no_build:
        pip = [python, "-m", "pip", "install", "--no-deps", "--target", str(SITE), "--upgrade"]
        for wheel in sorted(arguments.wheels.glob("*.whl")):
            find = ["--no-index", "--find-links", str(arguments.wheels)]
            yield Step(f"wheel {wheel.name}", [*pip, *find, str(wheel)], 60)
        yield Step(
            "build", [*pip, "--no-build-isolation", str(ROOT)], 600, environ={"PRO2SAM_CUDA": "on" if on_gpu else "off"}
        )
    yield Step("machine", [python, "-c", MACHINE], 60)
    yield Step("package", [python, "-P", "-m", "pro2sam_fast"], 60)
    yield Step("self-checks", [python, "-P", "-c", SELF_CHECKS], 240, settles=("self-checks",))

    def tests(name: str, *options: str, **more) -> Step:
        junit = work / f"{name.replace(' ', '-')}.xml"
        command = [python, "-P", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        command.append("--may-lack-libraries")
        return Step(name, [*command, *options], junit=junit, **more)

    for file in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
        op = file.stem.removeprefix("test_")
        if not op.endswith(("_ahead_of_time", "_on_host")):
            yield tests(f"tests {op}", str(file), settles=OP_ITEMS.get(op, (f"{op.replace('_', '-')}-op",)))
    for tool in ("memcheck", "racecheck"):
        yield _sanitized(tests(f"{tool} ops", "tests/ops", "-m", "not slow", "-k", SMALL, settles=(tool,)), tool)
    benches = _benchmarks(arguments, out)
    yield from _sent(benches, ("op",))
    on_device = ("match", "gallery", "transfer", "sharding", "decode-ahead", "decode-graphs", "image-encoder")
    yield tests("tests on the GPU", "tests", "--ignore=tests/ops", "-m", "cuda", settles=on_device)
    yield from _sent(benches, KINDS[1:])


# The CUDA rows of the parity tests, without shapes that only repeat them, and no other device's rows.
SMALL = "(parity or unaligned or strided or graph_capture) and cuda and not reference and not auto"


def _sanitized(step: Step, tool: str) -> Step:
    path = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    step.command = [str(path), "--tool", tool, "--error-exitcode", "9", *step.command]
    step.environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    step.absent = None if path else "compute-sanitizer isn't here"
    step.seconds = 180
    return step


def _benchmarks(arguments: argparse.Namespace, out: Path):
    """(kind, what) -> step, and the steps that list what a kind holds."""
    run = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
    common = ["--device", arguments.device]

    def listing(kind: str) -> Step:
        return Step(f"list {kind}", [*run, kind, "--list", *common], 120, settles=(f"{kind}-rows",))

    def bench(kind: str, what: str, dtype: str) -> Step:
        settles = (f"{kind}-rows", *((TIMES[what],) if what in TIMES else ()))
        back_ends = ("cuda", "triton") if what in TIMES and arguments.device != "cpu" else ()
        command = [*run, kind, what, *common, "--dtype", dtype, "--seconds", "2", "--output", str(out / "rows.jsonl")]
        name = f"{kind} {what}" if dtype == "float32" else f"{kind} {what} {dtype}"
        return Step(name, command, 240, settles, back_ends, rows=True)

    return listing, bench


def _sent(benches, kinds: tuple[str, ...]) -> Generator[Step, list[str] | None, None]:
    listing, bench = benches
    for kind in kinds:
        lines = yield listing(kind)
        for what in dict.fromkeys(re.findall(r"^(\w+) +b?(?:float|int)\d+ ", "\n".join(lines or ()), re.MULTILINE)):
            for dtype in DTYPES.get(what, ("float32",)):
                yield bench(kind, what, dtype)


def _missing(tool: str) -> str | None:
    return None if shutil.which(tool) else f"{tool} isn't here"


def _python_path() -> list[str]:
    return [path for path in (str(SITE) if SITE.exists() else "", os.environ.get("PYTHONPATH", "")) if path]


def _stop(process: subprocess.Popen) -> None:
    """Ends the command and what it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
        except (ProcessLookupError, PermissionError):
            return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--minutes", type=float, default=25.0, help="time limit of the whole (default: 25)")
    parser.add_argument("--commit", help="revision of a tree without .git, as `git describe --always --dirty` has it")
    parser.add_argument("--wheels", type=Path, default=ROOT / "benchmarks" / "wheels", help="folder of wheels")
    parser.add_argument("--only", default="", help='regular expression: only such steps; "list|op" for the ops')
    parser.add_argument("--no-build", action="store_true", help="use what is installed")
    parser.add_argument("--device", default="cuda", help="cpu tries the suite out and settles nothing")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.commit:
        REVISION.write_text(arguments.commit + "\n")
    if not arguments.no_build:
        shutil.rmtree(SITE, ignore_errors=True)
    out = arguments.out.resolve()
    suite = Suite(out, arguments.minutes)
    with tempfile.TemporaryDirectory() as work:
        suite.run(_settling(plan(arguments, Path(work), out), arguments.device != "cpu"), arguments.only)
    print("settled:", *suite.settled() or ["nothing"])
    print("open:", *[item for item in todo_items() if item not in suite.settled()] or ["nothing"])
    return 0 if all(result.status in ("passed", "skipped") for result in suite.results) else 1


def _settling(steps: Generator[Step, list[str] | None, None], on_gpu: bool):
    answer = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            return
        step.settles = step.settles if on_gpu else ()
        answer = yield step


if __name__ == "__main__":
    sys.exit(main())
