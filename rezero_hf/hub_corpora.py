"""Data sets of the Hugging Face Hub, or in a local folder or file that `load_dataset` reads, as corpora."""

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .sources import (
    Corpus,
    DataError,
    Piece,
    Source,
    explained,
    in_pieces,
    memory_file,
    read_once,
    recall,
    remember,
    sha256_of,
)


# In the order in which they are read: what is held out must be known before training text is handed out.
SPLIT_NAMES = {"test": ("test",), "validation": ("validation", "valid", "val", "dev"), "train": ("train",)}


class HubText(Corpus):
    """A text column of a data set, by its Hub id or in a local folder, read by `datasets.load_dataset`.

    The data set's own validation and test splits are used where they exist; a missing one is taken out of its training
    split by the sha256 of each document. A document that is also in an earlier split (test, then validation) is
    dropped, so none is on both sides. Code from data set repositories is never run.
    """

    def __init__(self, name: str, source: Source, fractions: dict[str, float], cache_dir: Path) -> None:
        if not name:
            raise DataError("data.sources: 'hub:' names no data set: write hub:ORG/NAME")
        self.label = label_of(name)
        self._name, self._source, self._fractions, self._cache_dir = name, source, fractions, cache_dir
        self._identity: dict[str, Any] = {}
        self._notes: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """Includes the commit that the revision points to now; without a network, the one it pointed to last time."""
        if not self._identity:
            self._identity = self._find_identity()
        return self._identity

    def _find_identity(self) -> dict[str, Any]:
        source = self._source
        key = {
            "kind": "hub" if self.label.startswith("hub:") else "local",
            "name": self.label,
            "config_name": source.config_name,
            "text_column": source.text_column,
            "max_documents": source.max_documents,
            "fractions": self._fractions,
        }
        memory = memory_file(self._cache_dir, ["version", self._name, source.revision, key])
        return {**key, "version": current_version(self.label, self._name, source.config_name, source.revision, memory)}

    def pieces(self) -> Iterator[Piece]:
        source = self._source
        dataset = load_version(
            self.label,
            self._name,
            source.config_name,
            source.revision,
            self.identity()["version"],
            streaming=source.streaming,
        )
        own = {split: next((n for n in names if n in dataset), None) for split, names in SPLIT_NAMES.items()}
        if own["train"] is None:
            raise DataError(f"{self.label} has no split named train, only {', '.join(dataset)}: use another data set")
        carved = {split: share for split, share in self._fractions.items() if own[split] is None}
        held_out: set[int] = set()
        dropped = empty = 0
        for split, name in own.items():
            digests = set()
            for text in self._texts(dataset[name], name) if name else ():
                data = text.encode()
                digest = int.from_bytes(hashlib.sha256(data).digest()[:8])
                if not data:
                    empty += 1
                elif digest in held_out:
                    dropped += 1
                else:
                    target = _carve(digest, carved) if split == "train" else split
                    yield from (Piece(target, *rest) for rest in in_pieces(data))
                if split != "train":
                    digests.add(digest)
            held_out |= digests
        self._notes = {"empty_documents": empty, "documents_also_held_out": dropped}

    def _texts(self, rows: Any, split: str) -> Iterator[str]:
        column = self._source.text_column
        with _explained(self.label):
            # Pictures and sounds beside the text would be decoded too.
            if column in (rows.column_names or ()):
                rows = rows.select_columns([column])
            for number, row in enumerate(itertools.islice(rows, self._source.max_documents)):
                if column not in row:
                    raise DataError(f"{self.label} has no column {column!r}, only {', '.join(row)}: set text_column")
                text = row[column]
                if not isinstance(text, str):
                    raise DataError(
                        f"{self.label}: row {number} of {split}, column {column!r}, is {type(text).__name__}, not "
                        "text: set text_column to a column of strings"
                    )
                yield text

    def notes(self) -> dict[str, Any]:
        return self._notes


