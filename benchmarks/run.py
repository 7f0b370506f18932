"""The one door to every measurement. Rows go to benchmarks/results, the page over them is benchmarks/report.py.

    python benchmarks/run.py op mask_match                          # the default cases of one op, with peers
    python benchmarks/run.py op mask_match --case "K=1000 480x640"  # one case
    python benchmarks/run.py stage encoder --list                   # what there is
    python benchmarks/run.py pipeline masks --images photos         # on photos of your own
    python benchmarks/run.py op decode --base HEAD~3                # against another commit, in turns
    python benchmarks/run.py accuracy --data DATA                   # quality of the bundled weights
    python benchmarks/run.py study --data CUB --runs RUNS           # CAM, SAT and GTFormer under one recipe
    python benchmarks/run.py exactness                              # the same masks as segment_anything's?

Before a number is reported the parity tests of what is measured must pass, and the installed package must be this
checkout's. Ours and the peers run in turns in one process on the same inputs and weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import accuracy
import exactness
import study
import torch
import workloads
from case import Case, Runs, Skip
from measuring import ceilings, interleaved, peak_bytes, percentiles
from rows import RESULTS, ROOT, append, environment, stale_files

KINDS = {
    "op": "one op at a time, every back end",
    "stage": "encoder, decoding, filter, post-processing, NMS, matching, box",
    "pipeline": "from JPEG files to boxes or galleries",
    "scaling": "cost against points, images, resolution, threads",
    "memory": "peak memory, each call in a fresh process",
    "training": "training steps of GTFormer-S and SAT-S",
}
QUALITY = {"accuracy": accuracy, "exactness": exactness, "study": study}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.kind in QUALITY:
        return QUALITY[arguments.kind].run(arguments)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    workload = workloads.Options(device=device, dtype=arguments.dtype, images=arguments.images)
    cases = list(_chosen(workloads.cases(arguments.kind, workload), arguments))
    if arguments.list:
        for case in cases:
            note = "" if case.default else "   (only by --case or --all)"
            print(f"{case.what:<18} {case.dtype:<9} {case.name}{note}")
        return 0
    if not cases:
        print(f"run.py: no such case; see run.py {arguments.kind} --list", file=sys.stderr)
        return 2
    if stale := stale_files(arguments.source):
        print(f"run.py: the installed package isn't this checkout ({', '.join(stale[:5])}); install it again",
              file=sys.stderr)  # fmt: skip
        return 1
    if not arguments.tested and not parity(sorted({test for case in cases for test in case.tests})):
        print("run.py: red tests, nothing is measured", file=sys.stderr)
        return 1
    output = arguments.output or RESULTS / f"{arguments.kind}.jsonl"
    if arguments.base:
        return _against(arguments, output)
    for case in cases:
        for row in measure(case, arguments, device):
            append(output, row)
            print(_line(row), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{op,stage,pipeline,...}")
    for kind, about in KINDS.items():
        sub = kinds.add_parser(kind, help=about)
        sub.add_argument("what", nargs="*", help="names to measure; all if none is given")
        sub.add_argument("--case", action="append", default=[], help="name of a case; repeatable")
        sub.add_argument("--all", action="store_true", help="also the cases that take long or much memory")
        sub.add_argument("--list", action="store_true", help="print the cases and stop")
        sub.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        sub.add_argument("--threads", type=int, default=torch.get_num_threads())
        sub.add_argument("--no-peers", action="store_true", help="measure ours only")
        sub.add_argument("--seconds", type=float, default=5.0, help="budget of a case; --rounds goes first")
        sub.add_argument("--rounds", type=int, default=3, help="least number of rounds")
        sub.add_argument("--images", type=Path, help="folder of photos (default: examples/images)")
        sub.add_argument("--base", metavar="REV", help="compare with this commit, built in a worktree of its own")
        sub.add_argument("--output", type=Path, help="file that rows are appended to (default: benchmarks/results)")
        sub.add_argument("--source", type=Path, default=ROOT, help=argparse.SUPPRESS)
        sub.add_argument("--tested", action="store_true", help=argparse.SUPPRESS)
    accuracy.add_arguments(kinds.add_parser("accuracy", help="quality of the bundled weights on annotated photos"))
    about = "ours against segment_anything with equal weights, bfloat16 against float32"
    exactness.add_arguments(kinds.add_parser("exactness", help=about))
    study.add_arguments(kinds.add_parser("study", help="CAM, SAT and GTFormer trained from labels under one recipe"))
    return parser


def _chosen(cases, arguments):
    for case in cases:
        if arguments.what and case.what not in arguments.what:
            continue
        if case.name in arguments.case or (not arguments.case and (case.default or arguments.all or arguments.list)):
            yield case


def parity(tests: list[str]) -> bool:
    """Whether these test files pass against the package that is imported here."""
    program = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "-r", "fE", "--may-lack-libraries"]
    print("parity:", *tests, flush=True)
    return subprocess.run([sys.executable, "-c", program, *options, *tests], cwd=ROOT, check=False).returncode == 0


def measure(case: Case, arguments: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each of our back ends and each peer of a case."""
    runs = case.build()
    peers = {} if arguments.no_peers else runs.peers
    calls = {("ours", name): call for name, call in runs.ours.items()}
    calls |= {("peer", name): call for name, call in peers.items() if not isinstance(call, Skip)}
    common = {
        "kind": arguments.kind,
        "what": case.what,
        "case": case.name,
        "dtype": case.dtype,
    }
    shared = {"facts": runs.facts} | environment(device, arguments.source) | {"command": _command(case, arguments)}
    skipped = [
        common | {"provider": "peer", "back_end": name, "skipped": peer.reason} | shared
        for name, peer in peers.items()
        if isinstance(peer, Skip)
    ]
    if runs.unit == "bytes":
        samples = {name: [call()] for name, call in calls.items()}
    else:
        samples = interleaved(calls, device, arguments.seconds, arguments.rounds)
    rows = []
    for (provider, name), call in calls.items():
        row = common | {"provider": provider, "back_end": name, "unit": runs.unit}
        row |= {q: round(value, 5) for q, value in percentiles(samples[provider, name]).items()}
        row["n"] = len(samples[provider, name])
        if provider == "ours":
            row["ratios"] = {
                peer: round(statistics.median(b / a for a, b in zip(samples["ours", name], samples["peer", peer])), 3)
                for kind, peer in calls
                if kind == "peer"
            }
        if runs.units:
            unit, count = runs.units
            row["rate"] = {f"{unit}/s": round(1e3 * count / row["p50"], 3)}
        row["peak_bytes"] = call() if runs.unit == "bytes" else peak_bytes(call, device)
        if runs.stages and provider == "ours":
            row["stages"] = {stage: round(ms, 2) for stage, ms in runs.stages().items()}
        row |= _floor(case, runs, row["p50"], device)
        rows.append(row | shared)
    return rows + skipped


