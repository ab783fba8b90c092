"""A study once more with what its committed result has chosen: whether its table holds, and what that costs."""

import json
import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from .errors import UserError
from .markdown import join
from .markdown import table as markdown_table
from .study_overview import brief, compared, of_the_paper
from .study_results import place_of, result_name
from .study_tables import UNITS, row_label, values


HEADER = (
    "recipe",
    "what it is about, then → now",
    "against, then → now",
    "farthest row",
    "core-hours",
    "searched",
    "now on",
)
TOGETHER = (
    "Core-hours are of all that runs take, from reading their data to the last evaluation: together {hours:.1f}, so "
    '{two:.1f} hours on two cores. "Searched" is what the command takes without `--chosen`, by what the search added to '
    "training when the committed table was made: {paper:.1f} hours on two cores for the paper's tables, {beyond:.1f} for "
    "the others."
)


def repeated_table(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Each row of a result beside the same of another that had its words already, and by how much its mean differs."""
    lines = []
    for row, then, difference in _rows(here, there):
        told = f"{difference:+.3f}" if math.isfinite(difference) else ""
        lines.append([row_label(row), values(then["runs"], "value"), values(row["runs"], "value"), told])
    return markdown_table(("row", "there", f"here ({UNITS[here['metric']]})", "difference"), lines)


def repeats_section(
    repeats: Iterable[dict[str, Any]], results: Iterable[dict[str, Any]], recipes: Collection[str]
) -> str:
    """What the guide shows of all studies that were run again: a line each, and what they took together.

    Args:
        repeats: results of `reproduce.py --chosen`, committed.
        results: the results that these repeat, among others.
        recipes: names of all studies that have a result of the size of two CPU cores.
    """
    repeats = sorted(repeats, key=lambda repeat: repeat["name"])
    found = {result_name(result): result for result in results}
    lines = [_line(repeat, found[result_name(repeat)]) for repeat in repeats]
    parts = [markdown_table(HEADER, lines)]
    if repeats:
        hours = sum(map(_core_hours, repeats))
        paper, beyond = (
            sum(_searched(repeat, found[result_name(repeat)]) for repeat in repeats if of_the_paper(repeat) == which)
            for which in (True, False)
        )
        parts.append(TOGETHER.format(hours=hours, two=hours / 2, paper=paper / 2, beyond=beyond / 2))
    if missing := sorted({*recipes} - {repeat["name"] for repeat in repeats}):
        parts.append(f"Not run again so far: {join([f'`{name}`' for name in missing])}.")
    return "\n\n".join(part for part in parts if part)


def repeated_said(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """What a recipe's header says of it."""
    device = "; ".join(repeat["device"])
    return f"with --chosen, {_core_hours(repeat):.2f} core-hours, {device}; farthest row: {_farthest(repeat, result)}"


def check_repeats(repeat: dict[str, Any], results: Iterable[dict[str, Any]]) -> None:
    """See that a repeat is of the result that is committed now.

    Raises:
        UserError: it is of none, or of one that another has replaced.
    """
    result = next((result for result in results if result_name(result) == result_name(repeat)), None)
    if result is None or result["finished"] != repeat["repeats"]:
        committed = "none" if result is None else f"that of {result['finished']}"
        raise UserError(
            f"{repeat['name']}: what was run again is the result of {repeat['repeats']}, and committed is {committed}: "
            "run it again with --chosen."
        )


def read_repeats(folder: str | Path) -> list[dict[str, Any]]:
    """Every repeat in a folder, `model_cards/repeats`."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]


def _line(repeat: dict[str, Any], result: dict[str, Any]) -> list[str]:
    now, then = ({(row["row"], place_of(row)): row for row in one["rows"]} for one in (repeat, result))

    def both(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        key = row["row"], place_of(row)
        return f"{brief(result, then[key])} → {brief(repeat, now[key])} ({row_label(row)})"

    ours, against, _ = compared(result)
    name = repeat["name"]
    return [
        f"[{name}](../scripts/recipes/{name}.yaml)",
        both(ours),
        both(against),
        _farthest(repeat, result),
        f"{_core_hours(repeat):.2f}",
        f"{_searched(repeat, result):.2f}",
        "; ".join(repeat["device"]),
    ]


def _farthest(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """The row whose mean differs most, by how much, and the rows that diverge only once."""
    rows = list(_rows(repeat, result))
    told = []
    if measured := [found for found in rows if math.isfinite(found[2])]:
        row, then, _ = max(measured, key=lambda found: abs(found[2]))
        means = f"{values(then['runs'], 'value')} → {values(row['runs'], 'value')}"
        told.append(f"{row_label(row)}, {means} {UNITS[repeat['metric']]}")
    lost = [row_label(row) for row, then, _ in rows if _diverged(row) != _diverged(then)]
    return "; ".join([*told, *(f"{label} diverges otherwise" for label in lost)])


def _rows(here: dict[str, Any], there: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    """Each row here, the same there, and the difference of their means; NaN where one of them has none."""
    cells = {(row["row"], place_of(row)): row for row in there["rows"]}
    for row in here["rows"]:
        then = cells[row["row"], place_of(row)]
        found = [[run["value"] for run in one["runs"] if run["value"] is not None] for one in (row, then)]
        yield row, then, fmean(found[0]) - fmean(found[1]) if all(found) else math.nan


def _diverged(row: dict[str, Any]) -> int:
    return sum(run["diverged"] is not None for run in row["runs"])


def _core_hours(repeat: dict[str, Any]) -> float:
    return repeat["core_seconds"] / 3600


def _searched(repeat: dict[str, Any], result: dict[str, Any]) -> float:
    """Core-hours that the search would take as well, where the repeat was: as many times more as there."""
    chosen = sum(run["training_seconds"] for row in result["rows"] for run in row["runs"])
    bases = sum(made["training_seconds"] for made in result["bases"].values())
    return _core_hours(repeat) * result["training_seconds"] / (chosen + bases)
