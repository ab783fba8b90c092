"""What the runs of a study come to: one JSON, and the tables made from it. Diverged runs are shown as such."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .markdown import table as markdown_table
from .studies import METRICS, Cell, Study, short
from .traces import scrub


CARD = """# {item}

Mean and standard deviation over seeds, on validation data unless said otherwise. Seconds are of training, on cores that
other runs may have shared. What the paper or its authors' notebooks report is quoted and was not checked against the
paper; it is of another size, so only the order of rows compares.

{tuning}

{table}

{pictures}

{how}

Made from `model_cards/results/{source}` by `scripts/report.py`, like every number here.
"""
TUNED = (
    'Every row was tuned by the same rule on the first seed; "edge" marks a word whose best value is the last tried.'
)
NOT_TUNED = "Rows were not tuned and have the same words but for what they are: this is not about where they end."
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats", "accuracy": "accuracy"}


def summarise(name: str, size: str, study: Study, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Everything a table, a figure or a card needs of a study.

    Args:
        name: of the recipe.
        size: `cpu`, `full` or `smoke`.
        study: what was run.
        runs: `studies.run_study`'s; cells that are missing are left out.

    Returns:
        JSON: what the study is, provenance of one of its runs, the target, and for each cell its chosen words, whether
        the best lies inside what was tried, all attempts, and the chosen runs with their curves.
    """
    cells = [cell for cell in study.cells() if cell.name in runs]
    rows = [_row(study, cell, runs[cell.name]) for cell in cells]
    target = _target(study, rows)
    for row in rows:
        for run in row["runs"]:
            run["to_target"] = None if target is None else first_at(run["curve"], study.metric, target)
    every = [run for cell in cells for run in runs[cell.name]]
    about = {
        word: getattr(study, word) for word in ("item", "metric", "baseline", "seeds", "search", "target_at", "toy")
    }
    about |= {word: every[0][word] for word in ("command", "recipe", "data")}
    # Runs of several sittings may differ in these.
    about |= {word: _distinct(run[word] for run in every) for word in ("versions", "git", "device", "threads")}
    result = {"name": name, "size": size, **about, "finished": max(run["finished"] for run in every)}
    result["training_seconds"] = round(sum(run["training_seconds"] for run in every))
    return scrub({**result, "complete": len(cells) == len(study.cells()), "target": target, "rows": rows})


def result_name(result: dict[str, Any]) -> str:
    """What a committed study's file and page are called: each size has its own."""
    return result["name"] + ("" if result["size"] == "cpu" else f"-{result['size']}")


def _distinct(values: Iterable[Any]) -> list[Any]:
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def first_at(curve: list[dict[str, Any]], metric: str, target: float) -> dict[str, float] | None:
    """Steps and training seconds at which a curve first reaches a value, between two evaluations by a straight line.

    Returns:
        `steps` and `seconds`; None if it never does.
    """
    sign = 1 if METRICS[metric] else -1
    points = finite(curve, metric)
    for before, after in zip([points[0], *points] if points else [], points, strict=False):
        if sign * (after[metric] - target) <= 0:
            change = before[metric] - after[metric]
            share = (before[metric] - target) / change if change else 1.0
            read = {"steps": "step", "seconds": "training_seconds"}
            return {name: before[key] + share * (after[key] - before[key]) for name, key in read.items()}
    return None


