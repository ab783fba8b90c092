"""Text to packed shards and their index, on all cores, by a process that may be killed at any point.

A folder of shards appears by one rename once everything in it is on disk, so a folder that exists is whole. Until then
it is called `.FINGERPRINT.partial`, and its `progress.json` says from where a killed preparation goes on. Memory stays
bounded: each core tokenizes at most one batch or piece at a time, about a megabyte.
"""

import hashlib
import itertools
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .durable import sync, write_whole, written_once
from .runs import cores
from .shards import INDEX_NAME, ShardWriter
from .sources import SPLITS, Corpus, Piece
from .tokenization import is_byte_tokenizer


PROGRESS_NAME = "progress.json"
# What one thread tokenizes at once, unless a single piece is longer. Meanwhile the library needs up to 200 times as
# much memory, on every core.
_ENCODE_BYTES = 256 << 10
# What a kill costs at most, beside reading up to the place again: a durable point is reached after this much text or
# time, whichever comes first.
_DURABLE_BYTES = 256 << 20
_DURABLE_SECONDS = 30.0


def write_shards(
    folder: Path, corpora: list[Corpus], tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Any], progress: bool
) -> int:
    """See to it that `folder` holds the shards and their index, written by this process or by one that is at it.

    Whoever writes holds a file lock, which ends with its process. The next one goes on from the last durable point:
    finished sources are not read again, and of the others the text before that point is read, but neither tokenized nor
    written.

    Returns:
        Bytes of text that this process tokenized.
    """
    write = lambda: _write(folder, corpora, tokenizer, inputs, progress)  # noqa: E731
    return written_once(folder, INDEX_NAME, write, progress) or 0


def _write(
    folder: Path, corpora: list[Corpus], tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Any], progress: bool
) -> int:
    """Write beside `folder`, then rename; returns the bytes of text that were tokenized for it."""
    partial = folder.parent / f".{folder.name}.partial"
    partial.mkdir(exist_ok=True)
    tokenized = 0
    try:
        # The index is written last: where there is one, only the rename is missing.
        if not (partial / INDEX_NAME).is_file():
            _say(f"tokenizing {', '.join(corpus.label for corpus in corpora)} into {folder}", progress)
            packing = _Packing(partial, folder.name, _Encoder(tokenizer), progress)
            tokenized = sum(packing.pack(corpus) for corpus in corpora[len(packing.sources) :])
            write_whole(partial / INDEX_NAME, json.dumps(packing.index(inputs), indent=1))
    except BaseException:
        if not (partial / PROGRESS_NAME).is_file():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / PROGRESS_NAME).unlink(missing_ok=True)
    # Without an index this is somebody's half-deleted copy.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    return tokenized


def _say(line: str, progress: bool) -> None:
    """One line where the progress bars are, for whoever asked for those."""
    if progress:
        print(line, file=sys.stderr, flush=True)


