"""The table of a study, made from its result alone. Diverged runs are shown as such."""

import json
import math
from statistics import fmean, median, stdev
from typing import Any

from .diagnostics import zeros_are_resolved
from .markdown import table as markdown_table
from .study_plan import short
from .study_results import measured, place_of, places


UNITS = {"bits_per_byte": "bits per byte", "loss": "nats", "accuracy": "error, %"}
DIGITS = {"bits_per_byte": 3, "loss": 3, "accuracy": 1}


def study_table(result: dict[str, Any]) -> str:
    """A study as a Markdown table: mean and spread over seeds, steps and time to the target, and what was chosen."""
    unit, aimed = UNITS[result["metric"]], any(row["target"] is not None for row in result["rows"])
    header = ["row", "reported", f"validation ({unit})", "test", "FLOP", "seconds"]
    header[4:4] = ["steps to the target", "speed-up", "ms a step", "seconds to the target"] if aimed else []
    recorded = {word for row in result["rows"] for run in row["runs"] for word in run}
    off, signal = "gates_off" in recorded, "signal" in recorded
    header += ["all alpha 0", "seconds a step", "peak memory"] if off else []
    if signal:
        header += ["chi at the start", "lost at the start", "chi at the end", "lost at the end", "mean size of alpha"]
    lines = []
    for row in result["rows"]:
        finished = [run for run in row["runs"] if not run["diverged"]]
        ends = [values(row["runs"], word, result["metric"]) for word in ("value", "test")]
        cells = [row_label(row), row["reported"] or "", *ends]
        if aimed:
            steps = reach(row["runs"], "steps")
            cells += [
                f"{steps} to {aim(row, result['metric'])}" if steps and row["target"] is not None else "",
                speed_up(row, baseline_of(result, row)),
                "" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.0f}",
                reach(row["runs"], "seconds", "{:.3g}"),
            ]
        cells.append(f"{fmean(run['flops'] for run in finished):.2g}" if finished else "")
        step = row["step_seconds"]
        took = [run["steps"] * step if step else run["training_seconds"] for run in finished]
        # Where one run stood still, a mean would say nothing.
        cells.append(f"{median(took):.0f}" if took else "")
        if off:
            without = [run["gates_off"].get(result["metric"]) for run in row["runs"] if run.get("gates_off")]
            cells.append(shown(without, result["metric"]) if without else "")
            cells.append(f"{fmean(run['training_seconds'] / max(run['steps'], 1) for run in row['runs']):.2g}")
            cells.append(f"{max(run['peak_memory_bytes'] for run in row['runs']) / 1e9:.2f} GB")
        if signal:
            cells += [text for moment in ("start", "end") for text in spectrum(row, moment)]
            cells.append(_mean_gate(row))
        lines.append([*cells, _chosen(row)])
    return markdown_table([*header, "tuned to"], lines)


def spectrum(row: dict[str, Any], moment: str) -> tuple[str, str]:
    """Mean squared singular value of the first seed's input-output Jacobian, and the share of them that is 0, where
    that can be told beside the largest.
    """
    found = row["runs"][0].get("signal", {}).get(moment)
    if found is None:
        return "", ""
    chi, lost = found["jacobian"]["chi"], found["jacobian"].get("share_zero")
    share = "" if lost is None else f"{lost:.0%}" if zeros_are_resolved(found["jacobian"]) else "not resolved"
    return "not finite" if chi is None else f"{chi:.3g}", share


def _mean_gate(row: dict[str, Any]) -> str:
    """How far the first seed's gates stood from 0 at the end, on the average; empty without gates."""
    history = row["runs"][0].get("alpha")
    found = [abs(alpha) for gates in history[-1]["alpha"].values() for alpha in gates] if history else []
    return f"{fmean(found):.2g}" if found else ""


def baseline_of(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    """The row that this one's speed-up is against: the baseline at the same value of `across`."""
    return next((base for base in places(result)[place_of(row)] if base["row"] == result["baseline"]), None)


def values(runs: list[dict[str, Any]], word: str, metric: str) -> str:
    """Mean and spread of the runs that did not diverge, and how many did."""
    found = measured(runs, word)
    if not found:
        return "diverged" if diverged(runs) else ""
    return shown(found, metric) + diverged(runs)


def as_shown(value: float, metric: str) -> float:
    """A measurement as tables and pictures have it: of accuracy the error in percent, as papers on images do."""
    return 100 * (1 - value) if metric == "accuracy" else value


def shown(found: list[float], metric: str) -> str:
    """Mean and spread of measurements."""
    return spread([as_shown(value, metric) for value in found], f"{{:.{DIGITS[metric]}f}}")


def with_unit(text: str, metric: str) -> str:
    """What `shown` says, within a sentence."""
    return f"error {text} %" if metric == "accuracy" else f"{text} {UNITS[metric]}"


def aim(row: dict[str, Any], metric: str) -> str:
    """A row's target."""
    return f"{as_shown(row['target'], metric):.3g}{' % error' if metric == 'accuracy' else ''}"


def diverged(runs: list[dict[str, Any]]) -> str:
    """A remark where some did, or ended without a number."""
    lost = sum(run["diverged"] is not None or run["value"] is None for run in runs)
    return f" ({lost} of {len(runs)} diverged)" if lost else ""


def reach(runs: list[dict[str, Any]], word: str, form: str = "{:.0f}") -> str:
    if all(run["diverged"] for run in runs):
        return ""
    found = measured(runs, "to_target")
    if not found:
        return "never"
    within = "≤ " if _within(runs) else ""
    share = f" ({len(found)} of {len(runs)})" if len(found) < len(runs) else ""
    return within + spread([reached[word] for reached in found], form) + share


def _within(runs: list[dict[str, Any]]) -> bool:
    """Whether one of them was at the target when it was first measured."""
    return any("within" in reached for reached in measured(runs, "to_target"))


def speed_up(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """How many times fewer steps than the baseline, by means over seeds; only if all runs of both arrive, and not where
    the baseline did before it was first measured.
    """
    means = []
    for runs in ([] if base is None else base["runs"], row["runs"]):
        reached = [run["to_target"] for run in runs]
        means.append(fmean(found["steps"] for found in reached) if reached and all(reached) else math.nan)
    ratio = means[0] / means[1]
    if not math.isfinite(ratio) or (row is not base and _within(base["runs"])):
        return ""
    return f"{'≥ ' if row is not base and _within(row['runs']) else ''}{ratio:.2f}x"


def row_label(row: dict[str, Any]) -> str:
    """A row's label, and where it stands."""
    return ", ".join([row["label"], *(f"{short(key)} {value}" for key, value in row["at"].items())])


def _chosen(row: dict[str, Any]) -> str:
    edge = [key for key, inside in row["inside"].items() if not inside]
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in row["chosen"].items()}
    words = [f"{short(key)} {value}{' (edge)' if key in edge else ''}" for key, value in shown.items()]
    settings = {json.dumps(run["set"], sort_keys=True) for run in row["tried"]}
    return f"{', '.join(words)}; of {len(settings)} settings" if words else ""


def spread(values: list[float], form: str) -> str:
    mean = form.format(fmean(values))
    return f"{mean} ± {form.format(stdev(values))}" if len(values) > 1 else mean
