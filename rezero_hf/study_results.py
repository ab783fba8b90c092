"""What the runs of a study come to: one JSON, from which its tables and pictures are made."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from .errors import UserError, one_line
from .recipe import FAMILIES, changed_words, load_recipe
from .study_curves import finite, first_at
from .study_plan import Cell, Row, Study, as_cost, load_study
from .traces import scrub


# What a result keeps of the study itself.
WORDS = ("item", "metric", "baseline", "seeds", "search", "target", "target_at", "toy", "ours", "against", "note")


def summarise(
    name: str,
    size: str,
    study: Study,
    runs: dict[str, list[dict[str, Any]]],
    step_seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Everything a table, a figure or a card needs of a study.

    Args:
        name: of the recipe.
        size: `cpu`, `full` or `smoke`.
        study: what was run.
        runs: `studies.run_study`'s; cells that are missing are left out.
        step_seconds: cell -> seconds of a step, all measured by turns (`step_times.step_times`). Without them times
            are the runs' own.

    Returns:
        JSON: what the study is, provenance of one of its runs, what all of them took together, and for each cell its
        chosen words, whether the best lies inside what was tried, all attempts, the target, and the chosen runs with
        their curves.
    """
    cells = [cell for cell in study.cells() if cell.name in runs]
    rows = [_row(study, cell, runs[cell.name]) for cell in cells]
    for cell, row in zip(cells, rows, strict=True):
        row["step_seconds"] = (step_seconds or {}).get(cell.name)
        # Nets of other depths end elsewhere, so each is held against the baseline of its own.
        row["target"] = _target(study, [other for other in rows if place_of(other) == place_of(row)])
        for run in row["runs"]:
            # Whatever it passed on the way, a run that diverged has not arrived.
            curve = [] if run["diverged"] else run["curve"]
            run["to_target"] = reached = first_at(curve, study.metric, row["target"])
            if reached and row["step_seconds"]:
                reached["seconds"] = reached["steps"] * row["step_seconds"]
    bases = {name: runs[f"bases/{name}"][0] for name in study.bases if f"bases/{name}" in runs}
    every = [run for cell in cells for run in runs[cell.name]] + [*bases.values()]
    about = {word: getattr(study, word) for word in WORDS}
    about["bases"] = {
        name: {"set": study.bases[name]}
        | {word: run[word] for word in ("results", "steps", "flops", "training_seconds", "seed")}
        for name, run in bases.items()
    }
    about |= {word: every[0][word] for word in ("command", "recipe", "data")}
    # Runs of several sittings may differ in these.
    about |= {word: _distinct(run[word] for run in every) for word in ("versions", "git", "device", "threads")}
    result = {"name": name, "size": size, **about, "finished": max(run["finished"] for run in every)}
    result["training_seconds"] = round(sum(run["training_seconds"] for run in every))
    if all("wall_seconds" in run for run in every):
        result["core_seconds"] = round(sum(run["wall_seconds"] * run["threads"] for run in every))
    return scrub({**result, "complete": len(cells) == len(study.cells()), "rows": rows})


def strayed(result: dict[str, Any], path: str | Path, overrides: Iterable[str] = ()) -> list[str]:
    """Where a recipe says something else now than what a result was made of, as lines; none if it would be made again.

    Args:
        result: `summarise`'s.
        path: of the recipe.
        overrides: `section.key=value` over it, for all runs.
    """
    study = load_study(path, result["size"])
    # The others are about how it is told.
    decide = ("metric", "baseline", "seeds", "search", "target", "target_at", "toy")
    was = {word: result[word] for word in decide}
    was["bases"] = {name: made["set"] for name, made in result["bases"].items()}
    now = {word: getattr(study, word) for word in was}
    # Which of them are recorded shows in the runs.
    every = [run for row in result["rows"] for run in row["runs"]]
    was |= {word: any(word in run for run in every) for word in ("signal", "gates_off")}
    now |= {word: getattr(study, word) for word in ("signal", "gates_off")}
    changed = [f"study.{word}: {was[word]} -> {now[word]}" for word in was if was[word] != now[word]]
    cells = study.cells()
    there = [(row["row"], row["set"], row["first"], row["at"]) for row in result["rows"]]
    if there != [(cell.row, cell.spec.set, cell.spec.first, cell.at) for cell in cells]:
        return [*changed, "study.rows: others, or other words in them"]
    for cell, row in zip(cells, result["rows"], strict=True):
        for key, values in study.tuned(cell).items():
            tried = [run["set"].get(key) for run in row["tried"]]
            changed += [f"study.rows.{cell.row}: {key}: {one} was not tried" for one in values if one not in tried]
    first = result["rows"][0]
    setting = {**first["chosen"], "training.seed": study.seeds[0]}
    recipe = load_recipe(path, [*cells[0].overrides(setting), *overrides], full=result["size"] == "full")
    known = yaml.safe_load(result["recipe"])["model"]
    known.pop("model_type", None)
    # What follows from the data has to be as it was.
    config = FAMILIES[recipe.model_type][0](**{**known, **recipe.model})
    lines = changed_words(result["recipe"], recipe.resolved(config), finished=True)
    return [*changed, *(line for line in lines if not line.startswith("data.path"))]


