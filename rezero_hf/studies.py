"""Many runs that make one table or figure of the paper: rows, what each is tuned over, and seeds.

A recipe's section `study` says what differs between rows. Every row is tuned by the same rule on held-out validation
data, over the study's grid and what the row itself needs besides (post-norm its warm-up), and only what that chose is
run with further seeds. Runs are independent: they go on `jobs` at a time, and finished ones are never repeated.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .errors import UserError
from .experiments import RECORD, run_experiment
from .launching import end_with_parent
from .markdown import join
from .recipe import load_recipe
from .strict import RecipeError
from .study_plan import Cell, Study, as_cost, overrides_of, short
from .throughput import forget_peak_memory


def run_study(
    path: str | Path,
    study: Study,
    folder: str | Path,
    *,
    only: str | None = None,
    overrides: tuple[str, ...] = (),
    size: str = "cpu",
    jobs: int = 1,
    chosen: Mapping[str, dict[str, Any]] | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, list[dict[str, Any]]]:
    """Run whatever of a study is not finished.

    Args:
        path: the recipe.
        study: `load_study(path)`.
        folder: of all its runs, one folder each; those that are finished are read, not repeated.
        only: one row's name.
        overrides: `section.key=value` over the recipe, for all runs.
        size: the recipe's: `cpu`, `smoke` or `full`.
        jobs: runs at a time, each on its share of the cores. On a GPU 1.
        chosen: cell name -> what it is tuned to already (`study_results.chosen_in`). Default: cells are tuned.
        tell: called with a line for every run that ends.

    Returns:
        Cell name -> its runs (`experiments.run_experiment`), each with `set` (what it was tuned to), the chosen ones
        first, marked `chosen`, in the order of seeds; and `bases/NAME` -> the one run of each base.

    Raises:
        UserError: a recipe cannot be run, another process runs a study in the same folder, a base is gone that rows
            began from, or a run was killed.
    """
    cells = [cell for cell in study.cells() if only in (None, cell.row)]
    threads, bases = max(1, torch.get_num_threads() // jobs), Path(folder) / "bases"
    spawn = get_context("spawn")
    stopping = spawn.Event()
    words = {"size": size, "signal": study.signal, "gates_off": study.gates_off}
    ours = {"training.seed", *study.words()}
    for text in overrides:
        if (key := text.partition("=")[0].strip()) in ours:
            raise RecipeError(f"override {text!r}: {key} is what the study varies; change it in {path}.")
    for name in study.bases:
        began = [cell.name for cell in cells if study.base_of(cell) == name and (Path(folder) / cell.name).exists()]
        if began and not (bases / name / RECORD).exists():
            raise UserError(
                f"{bases / name} is gone, which {join(began)} in {folder} began from: delete those folders too, or "
                "choose another --output."
            )
    with (
        _alone_in(Path(folder)),
        ProcessPoolExecutor(jobs, spawn, initializer=_start_worker, initargs=(threads, stopping)) as pool,
        # A thread a cell only waits.
        ThreadPoolExecutor(len(cells)) as tuners,
    ):

        def start(cell: Cell, setting: dict[str, Any], seed: int) -> Future:
            named = {**setting, "training.seed": seed}
            place = Path(folder) / cell.name / ",".join(f"{short(key)}={value}" for key, value in named.items())
            both = [said and [*said, *overrides] for said in (cell.overrides(named), cell.first(named))]
            name = study.base_of(cell)
            base = name and str(bases / name)
            return pool.submit(_run, str(path), *both, str(place), **words, base=base)

        def make(name: str) -> Future:
            said = [*overrides_of(study.bases[name]), *overrides]
            return pool.submit(_run, str(path), said, None, str(bases / name), **words, keep=True)

        try:
            making = {name: make(name) for name in study.bases if name in map(study.base_of, cells)}
            made = {name: future.result() for name, future in making.items()}
            for name, record in made.items():
                if record["diverged"]:
                    raise UserError(f"{path}: study.bases.{name}: {record['diverged']}")
                tell(f"base {name}: {record['results']['validation']}  ({record['training_seconds']:.0f} s)")
            tuned = {
                tuners.submit(tune, study, cell, partial(start, cell), tell, chosen and chosen[cell.name]): cell.name
                for cell in cells
            }
            for future in as_completed(tuned):
                future.result()
        except BaseException as error:
            workers = list((pool._processes or {}).values())
            # A run that trains saves when it is told to end; the next ones are with the workers already.
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            # What runs now would else go on to its end, which may be hours away.
            for worker in workers:
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{folder}: a run was killed, most likely for the memory it took: lower --jobs, now {jobs}. The "
                    "same command goes on."
                ) from error
            raise
        found = {name: future.result() for future, name in tuned.items()}
        return found | {f"bases/{name}": [record] for name, record in made.items()}


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two studies that run into one folder would delete each other's unfinished runs."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder}: a study is being run there; wait for it, or choose another --output.") from None


def tune(
    study: Study,
    cell: Cell,
    start: Callable[[dict[str, Any], int], Future],
    tell: Callable[[str], None] = print,
    chosen: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Tune one cell with the first seed, then run what was chosen with the others.

    One word after the other is set to its best, until none changes: so a rate is bracketed at the warm-up that was
    chosen, and not at another.

    Args:
        study, cell: what to tune.
        start: begins a run, of a setting and a seed, and returns its future record (`experiments.run_experiment`).
        tell: called with a line for every run that ends.
        chosen: what it is tuned to already; then all seeds run with that alone.

    Returns:
        The cell's runs, as `run_study` returns them.
    """
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    # Word -> values added below and above, over all sweeps.
    extended: dict[str, dict[int, int]] = {}

    def all_of(settings: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
        # As text, because a value may be a list.
        asked = {(json.dumps(setting), seed): setting for setting in settings for seed in seeds}
        started = {key: start(setting, key[1]) for key, setting in asked.items() if key not in runs}
        for key, future in started.items():
            runs[key] = {**future.result(), "set": asked[key]}
            tell(_line(study, cell, runs[key]))
        return [runs[json.dumps(setting), seed] for setting in settings for seed in seeds]

    def best_of(key: str, values: list[Any], others: dict[str, Any]) -> tuple[list[Any], Any]:
        values, added = list(values), extended.setdefault(key, {0: 0, -1: 0})
        number = len(values) > 1 and all(type(value) in (int, float) and value >= 0 for value in values)
        whole = all(type(value) is int for value in values)
        while True:
            found = all_of([{**others, key: value} for value in values], study.seeds[:1])
            scores = [score(run, study.metric) for run in found]
            place = scores.index(min(scores))
            # Where all diverge the first counts as best, and lower values are tried.
            edge = 0 if place == 0 else -1 if place == len(values) - 1 else None
            # Below no warm-up there is nothing.
            edge = None if edge == 0 and values[0] == 0 else edge
            if edge is None or not number or added[edge] >= study.extend:
                return values, values[place]
            added[edge] += 1
            ratio = values[-1] / values[-2] if values[-2] else 2.0
            beyond = values[0] / ratio if edge == 0 else values[-1] * ratio
            beyond = max(1, round(beyond)) if whole else float(f"{beyond:.6g}")
            if beyond in values:
                return values, values[place]
            values = [beyond, *values] if edge == 0 else [*values, beyond]

    if chosen is not None:
        return [{**run, "chosen": True} for run in all_of([chosen], study.seeds)]
    words = study.tuned(cell)
    best = {key: values[0] for key, values in words.items()}
    before = None
    while best != before:
        before = dict(best)
        for key, values in list(words.items()):
            words[key], best[key] = best_of(key, values, best)
    found = all_of([best], study.seeds)
    others = [run for run in runs.values() if not any(run is other for other in found)]
    return [{**run, "chosen": True} for run in found] + [{**run, "chosen": False} for run in others]


def score(run: dict[str, Any], metric: str) -> float:
    """The metric on validation data at the end of a run, less being better: infinite for one that diverged."""
    value = run["results"].get("validation", {}).get(metric)
    if run["diverged"] or value is None or not math.isfinite(value):
        return math.inf
    return as_cost(metric, value)


def _line(study: Study, cell: Cell, run: dict[str, Any]) -> str:
    value = "diverged" if run["diverged"] else f"{run['results']['validation'][study.metric]:.4f}"
    words = ", ".join(f"{short(key)}={value}" for key, value in run["set"].items())
    return f"{cell.name}  {words}  seed {run['seed']}: {value}  ({run['training_seconds']:.0f} s)"


def _start_worker(threads: int, stopping: Event) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    _run.stopping = stopping


def _run(
    path: str, overrides: list[str], before: list[str] | None, folder: str, size: str, **words: Any
) -> dict[str, Any]:
    """One run, with the one before it, in a process of the pool."""
    recipe, first = (
        said and load_recipe(path, said, smoke=size == "smoke", full=size == "full") for said in (overrides, before)
    )
    try:
        _leave_if_over()
        forget_peak_memory()
        return run_experiment(recipe, folder, first=first, **words)
    finally:
        # Told to stop, a run saves first; after that nobody has anything for this process to do.
        _leave_if_over()


def _leave_if_over() -> None:
    if _run.stopping.is_set() or not parent_process().is_alive():
        os._exit(143)