def _carve(digest: int, fractions: dict[str, float]) -> str:
    """The split of a document whose hash is `digest`, out of 2^64."""
    position = digest / 2**64
    for split, fraction in fractions.items():
        if position < fraction:
            return split
        position -= fraction
    return "train"


def label_of(name: str) -> str:
    """What records and messages call a data set: `hub:ORG/NAME`, or where it lies on this machine, if it does.

    Without absolute paths, and a folder with a slash at its end: one called `digits` is not the data set of that name.
    """
    path = Path(name)
    shown = path.name if path.is_absolute() else name
    if not path.exists():
        return f"hub:{shown}"
    return f"{shown.rstrip('/')}/" if path.is_dir() else shown


def current_version(label: str, name: str, config_name: str | None, revision: str | None, memory: Path) -> str:
    """The commit that a data set's revision points to now; without a network, the one it pointed to last time.

    Of a local folder it is a hash of what its files hold. A revision that is a commit is not asked for twice.

    Args:
        label: what messages call it.
        name, config_name, revision: as `load_dataset` takes them.
        memory: the `memory_file` that remembers the answer, or the hashes of local files.

    Raises:
        DataError: it cannot be read, and never could.
    """
    if Path(name).exists():
        builder = load_dataset_builder_or_explain(label, name, config_name, revision=revision)
        with _explained(label):
            return _hash_of_files(builder, Path(name), memory)
    known = recall(memory)
    if known and re.fullmatch("[0-9a-f]{40}", revision or ""):
        return known
    try:
        version = load_dataset_builder_or_explain(label, name, config_name, revision=revision).hash
    except DataError:
        if not known:
            raise
        return known
    remember(memory, version)
    return version


def _hash_of_files(builder: Any, path: Path, memory: Path) -> str:
    """The library's own hash knows of files that a README names only their pattern, and of others where they lie."""
    splits = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    folder = path.parent if path.is_file() else path
    about = (folder / name for name in ("README.md", ".huggingface.yaml", "dataset_infos.json"))
    splits["about"] = [str(file) for file in about if file.is_file()]
    here = sorted({Path(file) for files in splits.values() for file in files if Path(file).is_file()})
    hashes = dict(zip(map(str, here), read_once(here, sha256_of, memory), strict=True))
    content = {split: [hashes.get(file, file) for file in files] for split, files in splits.items()}
    return hashlib.sha256(json.dumps([builder.name, content]).encode()).hexdigest()[:32]


def load_version(
    label: str, name: str, config_name: str | None, revision: str | None, version: str, **kwargs: Any
) -> Any:
    """`load_dataset` at what `current_version` said, whatever the revision points to by now."""
    on_hub = re.fullmatch("[0-9a-f]{40}", version) and not Path(name).exists()
    if Path(name).exists():
        import datasets

        # Its own copy, too, may be of files that have changed since.
        kwargs["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / version)
    return load_dataset_or_explain(label, name, config_name, revision=version if on_hub else revision, **kwargs)


def load_dataset_or_explain(label: str, *args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset

    with _explained(label):
        args, kwargs = _located(*args, **kwargs)
        return load_dataset(*args, **kwargs)


def load_dataset_builder_or_explain(label: str, *args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset_builder

    with _explained(label):
        args, kwargs = _located(*args, **kwargs)
        return load_dataset_builder(*args, **kwargs)


def _located(name: str, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The library takes folders, though not ".", and patterns: a file is its folder, read for that file alone."""
    path = Path(name)
    if not path.is_file():
        return (name, *args), kwargs
    return (str(path.absolute().parent), *args), {**kwargs, "data_files": glob.escape(path.name)}


def _explained(label: str) -> AbstractContextManager:
    return explained(
        f"{label} cannot be read",
        "check its name, config_name, revision and files, the network, and for private or gated data sets the token "
        "(hf auth login)",
        # datasets, huggingface_hub and their readers raise a dozen unrelated types for what is one thing to a user.
        kinds=Exception,
    )
