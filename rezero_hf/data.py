"""Corpora to tokens, tokens to packed shards, shards to blocks in an order that is a function of (seed, index).

`prepare` tokenizes every source once into flat files of token ids and opens them as memory maps from then on. The
shards of a recipe live in one folder whose name is a fingerprint of the text, the tokenizer and the format, so a
changed corpus can never be mistaken for the old one. The folder appears by one rename when everything in it is on
disk.

Training reads blocks by number. Which block the i-th one is follows from the seed by arithmetic alone, so a resumed
run, a run on more machines and an uninterrupted one see the same text in the same order.
"""

import copy
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .corpora import open_corpus
from .packing import write_shards
from .randomness import permute
from .shards import INDEX_NAME, TokenStream
from .sources import SPLITS, DataError, Source, cache_folder, explained
from .tokenization import check_tokenizer, tokenizer_fingerprint


__all__ = ["IGNORE_INDEX", "DataConfig", "DataError", "EvalBlocks", "PreparedData", "Source", "TrainBlocks", "prepare"]

# Part of the fingerprint: raise it when the same sources and tokenizer would give other shards.
FORMAT_VERSION = 1
# The label of positions without a target, as in PyTorch's cross entropy and all of Transformers.
IGNORE_INDEX = -100
# A mixture repeats after this many blocks, so weights are kept to a thousandth.
MIXTURE_PERIOD = 1000


@dataclass
class DataConfig:
    """What to train on.

    Args:
        sources: text, mixed by weight. Default: the embedded corpus `python-stdlib`. Each is split on its own; two
            sources are not compared, so do not name the same text in two of them.
        tokenizer: `"bytes"`, or a folder or a Hub id of a lossless byte-level tokenizer: one that gives back exactly
            the text that went in, so that bits per byte are defined. Default: bytes, which need no training.
        block_size: tokens that the model sees at once. Default 256, about eight lines of code as bytes.
        validation_fraction: share of the text held out for validation, for sources without such a split. Default 5 %.
        test_fraction: the same for the final test.
        cache_dir: where prepared shards live. Default: `~/.cache/rezero_hf`.
    """

    sources: list[Source] = field(default_factory=lambda: [Source()])
    tokenizer: str = "bytes"
    block_size: int = 256
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    cache_dir: str | None = None

    def check(self) -> None:
        """Raise a `DataError` for values that make no sense, whatever the text is."""
        if not self.sources:
            raise DataError("data.sources is empty: name at least one, for example python-stdlib")
        for number, source in enumerate(self.sources):
            source.check(f"data.sources[{number}]")
        if self.block_size < 1:
            raise DataError(f"data.block_size is {self.block_size}: it must be at least 1")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"data.{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise DataError("data.validation_fraction and data.test_fraction leave nothing to train on: lower them")
        mixture_pattern([source.weight for source in self.sources])


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> "PreparedData":
    """Packed shards for a recipe: written now if they are missing, otherwise only opened.

    Safe to kill at any point and to run from several processes at once, on several machines too where they share the
    cache: the others wait for the one that writes, and if it dies another one goes on from its last durable point. They
    wait for a lock and not in a collective, so nothing times out.

    Args:
        config: the recipe's data section.
        tokenizer: what `config.tokenizer` names, loaded.
        progress: show progress bars, and say on stderr what is written, waited for or gone on with.

    Raises:
        DataError: a value, path, text or tokenizer that cannot be used.
    """
    config.check()
    check_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {config.tokenizer!r} has no eos_token to put between documents: give it one")
    cache = cache_folder(config.cache_dir)
    # Corpora explain what they cannot read, so this is about writing.
    with explained(f"cannot prepare data under {cache}", "set data.cache_dir to a folder with room and rights"):
        cache.mkdir(parents=True, exist_ok=True)
        corpora = [open_corpus(s, config.validation_fraction, config.test_fraction, cache) for s in config.sources]
        inputs = {
            "format": FORMAT_VERSION,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "sources": [corpus.identity() for corpus in corpora],
        }
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache / fingerprint
        tokenized = write_shards(folder, corpora, tokenizer, inputs, progress)
    return PreparedData(folder, config, [corpus.label for corpus in corpora], tokenized)


