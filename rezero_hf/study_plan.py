"""What a study says: the section `study` of a recipe, its rows, and what each is tuned over."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .arguments import SEEDS
from .recipe import SECTIONS, SIZES, load_recipe, name_is_plain, read_yaml
from .strict import RecipeError, check_names, checked, made


# Metric -> whether less of it is better.
METRICS = {"bits_per_byte": True, "loss": True, "accuracy": False}

# What a study's folder holds beside a folder for each row.
TAKEN = ("bases", "figures", "result.json")


@dataclass
class Row:
    """One line of a study's table.

    Args:
        label: what the table calls it.
        set: dotted overrides that make it, `section.key` -> value. A word that is set is not tuned.
        search: words tuned for this row alone, or with other values than the study's: `section.key` -> values to try.
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
            number are extended by their last ratio while the best is the first or the last of them; after 0 (no
            warm-up) and one value by doubling, and not below 0.
        extend: how many values may be added to each end of such a list.
        seeds: the first is tuned with, all are run with what was chosen.
        baseline: the row that speed-ups are against.
        ours: the row that the README's line is about.
        against: the row that it is held against there. None: the best of the others.
        target: a value of the metric; steps and seconds to reach it are compared. None compares ends alone, unless
        target_at: the share of the baseline's steps at which the target is read off the baseline's mean curve.
        signal: record how signals travel, too (`diagnostics.signal_record`).
        toy: also draw the paper's toy model of depth.
        gates_off: measure the trained model once more with every alpha at 0: what its layers are worth.
        note: what a reader of its page has to know before comparing rows.
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
    against: str | None = None
    target: float | None = None
    target_at: float | None = None
    signal: bool = False
    toy: bool = False
    gates_off: bool = False
    note: str | None = None
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cells(self) -> list["Cell"]:
        """Every row at every value of `across`, in the table's order."""
        return [Cell(name, row, at) for at in _product(self.across) for name, row in self.rows.items()]

    def base_of(self, cell: "Cell") -> str | None:
        """Which of the bases a cell's runs begin from, if any."""
        name = cell.spec.set.get("init_from.path")
        return name if name in self.bases else None

    def tuned(self, cell: "Cell") -> dict[str, list[Any]]:
        """What a cell is tuned over: the study's grid and its row's own, but for what the row sets."""
        return {key: values for key, values in {**self.search, **cell.spec.search}.items() if key not in cell.spec.set}

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
        return overrides_of({**self.at, **begins, **self.spec.set, **setting})

    def first(self, setting: dict[str, Any]) -> list[str] | None:
        """The same of the run before it; None without one."""
        return overrides_of({**self.at, **self.spec.first, **setting}) if self.spec.first else None


