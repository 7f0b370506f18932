"""The tables and plots of a study's report."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..io import write_atomic
from .localization import ERROR_TYPES
from .maps import MapReport, PixelReport
from .masks import MaskReport
from .protocols import protocol

__all__ = ["error_table", "map_tables", "markdown", "mask_table", "pixel_table", "plot_curves", "write_curves"]


def write_curves(path: Path, curves: Mapping[str, np.ndarray]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(curves)
    writer.writerows(zip(*(column.tolist() for column in curves.values())))
    write_atomic(path, text.getvalue().encode())


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in row) + " |" for row in lines
    )


def _columns(metrics: Mapping[str, float]) -> list[str]:
    return [name for name in metrics if not name.startswith("CorLoc")]


def map_tables(reports: Mapping[tuple[str, str], MapReport], iou: str) -> list[str]:
    parts = []
    for rules in dict.fromkeys(r for _, r in reports):
        chosen = {name: report for (name, r), report in reports.items() if r == rules}
        columns = list(dict.fromkeys(c for report in chosen.values() for c in _columns(report.metrics)))
        rows = []
        for name, report in chosen.items():
            said = {"oracle_sum": "best on these photos (oracle)", "val_split": "chosen on others", "fixed": "fixed"}
            for threshold, what, metrics in (
                (report.threshold, said[report.selection], report.metrics),
                *((t, "fixed", m) for t, m in report.fixed.items()),
            ):
                rows.append([name, f"{threshold:g}", what, *(metrics.get(c, "") for c in columns)])
        p = protocol(rules)
        parts.append(
            f"\n## Maps alone, protocol `{rules}`\n\nView: {p.resize} cropped to {p.crop}; map: {p.map}; "
            f"box: {p.rule}; IoU counts widths as x1 - x0{' + 1' if iou == 'plus1' else ''}.\n"
        )
        parts.append(markdown(["coarse", "threshold", "chosen", *columns], rows))
        if swept := [(name, sweep, r) for name, report in chosen.items() for sweep, r in report.sweeps.items()]:
            head = ["coarse", "metric", *(f"IoU {t}" for t in (30, 50, 70)), "mean"]
            parts.append("\nEach IoU at its own best of 1,000 thresholds; V2 takes every contour:\n")
            values = [[r.get(f"box_acc@{t:g}", "") for t in (0.3, 0.5, 0.7)] + [r["MaxBoxAcc"]] for _, _, r in swept]
            parts.append(markdown(head, [[name, sweep, *v] for (name, sweep, _), v in zip(swept, values)]))
    return parts


def pixel_table(reports: Mapping[str, PixelReport]) -> list[str]:
    if not reports:
        return []
    head = "\n## Maps against masks, protocol `wsoleval`\n\nPxAP at 224 x 224, the pixels of all photos pooled.\n"
    return [head, markdown(["coarse", "PxAP"], [[name, report.pxap] for name, report in reports.items()])]


def mask_table(reports: Mapping[str, MaskReport]) -> list[str]:
    if not reports:
        return []
    columns = list(dict.fromkeys(c for report in reports.values() for c in _columns(report.metrics)))
    rows = [[n, *(r.metrics.get(c, "") for c in columns), r.sources.get("sam", 0)] for n, r in reports.items()]
    head = "\n## Maps matched with SAM's masks, protocol `mask`\n\nBox of the chosen mask in a 224 x 224 view.\n"
    return [head, markdown(["coarse", *columns, "photos with a mask of SAM"], rows)]


def error_table(summary: Mapping[str, Any]) -> list[str]:
    if not summary["maps"]:
        return []
    rows = [
        [entry["coarse"], entry["protocol"], *(entry["errors"][kind] for kind in ERROR_TYPES)]
        for entry in [*summary["maps"], *summary["masks"]]
    ]
    return ["\n## Where it went wrong (percent of photos)\n", markdown(["coarse", "protocol", *ERROR_TYPES], rows)]


def plot_curves(reports: Mapping[tuple[str, str], MapReport], path: Path) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ious = np.arange(0.3, 0.96, 0.05)
    for (name, rules), report in reports.items():
        first, curve = list(report.curves.items())[1]
        left.plot(report.curves["threshold"], curve, label=f"{name}, {rules}")
        values = np.array([r.iou for r in report.accuracy.records.values()])
        right.plot(ious, [100 * (values >= t).mean() for t in ious])
    left.set(xlabel="threshold", ylabel=f"photos with IoU ≥ {first.partition('@')[2]} (%)", ylim=(0, 100))
    right.set(xlabel="IoU", ylabel="photos that reach it (%)", ylim=(0, 100))
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True
