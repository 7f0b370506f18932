"""benchmarks/REPORT.md, its plots and the marked blocks of README.md and of the model card, all from the rows in
benchmarks/results.

    python benchmarks/report.py            # write them (the plots need matplotlib)
    python benchmarks/report.py --check    # exit status 1 if what is there doesn't match the rows

Every line of a table names its row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import tables
import waterfall
from rows import RESULTS, ROOT, read
from tables import ballpark, newest, reference, table

__all__ = ["differences", "main", "render", "with_blocks"]

PAGE = ROOT / "benchmarks" / "REPORT.md"
PLOTS = ROOT / "benchmarks" / "plots"
README = ROOT / "README.md"
CARD = ROOT / "pro2sam_fast" / "weights" / "README.md"
WEIGHTS = CARD.with_name("lite.safetensors")
BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end rows -->)", re.DOTALL)
KINDS = {
    "pipeline": "The whole program",
    "stage": "Stages",
    "op": "Ops",
    "memory": "Peak memory",
    "training": "Training",
    "scaling": "Scaling",
}
UNTIMED = ("accuracy", "study", "exactness")
INTRODUCTION = """# Benchmark report

Made by `python benchmarks/report.py` from the rows in [`results`](results); a test fails when they differ. Each line
is the newest row of its case and ends with a reference to it, `file:line`; the row holds versions, facts and the
command, which the [appendix](#commands) repeats.

* **median [p20 – p80]**: milliseconds of one call, or bytes where memory is the question.
* **against**: time (or bytes) of the other / ours, the median over pairs that ran in turns in one process on the same
  inputs and weights. Above 1, ours is better.
* **of the floor**: the least time that the arithmetic and the memory traffic of the case need at the ceilings that
  were measured on the machine (a large copy, a large matrix product), divided by the time it took; and what binds.
* **peak**: bytes that one call needed on top of what was there before.
* **commit**: `+` marks a checkout with changes that aren't in that commit. **machine**: see [machines](#machines).
"""
EXACTNESS = """The same weights, photos and options on both sides. The lines of `segment_anything` against itself say
how far rounding alone moves masks.

* **masks**: of all galleries; *there*: of the side that is named second. **other_count**: photos with another number
  of masks.
* **twins**: percent of the masks with a mask of IoU ≥ 0.999 (float32) or ≥ 0.95 (bfloat16) on the other side;
  **twinless**: the number of the rest. **iou_min**, **iou_mean**: IoU of every mask with its most similar one.
* **same_order**: percent of neighbours whose twins stand in the same order. **rating_gap**, **iou_gap**: largest
  difference of predicted IoU.
* **logits_rms**: root mean square of the error relative to that of the logits, and for the photo where it is largest.
* **within_2_px**: percent of the photos whose box moves by at most 2 pixels."""
# Lines of the README: label, kind, what, case.
SPEED = (
    ("photo to box, mask and label", "pipeline", "localize", "lite batch=1 480x640 JPEG"),
    ("photo to all its masks", "pipeline", "masks", "lite batch=1 480x640 JPEG"),
    ("ViT-B image encoder", "stage", "encoder", "vit_b"),
    ("64 points decoded, ViT-B", "op", "decode", "G=64 half of the points survive"),
    ("64 masks at the photo's size: stability, box, area", "op", "postprocess", "K=64 480x640"),
    ("gated attention", "op", "gated_attention", "fwd B=32 N=201 small"),
    ("one mask matched with 1000", "op", "mask_match", "K=1000 512x512"),
)
# Columns of the card's history: case, metrics.
HISTORY = (
    ("one centre click, COCO val things", ("best_iou", "picked_iou", "iou_rank_correlation")),
    ("one centre click, BSDS val segments", ("best_iou", "picked_iou", "best_boundary_f")),
    ("GT-known, CUB-10 test boxes", ("box_acc@0.5", "box_acc@0.7", "box_acc@0.9")),
    ("box hits a thing, COCO val", ("hit@0.5",)),
    ("GT-known, CUB-10 train boxes", ("box_acc@0.5", "box_acc@0.7", "box_acc@0.9")),
    ("box hits a thing, COCO train", ("hit@0.5",)),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if something is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows")
    parser.add_argument("--output", type=Path, help="folder for the page and plots; other pages stay as they are")
    arguments = parser.parse_args(argv)
    rows = list(read(arguments.results))
    page, plots = (arguments.output / "REPORT.md", arguments.output / "plots") if arguments.output else (PAGE, PLOTS)
    if arguments.check:
        found = differences(rows, page, plots, () if arguments.output else (README, CARD))
        for problem in found:
            print(f"report.py: {problem}; run python benchmarks/report.py", file=sys.stderr)
        return 1 if found else 0
    draw(rows, plots)
    page.write_text(render(rows), encoding="utf-8")
    for path in () if arguments.output else (README, CARD):
        path.write_text(with_blocks(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0


def differences(rows: list[dict], page: Path, plots: Path, others: Iterable[Path] = ()) -> list[str]:
    """What doesn't match the rows, a sentence each; `others` are pages with marked blocks. Needs no matplotlib: a plot
    says which series it shows."""
    found = []
    if not page.exists() or page.read_text(encoding="utf-8") != render(rows):
        found.append(f"{page.name} doesn't match the rows")
    for path in others:
        text = path.read_text(encoding="utf-8")
        if text != with_blocks(text, rows):
            found.append(f"a block of {path.relative_to(ROOT)} doesn't match the rows")
    expected = {plot_name(row): fingerprint(row) for row in plotted(rows)}
    there = {path.name: path.read_text(encoding="utf-8") for path in plots.glob("*.svg")}
    found += [
        f"plots/{name} doesn't match its row" for name, mark in expected.items() if mark not in there.get(name, "")
    ]
    return found + [f"plots/{name} has no row" for name in there if name not in expected]


def render(rows: list[dict]) -> str:
    """REPORT.md."""
    quality, study, exact = (newest(row for row in rows if row["what"] == what) for what in UNTIMED)
    timed = [row for row in rows if row["what"] not in UNTIMED]
    shown = [row for row in newest(timed) if row["provider"] != "base"]
    names = tables.machines(shown + quality + study + exact)
    parts = [INTRODUCTION, "## Machines", _machine_table(names), tables.ceilings(shown, names)]
    for kind, title in KINDS.items():
        own = [row for row in shown if row["kind"] == kind]
        parts += [f"## {title}"] if own else []
        for what in dict.fromkeys(row["what"] for row in own):
            group = [row for row in own if row["what"] == what]
            parts += [f"### {kind}: {what}", tables.measured(group, names), tables.stages(group), tables.scaling(group)]
            parts += [f"![{row['case']}](plots/{plot_name(row)})" for row in plotted(group)]
    parts += _section("What couldn't run", tables.skipped(shown))
    parts += _section("Accuracy of `lite`", tables.accuracy(quality, names))
    parts += _section("Methods trained under one recipe", tables.accuracy(study, names))
    exactness = tables.accuracy(exact, names, digits=6)
    parts += _section("Exactness", f"{EXACTNESS}\n\n{exactness}" if exactness else "")
    history = waterfall.histories(timed)
    parts += _section("Our own steps, commit by commit", waterfall.page(history))
    steps = [row for rows_of_case in history.values() for row in rows_of_case]
    parts += _section("Commands", tables.commands([*quality, *study, *exact, *shown, *steps]))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def with_blocks(text: str, rows: list[dict]) -> str:
    """A page with its marked blocks made anew."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]](rows) + "\n" + found[3], text)


def speed(rows: list[dict]) -> str:
    """A few lines for the impatient: our quickest back end in each dtype, against whom."""
    shown = [row for row in newest(rows) if "p50" in row and row["provider"] == "ours"]
    lines = []
    for label, *wanted in SPEED:
        found = [row for row in shown if [row["kind"], row["what"], row["case"]] == wanted]
        for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in found):
            alike = (row for row in found if (row["device"], row["dtype"]) == (device, dtype))
            best = min(alike, key=lambda row: row["p50"])
            against = ", ".join(f"{ballpark(ratio)}× {peer}" for peer, ratio in best.get("ratios", {}).items())
            machine = f"{device}, {best['threads']} threads" if device == best["host"]["cpu"] else device
            line = [label, best["case"], best["dtype"], f"{ballpark(best['p50'])} ms", against, machine]
            lines.append([*line, reference(best, "benchmarks/")])
    titles = ["", "case", "dtype", "ours", "times as fast as", "machine", "row"]
    return table(titles, lines) or "No rows yet."


