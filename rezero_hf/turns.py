"""Measuring by turns: everybody takes a step, then everybody takes the next, and a slow minute slows all alike.

A machine shared with other work has no clock that compares with itself an hour later. So what compares is a ratio of
two neighbours, steps taken one right after the other, and what is told is the median of such ratios with its quartiles.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import NamedTuple


class Spread(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float


def by_turns(
    steps: Mapping[str, Callable[[], float]], seconds: float, warm_up: int = 1, least: int = 3, most: int = 25
) -> dict[str, list[float]]:
    """What each step costs, turn after turn.

    Args:
        steps: by name, in the order of a turn; each returns what it cost (seconds, bytes).
        seconds: after so many, warm-up included, no further turn begins.
        warm_up: turns before the first that counts.
        least, most: turns that count, whatever the time; 25 are enough for a steady median.

    Returns:
        name -> costs, equally many of each.
    """
    start = time.perf_counter()
    for _ in range(warm_up):
        for step in steps.values():
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(most):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            taken[name].append(step())
    return taken


def ratios(costs: Sequence[float], others: Sequence[float]) -> Spread:
    """Costs over the costs of their neighbours of the same turns."""
    found = [cost / other for cost, other in zip(costs, others, strict=True)]
    return Spread(*(quantiles(found, method="inclusive") if len(found) > 1 else found * 3))
