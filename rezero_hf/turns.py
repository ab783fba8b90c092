"""Measuring by turns: everybody takes a step, then everybody takes the next, and a slow minute slows all alike.

A machine shared with other work has no clock that compares with itself an hour later. So what compares is a ratio of
two neighbours, steps taken one right after the other, and what is told is the median of such ratios with its quartiles.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from math import comb
from statistics import quantiles
from typing import NamedTuple


class Spread(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(*(quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3))


def by_turns(
    steps: Mapping[str, Callable[[], float]], seconds: float, warm_up: int = 1, least: int = 3, most: int = 25
) -> dict[str, list[float]]:
    """What each step costs, turn after turn; every other turn runs backwards, so that nobody always follows another.

    Args:
        steps: by name, in the order of the first turn; each returns what it cost (seconds, bytes).
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
        for name, step in list(steps.items())[:: -1 if turn % 2 else 1]:
            taken[name].append(step())
    return taken


def ratios(costs: Sequence[float], others: Sequence[float]) -> list[float]:
    """Costs over the costs of their neighbours of the same turns."""
    return [cost / other for cost, other in zip(costs, others, strict=True)]


def sign_test(found: Sequence[float]) -> float:
    """How likely ratios lie on the two sides of 1 as unevenly as these, or more so, if their median is 1.

    It is below 5 % exactly where the interval between order statistics that holds the median with 95 % excludes 1, for
    which it takes 6 ratios at least.
    """
    rarer = min(sum(ratio <= 1 for ratio in found), sum(ratio >= 1 for ratio in found))
    return min(1.0, 2 * sum(comb(len(found), few) for few in range(rarer + 1)) / 2 ** len(found))
