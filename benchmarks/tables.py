"""Rows as Markdown tables. Every line ends with a reference to its row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

__all__ = [
    "accuracy", "amount", "ballpark", "ceilings", "commands", "commit", "machines", "measured", "natural", "newest",
    "plain", "reference", "scaling", "skipped", "stages", "table",
]  # fmt: skip

KEY = ("what", "case", "model", "dtype", "device", "threads", "provider", "back_end")


def newest(rows: Iterable[dict]) -> list[dict]:
    """The newest row of each case and back end, in the order in which the cases came first.

    A row that compares two commits ran without peers; one of the same commit that has them goes before it.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        kind = row.get("kind", row["what"])  # the first accuracy rows say it in `what` alone
        groups.setdefault((kind, *map(row.get, KEY)), []).append(row)
    found = []
    for group in groups.values():
        ordered = sorted(group, key=lambda row: row["date"])  # stable: the later line wins
        same = [
            row for row in ordered if (row["commit"], row["dirty"]) == (ordered[-1]["commit"], ordered[-1]["dirty"])
        ]
        found.append(max(same, key=lambda row: ("--base" not in row["command"], row["date"], same.index(row))))
    return found


def measured(rows: list[dict], names: dict[str, str]) -> str:
    """Times, rates, ratios, floors and memory of one op, stage, ...; ours first, quickest first."""
    lines = []
    order = {"ours": 0, "peer": 1}
    timed = [row for row in rows if "p50" in row]
    for row in sorted(timed, key=lambda r: (natural(r["case"]), r["dtype"], _place(r), order[r["provider"]], r["p50"])):
        floor = row.get("floor")
        lines.append([
            row["case"],
            row["dtype"],
            row["back_end"] if row["provider"] == "peer" else f"**{row['back_end']}**",
            spread(row),
            ", ".join(f"{ballpark(rate)} {unit}" for unit, rate in row.get("rate", {}).items()),
            ", ".join(f"{ballpark(ratio)}× {peer}" for peer, ratio in row.get("ratios", {}).items()),
            f"{100 * floor['fraction']:.2g} % ({floor['bound']})" if floor else "",
            size(row.get("peak_bytes")) if row["unit"] == "ms" else "",
            names[machine(row)],
            commit(row),
            reference(row),
        ])  # fmt: skip
    titles = [
        "case",
        "dtype",
        "**ours** / peer",
        "median [p20 – p80]",
        "rate",
        "against",
        "of the floor",
        "peak",
        "machine",
    ]
    return table([*titles, "commit", "row"], lines)


def stages(rows: list[dict]) -> str:
    """Where the time goes."""
    lines = []
    for row in rows:
        if parts := row.get("stages"):
            total = sum(parts.values()) or 1.0
            shares = ", ".join(f"{name} {ballpark(ms)} ms ({100 * ms / total:.0f} %)" for name, ms in parts.items())
            lines.append([row["case"], row["dtype"], row["back_end"], shares, reference(row)])
    return table(["case", "dtype", "back end", "where the time goes", "row"], lines)


def scaling(rows: list[dict]) -> str:
    """The series behind the plots."""
    lines = []
    for row in rows:
        facts = row.get("facts", {})
        if row["provider"] != "ours" or not facts.get("series"):
            continue
        for provider, points in facts["series"].items():
            series = "; ".join(f"{x:,}: {ballpark(ms)}" for x, ms in points)
            line = [row["case"], row["dtype"], provider, facts["axis"], series]
            lines.append([*line, f"{facts['exponent'][provider]:.2f}", reference(row)])
    return table(["case", "dtype", "provider", "axis", "ms along the axis", "fitted exponent", "row"], lines)


