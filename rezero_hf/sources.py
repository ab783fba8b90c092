"""What every corpus is made of: the recipe line that names it, pieces of text, and rules that keep the splits apart.

A corpus hands out its text once, in a fixed order, as `Piece`s: UTF-8 bytes, the split they belong to, and whether a
document ends there. Documents stream, so a corpus may be larger than memory. What a corpus *is* (`identity`) is known
without tokenizing anything, so packed shards are reused exactly when their text would come out the same.
"""

import hashlib
import io
import json
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock

from .durable import write_whole
from .errors import UserError


T = TypeVar("T")
SPLITS = ("train", "validation", "test")
# A document longer than this is handed out in pieces of about this many bytes, cut at line ends where there are any.
PIECE_BYTES = 1 << 20


class DataError(UserError):
    """Text, a tokenizer or prepared data that cannot be used; the message is one line and says what to do."""


@contextmanager
def explained(
    what: str, way_out: str, kinds: type[Exception] | tuple[type[Exception], ...] = OSError
) -> Iterator[None]:
    """Turn an exception of these kinds inside into the one line `what (why): way_out`.

    Why is the first line of the exception and, where that says more, of its innermost cause. A `DataError` passes.

    Raises:
        DataError: instead of one of `kinds`.
    """
    try:
        yield
    except DataError:
        raise
    except kinds as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why, detail = ((str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".:") for e in (error, cause))
        raise DataError(f"{what} ({why if detail in why else f'{why}: {detail}'}): {way_out}") from error


def writable_folder(folder: str | Path, way_out: str) -> Path:
    """The folder, `~` expanded, made if missing and tried out, before the work whose result goes there.

    Raises:
        DataError: nothing can be written there.
    """
    folder = Path(os.path.expanduser(folder))
    with explained(f"cannot write into {folder}", way_out):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder


@dataclass
class Source:
    """One source of text.

    Args:
        source: `"python-stdlib"`, `"enwik8"` or `"enwik8:PATH"`, `"hub:ORG/NAME"` (or `"hub:PATH"`, any data set
            folder, or file of rows, that `load_dataset` reads), or a file, folder or glob of UTF-8 text.
        weight: share of the training blocks relative to the other sources. Only ratios count.
        config_name: configuration of a Hub data set. Default: its only or default one.
        revision: branch, tag or commit of a Hub data set. A full commit hash needs no network once prepared.
        text_column: column of a Hub data set that holds the text.
        streaming: read a Hub data set over the network while packing instead of downloading it first.
        max_documents: read at most this many rows of each split of a Hub data set. Default: all of them.
    """

    source: str = "python-stdlib"
    weight: float = 1.0
    config_name: str | None = None
    revision: str | None = None
    text_column: str = "text"
    streaming: bool = False
    max_documents: int | None = None

    def check(self, field: str = "data.sources") -> None:
        """Raise a `DataError` for values that no source can have."""
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"{field}: weight of {self.source!r} is {self.weight}: it must be a number above 0")
        if self.max_documents is not None and self.max_documents < 1:
            raise DataError(
                f"{field}: max_documents of {self.source!r} is {self.max_documents}: at least 1, or leave it"
            )
        if not self.source.startswith("hub:"):
            default = Source()
            for name in ("config_name", "revision", "text_column", "streaming", "max_documents"):
                if getattr(self, name) != getattr(default, name):
                    raise DataError(f"{field}: {name} is only for hub: sources, not for {self.source!r}: remove it")


class Piece(NamedTuple):
    """UTF-8 text of one split; `last` marks the end of a document."""

    split: str
    data: bytes
    last: bool


class Corpus(ABC):
    """Text in three splits. `label` names it in records and messages, without absolute paths."""

    label: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the content, as JSON: two corpora with equal identities give equal pieces."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All text once, in a fixed order; the pieces of one document follow each other."""

    def notes(self) -> dict[str, Any]:
        """What happened on the way, as JSON, complete once `pieces` is exhausted: documents dropped and why."""
        return {}


