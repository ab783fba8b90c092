"""Curves of a study's runs, read off: when one reaches a value, and from when on a row is ahead of another."""

import math
from bisect import bisect_right
from statistics import fmean
from typing import Any

from .study_plan import as_cost


def finite(curve: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The points of a curve at which the metric was measured and is a number."""
    return [point for point in curve if point.get(metric) is not None and math.isfinite(point[metric])]


def first_at(curve: list[dict[str, Any]], metric: str, target: float | None) -> dict[str, float] | None:
    """Steps and training seconds at which a curve first reaches a value, between two evaluations by a straight line.

    Returns:
        `steps` and `seconds`, and `within` if it was there at the first evaluation, so that these are an upper bound;
        None if it never gets there, or without a target.
    """
    if target is None:
        return None
    points = finite(curve, metric)
    for before, after in zip([points[0], *points] if points else [], points, strict=False):
        if as_cost(metric, after[metric] - target) <= 0:
            change = before[metric] - after[metric]
            share = (before[metric] - target) / change if change else 1.0
            read = {"steps": "step", "seconds": "training_seconds"}
            found = {name: before[key] + share * (after[key] - before[key]) for name, key in read.items()}
            return found | ({"within": True} if before is after else {})
    return None


def ahead_from(
    ours: dict[str, Any], other: dict[str, Any], metric: str, mean: bool = False, seconds: bool = False
) -> float | None:
    """From when on one row is better than another, to the end.

    Args:
        ours, other: the rows, with the same seeds.
        metric: which of the curves' numbers.
        mean: compare means over the seeds; else (default) every seed by itself has to be better.
        seconds: compare at equal times, by what a step of each takes; else (default) at equal steps. Between two
            evaluations a curve is a straight line, and it stays at its last value while the other goes on.

    Returns:
        the step of `ours`, or the seconds, of the first evaluation of either from which on it is; None where it is not
        at the end.
    """
    # What is not there or no number, as after diverging, is behind.
    steps = sorted({point["step"] for run in (*ours["runs"], *other["runs"]) for point in run["curve"]})
    pairs = [
        [_on(steps, finite(run["curve"], metric), metric) for run in runs]
        for runs in zip(ours["runs"], other["runs"], strict=True)
    ]
    if mean:
        pairs = [[[fmean(at) for at in zip(*curves, strict=True)] for curves in zip(*pairs, strict=True)]]
    takes = [row["step_seconds"] if seconds else 1 for row in (ours, other)]
    first = None
    for time in sorted({step * each for step in steps for each in takes}, reverse=True):
        if time < steps[0] * max(takes):
            break
        here = [
            [_between(steps, curve, time / each) for curve, each in zip(pair, takes, strict=True)] for pair in pairs
        ]
        if not all(mine < theirs for mine, theirs in here):
            break
        first = time
    return first


def _on(steps: list[int], points: list[dict[str, Any]], metric: str) -> list[float]:
    """A curve on given steps, less being better, infinite where it has no point."""
    found = {point["step"]: as_cost(metric, point[metric]) for point in points}
    return [found.get(step, math.inf) for step in steps]


def _between(steps: list[int], curve: list[float], step: float) -> float:
    # A time divided by what a step takes may fall short of the first by a rounding.
    place = max(bisect_right(steps, step), 1)
    if place == len(steps) or steps[place - 1] == step:
        return curve[place - 1]
    share = (step - steps[place - 1]) / (steps[place] - steps[place - 1])
    return (1 - share) * curve[place - 1] + share * curve[place]
