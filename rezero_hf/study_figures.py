"""Pictures of a study, drawn from its result: curves, times to the target, ends against depth, gates."""

from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import numpy as np

from .figures import BLUE, GREY, VERMILION, gate_history, gate_map, log_ticks, new_figure, save, whole_ticks
from .signal_figures import norm_curves, singular_value_histograms, toy_contours
from .study_curves import finite
from .study_plan import METRICS, short
from .study_results import measured, place_of, places, tuned
from .study_tables import UNITS, aim, as_shown, diverged, with_unit
from .toy_model import toy_landscape


# Okabe and Ito's set, the ones that stay apart on white; dashes tell lines apart where colours repeat.
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", GREY)
# Blue is the row's that a study is about.
OTHERS = COLOURS[1:]
DASHES = ("-", "--", ":", "-.")


def draw(result: dict[str, Any], folder: str | Path) -> list[Path]:
    """Every picture that a result has the numbers for.

    Args:
        result: `study_results.summarise`'s.
        folder: where the PNGs go.

    Returns:
        The paths written.
    """
    folder, drawn = Path(folder), []
    at = places(result)
    # Where rates were not tuned, where rows end says little.
    if len(at) > 1 and tuned(result):
        drawn.append(depths(result, folder / "depths.png"))
    for place, rows in at.items():
        name = "".join(f"_{value}" for _, value in place)
        # A start and an end are no curve.
        if any(len(run["curve"]) > 2 for row in rows for run in row["runs"]):
            drawn.append(curves(rows, result["metric"], folder / f"curves{name}.png", result["ours"]))
        if rows[0]["target"] is not None:
            drawn.append(bars(rows, result["metric"], folder / f"steps{name}.png"))
    for row in result["rows"]:
        history = [{"event": "eval", **found} for found in row["runs"][0].get("alpha") or ()]
        gates = gate_history(history)
        # Gates that were held have no history.
        if gates is not None and np.nanmax(np.ptp(gates[1], axis=1)) > 0:
            name = ",".join([row["row"], *(str(value) for _, value in place_of(row))])
            drawn.append(gate_map(history, folder / f"gates_{name}.png"))
    signals = {row["label"]: {} for row in result["rows"] if row["runs"] and "signal" in row["runs"][0]}
    for row in result["rows"]:
        if row["label"] in signals:
            signals[row["label"]][next((value for _, value in place_of(row)), 0)] = row["runs"][0]["signal"]
    for moment in ("start", "end") if signals else ():
        records = {
            form: {at: both[moment] for at, both in of.items() if moment in both} for form, of in signals.items()
        }
        records = {form: of for form, of in records.items() if of}
        if not records:
            # All have diverged.
            continue
        drawn.append(singular_value_histograms(records, folder / f"spectra_{moment}.png"))
        deepest = max(at for of in records.values() for at in of)
        named = {form + ("" if deepest in of else f" (at {max(of)})"): of[max(of)] for form, of in records.items()}
        drawn.append(norm_curves(named, folder / f"norms_{moment}.png"))
    if result["toy"]:
        starts = [(0.0, w) for w in (0.5, 1.0, 1.5, 2.0, 2.5)] + [(1.0, w) for w in (0.5, 1.0, 1.5, 2.0)]
        drawn.append(toy_contours(toy_landscape(starts), folder / "toy.png"))
    return drawn


def curves(rows: list[dict[str, Any]], metric: str, path: str | Path, ours: str | None = None) -> Path:
    """Mean over seeds and the range of the seeds, against steps and, where steps were timed, against seconds.

    Where rows begin with another run's model, steps are of several kinds, and FLOP takes their place. The runs' own
    clocks are not shown: what else a machine did would look like a difference between rows. The row `ours` stands out.
    """
    timed = all(row["step_seconds"] for row in rows)
    figure, axes = new_figure(4.8, 2 if timed else 1, sharex=False)
    axes = np.atleast_1d(axes)
    spent = "flops" if any(row["first"] for row in rows) else "step"
    shown: list[float] = []
    looks = _looks([row["row"] for row in rows], ours)
    for row in rows:
        look = looks[row["row"]]
        whole = [run for run in row["runs"] if run["diverged"] is None]
        # Of a row of which none came through, what there was until the first one broke.
        runs = [points for run in whole or row["runs"] if (points := finite(run["curve"], metric))]
        label = row["label"] + (diverged(row["runs"]) if whole else " (diverged)")
        if not runs:
            axes[0].plot([], [], **look, label=label)
            continue
        for ax, key, unit in zip(axes, (spent, "step"), (1, row["step_seconds"]), strict=False):
            length = min(map(len, runs))
            at = [unit * fmean(points[place][key] for points in runs) for place in range(length)]
            values = as_shown(np.array([[points[place][metric] for points in runs] for place in range(length)]), metric)
            ax.plot(at, values.mean(1), **look, label=label)
            if not whole:
                ax.plot(at[-1:], values.mean(1)[-1:], "x", color=look["color"])
            ax.fill_between(at, values.min(1), values.max(1), color=look["color"], alpha=0.12, linewidth=0)
            shown += values.ravel().tolist()
    if rows[0]["target"] is not None:
        for ax in axes:
            ax.axhline(as_shown(rows[0]["target"], metric), color="black", linewidth=0.8, linestyle=":")
    for ax, label in zip(axes, ("FLOP" if spent == "flops" else "step", "seconds of training"), strict=False):
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(whole_ticks(5))
        ax.xaxis.set_major_formatter("{x:.3g}" if label == "FLOP" else _counted)
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    if shown and METRICS[metric]:
        # A row that goes nowhere would flatten all others.
        cap = 2.5 * min(shown)
        log_ticks(axes[0], [value for value in shown if value <= cap])
        for line in axes[0].get_lines():
            if len(line.get_ydata()) and min(line.get_ydata()) > cap:
                line.set_label(f"{line.get_label()} (above)")
    axes[0].set_ylabel(f"validation{' ' if metric == 'accuracy' else ', '}{UNITS[metric]}")
    _legend(figure, axes[0])
    return save(figure, path)


