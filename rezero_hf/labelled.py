"""Labelled text: the rows of a data set in three splits, and the names of its classes.

`stdlib-functions` is on every machine: from the head and the docstring of a function of the standard library, without
its body, tell whether a call gives something back. Rows come from the same files as the corpus `python-stdlib`, in the
same split, and a held-out row that a training module has too is left out, so a model pretrained on that corpus has not
seen a held-out row, and a fine-tuned one has seen no more of it. In each split both classes have as many rows, so a
guess is right half of the time: by themselves 76 % give something back in the few modules of validation, 57 % in those
of training.
"""

import ast
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .corpora import PythonStdlib
from .errors import one_line
from .hub_corpora import SPLIT_NAMES, label_of, load_dataset_or_explain
from .sources import SPLITS, DataError, cache_folder, memory_file, recall, remember


STDLIB = "stdlib-functions"
RETURNS = ["nothing", "a value"]
# Part of the memory's key: raise it when the same files would give other rows.
FORMAT_VERSION = 2


class Row(NamedTuple):
    """A text and its class, by number; or the words of a text and the class of each."""

    text: str | list[str]
    label: int | list[int]


class LabelledText(NamedTuple):
    """Rows by split (`train`, `validation`, `test`), the names of the classes, and what to record of them (JSON)."""

    splits: dict[str, list[Row]]
    classes: list[str]
    record: dict[str, Any]


