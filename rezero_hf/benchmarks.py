"""What a benchmark measures: an arm and the reference by turns, and beside them what the machine could do at best.

Everything is recorded as costs, seconds or bytes, of one repeat of the same work; rates and ratios are made from those
(`benchmark_report.py`). Clocks are wall clocks, on as many threads as torch takes by itself.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .benchmark_arms import Arm, Sizes
from .benchmark_cases import Case, Mode, modes
from .errors import one_line
from .flops import peak_flops
from .turns import by_turns


# Fewer repeats than that can decide nothing (`turns.sign_test`).
LEAST = 6


@dataclass(frozen=True)
class Measure:
    """One thing that is measured.

    Args:
        label, unit: in tables; a unit of tokens/s is made from seconds and the tokens of a repeat.
        cost: one repeat of a case; None for what is not measured in pairs, imports.
        turn: about how many seconds arm, reference and limits take on two cores. Time is divided by it, so that all
            get as many repeats, except imports, which are slow and get their least.
        tokens: of a repeat; None where the cost itself is told.
        limits: name -> what the same work costs at best.
        flops: of a repeat, for MFU.
        warm_up: turns that do not count.
        once: the same every time, so one repeat says it.
        every_mode: else it is taken in fp32 alone.
    """

    label: str
    unit: str
    cost: Callable[[Case], float] | None
    turn: float
    tokens: Callable[[Sizes], int] | None = None
    limits: dict[str, Callable[[Case], float]] = field(default_factory=dict)
    flops: Callable[[Case], int] | None = None
    warm_up: int = 1
    once: bool = False
    every_mode: bool = True


def _decoding(sequences: int, turn: float) -> Measure:
    return Measure(
        f"decode, batch {sequences}",
        "tokens/s",
        partial(Case.decode, sequences=sequences),
        turn,
        tokens=lambda sizes: sequences * sizes.decoded(sequences),
        limits={
            "products alone": partial(Case.decode_products, sequences=sequences),
            "bandwidth": partial(Case.decode_bandwidth, sequences=sequences),
        },
    )


MEASURES = {
    "train": Measure(
        "training",
        "tokens/s",
        Case.train,
        turn=2.5,
        tokens=lambda sizes: sizes.batch * sizes.context,
        limits={"matrix products": Case.training_products},
        flops=Case.training_flops,
        # The first step makes the optimiser's state, the second meets it.
        warm_up=2,
    ),
    "memory": Measure("peak memory of a step", "MB", Case.memory, turn=0.5, warm_up=0, once=True),
    "prefill": Measure(
        "prefill",
        "tokens/s",
        Case.prefill,
        turn=0.5,
        tokens=lambda sizes: sizes.context,
        limits={"matrix products": Case.prefill_products},
        flops=Case.prefill_flops,
    ),
    "decode_1": _decoding(1, turn=2.5),
    "decode_8": _decoding(8, turn=2),
    "first_token": Measure("time to first token", "ms", Case.first_token, turn=0.1),
    "load": Measure("load time", "ms", Case.load, turn=0.2, every_mode=False),
    "import": Measure("import time", "ms", None, turn=15, every_mode=False),
}


def chosen(arm: Arm, names: Iterable[str], modes: Iterable[Mode]) -> list[tuple[Mode, str]]:
    """What of `names` the arm takes part in, and in which modes, but for imports."""
    return [
        (mode, name)
        for mode in modes
        for name in names
        if name in arm.measures
        and (name in arm.compiled or not mode.compiled)
        and (MEASURES[name].every_mode or mode.dtype is torch.float32)
        and MEASURES[name].cost
    ]


def expected(arms: Collection[Arm], names: Collection[str], modes: Collection[Mode]) -> set[tuple[str, str, str]]:
    """Arm, measure and mode, by their names, of every comparison that makes a benchmark complete."""
    found = {(arm.name, name, mode.name) for arm in arms for mode, name in chosen(arm, names, modes)}
    return found | {(arm.name, "import", "fp32") for arm in arms if "import" in names and "import" in arm.measures}


def compare(
    arm: Arm,
    reference: Arm,
    names: list[str],
    sizes: Sizes,
    device: torch.device,
    seconds: float,
    least: int = LEAST,
    within: list[Mode] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure an arm and the reference by turns in this process.

    Args:
        names: of `MEASURES`.
        seconds: for all of it, models and warm-up included; what one measure leaves or overdraws is the next ones'.
        least: repeats of each, whatever the time.
        within: the modes; default all that the device has.

    Yields:
        for every measure and mode its names, `costs` of `arm` and `reference` (seconds or bytes, one a repeat),
        `limits`, name -> costs of the arm's work at best, `tokens` and `flops` of a repeat where there are any, and
        `peak_flops`, the data sheet's, where it is known.
    """
    deadline, todo, cases = time.perf_counter() + seconds, chosen(arm, names, within or modes(device)), {}
    for place, (mode, name) in enumerate(todo):
        if mode not in cases:
            # The models of the mode before go.
            cases = {mode: {"arm": Case(arm, sizes, mode, device), "reference": Case(reference, sizes, mode, device)}}
        measure, ours = MEASURES[name], cases[mode]["arm"]
        steps = {who: partial(measure.cost, case) for who, case in cases[mode].items()}
        steps |= {limit: partial(cost, ours) for limit, cost in measure.limits.items()}
        turns = {"least": 1, "most": 1} if measure.once else {"least": least}
        share = measure.turn / sum(MEASURES[left].turn for _, left in todo[place:])
        costs = by_turns(steps, share * (deadline - time.perf_counter()), measure.warm_up, **turns)
        tokens, flops = measure.tokens and measure.tokens(sizes), measure.flops and measure.flops(ours)
        yield _row(arm, name, mode.name, costs, measure.limits, tokens, flops, peak_flops(device, mode.dtype))


def compare_imports(arms: Iterable[Arm], reference: Arm, seconds: float) -> list[dict[str, Any]]:
    """Rows as `compare`'s: a fresh Python that imports what an arm needs and ends, all arms by turns."""
    found = [arm for arm in arms if "import" in arm.measures]
    costs = by_turns({arm.name: partial(_import_seconds, arm.imports) for arm in found}, seconds, least=LEAST)
    theirs = costs[reference.name]
    return [_row(arm, "import", "fp32", {"arm": costs[arm.name], "reference": theirs}) for arm in found]


def _import_seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def _row(arm, measure, mode, costs, limits=(), tokens=None, flops=None, peak_flops=None) -> dict[str, Any]:
    costs = {who: [round(cost, 7) for cost in each] for who, each in costs.items()}
    row = {"arm": arm.name, "measure": measure, "mode": mode, "limits": {limit: costs.pop(limit) for limit in limits}}
    return row | {"costs": costs, "tokens": tokens, "flops": flops, "peak_flops": peak_flops}


def alone(command: list[str], env: Mapping[str, str] | None = None) -> tuple[list[dict[str, Any]], str | None]:
    """Run a process that prints rows, one JSON object a line; what it said on stderr is passed on.

    Returns:
        the rows it finished, and why it failed: the last line on stderr or the signal; None where it did not.
    """
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode < 0:
        return rows, signal.Signals(-done.returncode).name
    return rows, one_line((done.stderr.strip() or "no reason").splitlines()[-1]) if done.returncode else None
