"""Train a byte-level BPE tokenizer on the training split of any source:

    python scripts/train_tokenizer.py --source python-stdlib --vocab-size 4096 --output tokenizers/stdlib-4096

The folder it writes is what a recipe's `data.tokenizer` takes, and a plain Transformers tokenizer. Text that is held
out under the default fractions is not looked at, so bits per byte on it stay honest.
"""

from pathlib import Path
from typing import Annotated

import typer

from rezero_hf.cli import run
from rezero_hf.corpora import open_corpus
from rezero_hf.data import DataConfig
from rezero_hf.sources import Source, explained, writable_folder
from rezero_hf.tokenization import train_bpe


def main(
    *,
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    source: Annotated[list[str], typer.Option(help="Text, any number of times.")] = ["python-stdlib"],  # noqa: B006
    vocab_size: Annotated[int, typer.Option(help="Ids in all, bytes and specials included.")] = 4096,
    cache_dir: Annotated[Path, typer.Option(help="Where hashes of files are remembered.")] = Path("~/.cache/rezero_hf"),
) -> None:
    """Train on all --source together and write --output."""
    # Training takes minutes, so whether its result has a place comes first.
    output = writable_folder(output, "name another folder with --output")
    defaults = DataConfig()
    corpora = [
        open_corpus(Source(name), defaults.validation_fraction, defaults.test_fraction, cache_dir.expanduser())
        for name in source
    ]
    pieces = (piece for corpus in corpora for piece in corpus.pieces() if piece.split == "train")
    tokenizer = train_bpe((piece.data.decode("utf-8", "ignore") for piece in pieces), vocab_size)
    with explained(f"cannot write into {output}", "name another folder with --output", kinds=Exception):
        tokenizer.save_pretrained(output)
    print(f"{len(tokenizer)} ids in {output}; use it as data.tokenizer={output}")


if __name__ == "__main__":
    run(main)