def in_pieces(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """One document as (text, whether it ends here), in pieces that cut no character."""
    return read_pieces(io.BytesIO(data), 0, len(data))


def read_pieces(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[bytes, bool]]:
    """Bytes `start` to `stop` of a file as one document in pieces."""
    file.seek(start)
    left, rest = stop - start, b""
    while left:
        block = file.read(min(PIECE_BYTES, left))
        if not block:
            raise DataError(f"{getattr(file, 'name', 'a corpus file')} became shorter while it was read: run again")
        left -= len(block)
        rest += block
        cut = _last_cut(rest) if left else len(rest)
        if cut:
            yield rest[:cut], not left
        rest = rest[cut:]


def _last_cut(data: bytes) -> int:
    """Where the last line begins or, if there is only one, the last character."""
    line = data.rfind(b"\n") + 1
    return line or next(i for i in range(len(data) - 1, -1, -1) if i == 0 or data[i] & 0xC0 != 0x80)


def held_out_names(sizes: dict[str, int], fractions: dict[str, float]) -> dict[str, str]:
    """Choose names for each held-out split, in the order of the sha256 of the name, until its share is reached.

    Args:
        sizes: bytes behind each name.
        fractions: share of all bytes that each held-out split should get.

    Returns:
        The split of each chosen name. A name that would be more than a third of its split's share is never chosen.
    """
    chosen = {}
    order = iter(sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()))
    for split, fraction in fractions.items():
        missing = fraction * sum(sizes.values())
        limit = missing / 3
        while missing > 0 and (name := next(order, None)) is not None:
            if sizes[name] <= limit:
                chosen[name] = split
                missing -= sizes[name]
    return chosen


def shares_window(texts: list[bytes], protected: list[bytes], width: int = 256) -> list[bool]:
    """Whether each text has a run of `width` bytes, at any offset, in common with any protected one, or equals it.

    Compared are 64-bit hashes of all runs: an equal run is never missed, and two different ones are taken for equal
    with a chance of about 1 in 10^6 per call on ten megabytes.
    """
    hashes = [_window_hashes(text, width) for text in protected]
    held = np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)
    # A table over the top 24 bits rules most runs out with one look-up, and only the rest is searched for.
    possible = np.zeros(1 << 24, dtype=bool)
    possible[held >> np.uint64(40)] = True
    whole = set(protected)
    found = []
    for text in texts:
        windows = _window_hashes(text, width)
        windows = windows[possible[windows >> np.uint64(40)]]
        places = np.searchsorted(held, windows)
        found.append(text in whole or bool((held[np.minimum(places, len(held) - 1)] == windows).any()))
    return found


def _window_hashes(data: bytes, width: int) -> np.ndarray:
    """Polynomial hashes mod 2^64 of all runs of `width` (a power of two) bytes, by doubling the run's length."""
    byte_values = np.random.default_rng(0).integers(1, 2**64, 256, dtype=np.uint64)
    hashes, length, factor = byte_values[np.frombuffer(data, np.uint8)], 1, 0x9E3779B97F4A7C15
    while length < width:
        hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return hashes


def cache_folder(cache_dir: str | None) -> Path:
    """Where prepared data live: what `cache_dir` says, or `~/.cache/rezero_hf`."""
    return Path(os.path.expanduser(cache_dir or "~/.cache/rezero_hf"))


def memory_file(cache_dir: Path, key: Any) -> Path:
    """The file that remembers what was found out about `key` (JSON)."""
    return cache_dir / "known" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def remember(memory: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or the old state, also after a crash.

    A cache that cannot be written forgets, and what it would have held is found out again the next time.
    """
    with suppress(OSError):
        write_whole(memory, json.dumps({"value": value}))


def signature(path: Path) -> list[int]:
    """Changes whenever the file is written to or replaced."""
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_once(paths: list[Path], read: Callable[[Path], T], memory: Path) -> list[T]:
    """What `read` finds out about each file (JSON), remembered for those that have not changed since.

    One process reads; others that want to know the same wait for it, and then find what it has remembered.
    """
    names = {os.path.abspath(path): signature(path) for path in paths}

    def remembered() -> dict[str, T]:
        before = recall(memory)
        entries = before.items() if isinstance(before, dict) else ()
        return {name: value for name, (signed, value) in entries if names.get(name) == signed}

    found = remembered()
    if len(found) < len(names):
        with _alone(memory):
            found = remembered()
            found = {name: found[name] if name in found else read(Path(name)) for name in names}
            remember(memory, {name: [signed, found[name]] for name, signed in names.items()})
    return [found[os.path.abspath(path)] for path in paths]


@contextmanager
def _alone(memory: Path) -> Iterator[None]:
    """Let one process in at a time, where a lock can be made: a cache that cannot be written has none."""
    lock = FileLock(memory.with_suffix(".lock"))
    with suppress(OSError, NotImplementedError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def recall(memory: Path) -> Any:
    """What `remember` wrote there, or None if there is nothing or something else."""
    try:
        return json.loads(memory.read_text())["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