def retold(result: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A result with what its recipe says now about how it is told: title, note, names of rows, what was reported, and
    which rows are compared. None of these decides a number.
    """
    study = load_study(path, result["size"])
    rows = [
        {**row, "label": study.rows[row["row"]].label, "reported": study.rows[row["row"]].reported}
        for row in result["rows"]
    ]
    return {**result, **{word: getattr(study, word) for word in ("item", "ours", "against", "note")}, "rows": rows}


def read_result(file: str | Path, name: str, size: str) -> dict[str, Any]:
    """`summarise`'s result in a file, of a recipe of that name, in that size.

    Raises:
        UserError: it is none.
    """
    try:
        result = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        if not {*WORDS, "bases", "recipe", "rows"} <= result.keys() or (result["name"], result["size"]) != (name, size):
            raise ValueError(f"no study {name} of the size {size}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: holds no result of this recipe in this size ({one_line(error)})") from error
    return result


def chosen_in(result: dict[str, Any], path: str | Path) -> dict[str, dict[str, Any]]:
    """What each cell of a recipe's study was tuned to in a result, by the cell's name.

    Args:
        result: `summarise`'s, of all rows.
        path: of the recipe.

    Raises:
        UserError: the recipe would not make it now.
    """
    if lines := strayed(result, path):
        raise UserError(
            f"{path} has changed since its rows were tuned ({'; '.join(lines)[:300]}): tune them anew with --search"
        )
    return {Cell(row["row"], Row(row["label"]), row["at"]).name: row["chosen"] for row in result["rows"]}


def result_name(result: dict[str, Any]) -> str:
    """What a committed study's file and page are called: each size has its own."""
    return result["name"] + ("" if result["size"] == "cpu" else f"-{result['size']}")


def _distinct(values: Iterable[Any]) -> list[Any]:
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _row(study: Study, cell: Cell, runs: list[dict[str, Any]]) -> dict[str, Any]:
    chosen = [run for run in runs if run["chosen"]]
    best = chosen[0]["set"]
    tried = [{"set": run["set"], "seed": run["seed"], "value": _value(run, study.metric)} for run in runs]
    inside = {}
    for key, value in best.items():
        beside = [run["set"] for run in runs if all(run["set"][other] == best[other] for other in best if other != key)]
        values = sorted({words[key] for words in beside if isinstance(words[key], int | float)})
        if len(values) > 1:
            # Below no warm-up there is nothing.
            inside[key] = (values[0] < value or value == 0) and value < values[-1]
    kept = ("seed", "parameters", "steps", "flops", "training_seconds", "peak_memory_bytes", "diverged", "curve")
    kept += ("signal", "gates_off", "threads", "wall_seconds")
    return {
        "row": cell.row,
        "label": cell.spec.label,
        "reported": cell.spec.reported,
        "at": cell.at,
        "set": cell.spec.set,
        "first": cell.spec.first,
        "chosen": best,
        "inside": inside,
        "tried": tried,
        "runs": [
            {word: run[word] for word in kept if word in run}
            | {"value": _value(run, study.metric), "test": _value(run, study.metric, "test")}
            | ({"alpha": run["alpha"]} if run["seed"] == study.seeds[0] else {})
            for run in chosen
        ],
    }


def _value(run: dict[str, Any], metric: str, split: str = "validation") -> float | None:
    value = run["results"].get(split, {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def _target(study: Study, rows: list[dict[str, Any]]) -> float | None:
    """The value to compare times at; `target_at` reads it off the baseline's mean curve."""
    base = next((row for row in rows if row["row"] == study.baseline), None)
    if study.target_at is None or base is None:
        return study.target
    at = study.target_at * max(run["steps"] for run in base["runs"])
    curves = [finite(run["curve"], study.metric) for run in base["runs"] if not run["diverged"]]
    read = [[[point[word] for point in curve] for word in ("step", study.metric)] for curve in curves if curve]
    return fmean(float(np.interp(at, *points)) for points in read) if read else None


def place_of(row: dict[str, Any]) -> tuple:
    """At which value of `across` a row stands; one without is nowhere."""
    at = row["at"].items()
    return tuple((key, "-".join(map(str, value)) if isinstance(value, list) else value) for key, value in at)


def places(result: dict[str, Any]) -> dict[tuple, list[dict[str, Any]]]:
    """A result's rows by where they stand."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(place_of(row), []).append(row)
    return found


def tuned(result: dict[str, Any]) -> bool:
    """Whether any row was; where none was, ends do not compare."""
    return any(row["chosen"] for row in result["rows"])


def measured(runs: Iterable[dict[str, Any]], word: str = "value") -> list[Any]:
    """One word of each run that has it: of `value` (default), those that ended with a number."""
    return [run[word] for run in runs if run[word] is not None]


def cost(row: dict[str, Any], metric: str) -> float:
    """A row's mean over seeds, less being better; infinite where a run has no number, for the others were lucky."""
    found = measured(row["runs"])
    return as_cost(metric, fmean(found)) if found and len(found) == len(row["runs"]) else math.inf