class _Packing:
    """Shards in the making, and the file from which another process can go on making them.

    Attributes:
        sources: entries of the index for the sources that are finished.
    """

    def __init__(self, folder: Path, fingerprint: str, encoder: "_Encoder", progress: bool) -> None:
        self._folder, self._fingerprint, self._encoder, self._progress = folder, fingerprint, encoder, progress
        self._saved_at, self._unsaved = time.monotonic(), 0
        try:
            self._resume()
        except FileNotFoundError:
            self._start()
        except ValueError as error:
            _say(f"{folder / PROGRESS_NAME} cannot be used ({error}): preparing from the start", progress)
            self._start()

    def pack(self, corpus: Corpus) -> int:
        """Tokenize and write what is missing of the next source; returns the bytes of that text."""
        tokenized = 0
        with tqdm(unit="B", unit_scale=True, disable=not self._progress, delay=1) as bar:
            pieces = corpus.pieces()
            bar.set_description_str(f"finding the place in {corpus.label}", refresh=False)
            for piece in itertools.islice(pieces, self._pieces):
                bar.update(len(piece.data))
            bar.set_description_str(f"tokenizing {corpus.label}", refresh=False)
            for piece in self._encoder.encode(pieces):
                self._writers[piece.split].append(piece.ids, piece.text_bytes, piece.documents)
                self._pieces += 1
                self._unsaved += piece.text_bytes
                tokenized += piece.text_bytes
                bar.update(piece.text_bytes)
                if self._unsaved >= _DURABLE_BYTES or time.monotonic() - self._saved_at >= _DURABLE_SECONDS:
                    self._save()
        splits = {split: writer.finish() for split, writer in self._writers.items()}
        self.sources.append({**corpus.identity(), **corpus.notes(), "splits": splits})
        self._next_source({})
        return tokenized

    def index(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What `index.json` says when all sources are packed."""
        return {
            "fingerprint": self._fingerprint,
            "inputs": inputs,
            "tokenizer": {
                "fingerprint": inputs["tokenizer"],
                "size": self._encoder.vocabulary,
                "separator": self._encoder.separator,
                "pad": self._encoder.pad,
            },
            "dtype": self._encoder.dtype.name,
            "sources": self.sources,
        }

    def _start(self) -> None:
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        self.sources: list[dict[str, Any]] = []
        self._next_source({})

    def _next_source(self, writers: dict[str, Any], pieces: int = 0) -> None:
        """Open the writers of the first source that is not finished, in the states that `progress.json` recorded."""
        self._pieces = pieces
        self._writers = {
            split: ShardWriter(self._folder, f"{split}-{len(self.sources)}", self._encoder.dtype, writers.get(split))
            for split in SPLITS
        }

    def _save(self) -> None:
        """A durable point: shards first, so that progress never speaks of what is not on disk."""
        state = {
            "fingerprint": self._fingerprint,
            "sources": self.sources,
            "pieces": self._pieces,
            "writers": {split: writer.save() for split, writer in self._writers.items()},
        }
        write_whole(self._folder / PROGRESS_NAME, json.dumps({"sha256": _digest(state), "state": state}))
        self._saved_at, self._unsaved = time.monotonic(), 0

    def _resume(self) -> None:
        """Take the place of the process that wrote `progress.json`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or about something else, or a shard is not as it says.
        """
        text = (self._folder / PROGRESS_NAME).read_bytes()
        try:
            saved = json.loads(text)
            state = saved["state"]
            whole = saved["sha256"] == _digest(state)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError("it is damaged")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError("it is about other data")
        self.sources = state["sources"]
        splits = [split for source in self.sources for split in source["splits"].values()]
        splits += state["writers"].values()
        shards = {self._folder / shard["file"]: shard for split in splits for shard in split["shards"]}
        for path, shard in shards.items():
            if not path.is_file() or path.stat().st_size < shard["tokens"] * self._encoder.dtype.itemsize:
                raise ValueError(f"shard {path.name} is missing or too short")
        self._next_source(state["writers"], state["pieces"])
        done = sum(split["bytes"] for split in splits)
        _say(f"going on after {done / 1e6:,.1f} MB of text", self._progress)
        # Shards that were begun after the durable point will be begun again.
        for path in set(self._folder.iterdir()) - {*shards, self._folder / PROGRESS_NAME}:
            path.unlink()


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


class _EncodedPiece(NamedTuple):
    """Ids of a piece, the separator included where a document ends; bytes of its text; documents that end in it."""

    split: str
    ids: np.ndarray
    text_bytes: int
    documents: int


class _Encoder:
    """Pieces of text to arrays of ids, with the separator after each document."""

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

    def encode(self, pieces: Iterable[Piece]) -> Iterator[_EncodedPiece]:
        """Each piece in order, tokenized on all cores.

        The library spreads the texts of one call over its threads, which leaves cores idle where texts are few or one
        takes longest. So as many calls as there are cores run at once. Only whole pieces are handed out, so which ids
        come out depends neither on batches nor on threads.
        """
        running: deque[Future] = deque()
        with ThreadPoolExecutor(cores()) as pool:
            for batch in _batches(pieces):
                running.append(pool.submit(self._encode_batch, batch))
                # Two for each core, so that none waits while the oldest is written.
                if len(running) >= 2 * cores():
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()

    def _encode_batch(self, batch: list[Piece]) -> list[_EncodedPiece]:
        if self._bytes:
            rows = [(np.frombuffer(piece.data, np.uint8), len(piece.data)) for piece in batch]
        else:
            # Corpora hand out whole characters; only enwik8's fixed cuts can leave a part of one, which no text
            # tokenizer can read.
            texts = [piece.data.decode("utf-8", "ignore") for piece in batch]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            rows = [
                (np.asarray(encoding.ids, dtype=self.dtype), len(text.encode()))
                for encoding, text in zip(encodings, texts, strict=True)
            ]
        encoded = []
        for piece, (ids, text_bytes) in zip(batch, rows, strict=True):
            ending = np.array([self.separator] if piece.last else [], dtype=self.dtype)
            packed = np.concatenate([ids, ending], dtype=self.dtype)
            encoded.append(_EncodedPiece(piece.split, packed, text_bytes, int(piece.last)))
        return encoded


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of at least `_ENCODE_BYTES` of text, the last one shorter."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= _ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