def ceilings(rows: list[dict], names: dict[str, str]) -> str:
    """What each machine reached, by the newest of its rows that measured the same things."""
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if "ceilings" in row:
            found[(names[machine(row)], *row["ceilings"])] = row
    lines = [
        [name, ", ".join(f"{what} {ballpark(value)}" for what, value in row["ceilings"].items()), reference(row)]
        for (name, *_), row in sorted(found.items())
    ]
    return table(["machine", "ceilings (GB/s, GFLOP/s)", "row"], lines)


def skipped(rows: list[dict]) -> str:
    """Peers that couldn't run, with the reason."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if "skipped" in row:
            found.setdefault((row["back_end"], f"{row['kind']} {row['what']}", row["skipped"]), []).append(row)
    lines = [
        [peer, what, ", ".join(dict.fromkeys(row["case"] for row in group)), reason, reference(group[-1])]
        for (peer, what, reason), group in found.items()
    ]
    return table(["peer", "what", "cases", "reason", "row"], lines)


def accuracy(rows: list[dict], names: dict[str, str], digits: int = 4) -> str:
    """Rows of metrics: quality of the weights, or exactness."""
    lines = [
        [
            row["case"],
            row["model"],
            row["dtype"],
            row["photos"],
            plain(row["metrics"], digits),
            names[machine(row)],
            commit(row),
            reference(row),
        ]
        for row in rows
    ]
    return table(["what", "model", "dtype", "photos", "measured", "machine", "commit", "row"], lines)


def commands(rows: list[dict]) -> str:
    """How to repeat each row, folded away."""
    if not rows:
        return ""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["command"], {})[row["at"]] = row
    lines = [f"* {', '.join(map(reference, group.values()))}: `{command}`" for command, group in found.items()]
    return "\n".join(["<details><summary>The command behind each row</summary>", "", *lines, "", "</details>"])


def machines(rows: list[dict]) -> dict[str, str]:
    """Machine with its versions, as JSON of what the table shows -> its short name."""
    return {key: f"M{number}" for number, key in enumerate(dict.fromkeys(map(machine, rows)), 1)}


def machine(row: dict) -> str:
    host = row.get("host") or {}
    about = ", ".join(str(part) for part in (host.get("cpu"), _cores(host), host.get("isa")) if part)
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return json.dumps([row["device"], about, row["threads"], versions])


def reference(row: dict, folder: str = "") -> str:
    """A link to the row's line in its file."""
    file, line = row["at"].split(":")
    return f"[{file.removesuffix('.jsonl')}:{line}]({folder}results/{file}#L{line})"


def commit(row: dict) -> str:
    return f"`{row['commit'][:7]}`" + ("+" if row["dirty"] else "")


def table(titles: list[str], lines: list[list[object]]) -> str:
    """A Markdown table without the columns that are empty throughout; nothing if there are no lines."""
    kept = [i for i, _ in enumerate(titles) if any(line[i] not in ("", None) for line in lines)]
    if not lines:
        return ""
    body = [[_cell(line[i]) for i in kept] for line in lines]
    rows = [[titles[i] for i in kept], ["---"] * len(kept), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def ballpark(value: float) -> str:
    """Three digits, or all of those before the point."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def amount(row: dict, quantile: str = "p50") -> str:
    """A time or a number of bytes with its unit."""
    return f"{ballpark(row[quantile])} ms" if row["unit"] == "ms" else size(row[quantile])


def spread(row: dict) -> str:
    low, high = (amount(row, quantile) for quantile in ("p20", "p80"))
    return amount(row) if low == high else f"{amount(row)} [{low.removesuffix(' ms')} – {high.removesuffix(' ms')}]"


def size(count: float | None) -> str:
    return "" if count is None else f"{ballpark(count / 2**20)} MiB"


def plain(metrics: dict[str, float], digits: int = 4) -> str:
    return ", ".join(f"{name} {value:.{digits}g}" for name, value in metrics.items())


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts numbers inside a text by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _cores(host: dict) -> str:
    return f"{host['cores']} cores" if host.get("cores") else ""


def _place(row: dict) -> tuple[str, int]:
    return row["device"], row["threads"]


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