def read_labelled(
    data: str,
    text_column: str,
    label_column: str,
    cache_dir: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> LabelledText:
    """Read labelled text.

    A text that is also in an earlier split (test, then validation) is dropped, so none is on both sides. In
    `stdlib-functions` it is the other way round (train, then validation): pretraining has seen every training module
    whole. A split that the data set lacks is a tenth of its training rows, at least one, in the order of the sha256 of
    their text.

    Args:
        data: `stdlib-functions`; `hub:ORG/NAME`; a file of rows (`.csv`, `.json`, `.jsonl`, `.parquet`), or a folder of
            such files with the names of splits. None of its code is run.
        text_column: of strings, or of lists of strings, the words of a text.
        label_column: a class for each string: a `ClassLabel`, or any strings or numbers. Where the column does not
            name the classes they are those of the training rows, in alphabetical order, or of whole numbers in theirs.
            A held-out split without any label, as a benchmark's test split, counts as one that is not there.
        cache_dir: where the rows of `stdlib-functions` are remembered. Default: `~/.cache/rezero_hf`.
        config_name: configuration of `hub:` data. Default: the only or default one.
        revision: branch, tag or commit of `hub:` data. Default: the newest.

    Raises:
        DataError: there are no such data, a column, a text, a label or a split is missing, or all labels are the same.
    """
    if (config_name or revision) and not data.startswith("hub:"):
        raise DataError(f"config_name and revision are of hub: data, not of {data}: leave them out")
    if data == STDLIB:
        splits, classes = stdlib_functions(cache_folder(cache_dir)), RETURNS
    else:
        splits, classes = _read(data, text_column, label_column, config_name, revision)
    splits = {split: splits.get(split, []) for split in SPLITS}
    dropped = _keep_apart(splits, SPLITS if data == STDLIB else tuple(reversed(SPLITS)))
    if data == STDLIB:
        splits = {split: _balanced(rows) for split, rows in splits.items()}
    for split in SPLITS:
        if not splits[split]:
            raise DataError(f"{data} has no rows for {split}: add some, at least three different ones in all")
    if len(classes) < 2:
        raise DataError(f"{data} has no two classes, only {', '.join(classes)}: choose another label_column")
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    counts = {split: len(rows) for split, rows in splits.items()}
    name = data if data == STDLIB else label_of(os.path.expanduser(data.removeprefix("hub:")))
    origin = {"kind": "labelled", "sha256": digest, "rows_in_an_earlier_split": dropped}
    return LabelledText(splits, classes, {"source": name, "origin": origin, "classes": classes, "splits": counts})


def _keep_apart(splits: dict[str, list[Row]], order: tuple[str, ...]) -> int:
    """Take out what a split before it in `order` has, then hold out what is missing; the number of rows taken out."""
    seen, dropped = set(), 0
    for split in order:
        keys = [json.dumps(row.text) for row in splits[split]]
        kept = [row for row, key in zip(splits[split], keys, strict=True) if key not in seen]
        dropped += len(splits[split]) - len(kept)
        splits[split] = kept
        seen |= set(keys)
    by_text: dict[str, list[Row]] = {}
    for row in splits["train"]:
        by_text.setdefault(hashlib.sha256(json.dumps(row.text).encode()).hexdigest(), []).append(row)
    digests = iter(sorted(by_text))
    size = max(1, len(by_text) // 10)
    for split in ("test", "validation"):
        if not splits[split]:
            splits[split] = [row for _, digest in zip(range(size), digests, strict=False) for row in by_text[digest]]
    left = set(digests)
    splits["train"] = [row for digest, rows in by_text.items() if digest in left for row in rows]
    return dropped


def _balanced(rows: list[Row]) -> list[Row]:
    """As many rows of each class that is there, in their order; those stay whose text has the first sha256."""
    classes: dict[int, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: hashlib.sha256(rows[place].text.encode()).digest()):
        classes.setdefault(rows[place].label, []).append(place)
    least = min(map(len, classes.values()), default=0)
    return [rows[place] for place in sorted(place for places in classes.values() for place in places[:least])]


def _read(
    data: str, text_column: str, label_column: str, config_name: str | None, revision: str | None
) -> tuple[dict[str, list[Row]], list[str]]:
    name = os.path.expanduser(data.removeprefix("hub:"))
    if not data.startswith("hub:") and not Path(name).exists():
        raise DataError(f"{data}: there is no such file or folder, and it is neither {STDLIB} nor hub:ORG/NAME")
    dataset = load_dataset_or_explain(data, name, config_name, revision=revision)
    own = {split: next((n for n in names if n in dataset), None) for split, names in SPLIT_NAMES.items()}
    if own["train"] is None:
        raise DataError(f"{data} has no split named train, only {', '.join(dataset)}: use another data set")
    for column, option in ((text_column, "text_column"), (label_column, "label_column")):
        for split in filter(None, own.values()):
            if column not in dataset[split].column_names:
                known = ", ".join(dataset[split].column_names)
                raise DataError(f"{data} has no column {column!r} in {split}, only {known}: choose another {option}")
    feature = dataset[own["train"]].features[label_column]
    classes = getattr(getattr(feature, "feature", feature), "names", None)
    # The library writes -1 where a ClassLabel is not known.
    missing = (None,) if classes is None else (None, -1)
    for split in ("validation", "test"):
        labels = dataset[own[split]][label_column] if own[split] else ()
        if all(each in missing for label in labels for each in _each(label)):
            own[split] = None
    read = {
        split: list(_rows(f"{data}: {name}", dataset[name], text_column, label_column, missing))
        for split, name in own.items()
        if name
    }
    for row in read["train"]:
        if strange := next((label for label in _each(row.label) if not isinstance(label, str | int | float)), None):
            raise DataError(
                f"{data}: column {label_column!r} holds {one_line(repr(strange))}; a label is a word or a number"
            )
    if classes is None:
        labels = {label for row in read["train"] for label in _each(row.label)}
        whole = all(isinstance(label, int) for label in labels)
        classes = [str(label) for label in sorted(labels, key=None if whole else str)]
        number = {name: place for place, name in enumerate(classes)}
    else:
        number = {str(place): place for place in range(len(classes))}
    splits = {}
    for split, rows in read.items():
        unknown = {str(label) for row in rows for label in _each(row.label)} - number.keys()
        if unknown:
            raise DataError(f"{data}: {split} has the label {min(unknown)!r}, which no training row has")
        splits[split] = [
            Row(text, [number[str(each)] for each in label] if isinstance(label, list) else number[str(label)])
            for text, label in rows
        ]
    return splits, classes


def _rows(where: str, table: Any, text_column: str, label_column: str, missing: tuple[Any, ...]) -> Iterator[Row]:
    """Rows with their labels as they are, each looked at."""
    for number, row in enumerate(table.select_columns([text_column, label_column])):
        text, label, place = row[text_column], row[label_column], f"{where}, row {number}"
        words = text if isinstance(text, list) else [text]
        if not words or not all(isinstance(word, str) and word for word in words):
            raise DataError(f"{place}: {text_column} is {repr(text)[:40]}, not text; leave such rows out")
        if isinstance(text, list) != isinstance(label, list) or len(words) != len(_each(label)):
            raise DataError(f"{place}: {label_column} has to be one label for each string of {text_column}")
        if any(each in missing for each in _each(label)):
            raise DataError(f"{place}: {label_column} is missing; leave such rows out")
        yield Row(text, label)


def _each(label: Any) -> list[Any]:
    return label if isinstance(label, list) else [label]


def stdlib_functions(cache_dir: Path) -> dict[str, list[Row]]:
    """The rows of `stdlib-functions` by split: `def`, name, arguments and docstring, 1 where something is given back.

    That is a function with `yield`, or a `return` of anything but None, in its own body.
    """
    corpus = PythonStdlib(cache_dir)
    memory = memory_file(cache_dir, [STDLIB, FORMAT_VERSION, corpus.identity()])
    found = recall(memory)
    if found is None:
        found = {
            split: [row for name in names for row in _functions(corpus.files[name])]
            for split, names in corpus.split().items()
        }
        remember(memory, found)
    return {split: [Row(*row) for row in rows] for split, rows in found.items()}


def _functions(source: bytes) -> Iterator[Row]:
    try:
        with warnings.catch_warnings():
            # About escapes in strings of old modules.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            head = f"def {node.name}({ast.unparse(node.args)}):"
            docstring = ast.get_docstring(node)
            gives = any(_gives_something(inner) for inner in _own_nodes(node))
            yield Row(f"{head}\n    {docstring}" if docstring else head, int(gives))


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Everything inside but the functions and classes that are defined there."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from _own_nodes(child)


def _gives_something(node: ast.AST) -> bool:
    if isinstance(node, ast.Return):
        return node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None)
    return isinstance(node, ast.Yield | ast.YieldFrom)
