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
            evaluations a curve is a straight line, and it stays at its last value while the other goes on. What has
            diverged is behind.

    Returns:
        the step of `ours`, or the seconds, of the first evaluation of either from which on it is; None where it is not
        at the end.
    """
    takes = [row["step_seconds"] if seconds else 1 for row in (ours, other)]
    sides = [[_costs(run, metric, each) for run in row["runs"]] for row, each in zip((ours, other), takes, strict=True)]
    begin, first = first_compared(ours, other, seconds), None
    points = [(run["curve"], each) for row, each in zip((ours, other), takes, strict=True) for run in row["runs"]]
    times = {each * point["step"] for curve, each in points for point in curve}
    for time in sorted((time for time in times if time >= begin), reverse=True):
        here = [[_at(curve, time) for curve in side] for side in sides]
        if mean:
            here = [[fmean(values)] for values in here]
        if not all(mine < theirs for mine, theirs in zip(*here, strict=True)):
            break
        first = time
    return first


def first_compared(ours: dict[str, Any], other: dict[str, Any], seconds: bool = False) -> float:
    """The first step, or second, at which two rows have both been measured."""
    takes = [row["step_seconds"] if seconds else 1 for row in (ours, other)]
    firsts = [
        min((run["curve"][0]["step"] for run in row["runs"] if run["curve"]), default=0) * each
        for row, each in zip((ours, other), takes, strict=True)
    ]
    return max(firsts)


def _costs(run: dict[str, Any], metric: str, takes: float) -> list[tuple[float, float]]:
    """A run's curve as time and cost; what is no number, and all after a run that diverged, is behind everything."""
    known = {point["step"]: as_cost(metric, point[metric]) for point in finite(run["curve"], metric)}
    curve = [(takes * point["step"], known.get(point["step"], math.inf)) for point in run["curve"]]
    if run["diverged"] and curve:
        curve.append((math.nextafter(curve[-1][0], math.inf), math.inf))
    return curve


def _at(curve: list[tuple[float, float]], time: float) -> float:
    """A curve between two of its points, by a straight line; after its last one it stays there."""
    place = bisect_right(curve, time, key=lambda point: point[0])
    if place == 0:
        return math.inf
    (since, before), (until, after) = curve[place - 1], curve[min(place, len(curve) - 1)]
    if since in (time, until):
        return before
    share = (time - since) / (until - since)
    return (1 - share) * before + share * after