def quality(rows: list[dict], folder: str = "benchmarks/") -> str:
    """What the bundled weights reach with their own options; other weights and train splits do not count."""
    shipped = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    lines = []
    own = [row for row in rows if row["what"] == "accuracy" and row.get("weights") == shipped]
    for row in newest(row for row in own if not row.get("options") and "--split test" in row["command"]):
        shown = {name: value for name, value in row["metrics"].items() if not name.startswith(("source_", "median_"))}
        lines.append([row["case"], row["dtype"], row["photos"], tables.plain(shown), reference(row, folder)])
    return table(["what", "dtype", "photos", "measured", "row"], lines) or "No rows yet."


def card(rows: list[dict]) -> str:
    """The same for the model card, which lies elsewhere."""
    return quality(rows, "../../benchmarks/")


def history(rows: list[dict]) -> str:
    """What each of the weights that were ever bundled reaches, and the newest with other options."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["what"] == "accuracy" and row["dtype"] == "float32" and row.get("weights"):
            key = row["weights"][:8], json.dumps(row.get("options") or {})
            found.setdefault(key, []).append(row)
    lines = []
    for (weights, options), group in found.items():
        latest = {row["case"].removesuffix(f", {options}"): row for row in newest(group)}
        line = [weights, options.strip("{}")]
        for case, names in HISTORY:
            row = latest.get(case)
            values = " / ".join(f"{row['metrics'][name]:.3g}" for name in names) if row else ""
            line.append(f"{values} ({reference(row, '../../benchmarks/')})" if row else "")
        if any(line[2:]):
            lines.append(line)
    return table(["weights", "options", *(f"{case}: {' / '.join(names)}" for case, names in HISTORY)], lines)


def studies(rows: list[dict]) -> str:
    """Methods trained under one recipe: mean over the seeds ± standard deviation, in percent."""
    found = newest(row for row in rows if row["what"] == "study")
    columns = list(dict.fromkeys(name for row in found for name in row["metrics"] if not name.startswith("± ")))
    lines = [
        [row["case"], *(_with_spread(row["metrics"], name) for name in columns), reference(row, "benchmarks/")]
        for row in found
    ]
    return table(["what", *columns, "row"], lines) or "No rows yet."


def _with_spread(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    digits = 2 if name == "threshold" else 1
    spread = f" ± {metrics[f'± {name}']:.{digits}f}" if f"± {name}" in metrics else ""
    return f"{metrics[name]:.{digits}f}{spread}"


BLOCKS: dict[str, Callable[[list[dict]], str]] = {
    "speed": speed,
    "accuracy": quality,
    "studies": studies,
    "card": card,
    "history": history,
}


def plotted(rows: Iterable[dict]) -> list[dict]:
    """The rows that hold a series."""
    return [row for row in newest(rows) if row.get("provider") == "ours" and row["facts"].get("series")]


def plot_name(row: dict) -> str:
    words = (row["what"], row["case"], row["dtype"], row["device"], str(row["threads"]), row["back_end"])
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") + ".svg"


def fingerprint(row: dict) -> str:
    """Stands in the plot's description."""
    series = hashlib.sha256(json.dumps(row["facts"], sort_keys=True).encode()).hexdigest()[:16]
    return f"{row['at']} {series}"


def draw(rows: list[dict], folder: Path) -> None:
    """A log-log plot of each series, the same bytes for the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = plotted(rows)
    for path in folder.glob("*.svg"):
        if path.name not in {plot_name(row) for row in shown}:
            path.unlink()
    if not shown:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "pro2sam_fast", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot, ticker

    for row in shown:
        facts = row["facts"]
        figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        for provider, points in facts["series"].items():
            axes.plot(*zip(*points), "o-" if provider == "ours" else "s--", label=provider)
        axes.set(xscale="log", yscale="log", xlabel=facts["axis"], ylabel="ms", title=f"{row['what']}, {row['case']}")
        ticks = sorted({x for series in facts["series"].values() for x, _ in series})
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        about = {"Description": fingerprint(row), "Date": None, "Creator": None}
        figure.savefig(folder / plot_name(row), metadata=about)
        pyplot.close(figure)


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _machine_table(names: dict[str, str]) -> str:
    lines = [[name, *json.loads(machine)] for machine, name in names.items()]
    return table(["machine", "device", "host", "threads", "versions"], lines)


if __name__ == "__main__":
    sys.exit(main())
