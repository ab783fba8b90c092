"""What to train on, and its tokens on disk: corpora to packed shards.

`prepare` tokenizes every source once into flat files of token ids, and only opens them from then on. The shards of a
recipe live in one folder whose name is a fingerprint of the text, the tokenizer and the format, so a changed corpus
can never be mistaken for the old one. The folder appears by one rename when everything in it is on disk. `blocks`
cuts them into what a model sees at once.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .corpora import open_corpus
from .mixture import mixture_pattern
from .packing import write_shards
from .shards import INDEX_NAME, TokenStream
from .sources import SPLITS, DataError, Source, cache_folder, explained
from .tokenization import check_tokenizer, tokenizer_fingerprint


# Part of the fingerprint: raise it when the same sources and tokenizer would give other shards.
FORMAT_VERSION = 1


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
    def fingerprint(self) -> str:
        """Of text, tokenizer and format: what has the same one is the same, token by token."""
        return self.index["fingerprint"]

    @property
    def _way_out(self) -> str:
        return f"delete {self.folder} and prepare again"

    def _shards(self) -> Iterator[dict[str, Any]]:
        for source in self.index["sources"]:
            for split in source["splits"].values():
                yield from split["shards"]

    def verify(self, part: int = 0, parts: int = 1, fingerprint: str | None = None) -> None:
        """Read shards and compare their sha256 with the recorded one.

        Args:
            part, parts: which share of the shards, from 0, out of how many, so that several processes can divide the
                work. Default: all shards.
            fingerprint: what the others prepared, which on another machine may be other text. Default: anything.

        Raises:
            DataError: one differs or cannot be read, or this is other text.
            ValueError: there is no such share.
        """
        if not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}: parts count from 0")
        if fingerprint not in (None, self.fingerprint):
            raise DataError(f"{self.folder} holds other text or tokens than the {fingerprint} of the first process")
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
            "fingerprint": self.fingerprint,
            "tokenizer": {
                "name": Path(name).name if Path(name).is_absolute() else name,
                "fingerprint": self.index["tokenizer"]["fingerprint"],
                "size": self.index["tokenizer"]["size"],
            },
            "block_size": self.config.block_size,
            "sources": sources,
            "splits": {split: self.totals(split) for split in SPLITS},
        }
