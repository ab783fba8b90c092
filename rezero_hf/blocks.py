"""Blocks of packed tokens, in an order that is a function of (seed, index).

Training reads blocks by number. Which block the i-th one is follows from the seed by arithmetic alone, so a resumed
run, a run on more machines and an uninterrupted one see the same text in the same order.
"""

import copy
import math

import numpy as np
import torch
from torch.utils.data import Dataset

from .data import PreparedData
from .mixture import MIXTURE_PERIOD, mixture_pattern
from .randomness import permute
from .sources import SPLITS, DataError


# The label of positions without a target, as in PyTorch's cross entropy and all of Transformers.
IGNORE_INDEX = -100


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

    Attributes:
        fingerprint: of the text; a run goes on with the same one alone.

    Raises:
        DataError: a source does not give one block of training text.
    """

    def __init__(self, prepared: PreparedData, seed: int, num_blocks: int) -> None:
        self.fingerprint = prepared.fingerprint
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