def study_table(result: dict[str, Any]) -> str:
    """A study as a Markdown table: mean and spread over seeds, steps and time to the target, and what was chosen."""
    unit, aimed = UNITS[result["metric"]], result["target"] is not None
    header = ["row", "reported", f"validation ({unit})", "test", "seconds"]
    header[4:4] = [f"steps to {result['target']:.3g}", "speed-up", "seconds to it"] if aimed else []
    measured = {word for row in result["rows"] for run in row["runs"] for word in run}
    off, signal = "gates_off" in measured, "signal" in measured
    header += ["all alpha 0", "seconds a step", "peak memory"] if off else []
    header += ["chi at the start", "lost", "chi at the end", "lost"] if signal else []
    lines = []
    base = {place_of(row): row for row in result["rows"] if row["row"] == result["baseline"]}
    for row in result["rows"]:
        finished = [run for run in row["runs"] if not run["diverged"]]
        label = ", ".join([row["label"], *(f"{short(key)} {value}" for key, value in row["at"].items())])
        cells = [label, row["reported"] or "", _values(row["runs"], "value"), _values(row["runs"], "test")]
        if aimed:
            cells += [
                _reach(row["runs"], "steps"),
                _speed_up(row, base.get(place_of(row))),
                _reach(row["runs"], "seconds"),
            ]
        cells.append(f"{fmean(run['training_seconds'] for run in finished):.0f}" if finished else "")
        if off:
            without = [run["gates_off"].get(result["metric"]) for run in row["runs"] if run.get("gates_off")]
            cells.append(_spread(without, "{:.3f}") if without else "")
            cells.append(f"{fmean(run['training_seconds'] / max(run['steps'], 1) for run in row['runs']):.2g}")
            cells.append(f"{max(run['peak_memory_bytes'] for run in row['runs']) / 1e9:.2f} GB")
        if signal:
            cells += [text for moment in ("start", "end") for text in _spectrum(row, moment)]
        lines.append([*cells, _chosen(row)])
    return markdown_table([*header, "tuned to"], lines)


def _spectrum(row: dict[str, Any], moment: str) -> tuple[str, str]:
    """Mean squared singular value of the first seed's input-output Jacobian, and the share of them that is 0."""
    found = row["runs"][0].get("signal", {}).get(moment)
    if found is None:
        return "", ""
    chi, lost = found["jacobian"]["chi"], found["jacobian"].get("share_zero")
    return "not finite" if chi is None else f"{chi:.3g}", "" if lost is None else f"{lost:.0%}"


def study_card(result: dict[str, Any], figures: Sequence[str]) -> str:
    """A page on one study: its table, its pictures, and how it was made.

    Args:
        result: `summarise`'s.
        figures: names of pictures in the folder `figures` beside the page.
    """
    versions = ["; ".join(f"{package} {version}" for package, version in found.items()) for found in result["versions"]]
    commits = [f"{git['sha'][:8]}{' with changes' if git['dirty'] else ''}" for git in result["git"] if git]
    facts = {
        "command": f"`{result['command']}`",
        "size": result["size"],
        "seeds": ", ".join(map(str, result["seeds"])),
        "device": "; ".join(result["device"]),
        "threads of a run": ", ".join(map(str, result["threads"])),
        "training of all runs": f"{result['training_seconds'] / 3600:.1f} hours",
        "versions": " / ".join(versions),
        "commits": ", ".join(commits) or "unknown",
    }
    pictures = "\n\n".join(f"![{name.partition('.')[0]}](figures/{name})" for name in figures)
    tuning = TUNED if any(row["chosen"] for row in result["rows"]) else NOT_TUNED
    return CARD.format(
        tuning=tuning,
        item=result["item"],
        table=study_table(result),
        pictures=pictures,
        how=markdown_table(("how it was made", ""), facts),
        source=f"{result_name(result)}.json",
    )


def studies_table(results: Iterable[dict[str, Any]]) -> str:
    """One line a study: what the paper reports of ReZero, what was measured of it, and of the best other row."""
    header = (
        "paper",
        "recipe",
        "reported for ReZero",
        "ReZero here",
        "best other row",
        "size, seeds, device",
        "figure",
    )
    lines = []
    for result in sorted(results, key=lambda result: result["name"]):
        sign = 1 if METRICS[result["metric"]] else -1
        last = place_of(result["rows"][-1])
        rows = [row for row in result["rows"] if place_of(row) == last]
        ours = next((row for row in rows if row["row"] == "rezero"), rows[-1])
        others = [row for row in rows if row is not ours and any(run["value"] is not None for run in row["runs"])]
        best = min(others, key=lambda row: sign * _mean(row), default=None)
        page = f"model_cards/{result_name(result)}"
        where = "".join(f", {short(key)} {value}" for key, value in last)
        cells = [
            f"[{result['item']}]({page}/README.md)",
            f"[{result['name']}](scripts/recipes/{result['name']}.yaml)",
            ours["reported"] or "",
            f"{_headline(result, ours)}{where}",
            "" if best is None else f"{_headline(result, best)} ({best['label']})",
            f"{result['size']}, {len(result['seeds'])}, {'; '.join(result['device'])}",
            f"[{_main_figure(result)}]({page}/figures/{_main_figure(result)}.png)",
        ]
        lines.append(cells)
    return markdown_table(header, lines) or ""


