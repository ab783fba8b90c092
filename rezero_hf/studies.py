"""Many runs that make one table or figure of the paper: rows, what each is tuned over, and seeds.

A recipe's section `study` says what differs between rows. Every row is tuned over the same grid by the same rule on
held-out validation text, and only what that chose is run with further seeds, so no row has had more attempts than its
own difficulty asked for. Runs are independent: they go on `jobs` at a time, and finished ones are never repeated.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from filelock import FileLock, Timeout

from .errors import UserError
from .experiments import run_experiment
from .launching import end_with_parent
from .recipe import SECTIONS, load_recipe, read_yaml
from .strict import RecipeError, check_names, checked


# Metric -> whether less of it is better.
METRICS = {"bits_per_byte": True, "loss": True, "accuracy": False}


@dataclass
class Row:
    """One line of a study's table.

    Args:
        label: what the table calls it.
        set: dotted overrides that make it, `section.key` -> value. A word that is set is not tuned.
        search: words tuned for this row alone, besides the study's: `section.key` -> values to try.
        first: what makes a run before it of the recipe, as `set` makes the row: `section.key` -> value. It is tuned to
            the same words and has the same seed; the row goes on with its model, its optimiser's state and its data
            (`init_from.path` is filled in, `init_from.grow_to` may be set), and its cost is the row's. Empty (default):
            the row begins with random weights.
        reported: the paper's number or word for it, as text; quoted as reported, not checked.
    """

    label: str
    set: dict[str, Any] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    reported: str | None = None


@dataclass
class Study:
    """The section `study` of a recipe.

    Args:
        item: the table or figure of the paper it stands for.
        rows: the lines of the table, by name.
        metric: what is tuned for and shown, on validation data: `bits_per_byte`, `loss` or `accuracy`.
        across: every row is run at each of these values, `section.key` -> values; one key.
        search: words tuned for every row, tried in this order with the others at their best so far. The values of a
            number are extended by their last ratio while the best is the first or the last of them.
        extend: how many values may be added to each end of such a list.
        seeds: the first is tuned with, all are run with what was chosen.
        baseline: the row that speed-ups are against.
        ours: the row that the README's line is about.
        target: a value of the metric; steps and seconds to reach it are compared. None compares ends alone, unless
        target_at: the share of the baseline's steps at which the target is read off the baseline's mean curve.
        signal: record how signals travel, too (`diagnostics.signal_record`).
        toy: also draw the paper's toy model of depth.
        gates_off: measure the trained model once more with every alpha at 0: what its layers are worth.
        bases: runs made once, before all rows, by name: what makes each of the recipe, `section.key` -> value. A row
            begins with the model of one by `init_from.path: NAME`; its cost is not the row's. Nothing in it is tuned.
    """

    item: str
    rows: dict[str, Row]
    metric: Literal["bits_per_byte", "loss", "accuracy"] = "bits_per_byte"
    across: dict[str, list[Any]] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    extend: int = 3
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str | None = None
    ours: str = "rezero"
    target: float | None = None
    target_at: float | None = None
    signal: bool = False
    toy: bool = False
    gates_off: bool = False
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cells(self) -> list["Cell"]:
        """Every row at every value of `across`, in the table's order."""
        return [Cell(name, row, at) for at in _product(self.across) for name, row in self.rows.items()]

    def base_of(self, cell: "Cell") -> str | None:
        """Which of the bases a cell's runs begin from, if any."""
        name = cell.spec.set.get("init_from.path")
        return name if name in self.bases else None

    def words(self) -> set[str]:
        """All that rows differ in or are tuned over."""
        said = (words for row in self.rows.values() for words in (row.set, row.search, row.first))
        return {*self.across, *self.search, *itertools.chain(*said, *self.bases.values())}

    def smallest(self) -> "Study":
        """The same rows with as little of everything as still goes through every step: for smoke tests."""
        few = {key: values[:2] for key, values in self.search.items()}

        def short_run(words: dict[str, Any]) -> dict[str, Any]:
            # How long is for the recipe's `smoke` to say.
            return {key: value for key, value in words.items() if key != "training.max_steps"}

        def small(row: Row) -> Row:
            search = {key: values[:1] for key, values in row.search.items()}
            return replace(row, set=short_run(row.set), first=short_run(row.first), search=search)

        bases = {name: short_run(words) for name, words in self.bases.items()}
        rows = {name: small(row) for name, row in self.rows.items()}
        across = {key: values[:1] for key, values in self.across.items()}
        return replace(self, rows=rows, search=few, across=across, extend=0, seeds=self.seeds[:1], bases=bases)


