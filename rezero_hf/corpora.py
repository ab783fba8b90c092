"""Where text comes from: the embedded corpus, files, enwik8 and Hub data sets, each already split into three."""

import codecs
import glob
import hashlib
import io
import itertools
import os
import platform
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from .hub_corpora import HubText, load_dataset_or_explain
from .sources import (
    PIECE_BYTES,
    SPLITS,
    Corpus,
    DataError,
    Piece,
    Source,
    explained,
    held_out_names,
    in_pieces,
    memory_file,
    read_once,
    read_pieces,
    recall,
    remember,
    shares_window,
    signature,
)


def open_corpus(source: Source, validation_fraction: float, test_fraction: float, cache_dir: Path) -> Corpus:
    """The corpus that a line of a recipe names.

    Args:
        source: the line.
        validation_fraction, test_fraction: held-out shares, for corpora without splits of their own.
        cache_dir: where enwik8 is looked for, and where hashes of unchanged files are remembered.

    Raises:
        DataError: nothing there has that name.
    """
    source.check()
    kind, _, rest = source.source.partition(":")
    fractions = {"validation": validation_fraction, "test": test_fraction}
    if source.source == "python-stdlib":
        return PythonStdlib(cache_dir)
    if kind == "enwik8":
        return Enwik8(Path(os.path.expanduser(rest)) if rest else None, cache_dir)
    if kind == "hub":
        return HubText(os.path.expanduser(rest), source, fractions, cache_dir)
    return TextFiles(source.source, fractions, cache_dir)