def bars(rows: list[dict[str, Any]], metric: str, path: str | Path) -> Path:
    """Steps to the target, a bar a row, a dot a seed; rows that never arrive say so, and ≤ those that were there when
    they were first measured."""
    rows = rows[::-1]
    figure, ax = new_figure(1.2 + 0.5 * len(rows))
    for place, row in enumerate(rows):
        there = measured(row["runs"], "to_target")
        reached = [found["steps"] for found in there]
        if reached:
            if any("within" in found for found in there):
                ax.annotate("≤", (max(reached), place), (5, 0), textcoords="offset points", va="center")
            whole = len(reached) == len(row["runs"])
            ax.barh(place, fmean(reached), color=BLUE if whole else "#BBBBBB", alpha=0.75, height=0.6)
            ax.plot(reached, [place] * len(reached), "o", color="black", markersize=3.5)
        else:
            ax.text(0, place, " diverged" if all(run["diverged"] for run in row["runs"]) else " never", va="center")
    # Long names would leave no room for the bars.
    ax.set_yticks(range(len(rows)), [fill(row["label"], 36) for row in rows])
    ax.set_xlabel(f"steps to {with_unit(aim(rows[0], metric), metric)}")
    ax.xaxis.set_major_locator(whole_ticks(6))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    return save(figure, path)


def depths(result: dict[str, Any], path: str | Path) -> Path:
    """What each row ends with, against the word it was run across: mean, range of seeds, a cross where one of its runs
    diverged."""
    rows = {row["row"]: row["label"] for row in result["rows"]}
    looks = _looks([*rows], result["ours"])
    values = [place[0][1] for place in places(result)]
    key = short(next(iter(result["rows"][0]["at"]))).replace("_", " ")
    figure, ax = new_figure(4.6)
    shown: list[float] = []
    for number, (name, label) in enumerate(rows.items()):
        look, colour = looks[name], looks[name]["color"]
        points, lost = {}, []
        for row in (row for row in result["rows"] if row["row"] == name):
            place = values.index(place_of(row)[0][1])
            found = [as_shown(value, result["metric"]) for value in measured(row["runs"])]
            if found:
                points[place] = found
            if len(found) < len(row["runs"]):
                lost.append(place)
        at = sorted(points)
        ax.plot(at, [fmean(points[p]) for p in at], **look, marker="o", markersize=4, label=label)
        ax.vlines(at, [min(points[p]) for p in at], [max(points[p]) for p in at], color=colour, linewidth=2, alpha=0.5)
        shown += [value for found in points.values() for value in found]
        offset = 0.06 * (number - len(rows) / 2)
        ax.plot([p + offset for p in lost], [0.97] * len(lost), "x", color=colour, transform=ax.get_xaxis_transform())
    ax.set_xticks(range(len(values)), [str(value) for value in values])
    ax.set_xlabel(key)
    ax.set_ylabel(f"validation at the end, {UNITS[result['metric']]}")
    if shown and METRICS[result["metric"]]:
        # What goes nowhere would flatten all others: it leaves the picture at the top, with an arrow and its value.
        cap = 2.5 * min(shown)
        log_ticks(ax, [value for value in shown if value <= cap])
        if max(shown) > cap:
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.25)
        for line in ax.get_lines():
            place = ax.get_xaxis_transform()
            for x, y in zip(*line.get_data(), strict=True):
                if y > cap:
                    ax.plot([x], [0.9], "^", color=line.get_color(), transform=place, markersize=7)
                    words = {"color": line.get_color(), "fontsize": 8, "ha": "center", "va": "bottom"}
                    ax.annotate(f"{y:.3g}", (x, 0.9), (0, 5), xycoords=place, textcoords="offset points", **words)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    _legend(figure, ax)
    return save(figure, path)


def _counted(x: float, _place: int) -> str:
    """Steps and seconds, which of the smallest runs are not whole."""
    return f"{x:,.0f}" if x == round(x) else f"{x:.3g}"


def _looks(rows: list[str], ours: str | None) -> dict[str, dict[str, Any]]:
    """How each row is drawn: the one that a study is about blue, thick and on top, the others in their order."""
    looks = {ours: {"color": BLUE, "linestyle": "-", "linewidth": 2.6, "zorder": 3}}
    for number, name in enumerate(name for name in rows if name != ours):
        colour, dash = OTHERS[number % len(OTHERS)], DASHES[number // len(OTHERS) % len(DASHES)]
        looks[name] = {"color": colour, "linestyle": dash, "linewidth": 1.4}
    return looks


def _legend(figure, ax) -> None:
    """Below the axes, in as many columns as there is room for."""
    handles, labels = ax.get_legend_handles_labels()
    for columns in (3, 2, 1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
