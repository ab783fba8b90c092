"""Make a publishable folder from a training checkpoint, whole or in FSDP shards.

python scripts/export.py runs/quickstart/checkpoints/checkpoint-1200 exported
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

from rezero_hf.checkpoints import verify_checkpoint
from rezero_hf.cli import run
from rezero_hf.descriptions import described_class
from rezero_hf.errors import UserError
from rezero_hf.export import export_folder
from rezero_hf.opening import load_processor
from rezero_hf.runs import read_metrics, read_record
from rezero_hf.starting import SHARDS


def main(
    checkpoint: Annotated[Path, typer.Argument(help="a folder checkpoint-N of a run")],
    output: Annotated[Path, typer.Argument(help="where to; an earlier export there is replaced")],
    license: Annotated[str | None, typer.Option(help="licence of code and weights, e.g. mit [as recorded]")] = None,
):
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: there is no such folder")
    verify_checkpoint(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    model_class = described_class(config)
    shards = checkpoint / SHARDS
    if shards.is_dir():
        with TemporaryDirectory() as folder:
            merge_fsdp_weights(str(shards), folder)
            weights = load_file(Path(folder) / "model.safetensors")
        model = model_class(config)
        for tied, source in model.all_tied_weights_keys.items():
            weights.setdefault(tied, weights[source])
        model.load_state_dict(weights)
    else:
        model = model_class.from_pretrained(checkpoint, trust_remote_code=False)
    recipe = checkpoint / "recipe.yaml"
    export_folder(
        model,
        load_processor(AutoProcessor, checkpoint, str(checkpoint), "tokenizer or image processor"),
        output,
        run=read_record(checkpoint / "run.json"),
        metrics=read_metrics(checkpoint / "metrics.jsonl") if (checkpoint / "metrics.jsonl").exists() else None,
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.exists() else None,
        license=license,
    )
    print(f"{output}: {model.num_parameters():,} parameters, verified; it loads anywhere as it is")


if __name__ == "__main__":
    run(main)
