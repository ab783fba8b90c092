"""Where the time of a benchmark's repeat goes: operation by operation, and what is between them."""

import torch
from torch.profiler import ProfilerActivity, profile

from .benchmark_arms import Arm, Sizes
from .benchmark_cases import Case, Mode
from .benchmarks import MEASURES
from .markdown import table


def time_table(arm: Arm, name: str, sizes: Sizes, mode: Mode, repeats: int = 3, longest: int = 12) -> str:
    """A line an operation, those that take longest first, on a CPU; the profiler's own cost is in all of them.

    Args:
        arm: what is measured.
        name: of `MEASURES`, but for imports.
        sizes, mode: what is built, and its precision.
        repeats: that are profiled together, after one that is not. Default 3: enough for shares to one per cent.
        longest: lines of operations; the rest is one line. Default 12.
    """
    case, cost = Case(arm, sizes, mode, torch.device("cpu")), MEASURES[name].cost
    cost(case)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            cost(case)
    events = profiler.events()
    whole = (max(event.time_range.end for event in events) - min(event.time_range.start for event in events)) / repeats
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    lines = [(event.key, event.count / repeats, event.self_cpu_time_total / repeats) for event in found]
    rest = lines[longest:]
    lines = [*lines[:longest], ("other operations", sum(line[1] for line in rest), sum(line[2] for line in rest))]
    lines.append(("between operations: Python", 0, whole - sum(line[2] for line in lines)))
    return table(
        ("operation", "calls", "ms", "share"),
        [(key, f"{calls:,.0f}" if calls else "", f"{us / 1e3:.2f}", f"{us / whole:.0%}") for key, calls, us in lines],
    )