class PythonStdlib(Corpus):
    """The running interpreter's standard library: real code and prose on every machine, nothing to download.

    Left out: installed packages, tests, the character tables in `encodings`, and files generated when Python was
    built. Held out are whole top-level modules and packages, in the order of the sha256 of their names, until each
    split has 5 % of the bytes. One that is larger than a third of a split's share stays in training, so that no single
    package decides the number. Names alone choose, nothing was tuned; the choice shifts a little between Python
    versions, so compare results only where the recorded version and hash agree.

    Files of different modules share text (licence headers, near copies). A file that shares a run of 256 bytes, at
    any offset, with the test split is dropped from the other two, and one that shares it with validation is dropped
    from training; the record counts them. On Python 3.11 that is 4 % of the training text and one validation file.
    """

    label = "python-stdlib"
    share = 0.05
    skipped_folders = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._notes: dict[str, Any] = {}
        root = Path(sysconfig.get_paths()["stdlib"])
        self._paths: dict[str, Path] = {}
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in self.skipped_folders]
            for path in (Path(folder, name) for name in files if name.endswith(".py")):
                name = path.relative_to(root).as_posix()
                if not name.startswith(("_sysconfigdata", "config-")):
                    self._paths[name] = path
        self._paths = dict(sorted(self._paths.items()))

    def identity(self) -> dict[str, Any]:
        signatures = []
        for path in self._paths.values():
            with _reading(path):
                signatures.append((os.path.abspath(path), signature(path)))
        memory = memory_file(self._cache_dir, ["python-stdlib", signatures])
        sha256 = recall(memory)
        if sha256 is None:
            digest = hashlib.sha256()
            for name, data in self.files.items():
                digest.update(f"{name}\0{len(data)}\0".encode() + data)
            sha256 = digest.hexdigest()
            remember(memory, sha256)
        return {"kind": self.label, "python": platform.python_version(), "sha256": sha256}

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Name and content of every file, before the split."""
        contents = {}
        for name, path in self._paths.items():
            with _reading(path):
                contents[name] = path.read_bytes()
        return {
            name: data
            for name, data in contents.items()
            if data and _is_utf8(data) and not (name.startswith("encodings/") and b"decoding_" in data)
        }

    def pieces(self) -> Iterator[Piece]:
        for split, files in self.split().items():
            for name in files:
                for data, last in in_pieces(self.files[name]):
                    yield Piece(split, data, last)

    def split(self) -> dict[str, list[str]]:
        """File names of each split, after the files that share text with a later split are dropped."""
        sizes: dict[str, int] = {}
        for name, data in self.files.items():
            sizes[_module(name)] = sizes.get(_module(name), 0) + len(data)
        modules = held_out_names(sizes, {"validation": self.share, "test": self.share})
        splits = {
            split: [name for name in self.files if modules.get(_module(name), "train") == split] for split in SPLITS
        }
        dropped = {}
        protected: list[str] = []
        for split in reversed(SPLITS):
            shared = shares_window([self.files[name] for name in splits[split]], [self.files[n] for n in protected])
            gone = [name for name, is_shared in zip(splits[split], shared, strict=True) if is_shared]
            dropped[split] = {"files": gone, "bytes": sum(len(self.files[name]) for name in gone)}
            splits[split] = [name for name in splits[split] if name not in set(gone)]
            protected += splits[split]
        held_out = {split: sorted({_module(name) for name in splits[split]}) for split in ("validation", "test")}
        self._notes = {"modules": held_out, "dropped_for_shared_text": dropped}
        return splits

    def notes(self) -> dict[str, Any]:
        return self._notes


class TextFiles(Corpus):
    """UTF-8 text in a file, a folder (all files below it that are not hidden) or a glob.

    Identical files count once and empty ones are skipped. Many files are split by file, in the order of the sha256 of
    their content, none larger than a third of its split's share. Where that cannot reach half of the asked share (few
    files, or one that is most of the text) every file is split instead: its last part is the test split, the part
    before it the validation split, both starting at a line. Only whole files are compared, so text repeated inside
    different files can end up on both sides.
    """

    def __init__(self, pattern: str, fractions: dict[str, float], cache_dir: Path) -> None:
        path = Path(os.path.expanduser(pattern))
        self.label = path.name if path.is_absolute() else pattern
        self._fractions = fractions
        if path.is_file():
            paths = [path]
        elif path.is_dir():
            paths = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        else:
            paths = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not paths:
            raise DataError(
                f"data.sources: {pattern!r} is no file, folder with files or glob that matches any, and none of "
                "python-stdlib, enwik8, enwik8:PATH, hub:ORG/NAME: correct the path (relative ones start at "
                f"{Path.cwd()})"
            )
        paths = sorted(paths)
        with _reading(path):
            scanned = read_once(paths, _scan, memory_file(cache_dir, ["files", os.path.abspath(path)]))
        texts = [(path, found) for path, found in zip(paths, scanned, strict=True) if found["size"]]
        if not texts:
            raise DataError(f"data.sources: {pattern!r} holds no text, only empty files: put text into it or remove it")
        unique = {found["sha256"]: (path, found["size"]) for path, found in texts}
        self._files = dict(sorted(unique.items()))
        self._counts = {
            "files": len(unique),
            "empty_files": len(paths) - len(texts),
            "duplicate_files": len(texts) - len(unique),
        }

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256("\n".join(self._files).encode()).hexdigest()
        return {"kind": "files", **self._counts, "sha256": digest, "fractions": self._fractions}

    def pieces(self) -> Iterator[Piece]:
        sizes = {digest: size for digest, (_, size) in self._files.items()}
        held_out = held_out_names(sizes, self._fractions)
        by_file = all(
            sum(sizes[digest] for digest in held_out if held_out[digest] == split) >= share * sum(sizes.values()) / 2
            for split, share in self._fractions.items()
        )
        for digest, (path, size) in self._files.items():
            with _reading(path), path.open("rb") as file:
                if by_file:
                    ranges = {held_out.get(digest, "train"): (0, size)}
                else:
                    ranges = _tail_ranges(file, size, self._fractions)
                for split, (start, stop) in ranges.items():
                    yield from (Piece(split, *rest) for rest in read_pieces(file, start, stop))


@dataclass(frozen=True)
class Enwik8Facts:
    """What makes a file enwik8, and its usual split: the first bytes train, the next validate, the rest test.

    Size and SHA-1 are those on the page of the Large Text Compression Benchmark, which hosts the file; several
    independent projects check for the same pair.
    """

    size: int = 100_000_000
    sha1: str = "57b8363b814821dc9d47aa4d41f58733519076b2"
    train: int = 90_000_000
    validation: int = 5_000_000


class Enwik8(Corpus):
    """The first 10^8 bytes of a 2006 English Wikipedia dump, split 90M/5M/5M at byte positions.

    The cuts fall where they fall, also inside a character. The byte tokenizer sees every byte; a text tokenizer
    cannot see a part of a character, so for it the packer leaves out the at most 3 bytes on each side of a cut. Each
    split is one document.

    Args:
        path: `enwik8` or `enwik8.zip`. Default: those names in the cache folder, otherwise the Hub's Parquet copy of
            `LTCB/enwik8` (not tested against the real Hub; the hash decides whether it is the real file).
        cache_dir: the cache folder.
        facts: size, hash and split; other ones only in tests.
    """

    label = "enwik8"
    hub_copy = ("LTCB/enwik8", "enwik8-raw", "refs/convert/parquet")
    _way_out = "download enwik8.zip from mattmahoney.net/dc/enwik8.zip and name it as enwik8:PATH"

    def __init__(self, path: Path | None, cache_dir: Path, facts: Enwik8Facts | None = None) -> None:
        self._facts = facts or Enwik8Facts()
        if path is None:
            path = next((p for p in (cache_dir / "enwik8", cache_dir / "enwik8.zip") if p.is_file()), None)
        elif not path.is_file():
            raise DataError(f"data.sources: enwik8 file {str(path)!r} does not exist: {self._way_out}")
        self._path = path

    def identity(self) -> dict[str, Any]:
        facts = self._facts
        return {"kind": self.label, "sha1": facts.sha1, "split": [facts.train, facts.validation]}

    def pieces(self) -> Iterator[Piece]:
        facts = self._facts
        digest, size = hashlib.sha1(), 0
        # The zip reader raises RuntimeError for encryption and compression it does not know.
        damage = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
        with explained(f"data.sources: {self._path} cannot be read", self._way_out, damage), self._open() as file:
            while block := file.read(PIECE_BYTES):
                digest.update(block)
                size += len(block)
        if (size, digest.hexdigest()) != (facts.size, facts.sha1):
            raise DataError(
                f"data.sources: {self._path or self.hub_copy[0]} is not enwik8: {size:,} bytes with SHA-1 "
                f"{digest.hexdigest()}, expected {facts.size:,} with {facts.sha1}: {self._way_out}"
            )
        bounds = (0, facts.train, facts.train + facts.validation, facts.size)
        with _reading(self._path), self._open() as file:
            for split, (start, stop) in zip(SPLITS, itertools.pairwise(bounds), strict=True):
                yield from (Piece(split, *rest) for rest in read_pieces(file, start, stop))

    def _open(self) -> BinaryIO:
        if self._path is None:
            return self._open_hub_copy()
        if not zipfile.is_zipfile(self._path):
            return self._path.open("rb")
        try:
            return zipfile.ZipFile(self._path).open("enwik8")
        except KeyError:
            raise DataError(f"data.sources: {self._path} has no member named enwik8: {self._way_out}") from None

    def _open_hub_copy(self) -> BinaryIO:
        name, config_name, revision = self.hub_copy
        dataset = load_dataset_or_explain(
            f"enwik8 (as hub:{name})", name, config_name, revision=revision, split="train"
        )
        return io.BytesIO("".join(dataset["text"]).encode())


def _module(name: str) -> str:
    return name.split("/", maxsplit=1)[0].removesuffix(".py")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _reading(path: Path | None) -> AbstractContextManager:
    return explained(
        f"data.sources: {path} cannot be read",
        "check the file and its rights, or name only other ones, for example by a glob such as '*.txt'",
    )


def _scan(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, checked to be UTF-8."""
    digest, size, decoder = hashlib.sha256(), 0, codecs.getincrementaldecoder("utf-8")()
    with _reading(path), path.open("rb") as file:
        block = b"start"
        while block:
            block, pending = file.read(PIECE_BYTES), len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data.sources: {path} is not UTF-8 text at byte {size - pending + error.start}: convert it (for "
                    "example: iconv -f latin1 -t utf-8), or name only the text files with a glob such as '*.txt'"
                ) from None
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _tail_ranges(file: BinaryIO, size: int, fractions: dict[str, float]) -> dict[str, tuple[int, int]]:
    """Training, then validation, then test text of one file, each beginning where a line does."""
    test = _next_line(file, size - int(size * fractions["test"]), size)
    validation = _next_line(file, size - int(size * sum(fractions.values())), size)
    validation = min(validation, test) if fractions["validation"] else test
    return {"train": (0, validation), "validation": (validation, test), "test": (test, size)}


def _next_line(file: BinaryIO, position: int, size: int) -> int:
    """The first line start at or after `position`; a character's start if there is no line end close by."""
    if position in (0, size):
        return position
    file.seek(position - 1)
    block = file.read(1 << 16)
    if newline := block.find(b"\n") + 1:
        return position - 1 + newline
    return position + next((i for i, byte in enumerate(block[1:]) if byte & 0xC0 != 0x80), len(block) - 1)
