"""Packed shards: flat files of token ids with an end-of-document mark after each document, which an index vouches for.

They are written once, by `packing.py`, and opened for each read: a file that stays open is a descriptor, and a run over
more shards than a process may hold of those would end.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from .sources import DataError


INDEX_NAME = "index.json"
SHARD_TOKENS = 64 * 1024 * 1024


class ShardWriter:
    """The shards of one split of one source: NAME-00000.bin and on, each full but the last.

    Args:
        state: what `save` gave in an earlier process; the shards are on disk, the open one possibly longer.

    Raises:
        ValueError: the open shard does not hold what was saved.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, state: dict[str, Any] | None) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._file = None
        names = ("documents", "tokens", "bytes", "max_id")
        self._totals = {name: state[name] if state else 0 for name in names}
        self._shards: list[dict[str, Any]] = state["shards"] if state else []
        if state and state["open"]:
            path = folder / self._shards[-1]["file"]
            self._file = path.open("r+b")
            self._digest = hashlib.sha256(self._file.read(self._shards[-1]["tokens"] * self._dtype.itemsize))
            if self._digest.hexdigest() != state["open"]:
                raise ValueError(f"shard {path.name} is damaged")
            self._file.seek(self._file.truncate(self._file.tell()))

    def append(self, ids: np.ndarray, text_bytes: int, documents: int) -> None:
        """Add ids, which stand for so many bytes of text and end so many documents."""
        self._totals["documents"] += documents
        self._totals["tokens"] += len(ids)
        self._totals["bytes"] += text_bytes
        self._totals["max_id"] = max(self._totals["max_id"], int(ids.max(initial=0)))
        while len(ids):
            if self._file is None:
                self._shards.append({"file": f"{self._name}-{len(self._shards):05d}.bin", "tokens": 0})
                self._file = (self._folder / self._shards[-1]["file"]).open("wb")
                self._digest = hashlib.sha256()
            part = ids[: SHARD_TOKENS - self._shards[-1]["tokens"]]
            self._file.write(part.data)
            self._digest.update(part.data)
            self._shards[-1]["tokens"] += len(part)
            if self._shards[-1]["tokens"] == SHARD_TOKENS:
                self._close()
            ids = ids[len(part) :]

    def save(self) -> dict[str, Any]:
        """Push everything to disk and say what it is: the index entry so far, and the sha256 of the open shard."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        opened = None if self._file is None else self._digest.hexdigest()
        return {**self._totals, "shards": self._shards, "open": opened}

    def finish(self) -> dict[str, Any]:
        """Close the last shard; returns the split's entry in the index."""
        self._close()
        return {**self._totals, "shards": self._shards}

    def _close(self) -> None:
        if self._file is None:
            return
        self.save()
        self._file.close()
        self._file = None
        shard = self._shards[-1]
        shard["bytes"] = shard["tokens"] * self._dtype.itemsize
        shard["sha256"] = self._digest.hexdigest()


class TokenStream:
    """All tokens of one split of one source, read from its shards as if they were one array.

    Raises:
        DataError: an id is above the highest that was written, so the shard is damaged. It says so before a model
            looks the id up; damage that leaves the ids in range is for `PreparedData.verify` to find.
    """

    def __init__(self, folder: Path, dtype: str, split: dict[str, Any], separator: int) -> None:
        self._paths = [folder / shard["file"] for shard in split["shards"]]
        self._max_id = split["max_id"]
        self._starts = np.cumsum([0] + [shard["tokens"] for shard in split["shards"]])
        self._dtype, self._separator = np.dtype(dtype), separator

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids `start` to `stop` as int64. Position -1 holds the separator that precedes the first document."""
        parts = [np.array([self._separator])] if start < 0 else []
        start, stop = max(start, 0), min(stop, len(self))
        while start < stop:
            shard = int(np.searchsorted(self._starts, start, side="right")) - 1
            path, end = self._paths[shard], min(stop, int(self._starts[shard + 1]))
            with path.open("rb") as file:
                file.seek((start - int(self._starts[shard])) * self._dtype.itemsize)
                part = np.frombuffer(file.read((end - start) * self._dtype.itemsize), self._dtype)
            if (highest := int(part.max())) > self._max_id:
                raise DataError(
                    f"shard {path} is damaged: it holds token id {highest}, but none above {self._max_id} was written: "
                    f"delete {path.parent} and prepare again"
                )
            parts.append(part)
            start = end
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