def _floor(case: Case, runs: Runs, p50: float, device: torch.device) -> dict:
    floor = case.floor(runs.facts)
    if not floor.bytes and not floor.flops:
        return {}
    reached = ceilings(device, tuple(sorted(floor.flops)))
    times = {"memory": 1e3 * floor.bytes / (reached["copy_gb_s"] * 1e9)}
    times["compute"] = sum(1e3 * n / (reached[f"{name}_gflop_s"] * 1e9) for name, n in floor.flops.items())
    bound = max(times, key=times.get)
    return {
        "floor": {
            "flops": floor.flops,
            "bytes": floor.bytes,
            "formula": floor.formula,
            "bound": bound,
            "ms": round(times[bound], 5),
            "fraction": round(times[bound] / p50, 4),
        },
        "ceilings": {name: round(value, 1) for name, value in reached.items()},
    }


def _command(case: Case, arguments: argparse.Namespace) -> str:
    parts = ["python", "benchmarks/run.py", arguments.kind, case.what, "--case", case.name]
    parts += ["--device", arguments.device, "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    parts += ["--seconds", f"{arguments.seconds:g}", "--rounds", str(arguments.rounds)]
    parts += ["--images", "PHOTOS"] if arguments.images else []
    parts += ["--no-peers"] if arguments.no_peers else []
    parts += ["--base", arguments.base] if arguments.base else []
    return shlex.join(parts)


def _line(row: dict) -> str:
    name = f"{row['what']} | {row['case']} | {row['dtype']} | {row['provider']} {row['back_end']}"
    if "skipped" in row:
        return f"{name}: skipped, {row['skipped']}"
    extra = [f"{ratio:.2f}x {peer}" for peer, ratio in row.get("ratios", {}).items()]
    extra += [f"{100 * row['floor']['fraction']:.0f} % of the floor"] if "floor" in row else []
    value = f"{row['p50']:.4g} ms" if row["unit"] == "ms" else f"{row['p50'] / 2**20:.4g} MiB"
    return f"{name}: {value} (n={row['n']})" + "".join(f", {text}" for text in extra)


def _against(arguments: argparse.Namespace, output: Path) -> int:
    """Rows of this checkout and of another commit, three rounds in turns; ours carry the ratio to the other."""
    with tempfile.TemporaryDirectory() as folder:
        tree, site = Path(folder, "tree"), Path(folder, "site")
        ask = ["git", "rev-parse", "--short=10", arguments.base]
        revision = subprocess.check_output(ask, cwd=ROOT, text=True).strip()
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), revision], cwd=ROOT, check=True)
        try:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
            subprocess.run([*install, "--target", str(site), str(tree)], check=True)
            places = {"ours": (None, ROOT), "base": (str(site), tree)}
            found: dict[str, list[list[dict]]] = {"ours": [], "base": []}
            for turn in range(3):
                for side, (path, source) in places.items():
                    file = Path(folder, f"{side}{turn}.jsonl")
                    found[side].append(_elsewhere(arguments, file, path, source))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    turns = {side: _by_name(rows) for side, rows in found.items()}
    for name in [name for name in turns["ours"] if name in turns["base"]]:
        here, there = (turns[side][name] for side in ("ours", "base"))
        pairs = [b["p50"] / a["p50"] for a, b in zip(here, there)]
        command = {"command": here[1]["command"] + f" --base {revision}"}
        rows = [dict(sorted(found, key=lambda row: row["p50"])[1]) | command for found in (here, there)]
        rows[1]["provider"] = "base"
        rows[0]["ratios"] = rows[0].get("ratios", {}) | {f"commit {revision}": round(statistics.median(pairs), 3)}
        for row in rows:
            append(output, row)
            print(_line(row), flush=True)
    return 0


def _by_name(turns: list[list[dict]]) -> dict[tuple, list[dict]]:
    """The rows of all turns by what was measured; a back end that only one side has is in that side's alone."""
    found: dict[tuple, list[dict]] = {}
    for row in itertools.chain(*turns):
        found.setdefault((row["what"], row["case"], row["dtype"], row["back_end"]), []).append(row)
    return found


def _elsewhere(arguments: argparse.Namespace, file: Path, path: str | None, source: Path) -> list[dict]:
    command = [sys.executable, __file__, arguments.kind, *arguments.what, "--tested", "--no-peers"]
    command += ["--source", str(source), "--output", str(file), "--device", arguments.device]
    command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
    command += ["--seconds", str(arguments.seconds), *(["--all"] if arguments.all else [])]
    command += ["--images", str(arguments.images)] if arguments.images else []
    for name in arguments.case:
        command += ["--case", name]
    environ = os.environ | ({"PYTHONPATH": path} if path else {})
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