def _main_figure(result: dict[str, Any]) -> str:
    """Of the pictures that `study_figures.draw` makes, the one that shows the study's claim."""
    if "signal" in result["rows"][0]["runs"][0]:
        return "spectra_start"
    return "depths" if result["rows"][0]["at"] else "curves"


def _headline(result: dict[str, Any], row: dict[str, Any]) -> str:
    """What a study's line says of a row: signals where it is about them, else where it ends and how soon."""
    if "signal" in row["runs"][0]:
        return ", ".join(f"chi {_spectrum(row, moment)[0]} at the {moment}" for moment in ("start", "end"))
    return f"{_values(row['runs'], 'value')} {UNITS[result['metric']]}{_reached(result, row)}"


def _mean(row: dict[str, Any]) -> float:
    return fmean(run["value"] for run in row["runs"] if run["value"] is not None)


def _reached(result: dict[str, Any], row: dict[str, Any]) -> str:
    if result["target"] is None:
        return ""
    base = next((r for r in result["rows"] if r["row"] == result["baseline"] and place_of(r) == place_of(row)), None)
    ratio = _speed_up(row, base)
    return f"; {_reach(row['runs'], 'steps')} steps to {result['target']:.3g}" + (f", {ratio}" if ratio else "")


def _row(study: Study, cell: Cell, runs: list[dict[str, Any]]) -> dict[str, Any]:
    chosen = [run for run in runs if run["chosen"]]
    best = chosen[0]["set"]
    tried = [{"set": run["set"], "seed": run["seed"], "value": _value(run, study.metric)} for run in runs]
    inside = {}
    for key, value in best.items():
        beside = [run["set"] for run in runs if all(run["set"][other] == best[other] for other in best if other != key)]
        values = sorted({words[key] for words in beside if isinstance(words[key], int | float)})
        if len(values) > 1:
            inside[key] = values[0] < value < values[-1]
    kept = ("seed", "parameters", "steps", "flops", "training_seconds", "peak_memory_bytes", "diverged", "curve")
    kept += ("signal", "gates_off", "threads")
    return {
        "row": cell.row,
        "label": cell.spec.label,
        "reported": cell.spec.reported,
        "at": cell.at,
        "set": cell.spec.set,
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


def finite(curve: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The points of a curve at which the metric was measured and is a number."""
    return [point for point in curve if point.get(metric) is not None and math.isfinite(point[metric])]


def place_of(row: dict[str, Any]) -> tuple:
    """At which value of `across` a row stands; one without is nowhere."""
    return tuple(row["at"].items())


def _values(runs: list[dict[str, Any]], word: str) -> str:
    """Mean and spread of the runs that did not diverge, and how many did."""
    values = [run[word] for run in runs if run[word] is not None]
    lost = sum(run["diverged"] is not None for run in runs)
    if not values:
        return "diverged" if lost else ""
    return _spread(values, "{:.3f}") + (f" ({lost} of {len(runs)} diverged)" if lost else "")


def _reach(runs: list[dict[str, Any]], word: str) -> str:
    reached = [run["to_target"][word] for run in runs if run["to_target"] is not None]
    if not reached:
        return "never"
    return _spread(reached, "{:.0f}") + (f" ({len(reached)} of {len(runs)})" if len(reached) < len(runs) else "")


def _speed_up(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """How many times fewer steps than the baseline, by means over seeds; only if all runs of both arrive."""
    means = []
    for runs in ([] if base is None else base["runs"], row["runs"]):
        reached = [run["to_target"] for run in runs]
        means.append(fmean(found["steps"] for found in reached) if reached and all(reached) else math.nan)
    ratio = means[0] / means[1]
    return f"{ratio:.2f}x" if math.isfinite(ratio) else ""


def _chosen(row: dict[str, Any]) -> str:
    edge = [key for key, inside in row["inside"].items() if not inside]
    words = [f"{short(key)} {value}{' (edge)' if key in edge else ''}" for key, value in row["chosen"].items()]
    return ", ".join(words)


def _spread(values: list[float], form: str) -> str:
    mean = form.format(fmean(values))
    return f"{mean} ± {form.format(stdev(values))}" if len(values) > 1 else mean
