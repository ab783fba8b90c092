"""A study once more with what its committed result has chosen: whether its table holds, and what that costs."""

import json
import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .errors import UserError
from .markdown import join
from .markdown import table as markdown_table
from .runs import is_processor
from .study_overview import about_signals, brief, compared, of_the_paper
from .study_results import place_of, result_name
from .study_tables import UNITS, row_label, values


HEADER = (
    *("recipe", "what it is about, then → now", "against, then → now", "means of all rows", "seeds then → now"),
    *("core-hours", "searched", "now on"),
)
# A repeat, and the committed result that it is of.
Pair = tuple[dict[str, Any], dict[str, Any]]


def is_searched(result: dict[str, Any]) -> bool:
    """Whether it is of a search. Repeats from before they were kept have no word for what they repeat."""
    return result["complete"] and "repeats" not in result


def repeated_table(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Each row of a result beside the same of another that had its words already, and by how much its mean differs."""
    lines = []
    for row, then, difference in _rows(here, there):
        told = f"{difference:+.3f}" if math.isfinite(difference) else ""
        lines.append([row_label(row), values(then["runs"], "value"), values(row["runs"], "value"), told])
    return markdown_table(("row", "there", f"here ({UNITS[here['metric']]})", "difference"), lines)


def repeated(repeat: dict[str, Any], results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The committed result that a repeat is of.

    Raises:
        UserError: it is of none that is committed now, or not the same but for machine, versions and seeds.
    """
    name = result_name(repeat)
    result = next((result for result in results if result_name(result) == name), None)
    wrong = None
    if repeat["size"] != "cpu" or not all(map(is_processor, repeat["device"])):
        wrong = "only repeats on CPUs are kept, of their size"
    elif result is None or result["finished"] != repeat["repeats"]:
        wrong = "what it repeats is not what is committed"
    elif _places(repeat).keys() != _places(result).keys():
        wrong = "it has other rows than what is committed"
    elif _identity(repeat["data"]) != _identity(result["data"]):
        wrong = "it had other data, as another Python's standard library"
    elif "core_seconds" not in repeat:
        wrong = "it has runs from before their time was kept: delete these"
    if wrong is not None:
        raise UserError(
            f"{name}, run again: {wrong}. Run python scripts/reproduce.py scripts/recipes/{name}.yaml --chosen "
            f"model_cards/results/{name}.json"
        )
    return result


def repeat_name(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """What a committed repeat's file is called: one with the seeds that have chosen, and others."""
    seeds = [] if repeat["seeds"] == result["seeds"] else map(str, repeat["seeds"])
    return "-".join([result_name(repeat), *seeds])


def read_repeats(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """Every repeat in a folder, `model_cards/repeats`, by its file."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}


def repeats_section(pairs: Iterable[Pair], recipes: Collection[str]) -> str:
    """What the guide shows of all studies that were run again: a line each, and what they took together.

    Args:
        pairs: what is committed.
        recipes: names of all studies that have a result of the size of two CPU cores.
    """
    pairs = list(pairs)
    parts = [markdown_table(HEADER, [_line(*pair) for pair in pairs]), *_together(pairs)]
    if missing := sorted({*recipes} - {repeat["name"] for repeat, _ in pairs}):
        parts.append(f"No repeat is kept of {join([f'`{name}`' for name in missing])}.")
    return "\n\n".join(part for part in parts if part)


def repeated_said(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """What a recipe's header says of it."""
    ours, *_ = compared(result)
    seeds = "" if repeat["seeds"] == result["seeds"] else f" and seeds {_seeds(repeat)}"
    cost = f"{_core_hours(repeat):.2f} core-hours, {'; '.join(repeat['device'])}"
    return f"with --chosen{seeds}: {_both(ours, repeat, result)}; {cost}"


def _line(repeat: dict[str, Any], result: dict[str, Any]) -> list[str]:
    ours, against, _ = compared(result)
    name = repeat["name"]
    return [
        f"[{name}](../scripts/recipes/{name}.yaml)",
        _both(ours, repeat, result),
        "" if against is None else _both(against, repeat, result),
        _moved(repeat, result),
        f"{_seeds(result)} → {_seeds(repeat)}",
        f"{_core_hours(repeat):.2f}",
        f"{_searched(repeat, result):.2f}",
        "; ".join(repeat["device"]),
    ]


def _together(pairs: list[Pair]) -> Iterator[str]:
    """Sums of the columns, each study counted once."""
    once = list({repeat["name"]: (repeat, result) for repeat, result in pairs}.values())
    if not once:
        return
    hours = sum(_core_hours(repeat) for repeat, _ in once)
    studies = f"{len(once)} {'studies' if len(once) > 1 else 'study'}"
    searched = [
        f"{sum(_searched(*pair) for pair in those) / 2:.1f} for the {len(those)} {which}"
        for wanted, which in ((True, "of the paper's tables"), (False, "of questions beyond it"))
        if (those := [pair for pair in once if of_the_paper(pair[1]) == wanted])
    ]
    yield (
        "Core-hours are of all that runs take, from reading their data to the last evaluation. The "
        f"{studies} here took {hours:.1f}, so {hours / 2:.1f} hours on two cores. "
        '"Searched" is an estimate of what the command takes without `--chosen`, by what the search added to training '
        f"when the committed table was made. In hours on two cores: {join(searched)}."
    )


def _both(row: dict[str, Any], repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """How a row ended then and now."""
    then, now = (_places(one)[row["row"], place_of(row)] for one in (result, repeat))
    return f"{row_label(row)}: {brief(result, then)} → {brief(repeat, now)}"


def _moved(repeat: dict[str, Any], result: dict[str, Any]) -> str:
    """By how much the means of rows differ, and which most; and where another number of seeds diverged."""
    if about_signals(result):
        return ""
    rows, told = list(_rows(repeat, result)), []
    if measured := [found for found in rows if math.isfinite(found[2])]:
        size = {"accuracy": "{:.1f} %"}.get(repeat["metric"], f"{{:.3f}} {UNITS[repeat['metric']]}")
        scale = 100 if repeat["metric"] == "accuracy" else 1
        middle = size.format(scale * median(abs(difference) for *_, difference in measured))
        most = max(measured, key=lambda found: abs(found[2]))[0]
        told.append(f"differ by {middle} in the median, most in {_both(most, repeat, result)}")
    lost = [(row_label(row), _diverged(then), _diverged(row), len(row["runs"])) for row, then, _ in rows]
    told += [f"{label}: {before} → {now} of {of} diverged" for label, before, now, of in lost if before != now]
    return "; ".join(told)


def _rows(here: dict[str, Any], there: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], float]]:
    """Each row here, the same there, and the difference of their means; NaN where one of them has none."""
    for key, row in _places(here).items():
        then = _places(there)[key]
        found = [[run["value"] for run in one["runs"] if run["value"] is not None] for one in (row, then)]
        yield row, then, fmean(found[0]) - fmean(found[1]) if all(found) else math.nan


def _places(result: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    return {(row["row"], place_of(row)): row for row in result["rows"]}


def _identity(data: dict[str, Any]) -> Any:
    """What tells data from other data: of images their pixels and labels, whatever version of the package read them."""
    return data.get("stored") or data.get("fingerprint")


def _diverged(row: dict[str, Any]) -> int:
    return sum(run["diverged"] is not None for run in row["runs"])


def _seeds(result: dict[str, Any]) -> str:
    return ", ".join(map(str, result["seeds"]))


def _core_hours(repeat: dict[str, Any]) -> float:
    return repeat["core_seconds"] / 3600


def _searched(repeat: dict[str, Any], result: dict[str, Any]) -> float:
    """Core-hours of the whole command, search included, where the repeat was: as many times more as there."""
    chosen = sum(run["training_seconds"] for row in result["rows"] for run in row["runs"])
    bases = sum(made["training_seconds"] for made in result["bases"].values())
    seeds = len(result["seeds"]) / len(repeat["seeds"])
    return seeds * _core_hours(repeat) * result["training_seconds"] / (chosen + bases)
