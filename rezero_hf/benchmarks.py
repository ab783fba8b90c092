"""What a benchmark measures: an arm and the reference by turns, and beside them what the machine could do at best.

Everything is recorded as costs, seconds or bytes, of one repeat of the same work; rates and ratios are made from those
(`benchmark_report.py`). Clocks are wall clocks, on as many threads as torch takes by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .benchmark_arms import Arm, Sizes
from .benchmark_cases import Case, modes
from .flops import peak_flops
from .turns import by_turns


@dataclass(frozen=True)
class Measure:
    """One thing that is measured.

    Args:
        label, unit: in tables; a unit of tokens/s is made from seconds and the tokens of a repeat.
        cost: one repeat of a case.
        tokens: of a repeat; None where the cost itself is told.
        limits: name -> what the same work costs at best.
        flops: of a repeat, for MFU.
        share: of an arm's time, relative to the other measures'.
        once: the same every time, so one repeat says it.
        every_mode: else it is taken in fp32 alone.
    """

    label: str
    unit: str
    cost: Callable[[Case], float]
    share: float
    tokens: Callable[[Sizes], int] | None = None
    limits: dict[str, Callable[[Case], float]] = field(default_factory=dict)
    flops: Callable[[Case], int] | None = None
    once: bool = False
    every_mode: bool = True


def _decoding(sequences: int, share: float) -> Measure:
    return Measure(
        f"decode, batch {sequences}",
        "tokens/s",
        partial(Case.decode, sequences=sequences),
        share,
        tokens=lambda sizes: sequences * sizes.new_tokens,
        limits={
            "products alone": partial(Case.decode_products, sequences=sequences),
            "bandwidth": Case.decode_bandwidth,
        },
    )


MEASURES = {
    "train": Measure(
        "training",
        "tokens/s",
        Case.train,
        share=20,
        tokens=lambda sizes: sizes.batch * sizes.context,
        limits={"matrix products": Case.training_products},
        flops=Case.training_flops,
    ),
    "memory": Measure("peak memory of a step", "MB", Case.memory, share=0, once=True),
    "prefill": Measure(
        "prefill",
        "tokens/s",
        Case.prefill,
        share=5,
        tokens=lambda sizes: sizes.context,
        limits={"matrix products": Case.prefill_products},
        flops=Case.prefill_flops,
    ),
    "decode_1": _decoding(1, share=18),
    "decode_8": _decoding(8, share=24),
    "first_token": Measure("time to first token", "ms", Case.first_token, share=3),
    "load": Measure("load time", "ms", Case.load, share=3, every_mode=False),
    "import": Measure("import time", "ms", Case.imports, share=15, every_mode=False),
}


def compare(
    arm: Arm, reference: Arm, names: list[str], sizes: Sizes, device: torch.device, seconds: float, least: int = 3
) -> list[dict[str, Any]]:
    """Measure an arm and the reference by turns in this process.

    Args:
        names: of `MEASURES`; those that the arm takes no part in are passed over.
        seconds: for all of it, divided by their shares.
        least: repeats of each, whatever the time.

    Returns:
        for every measure and mode its names, `costs` of `arm` and `reference` (seconds or bytes, one a repeat),
        `limits`, name -> costs of the arm's work at best, `tokens` and `flops` of a repeat where there are any, and
        `peak_flops`, the data sheet's, where it is known.
    """
    taken = [
        (mode, name)
        for mode in modes(device)
        for name in names
        if name in (arm.compiled if mode.compiled else arm.measures)
        and (MEASURES[name].every_mode or mode.dtype is torch.float32)
    ]
    whole = sum(MEASURES[name].share for _, name in taken)
    found, cases = [], {}
    for mode, name in taken:
        if mode not in cases:
            # The models of the mode before go.
            cases = {mode: {"arm": Case(arm, sizes, mode, device), "reference": Case(reference, sizes, mode, device)}}
        measure, ours = MEASURES[name], cases[mode]["arm"]
        steps = {who: partial(measure.cost, case) for who, case in cases[mode].items()}
        steps |= {limit: partial(cost, ours) for limit, cost in measure.limits.items()}
        turns = {"least": 1, "most": 1} if measure.once else {"least": least}
        costs = by_turns(steps, seconds * measure.share / max(whole, 1), **turns)
        costs = {who: [round(cost, 7) for cost in each] for who, each in costs.items()}
        row = {"arm": arm.name, "measure": name, "mode": mode.name}
        row["limits"] = {limit: costs.pop(limit) for limit in measure.limits}
        row |= {"tokens": measure.tokens and measure.tokens(sizes), "costs": costs}
        row |= {"flops": measure.flops and measure.flops(ours), "peak_flops": peak_flops(device, mode.dtype)}
        found.append(row)
    return found