def load_study(path: str | Path, size: str = "cpu") -> Study:
    """Read and check the section `study` of a recipe.

    Args:
        path: the recipe.
        size: `cpu`, or `smoke` or `full`, whose sections may set words of the study as `study.WORD`, and of its rows as
            `study.rows.NAME.WORD`.

    Raises:
        RecipeError: there is none, or it says something that cannot be.
    """
    path = Path(path)
    document = read_yaml(path)
    section = document.get("study")
    if not isinstance(section, dict) or not isinstance(section.get("rows"), dict):
        raise RecipeError(f"{path}: is one run (scripts/pretrain.py), not a study: it has no section study with rows.")
    # Looked at in any case, so that a typo shows whichever size is asked for.
    sized = {other: _words_of(document, other, path) for other in SIZES}
    of_study, of_rows = sized.get(size, ({}, {}))
    section |= of_study
    rows = {name: made(Row, spec or {}, f"{path}: study.rows.{name}") for name, spec in section["rows"].items()}
    rows = {name: replace(row, **of_rows.get(name, {})) for name, row in rows.items()}
    study = made(Study, {**section, "rows": rows}, f"{path}: study")
    tuned = [*study.search.items(), *itertools.chain(*(row.search.items() for row in rows.values()))]
    for word, found in [("rows", rows), ("seeds", study.seeds), *study.across.items(), *tuned]:
        if not found or not isinstance(found, list | dict):
            raise RecipeError(f"{path}: study: {word}={found!r}: needs a list with at least one entry.")
    images = (document.get("model") or {}).get("model_type", "rezero") != "rezero"
    known = ("loss", "accuracy") if images or document.get("task") else ("loss", "bits_per_byte")
    for word, fits, needs in (
        ("metric", study.metric in known, f"is not measured here; take one of {', '.join(known)}"),
        ("seeds", all(0 <= seed < SEEDS for seed in study.seeds), "needs numbers from 0 to 2**32 - 1"),
        ("extend", study.extend >= 0, "needs to be at least 0"),
        ("target_at", study.target_at is None or 0 < study.target_at <= 1, "is a share of the steps, above 0 up to 1"),
    ):
        if not fits:
            raise RecipeError(f"{path}: study: {word}={getattr(study, word)!r}: {needs}.")
    for name, row in rows.items():
        if varied := [key for key in study.across if key in {**row.set, **row.first}]:
            raise RecipeError(f"{path}: study.rows.{name}: {varied[0]} is what study.across varies.")
    labels = [row.label for row in rows.values()]
    # Two cells of one name would run in one folder, two rows of one label be drawn as one.
    for word, found in [("seeds", study.seeds), ("rows: label", labels), *study.across.items()]:
        if any(found.count(value) > 1 for value in found):
            raise RecipeError(f"{path}: study: {word}={found}: has one twice.")
    for name in (*rows, *study.bases):
        if not name_is_plain(name) or name in TAKEN:
            raise RecipeError(
                f"{path}: study: {name!r} names a folder beside {', '.join(TAKEN)}: it must be another plain word."
            )
    for word in ("baseline", "ours", "against"):
        if section.get(word) is not None:
            check_names([section[word]], study.rows, f"{path}: study.{word}")
    if len(study.across) > 1:
        raise RecipeError(f"{path}: study.across has {len(study.across)} keys; a table has one.")
    if study.baseline is not None and any(row.first for row in rows.values()):
        raise RecipeError(f"{path}: study.baseline compares steps, and those of a row with `first` are of two kinds.")
    # What neither reads text nor goes on by its blocks.
    if (images or document.get("task")) and any(row.first for row in rows.values()):
        raise RecipeError(f"{path}: a row with `first` goes on with the blocks of a language model's text.")
    if document.get("task") and study.baseline is not None:
        raise RecipeError(f"{path}: study.baseline times steps, which differ with the rows of a task; leave it out.")
    for key in study.words():
        check_names([key.partition(".")[0]], SECTIONS, f"{path}: study: {key!r}: section")
    # A typo in a row, or in what is tried, shows before the first hour of training.
    for words in (*study.bases.values(), *({key: value} for key, found in tuned for value in found)):
        load_recipe(path, overrides_of(words))
    for cell in study.cells():
        if study.bases and "init_from.path" in cell.spec.set:
            check_names([cell.spec.set["init_from.path"]], study.bases, f"{path}: study.rows.{cell.row}: base")
        for overrides in (cell.overrides({}), cell.first({})):
            load_recipe(path, overrides or ())
    return study


def _words_of(document: dict[str, Any], size: str, path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the section of a size says of the study, and of rows of it."""
    if not isinstance(document.get(size) or {}, dict):
        raise RecipeError(f"{path}: section {size} is not a mapping of keys to values.")
    words = {str(key): value for key, value in (document.get(size) or {}).items()}
    said = {key.removeprefix("study."): value for key, value in words.items() if key.startswith("study.")}
    of_rows: dict[str, dict[str, Any]] = {}
    for key in [key for key in said if key.startswith("rows.")]:
        name, _, word = key.removeprefix("rows.").partition(".")
        check_names([name], document["study"]["rows"], f"{path}: {size}.study.rows: row")
        of_rows.setdefault(name, {})[word] = said.pop(key)
    checked(said, Study, f"{path}: {size}.study")
    return said, {name: checked(row, Row, f"{path}: {size}.study.rows.{name}") for name, row in of_rows.items()}


def overrides_of(words: dict[str, Any]) -> list[str]:
    """Words and their values as `load_recipe` takes them, `section.key=value`."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}"
        for key, value in words.items()
    ]


def short(key: str) -> str:
    """A dotted word without its section."""
    return key.rpartition(".")[2]


def _product(across: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(across, values, strict=True)) for values in itertools.product(*across.values()))


def as_cost(metric: str, value: float) -> float:
    """A measurement, or a difference of two, with the sign by which less is better."""
    return value if METRICS[metric] else -value