class PreparedData:
    """Prepared shards on disk, opened. Made by `prepare`.

    Attributes:
        config: the `DataConfig` it was prepared for.
        index: what `index.json` says: every split's documents, tokens, bytes and shards.
        separator: id between documents.
        pad: id that fills the last, shorter evaluation block.
        tokenized_bytes: text that was tokenized for it just now; 0 when its shards were there already.

    Raises:
        DataError: the index cannot be read, or a shard is missing or has another size than recorded.
    """

    def __init__(self, folder: Path, config: DataConfig, labels: list[str], tokenized_bytes: int = 0) -> None:
        self.folder, self.config, self._labels, self.tokenized_bytes = folder, config, labels, tokenized_bytes
        try:
            self.index = json.loads((folder / INDEX_NAME).read_text())
            self.separator, self.pad = self.index["tokenizer"]["separator"], self.index["tokenizer"]["pad"]
            expected = {folder / shard["file"]: shard["bytes"] for shard in self._shards()}
            # Everything that is read later is read once here, so that damage shows now.
            for split in SPLITS:
                self.totals(split)
                for number in range(len(config.sources)):
                    self.stream(split, number)
            self.record()
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise DataError(f"{folder / INDEX_NAME} is damaged: {self._way_out}") from None
        for path, size in expected.items():
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise DataError(f"shard {path} {problem}: {self._way_out}")

    @property
    def _way_out(self) -> str:
        return f"delete {self.folder} and prepare again"

    def _shards(self) -> Iterator[dict[str, Any]]:
        for source in self.index["sources"]:
            for split in source["splits"].values():
                yield from split["shards"]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read shards and compare their sha256 with the recorded one.

        Args:
            part, parts: which share of the shards, from 0, out of how many, so that several processes can divide the
                work. Default: all shards.

        Raises:
            DataError: one differs or cannot be read.
            ValueError: there is no such share.
        """
        if not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}: parts count from 0")
        for shard in itertools.islice(self._shards(), part, None, parts):
            path = self.folder / shard["file"]
            with explained(f"shard {path} cannot be read", self._way_out), path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise DataError(
                    f"shard {path} is damaged: its content has changed since it was written (sha256 {digest[:12]}, "
                    f"recorded {shard['sha256'][:12]}): {self._way_out}"
                )

    def check_vocab(self, vocab_size: int) -> None:
        """Raise a `DataError` if a model with `vocab_size` ids cannot take every id of this data."""
        highest = max(
            [split["max_id"] for source in self.index["sources"] for split in source["splits"].values()]
            + [self.separator, self.pad]
        )
        if highest >= vocab_size:
            raise DataError(
                f"a model with vocab_size {vocab_size} cannot take this data's token ids up to {highest} (tokenizer "
                f"{self.config.tokenizer!r}): it takes a vocab_size of at least {self.index['tokenizer']['size']}"
            )

    def stream(self, split: str, source: int) -> TokenStream:
        """The tokens of one split of the source with that number."""
        if split not in SPLITS:
            raise DataError(f"split {split!r} does not exist: use one of {', '.join(SPLITS)}")
        found = self.index["sources"][source]["splits"][split]
        return TokenStream(self.folder, self.index["dtype"], found, self.separator)

    def totals(self, split: str) -> dict[str, int]:
        """Documents, tokens and bytes of text of one split, over all sources."""
        splits = [source["splits"][split] for source in self.index["sources"]]
        return {name: sum(found[name] for found in splits) for name in ("documents", "tokens", "bytes")}

    def record(self) -> dict[str, Any]:
        """What a run writes down about its data, as JSON: hashes, versions and sizes, no absolute paths."""
        sources = []
        for label, line, source in zip(self._labels, self.config.sources, self.index["sources"], strict=True):
            splits = {
                name: {key: split[key] for key in ("documents", "tokens", "bytes")}
                for name, split in source["splits"].items()
            }
            sources.append({"source": label, "weight": line.weight, **source, "splits": splits})
        name = os.path.expanduser(self.config.tokenizer)
        return {
            "fingerprint": self.index["fingerprint"],
            "tokenizer": {
                "name": Path(name).name if Path(name).is_absolute() else name,
                "fingerprint": self.index["tokenizer"]["fingerprint"],
                "size": self.index["tokenizer"]["size"],
            },
            "block_size": self.config.block_size,
            "sources": sources,
            "splits": {split: self.totals(split) for split in SPLITS},
        }


class TrainBlocks(Dataset):
    """The training blocks of a whole run, all epochs, by global number.

    Each source's text is cut into blocks of `block_size` once; every epoch over a source visits all of them in a new
    order. A mixture gives each run of 1000 block numbers to the sources in exact proportion to their weights, spread
    evenly. The text after a source's last whole block is not trained on.

    Items are dictionaries of int64 tensors of shape (block_size,): `input_ids`; `labels`, equal to them (Transformers'
    convention, where the model shifts); `shift_labels`, the next token at each position, including the one after
    the block, which `labels` alone would lose.

    Args:
        prepared: the data.
        seed: another seed, another order.
        num_blocks: blocks in the whole run: steps x global batch size.

    Raises:
        DataError: a source does not give one block of training text.
    """

    def __init__(self, prepared: PreparedData, seed: int, num_blocks: int) -> None:
        self._block_size, self._seed, self._num_blocks = prepared.config.block_size, seed, num_blocks
        self._first = 0
        weights = [source.weight for source in prepared.config.sources]
        self._streams = [prepared.stream("train", number) for number in range(len(weights))]
        for source, stream in zip(prepared.config.sources, self._streams, strict=True):
            if len(stream) < self._block_size:
                raise DataError(
                    f"{source.source!r} gives {len(stream)} training tokens, less than one block of "
                    f"{self._block_size}: add text or lower data.block_size"
                )
        self._pattern = mixture_pattern(weights)

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, block = self.locate(index)
        start = block * self._block_size
        tokens = torch.from_numpy(self._streams[source].read(start - 1, start + self._block_size))
        return {"input_ids": tokens[:-1], "labels": tokens[:-1].clone(), "shift_labels": tokens[1:].clone()}

    def after(self, blocks: int) -> "TrainBlocks":
        """As many blocks, but those that come after so many: for a run that goes on where another one ended."""
        later = copy.copy(self)
        later._first = self._first + blocks
        return later

    def locate(self, index: int) -> tuple[int, int]:
        """The source and the number of its block that stand at a global block number."""
        if not 0 <= index < self._num_blocks:
            raise IndexError(f"block {index} of {self._num_blocks}")
        slots, ranks, counts = self._pattern
        period, slot = divmod(self._first + index, MIXTURE_PERIOD)
        source = int(slots[slot])
        blocks = len(self._streams[source]) // self._block_size
        epoch, position = divmod(period * int(counts[source]) + int(ranks[slot]), blocks)
        return source, permute(position, blocks, (self._seed, source, epoch))


class EvalBlocks(Dataset):
    """A held-out split in order, such that every token is predicted exactly once.

    Block k predicts tokens k*window to (k+1)*window - 1 and sees the token before each, so the first token of a source
    is predicted from the separator. The last block of a source is filled up with padding whose labels are
    `IGNORE_INDEX`. Items are as in `TrainBlocks`; only `shift_labels` covers every token.

    Args:
        prepared: the data.
        split: `"validation"` or `"test"` (or `"train"`, to measure overfitting).
        max_blocks: take this many blocks, evenly spaced and always the same ones. Default: all.
        window: tokens that the model sees at once. Default: the block size it was trained with.
        stride: tokens from the beginning of a block to that of the next. Default: `window`, blocks side by side. With
            a smaller one blocks overlap, and what an earlier block has predicted is no label again: after the first
            block of a source every token is predicted from at least window - stride + 1 tokens before it.

    Raises:
        DataError: the split is empty, there are no blocks to take, or the stride leaves text out.
    """

    def __init__(
        self,
        prepared: PreparedData,
        split: str,
        max_blocks: int | None = None,
        window: int | None = None,
        stride: int | None = None,
    ) -> None:
        self._window, self._pad = window or prepared.config.block_size, prepared.pad
        self._stride = self._window if stride is None else stride
        if not 1 <= self._stride <= self._window:
            raise DataError(f"stride {self._stride}: must be at least 1 and at most the window, {self._window} tokens")
        self._overlap = self._window - self._stride
        self._streams = [prepared.stream(split, number) for number in range(len(prepared.config.sources))]
        # One at the beginning of a source, and one more for every stride of text that it leaves.
        left = (max(0, len(stream) - self._window) for stream in self._streams)
        blocks = [
            1 + math.ceil(rest / self._stride) if len(stream) else 0
            for stream, rest in zip(self._streams, left, strict=True)
        ]
        self._starts = np.cumsum([0, *blocks])
        self._total = int(self._starts[-1])
        if not self._total:
            raise DataError(f"the {split} split is empty: raise data.{split}_fraction or add text")
        if max_blocks is not None and max_blocks < 1:
            raise DataError(
                f"cannot evaluate {split} on {max_blocks} blocks: set training.eval_blocks and "
                "training.final_eval_blocks to at least 1, or leave them out for all"
            )
        self._length = min(max_blocks or self._total, self._total)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        block = index * self._total // self._length
        source = int(np.searchsorted(self._starts, block, side="right")) - 1
        start = (block - int(self._starts[source])) * self._stride
        tokens = torch.from_numpy(self._streams[source].read(start - 1, start + self._window))
        shape = (self._window,)
        filled = len(tokens) - 1
        item = {
            "input_ids": torch.full(shape, self._pad),
            "labels": torch.full(shape, IGNORE_INDEX),
            "shift_labels": torch.full(shape, IGNORE_INDEX),
        }
        item["input_ids"][:filled] = item["labels"][:filled] = tokens[:-1]
        item["shift_labels"][:filled] = tokens[1:]
        if start:
            item["shift_labels"][: self._overlap] = IGNORE_INDEX
        return item


def held_out_blocks(prepared: PreparedData, max_blocks: int | None = None) -> dict[str, EvalBlocks]:
    """`EvalBlocks` of validation and test, of those that hold text."""
    splits = [split for split in SPLITS if split != "train" and prepared.totals(split)["tokens"]]
    return {split: EvalBlocks(prepared, split, max_blocks) for split in splits}


def mixture_pattern(weights: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How sources share each run of `MIXTURE_PERIOD` blocks.

    Returns:
        The source of each slot, how many earlier slots that source has, and how many slots each source has in all.

    Raises:
        DataError: a weight is too small to get a slot.
    """
    exact = np.array(weights) / sum(weights) * MIXTURE_PERIOD
    counts = np.floor(exact).astype(int)
    # The largest remainders get the slots that rounding down left over.
    counts[np.argsort(counts - exact, kind="stable")[: MIXTURE_PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise DataError(
            f"data.sources: weight {min(weights)} is below 1/{MIXTURE_PERIOD} of the sum of {weights}: raise it"
        )
    ranks = np.concatenate([np.arange(count) for count in counts])
    sources = np.repeat(np.arange(len(weights)), counts)
    order = np.argsort((ranks + 0.5) / counts[sources], kind="stable")
    return sources[order], ranks[order], counts
