"""All studies at a glance: a line each for the README, and what a recipe's header says was measured."""

from collections.abc import Collection, Iterable
from typing import Any

import yaml

from .markdown import join
from .markdown import table as markdown_table
from .study_page import lossy
from .study_plan import short
from .study_results import cost, measured, places, result_name, tuned
from .study_tables import aim, baseline_of, diverged, reach, shown, spectrum, speed_up, values, with_unit


OF_THE_PAPER = (
    *("paper", "recipe", "reported for ReZero (not checked)", "ReZero here", "compared with"),
    *("size of ours, seeds, device", "figure"),
)
BEYOND = ("question", "recipe", "our row", "the paper's ReZero", "compared with", OF_THE_PAPER[-2], "figure")
SIGNALS = (
    "chi is the mean squared singular value of the input-output Jacobian: 1 if signals pass unchanged, though a chi "
    "near 1 alone does not show that they do: each page has what is lost."
)


def studies_section(results: Iterable[dict[str, Any]], recipes: Collection[str]) -> str:
    """What the README shows of all studies: those of the paper, those of questions of our own, those without a result.

    Args:
        results: of all sizes.
        recipes: names of all studies there are.
    """
    results = sorted(results, key=lambda result: result["name"])
    paper = [result for result in results if of_the_paper(result)]
    beyond = [result for result in results if result not in paper]
    missing = sorted({*recipes} - {result["name"] for result in results})
    parts = [markdown_table(OF_THE_PAPER, [_line(result) for result in paper])]
    parts += [SIGNALS] if any(about_signals(result) for result in paper) else []
    if beyond:
        parts += ["Beyond the paper:", markdown_table(BEYOND, [_line(result) for result in beyond])]
    if missing:
        parts.append(f"Without a result so far: {join([f'`{name}`' for name in missing])}.")
    return "\n\n".join(part for part in parts if part)


def study_measured(result: dict[str, Any]) -> str:
    """What a recipe's header says of a result."""
    ours, best, _ = compared(result)
    said = [f"{_headline(result, row)} ({row['label']}{_where(result)})" for row in (ours, best) if row is not None]
    return ("full size: " if result["size"] == "full" else "") + "; ".join(said)


def _line(result: dict[str, Any]) -> list[str]:
    ours, best, as_in_paper = compared(result)
    page, figure = f"model_cards/{result_name(result)}", _main_figure(result)
    our_headline = f"{_headline(result, ours)} ({ours['label']}{_where(result)})"
    theirs = "" if as_in_paper is None else _headline(result, as_in_paper)
    seeds = len(result["seeds"])
    return [
        f"[{result['item']}]({page}/README.md)",
        f"[{result['name']}](scripts/recipes/{result['name']}.yaml)",
        *([ours["reported"] or "", our_headline] if of_the_paper(result) else [our_headline, theirs]),
        "" if best is None else f"{_headline(result, best)} ({best['label']})",
        ", ".join(
            [
                *(["full size"] if result["size"] == "full" else []),
                _extent(ours),
                f"{seeds} seed{'s' if seeds > 1 else ''}",
                "; ".join(result["device"]),
                *lossy(result["data"]),
                *([] if tuned(result) else ["not tuned"]),
            ]
        ),
        f"[{figure}]({page}/figures/{figure}.png)",
    ]


def _extent(row: dict[str, Any]) -> str:
    """How large a row's model is and how long it trains."""
    run = row["runs"][0]
    return f"{run['parameters'] / 1e6:.3g} M parameters, {max(run['steps'] for run in row['runs']):,} steps"


def of_the_paper(result: dict[str, Any]) -> bool:
    """Whether it is of a table or figure of the paper, and not of a question of our own."""
    return any(row["reported"] for row in result["rows"])


def compared(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]:
    """At the last value of `across`: the row that a study is about, what it is against (the row that the study names,
    else the best of the others), and the paper's form of it."""
    rows = list(places(result).values())[-1]
    ours = next((row for row in rows if row["row"] == result["ours"]), rows[-1])
    as_in_paper = next((row for row in rows if row is not ours and row["row"] == "rezero"), None)
    others = [row for row in rows if row is not ours and measured(row["runs"])]
    named = next((row for row in others if row["row"] == result["against"]), None)
    best = min(others, key=lambda row: cost(row, result["metric"]), default=None)
    return ours, named or best, as_in_paper


def _where(result: dict[str, Any]) -> str:
    last = list(places(result))[-1]
    return "".join(f", {short(key)} {value}" for key, value in last)


def about_signals(result: dict[str, Any]) -> bool:
    """Whether a study is of how signals travel, and not of where training ends."""
    return "signal" in result["rows"][0]["runs"][0]


def _main_figure(result: dict[str, Any]) -> str:
    """Of the pictures that `study_figures.draw` makes, the one that shows the study's claim."""
    if about_signals(result):
        return "spectra_start"
    return "depths" if result["rows"][0]["at"] else "curves"


def _headline(result: dict[str, Any], row: dict[str, Any]) -> str:
    """What a study's line says of a row: how it ends, unless that was left to untuned rates, and how soon it is at the
    target.
    """
    reached = "" if about_signals(result) else _reached(result, row)
    return reached if reached and not tuned(result) else "; ".join(filter(None, [ending(result, row), reached]))


def ending(result: dict[str, Any], row: dict[str, Any]) -> str:
    """How a row ends, with its unit: its signals where the study is about them, else the mean over seeds."""
    if about_signals(result):
        return ", ".join(f"chi {spectrum(row, moment)[0]} at the {moment}" for moment in ("start", "end"))
    found = measured(row["runs"])
    if not found:
        return values(row["runs"], "value", result["metric"])
    return with_unit(shown(found, result["metric"]), result["metric"]) + diverged(row["runs"])


def _reached(result: dict[str, Any], row: dict[str, Any]) -> str:
    """When a row has the target: in epochs where the recipe counts these, else in steps."""
    if row["target"] is None:
        return ""
    of_images, target = result["metric"] == "accuracy", aim(row, result["metric"])
    if not measured(row["runs"], "to_target"):
        return f"never {target}"
    epochs = yaml.safe_load(result["recipe"])["training"].get("num_train_epochs")
    runs, form, unit = row["runs"], "{:.0f}", "steps"
    if epochs and of_images:
        runs, form, unit = [_in_epochs(run, epochs) for run in runs], "{:.1f}", "epochs"
    seconds = f", {reach(runs, 'seconds', '{:.3g}')} s" if row["step_seconds"] else ""
    base = baseline_of(result, row)
    ratio = "" if base is row else speed_up(row, base)
    than = f" ({base['label']}: {ratio} as many)" if ratio else ""
    return f"{target} after {reach(runs, 'steps', form)} {unit}{than}{seconds}"


def _in_epochs(run: dict[str, Any], epochs: float) -> dict[str, Any]:
    reached = run["to_target"]
    return {**run, "to_target": reached and {**reached, "steps": reached["steps"] * epochs / run["steps"]}}
