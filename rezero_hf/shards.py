"""Packed shards: flat files of token ids with an end-of-document mark after each document, and an index that vouches
for them.

A folder of shards appears by one rename once everything in it is on disk, so a folder that exists is whole. Memory
stays bounded: text is tokenized a few megabytes at a time and read back through memory maps.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .sources import SPLITS, Corpus, DataError, Piece, sync
from .tokenization import is_byte_tokenizer


INDEX_NAME = "index.json"
SHARD_TOKENS = 64 * 1024 * 1024
_ENCODE_BYTES = 4 << 20


def write_shards(
    folder: Path, corpora: list[Corpus], tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Any], progress: bool
) -> None:
    """Write all shards and their index beside `folder`, then rename. The caller holds the lock."""
    # Whoever left one of these was killed: only the holder of the lock writes them.
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    temporary.mkdir()
    try:
        encoder = _Encoder(tokenizer)
        sources = []
        for number, corpus in enumerate(corpora):
            bar = tqdm(unit="B", unit_scale=True, desc=f"tokenizing {corpus.label}", disable=not progress, delay=1)
            with bar:
                writers = {split: _Writer(temporary, f"{split}-{number}", encoder) for split in SPLITS}
                for split, ids, text_bytes, documents in encoder.encode(corpus.pieces()):
                    writers[split].append(ids, text_bytes, documents)
                    bar.update(text_bytes)
                splits = {split: writer.finish() for split, writer in writers.items()}
            sources.append({**corpus.identity(), **corpus.notes(), "splits": splits})
        index = {
            "fingerprint": folder.name,
            "inputs": inputs,
            "tokenizer": {
                "fingerprint": inputs["tokenizer"],
                "size": encoder.vocabulary,
                "separator": tokenizer.eos_token_id,
                "pad": encoder.pad,
            },
            "dtype": encoder.dtype.name,
            "sources": sources,
        }
        with (temporary / INDEX_NAME).open("w") as file:
            json.dump(index, file, indent=1)
            sync(file)
        _sync_folder(temporary)
        # Without an index this is somebody's half-deleted copy.
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class _Encoder:
    """Pieces of text to arrays of ids, a few megabytes at a time, with the separator after each document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizer.backend_tokenizer
        # A copy, because padding, truncation and the reading of specials are settings of the caller's object.
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._bytes = is_byte_tokenizer(tokenizer)
        self.separator = tokenizer.eos_token_id
        self.pad = self.separator if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.dtype = np.dtype(np.min_scalar_type(self.vocabulary - 1))

    def encode(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, np.ndarray, int, int]]:
        """(split, ids, bytes of text, documents ended) for each piece, in order."""
        batch: list[Piece] = []
        size = 0
        for piece in pieces:
            batch.append(piece)
            size += len(piece.data)
            if size >= _ENCODE_BYTES:
                yield from self._encode_batch(batch)
                batch, size = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[Piece]) -> Iterator[tuple[str, np.ndarray, int, int]]:
        if self._bytes:
            rows = [(np.frombuffer(piece.data, np.uint8), len(piece.data)) for piece in batch]
        else:
            # Corpora hand out whole characters; only enwik8's fixed cuts can leave a part of one, which no text
            # tokenizer can read.
            texts = [piece.data.decode("utf-8", "ignore") for piece in batch]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            rows = [
                (np.asarray(encoding.ids, dtype=np.int64), len(text.encode()))
                for encoding, text in zip(encodings, texts, strict=True)
            ]
        for piece, (ids, text_bytes) in zip(batch, rows, strict=True):
            ending = np.array([self.separator] if piece.last else [], dtype=self.dtype)
            yield piece.split, np.concatenate([ids.astype(self.dtype), ending]), text_bytes, int(piece.last)


class _Writer:
    """The shards of one split of one source: NAME-00000.bin and on, each full but the last."""

    def __init__(self, folder: Path, name: str, encoder: _Encoder) -> None:
        self._folder, self._name, self._dtype = folder, name, encoder.dtype
        self._file = None
        self._totals = {"documents": 0, "tokens": 0, "bytes": 0, "max_id": 0}
        self._shards: list[dict[str, Any]] = []

    def append(self, ids: np.ndarray, text_bytes: int, documents: int) -> None:
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

    def finish(self) -> dict[str, Any]:
        self._close()
        return {**self._totals, "shards": self._shards}

    def _close(self) -> None:
        if self._file is None:
            return
        sync(self._file)
        self._file.close()
        self._file = None
        shard = self._shards[-1]
        shard["bytes"] = shard["tokens"] * self._dtype.itemsize
        shard["sha256"] = self._digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TokenStream:
    """All tokens of one split of one source, read from its memory-mapped shards as if they were one array.

    Raises:
        DataError: an id is above the highest that was written, so the shard is damaged. It says so before a model
            looks the id up; damage that leaves the ids in range is for `PreparedData.verify` to find.
    """

    def __init__(self, folder: Path, dtype: str, split: dict[str, Any], separator: int) -> None:
        self._paths = [folder / shard["file"] for shard in split["shards"]]
        self._max_id = split["max_id"]
        self._starts = np.cumsum([0] + [shard["tokens"] for shard in split["shards"]])
        self._dtype, self._separator = np.dtype(dtype), separator
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    # Loader processes open their own maps; a pickled map would be a copy of the whole shard.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids `start` to `stop` as int64. Position -1 holds the separator that precedes the first document."""
        parts = [np.array([self._separator])] if start < 0 else []
        start, stop = max(start, 0), min(stop, len(self))
        while start < stop:
            shard = int(np.searchsorted(self._starts, start, side="right")) - 1
            if shard not in self._maps:
                self._maps[shard] = np.memmap(self._paths[shard], dtype=self._dtype, mode="r")
            end = min(stop, int(self._starts[shard + 1]))
            part = self._maps[shard][start - self._starts[shard] : end - self._starts[shard]]
            if (highest := int(part.max())) > self._max_id:
                path = self._paths[shard]
                raise DataError(
                    f"shard {path} is damaged: it holds token id {highest}, but none above {self._max_id} was written: "
                    f"delete {path.parent} and prepare again"
                )
            parts.append(part)
            start = end
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
