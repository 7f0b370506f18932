"""How our own commits changed the time of a case: the best row of each commit, oldest commit first."""

from __future__ import annotations

from collections.abc import Iterable

from tables import amount, ballpark, commit, natural, reference, table

__all__ = ["histories", "page"]

KEY = ("kind", "what", "case", "dtype", "device", "threads")


def histories(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Case -> the quickest row of ours at each commit, for the cases with two commits or more."""
    cases: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        if row["provider"] != "peer" and row.get("p50"):
            key = tuple(row[name] for name in KEY)
            cases.setdefault(key, {}).setdefault(commit(row), []).append(row)
    found = {}
    for key in sorted(cases, key=lambda key: [natural(str(part)) for part in key]):
        if len(cases[key]) > 1:
            found[key] = [min(group, key=_speed) for group in sorted(cases[key].values(), key=_age)]
    return found


def page(found: dict[tuple, list[dict]]) -> str:
    """A table of steps for each case."""
    parts = []
    for (kind, what, case, dtype, device, threads), steps in found.items():
        lines, before = [], None
        for row in steps:
            turns = row.get("ratios", {}).get(f"commit {before['commit']}") if before else None
            to_previous = f"{ballpark(turns)}× (in turns)" if turns else f"{_ratio(before, row)}×" if before else ""
            to_first = f"{_ratio(steps[0], row)}×" if before else ""
            lines.append(
                [
                    commit(row),
                    row.get("subject", ""),
                    row["back_end"],
                    amount(row),
                    to_first,
                    to_previous,
                    reference(row),
                ]
            )
            before = row
        title = f"**{kind} {what}, {case}**, {dtype}, {device}, {threads} threads"
        titles = ["commit", "subject", "back end", "median", "against the first", "against the one before", "row"]
        parts.append(f"{title}\n\n{table(titles, lines)}")
    if not parts:
        return ""
    note = (
        'The quickest of our back ends at each commit. "In turns": both commits were built and measured alternately; '
        "the other ratios compare separate runs of the same case on the same machine."
    )
    return "\n\n".join([note, *parts])


def _age(group: list[dict]) -> tuple[str, bool, str]:
    first = min(group, key=lambda row: row["date"])
    return first.get("committed") or first["date"], first["provider"] == "ours", first["date"]


def _speed(row: dict) -> float:
    return row["p50"]


def _ratio(before: dict, row: dict) -> str:
    return ballpark(before["p50"] / row["p50"])