@dataclass(frozen=True)
class Cell:
    """A row at one value of `across`.

    Args:
        row: its name.
        spec: what it says.
        at: the value of `across`.
    """

    row: str
    spec: Row
    at: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the folder of its runs."""
        return ",".join([self.row, *(f"{short(key)}={value}" for key, value in self.at.items())])

    def overrides(self, setting: dict[str, Any]) -> list[str]:
        """What `load_recipe` needs to make this cell of a recipe, tuned to `setting`."""
        begins = {"init_from.path": "first"} if self.spec.first else {}
        return _overrides({**self.at, **begins, **self.spec.set, **setting})

    def first(self, setting: dict[str, Any]) -> list[str] | None:
        """The same of the run before it; None without one."""
        return _overrides({**self.at, **self.spec.first, **setting}) if self.spec.first else None


def load_study(path: str | Path, size: str = "cpu") -> Study:
    """Read and check the section `study` of a recipe.

    Args:
        path: the recipe.
        size: `cpu`, or `smoke` or `full`, whose sections may set words of the study as `study.WORD`.

    Raises:
        RecipeError: there is none, or it says something that cannot be.
    """
    path = Path(path)
    document = read_yaml(path)
    section = document.get("study")
    if not isinstance(section, dict) or not isinstance(section.get("rows"), dict):
        raise RecipeError(f"{path}: is one run (scripts/pretrain.py), not a study: it has no section study with rows.")
    sized = {key: value for key, value in (document.get(size) or {}).items() if key.startswith("study.")}
    section |= {key.removeprefix("study."): value for key, value in sized.items()}
    rows = {
        name: Row(**checked(spec or {}, Row, f"{path}: study.rows.{name}")) for name, spec in section["rows"].items()
    }
    study = Study(**{**checked({**section, "rows": rows}, Study, f"{path}: study"), "rows": rows})
    if study.baseline is not None:
        check_names([study.baseline], study.rows, f"{path}: study.baseline")
    if len(study.across) > 1:
        raise RecipeError(f"{path}: study.across has {len(study.across)} keys; a table has one.")
    if study.baseline is not None and any(row.first for row in rows.values()):
        raise RecipeError(f"{path}: study.baseline compares steps, and those of a row with `first` are of two kinds.")
    for key in study.words():
        check_names([key.partition(".")[0]], SECTIONS, f"{path}: study: {key!r}: section")
    # A typo in a row shows before the first hour of training.
    for words in study.bases.values():
        load_recipe(path, _overrides(words))
    for cell in study.cells():
        if study.bases and "init_from.path" in cell.spec.set:
            check_names([cell.spec.set["init_from.path"]], study.bases, f"{path}: study.rows.{cell.row}: base")
        for overrides in (cell.overrides({}), cell.first({})):
            load_recipe(path, overrides or ())
    return study


def run_study(
    path: str | Path,
    study: Study,
    folder: str | Path,
    *,
    only: str | None = None,
    overrides: tuple[str, ...] = (),
    size: str = "cpu",
    jobs: int = 1,
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
        tell: called with a line for every run that ends.

    Returns:
        Cell name -> its runs (`experiments.run_experiment`), each with `set` (what it was tuned to), the chosen ones
        first, marked `chosen`, in the order of seeds.

    Raises:
        UserError: a recipe cannot be run, or another process runs a study in the same folder.
    """
    cells = [cell for cell in study.cells() if only in (None, cell.row)]
    threads, bases = max(1, torch.get_num_threads() // jobs), Path(folder) / "bases"
    words = {"size": size, "signal": study.signal, "gates_off": study.gates_off}
    ours = {"training.seed", *study.words()}
    for text in overrides:
        if (key := text.partition("=")[0].strip()) in ours:
            raise RecipeError(f"override {text!r}: {key} is what the study varies; change it in {path}.")
    with (
        _alone_in(Path(folder)),
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start_worker, initargs=(threads,)) as pool,
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
            said = [*_overrides(study.bases[name]), *overrides]
            return pool.submit(_run, str(path), said, None, str(bases / name), **words, keep=True)

        try:
            made = {name: make(name) for name in study.bases if name in map(study.base_of, cells)}
            for name, future in made.items():
                if diverged := future.result()["diverged"]:
                    raise UserError(f"{path}: study.bases.{name}: {diverged}")
                tell(f"base {name}  ({future.result()['training_seconds']:.0f} s)")
            tuned = {tuners.submit(tune, study, cell, partial(start, cell), tell): cell.name for cell in cells}
            for future in as_completed(tuned):
                future.result()
        except BaseException:
            workers = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            # What runs now would else go on to its end, which may be hours away.
            for worker in workers:
                worker.terminate()
            raise
        return {name: future.result() for future, name in tuned.items()}


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
) -> list[dict[str, Any]]:
    """Tune one cell with the first seed, then run what was chosen with the others.

    One word after the other is set to its best, until none changes: so a rate is bracketed at the warm-up that was
    chosen, and not at another.

    Args:
        study, cell: what to tune.
        start: begins a run, of a setting and a seed, and returns its future record (`experiments.run_experiment`).
        tell: called with a line for every run that ends.

    Returns:
        The cell's runs, as `run_study` returns them.
    """
    runs: dict[tuple, dict[str, Any]] = {}
    # Word -> values added below and above, over all sweeps.
    extended: dict[str, dict[int, int]] = {}

    def all_of(settings: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
        keys = [(tuple(setting.items()), seed) for setting in settings for seed in seeds]
        started = {key: start(dict(key[0]), key[1]) for key in dict.fromkeys(keys) if key not in runs}
        for (setting, seed), future in started.items():
            runs[(setting, seed)] = {**future.result(), "set": dict(setting)}
            tell(_line(study, cell, runs[(setting, seed)]))
        return [runs[key] for key in keys]

    def best_of(key: str, values: list[Any], others: dict[str, Any]) -> tuple[list[Any], Any]:
        values, added = list(values), extended.setdefault(key, {0: 0, -1: 0})
        number = len(values) > 1 and all(isinstance(value, int | float) and value > 0 for value in values)
        while True:
            found = all_of([{**others, key: value} for value in values], study.seeds[:1])
            scores = [score(run, study.metric) for run in found]
            place = scores.index(min(scores))
            # Where all diverge the first counts as best, and lower values are tried.
            edge = 0 if place == 0 else -1 if place == len(values) - 1 else None
            if edge is None or not number or added[edge] >= study.extend:
                return values, values[place]
            added[edge] += 1
            ratio = values[-1] / values[-2]
            values = [_rounded(values[0] / ratio), *values] if edge == 0 else [*values, _rounded(values[-1] * ratio)]

    words = {key: values for key, values in {**study.search, **cell.spec.search}.items() if key not in cell.spec.set}
    best = {key: values[0] for key, values in words.items()}
    before = None
    while best != before:
        before = dict(best)
        for key, values in list(words.items()):
            words[key], best[key] = best_of(key, values, best)
    chosen = all_of([best], study.seeds)
    others = [run for run in runs.values() if not any(run is other for other in chosen)]
    return [{**run, "chosen": True} for run in chosen] + [{**run, "chosen": False} for run in others]


def score(run: dict[str, Any], metric: str) -> float:
    """The metric on validation data at the end of a run, less being better: infinite for one that diverged."""
    value = run["results"].get("validation", {}).get(metric)
    if run["diverged"] or value is None or not math.isfinite(value):
        return math.inf
    return value if METRICS[metric] else -value


def _line(study: Study, cell: Cell, run: dict[str, Any]) -> str:
    value = "diverged" if run["diverged"] else f"{run['results']['validation'][study.metric]:.4f}"
    words = ", ".join(f"{short(key)}={value}" for key, value in run["set"].items())
    return f"{cell.name}  {words}  seed {run['seed']}: {value}  ({run['training_seconds']:.0f} s)"


def _start_worker(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


def _run(
    path: str, overrides: list[str], before: list[str] | None, folder: str, size: str, **words: Any
) -> dict[str, Any]:
    """One run, with the one before it, in a process of the pool."""
    recipe, first = (
        said and load_recipe(path, said, smoke=size == "smoke", full=size == "full") for said in (overrides, before)
    )
    try:
        return run_experiment(recipe, folder, first=first, **words)
    finally:
        # Told to stop by its parent's death, a run saves first; after that nobody has anything for this process to do.
        if not parent_process().is_alive():
            os._exit(143)


def _overrides(words: dict[str, Any]) -> list[str]:
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}"
        for key, value in words.items()
    ]


def _product(across: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(across, values, strict=True)) for values in itertools.product(*across.values()))


def short(key: str) -> str:
    """A dotted word without its section."""
    return key.rpartition(".")[2]


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")
