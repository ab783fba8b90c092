"""A study once more with what its committed result has chosen: whether its table holds, and what it costs."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .errors import UserError
from .markdown import join
from .markdown import table as markdown_table
from .runs import is_processor
from .study_overview import about_signals, compared, ending, of_the_paper
from .study_results import cost, measured, place_of, places, result_name, tuned
from .study_tables import DIGITS, UNITS, as_shown, row_label, values


HEADER = (
    *("recipe", "our row, then → now", "compared with, then → now", "all rows", "seeds, then → now"),
    *("machine, then → now", "core-hours", "with `--search` (estimate)"),
)
# A repeat, and the committed result that it is of.
Pair = tuple[dict[str, Any], dict[str, Any]]


def is_searched(result: dict[str, Any]) -> bool:
    """Whether a study's result comes from a search. Older repeats lack `repeats`, and are marked incomplete."""
    return result["complete"] and "repeats" not in result


def repeated_table(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Each row of a result beside the same of another that had its words already, and by how much its mean differs;
    of a study about signals, how these travel.
    """
    if about_signals(here):
        lines = [[row_label(row), ending(there, then), ending(here, row)] for row, then, _ in _rows(here, there)]
        return markdown_table(("row", "then", "now"), lines)
    lines = []
    for row, then, difference in _rows(here, there):
        ends = [values(one["runs"], "value", here["metric"]) for one in (then, row)]
        told = f"{difference:+.{DIGITS[here['metric']]}f}" if math.isfinite(difference) else ""
        lines.append([row_label(row), *ends, told])
    return markdown_table(("row", "then", f"now ({UNITS[here['metric']]})", "difference"), lines)


def unlike(here: dict[str, Any], there: dict[str, Any], changed: Iterable[str] = ()) -> str:
    """What a result differs in from the other one, so that their numbers need not agree; empty if in nothing.

    Args:
        here, there: `summarise`'s.
        changed: words that were said over the recipe, `section.key: OLD -> NEW`.
    """
    data = ["the data, for example another Python's standard library or other copies of images"]
    return "; ".join([*(data if _identity(here["data"]) != _identity(there["data"]) else []), *changed])


def can_be_kept(repeat: dict[str, Any]) -> bool:
    """Whether it was made as those in the guide are: on CPUs, at the size for them."""
    return repeat["size"] == "cpu" and all(map(is_processor, repeat["device"]))


def original_of(repeat: dict[str, Any], results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The committed result that a repeat is of.

    Raises:
        UserError: it is of none that is committed now, or not the same but for machine, versions and seeds.
    """
    name = result_name(repeat)
    result = next((result for result in results if result_name(result) == name), None)
    wrong = None
    if not can_be_kept(repeat):
        raise UserError(f"this repeat of {name} is not kept: only those on CPUs are, at the size for them")
    if result is None or result["finished"] != repeat["repeats"]:
        wrong = "is not of the result that is committed"
    elif _places(repeat).keys() != _places(result).keys():
        wrong = "has other rows than the committed result"
    elif differs := unlike(repeat, result, repeat.get("changed", ())):
        wrong = f"differs in {differs}"
    elif "core_seconds" not in repeat:
        wrong = "has runs of unknown time (old, resumed, or with more --jobs than cores): delete these"
    if wrong is not None:
        raise UserError(f"this repeat of {name} {wrong}. Run: python scripts/reproduce.py scripts/recipes/{name}.yaml")
    return result


def repeat_name(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """What a committed repeat's file is called: one with the seeds that have chosen, and others."""
    seeds = [] if repeat["seeds"] == result["seeds"] else map(str, repeat["seeds"])
    return "-".join([result_name(repeat), *seeds])


def read_repeats(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """Every repeat in a folder, `model_cards/repeats`, by its file."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}


def repeats_section(pairs: Iterable[Pair], results: Iterable[dict[str, Any]]) -> str:
    """What the guide shows of all studies that were run again: a line each, and what they took together.

    Args:
        pairs: what is committed.
        results: of all studies, at the default size.
    """
    pairs = list(pairs)
    parts = [markdown_table(HEADER, [_line(*pair) for pair in pairs]), *_together(pairs)]
    again = {repeat["name"] for repeat, _ in pairs}
    missing = [result for result in results if result["name"] not in again]
    for on_cpus, why in ((True, "so far"), (False, "which are for a GPU: their headers say what they cost")):
        those = [result for result in missing if all(map(is_processor, result["device"])) == on_cpus]
        if names := sorted(f"`{result['name']}`" for result in those):
            parts.append(f"No repeat is kept of {join(names)}{' ' if on_cpus else ', '}{why}.")
    return "\n\n".join(part for part in parts if part)


def repeated_said(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """What a recipe's header says of it."""
    ours, *_ = compared(result)
    seeds = "" if repeat["seeds"] == result["seeds"] else f" with seeds {_seeds(repeat)}"
    return f"{_both(ours, repeat, result)}{seeds}"


def cost_said(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """What a recipe's header says of what its study takes on two cores, without a search and with it."""
    here = _duration(_on_two_cores(repeat, _core_hours(repeat)))
    searched = _duration(_on_two_cores(repeat, _hours_with_search(repeat, result)))
    more = f"; with --search about {searched}" if tuned(result) else ""
    return f"{here} on two cores ({'; '.join(repeat['device'])}){more}"


def _line(repeat: dict[str, Any], result: dict[str, Any]) -> list[str]:
    ours, against, _ = compared(result)
    name = repeat["name"]
    return [
        f"[{name}](../scripts/recipes/{name}.yaml)",
        _both(ours, repeat, result),
        "" if against is None else _both(against, repeat, result),
        _moved(repeat, result),
        f"{_seeds(result)} → {_seeds(repeat)}",
        " → ".join("; ".join(one["device"]) for one in (result, repeat)),
        f"{_core_hours(repeat):.2f}",
        f"{_hours_with_search(repeat, result):.2f}",
    ]


def _together(pairs: list[Pair]) -> Iterator[str]:
    """Sums of the last two columns, of each study once."""
    if not pairs:
        return
    once = {repeat["name"]: (repeat, result) for repeat, result in reversed(pairs)}.values()
    hours = sum(_on_two_cores(repeat, _core_hours(repeat)) for repeat, _ in once)
    yield (
        "Core-hours cover each run, from reading its data to its last evaluation; timing the steps comes on top. All "
        f"these studies ({len(once)}) together take {hours:.1f} hours on two cores, a run on each."
    )
    for wanted, which in ((True, "the studies of the paper's tables"), (False, "those of questions beyond the paper")):
        if those := [pair for pair in once if of_the_paper(pair[1]) == wanted]:
            hours = sum(_on_two_cores(pair[0], _hours_with_search(*pair)) for pair in those)
            yield (
                f"With `--search`, {which} that are listed here ({len(those)}) would take about {hours:.1f} hours on "
                "two cores, if it costs the same multiple as when they were tuned."
            )


def _both(row: dict[str, Any], repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """How a row ended then and now."""
    then, now = (_places(one)[row["row"], place_of(row)] for one in (result, repeat))
    return f"{row_label(row)}: {ending(result, then)} → {ending(repeat, now)}"


def _moved(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """By how much the means of rows differ, and which most; whether their order is the same; and where another number
    of seeds diverged.
    """
    if about_signals(result):
        return _signals_moved(repeat, result)
    rows, told = list(_rows(repeat, result)), []
    if comparable := [found for found in rows if math.isfinite(found[2])]:
        unit = "points" if repeat["metric"] == "accuracy" else UNITS[repeat["metric"]]
        middle = f"{median(abs(difference) for *_, difference in comparable):.{DIGITS[repeat['metric']]}f} {unit}"
        most = max(comparable, key=lambda found: abs(found[2]))[0]
        told.append(f"means differ by {middle} in the median, most in {_both(most, repeat, result)}")
        told.append("the same order" if _order(repeat) == _order(result) else "**another order**")
    for row, then, _ in rows:
        shares = [fmean(run["diverged"] is not None for run in one["runs"]) for one in (then, row)]
        if shares[0] != shares[1]:
            told.append(f"{row_label(row)}: {_diverged(then)} → {_diverged(row)} diverged")
    return "; ".join(told)


def _signals_moved(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """By what factor the first seed's chi at the end differs, and where most."""

    def chi(row: dict[str, Any]) -> float | None:
        return row["runs"][0].get("signal", {}).get("end", {}).get("jacobian", {}).get("chi")

    chis = [(row, chi(then), chi(row)) for row, then, _ in _rows(repeat, result)]
    factors = [(max(now / then, then / now), row) for row, then, now in chis if now and then]
    if not factors:
        return ""
    middle = median(factor for factor, _ in factors)
    most = max(factors, key=lambda found: found[0])[1]
    return f"chi at the end by a factor of {middle:.2f} in the median, most in {_both(most, repeat, result)}"


def _rows(here: dict[str, Any], there: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    """Each row here, the same there, and the difference of their means; NaN where one of them has none."""
    before = _places(there)
    for key, row in _places(here).items():
        then = before[key]
        found = [[as_shown(value, here["metric"]) for value in measured(one["runs"])] for one in (row, then)]
        yield row, then, fmean(found[0]) - fmean(found[1]) if all(found) else math.nan


def _order(result: dict[str, Any]) -> dict[tuple, list[str]]:
    """The rows at each value of `across`, best first, and last those that all diverged."""
    return {
        place: [row["row"] for row in sorted(rows, key=lambda row: cost(row, result["metric"]))]
        for place, rows in places(result).items()
    }


def _places(result: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    return {(row["row"], place_of(row)): row for row in result["rows"]}


def _identity(data: dict[str, Any]) -> Any:
    """What tells data from other data: of images their pixels and labels, whatever version of the package read them."""
    return data.get("stored") or data.get("fingerprint")


def _diverged(row: dict[str, Any]) -> str:
    return f"{sum(run['diverged'] is not None for run in row['runs'])} of {len(row['runs'])}"


def _on_two_cores(repeat: dict[str, Any], core_hours: float) -> float:
    """Hours with a run on each: not fewer than the longest run takes."""
    runs = [run for row in repeat["rows"] for run in row["runs"]]
    longest = max(run.get("wall_seconds") or run["training_seconds"] for run in runs)
    return max(core_hours / 2, longest / 3600)


def _duration(hours: float) -> str:
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h"


def _seeds(result: dict[str, Any]) -> str:
    return ", ".join(map(str, result["seeds"]))


def _core_hours(repeat: dict[str, Any]) -> float:
    return repeat["core_seconds"] / 3600


def _hours_with_search(repeat: dict[str, Any], result: dict[str, Any]) -> float:
    """Core-hours of the whole command, search included, where the repeat was: as many times more as there."""
    chosen = sum(run["training_seconds"] for row in result["rows"] for run in row["runs"])
    bases = sum(made["training_seconds"] for made in result["bases"].values())
    seeds = len(result["seeds"]) / len(repeat["seeds"])
    return seeds * _core_hours(repeat) * result["training_seconds"] / (chosen + bases)
