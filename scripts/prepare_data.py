"""Tokenize and pack the text of a recipe, ahead of training or to check it:

    python scripts/prepare_data.py scripts/recipes/quickstart.yaml
    python scripts/prepare_data.py --source 'corpus/**/*.txt' --tokenizer bytes

Training does this by itself when the shards are missing. Do it first on a cluster, where one process would tokenize
while all others wait, and on machines whose compute nodes have no network. A second call only checks what is there. One
that was interrupted or killed goes on with the same command.
"""

import sys
import time
from typing import Annotated

import typer

from rezero_hf.cli import run
from rezero_hf.data import DataConfig, prepare
from rezero_hf.errors import UserError
from rezero_hf.recipe import load_language_recipe
from rezero_hf.sources import SPLITS, Source
from rezero_hf.tokenization import load_tokenizer


# 128 + SIGINT, as shells report it.
INTERRUPTED = 130


def main(
    *,
    recipe: Annotated[str | None, typer.Argument(help="YAML recipe; its data section is used.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="data.key=value, over the recipe.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Instead of a recipe: text, any number of times.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="With --source: bytes (default), a folder or a Hub id.")] = None,
    block_size: Annotated[int | None, typer.Option(help="With --source: tokens per block (default 256).")] = None,
    cache_dir: Annotated[str | None, typer.Option(help="With --source: where the shards go.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the hash of every shard.")] = False,
) -> None:
    """Prepare the text of RECIPE, or of --source, and say what came out."""
    if (recipe is None) == (source is None):
        raise UserError("name a recipe or at least one --source, and not both")
    options = {"tokenizer": tokenizer, "block_size": block_size, "cache_dir": cache_dir}
    given = {name: value for name, value in options.items() if value is not None}
    if recipe is not None:
        for name, value in given.items():
            option = name.replace("_", "-")
            raise UserError(f"--{option} goes with --source; beside a recipe write data.{name}={value}")
        config = load_language_recipe(recipe, overrides or ()).data
    else:
        config = DataConfig([Source(name) for name in source], **given)
    text_tokenizer = load_tokenizer(config.tokenizer)
    started = time.perf_counter()
    try:
        prepared = prepare(config, text_tokenizer)
    except KeyboardInterrupt:
        line = "interrupted: the same command goes on; it reads text again, but tokenizes half a minute of it at most"
        typer.echo(line, err=True)
        sys.exit(INTERRUPTED)
    seconds = time.perf_counter() - started
    for split in SPLITS:
        totals = prepared.totals(split)
        print(f"{split:<10} " + "  ".join(f"{count:>13,} {name}" for name, count in totals.items()))
    print(f"shards in {prepared.folder}")
    if prepared.tokenized_bytes:
        megabytes = prepared.tokenized_bytes / 1e6
        print(f"tokenized {megabytes:,.1f} MB of text in {seconds:,.1f} s, {megabytes / seconds:,.1f} MB/s")
    if verify:
        prepared.verify()
        print("every shard is as it was written")


if __name__ == "__main__":
    run(main)
