"""Tokenize and pack the text of a recipe, ahead of training or to check it:

    python scripts/prepare_data.py scripts/recipes/quickstart.yaml
    python scripts/prepare_data.py --source 'corpus/**/*.txt' --tokenizer bytes

Training does this by itself when the shards are missing. Do it first on a cluster, where one process would tokenize
while all others wait, and on machines whose compute nodes have no network. A second call only checks what is there.
"""

from typing import Annotated

import typer

from rezero_hf.cli import run
from rezero_hf.data import DataConfig, Source, prepare
from rezero_hf.errors import UserError
from rezero_hf.recipe import load_recipe
from rezero_hf.sources import SPLITS
from rezero_hf.tokenization import load_tokenizer


def main(
    *,
    recipe: Annotated[str | None, typer.Argument(help="YAML recipe; its data section is used.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="data.key=value, over the recipe.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Instead of a recipe: text, any number of times.")] = None,
    tokenizer: Annotated[str, typer.Option(help="With --source: bytes, a folder or a Hub id.")] = "bytes",
    block_size: Annotated[int, typer.Option(help="With --source: tokens per block.")] = DataConfig.block_size,
    cache_dir: Annotated[str | None, typer.Option(help="With --source: where the shards go.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the hash of every shard.")] = False,
) -> None:
    """Prepare the text of RECIPE, or of --source, and say what came out."""
    if (recipe is None) == (source is None):
        raise UserError("name a recipe or at least one --source, and not both")
    if recipe is not None:
        config = load_recipe(recipe, overrides or ()).data
    else:
        config = DataConfig([Source(name) for name in source], tokenizer, block_size, cache_dir=cache_dir)
    prepared = prepare(config, load_tokenizer(config.tokenizer))
    if verify:
        prepared.verify()
    for split in SPLITS:
        totals = prepared.totals(split)
        print(f"{split:<10} " + "  ".join(f"{count:>13,} {name}" for name, count in totals.items()))
    print(f"shards in {prepared.folder}")


if __name__ == "__main__":
    run(main)
