"""Show what a network does to signals and gradients: of a checkpoint, or of a recipe's model before training.

    python scripts/inspect_signal.py runs/quickstart/model
    python scripts/inspect_signal.py scripts/recipes/quickstart.yaml model.residual=post_norm model.num_hidden_layers=64

Language models read the first tokens of `--text` (by default this file), image models get normal noise, as in the
authors' notebook. Of a wide network the mean squared singular value of the Jacobian is estimated; A larger
`--max-size` gives all its singular values, and takes minutes.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedConfig, set_seed

import rezero_hf
from rezero_hf.cli import read_text, result_file, run
from rezero_hf.diagnostics import signal_record
from rezero_hf.errors import UserError
from rezero_hf.opening import find, load_folder
from rezero_hf.recipe import load_language_recipe
from rezero_hf.signal_figures import norm_curves
from rezero_hf.tokenization import load_tokenizer


LANGUAGE_MODELS = ("ReZeroForCausalLM", "ReZeroForMaskedLM")


def show(value: float | None) -> str:
    """A number as the table has it; a dash where there is none or it is not finite."""
    return "-" if value is None else f"{value:.3g}"


def main(
    *,
    model: Annotated[str, typer.Argument(help="a checkpoint (folder or Hub id), or a YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the recipe")] = None,
    text: Annotated[Path, typer.Option(help="what language models read", show_default="this script")] = Path(__file__),
    inputs: Annotated[int, typer.Option(min=1, help="pieces of text, or images")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="tokens of a piece")] = 16,
    max_size: Annotated[
        int,
        typer.Option(
            "--max-size",
            min=1,
            help="of the stream of one input (tokens x width) up to which the Jacobian is exact, not estimated",
        ),
    ] = 1024,
    seed: Annotated[int, typer.Option(help="of the noise and labels of images")] = 0,
    output: Annotated[Path | None, typer.Option(help="where the whole record goes, as JSON")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="where the norms of stream and gradient are drawn, as PNG")
    ] = None,
) -> None:
    """Print RMS of stream and gradient, gates and their use for each layer, and the spectrum of the Jacobian."""
    output = output and result_file(output, "--output")
    figure = figure and result_file(figure, "--figure")
    if figure is not None and figure.suffix != ".png":
        raise UserError(f"--figure {figure}: name a file that ends in .png.")
    if model.endswith((".yaml", ".yml")):
        recipe = load_language_recipe(model, overrides or ())
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        set_seed(recipe.training.get("seed", 42))
        network = rezero_hf.ReZeroForCausalLM(recipe.model_config(tokenizer))
    else:
        if overrides:
            raise UserError(f"{overrides[0]!r} goes with a recipe; a checkpoint is what it is.")

        def choose(config: PreTrainedConfig) -> type:
            name = (config.architectures or ["nothing"])[0]
            if name not in rezero_hf.__all__:
                raise UserError(f"{model} holds {name}, not a model of rezero_hf.")
            return getattr(rezero_hf, name)

        folder, _ = find(model)
        network = load_folder(folder, model, choose)
        tokenizer = None if network.main_input_name == "pixel_values" else load_tokenizer(str(folder))

    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        config, size = network.config, getattr(network.config, "image_size", 32)
        batch = {"pixel_values": torch.randn(inputs, config.num_channels, size, size, generator=generator)}
        if hasattr(network, "classifier"):
            batch["labels"] = torch.randint(config.num_labels, (inputs,), generator=generator)
    else:
        ids = tokenizer(read_text(text), add_special_tokens=False)["input_ids"][: inputs * tokens]
        if len(ids) < inputs * tokens:
            raise UserError(f"{text}: {len(ids)} tokens, fewer than {inputs} x {tokens}; lower --inputs or --tokens.")
        batch = {"input_ids": torch.tensor(ids).view(inputs, tokens)}
        if type(network).__name__ in LANGUAGE_MODELS:
            batch["labels"] = batch["input_ids"]

    record = signal_record(network, batch, max_size)
    norms, jacobian = record["norms"], record["jacobian"]
    gradients = norms["gradient"] or [None] * len(norms["activation"])
    print(f"{'layer':>5}  {'stream':>9}  {'gradient':>9}  {'alpha':>16}  relative update")
    for after, (activation, gradient) in enumerate(zip(norms["activation"], gradients, strict=True), start=-1):
        name, alpha, update = "input", "", ""
        if after >= 0:
            name = str(after)
            alpha = " ".join(map(show, norms["alpha"][after])) if norms["alpha"] else ""
            update = "  ".join(f"{branch} {show(values[after])}" for branch, values in norms["update"].items())
        print(f"{name:>5}  {show(activation):>9}  {show(gradient):>9}  {alpha:>16}  {update}".rstrip())
    print(f"mean squared singular value of the input-output Jacobian: {show(jacobian['chi'])}", end=" ")
    if jacobian["method"] == "exact":
        low, median, high = (jacobian["quantiles"][q] for q in ("0", "0.5", "1"))
        print(
            f"(from {show(low)} over {show(median)} to {show(high)}; share below 1e-8: {show(jacobian['share_zero'])})"
        )
    else:
        print(f"+- {show(jacobian['standard_error'])} (estimated)")
    if output is not None:
        output.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if figure is not None:
        norm_curves({Path(model).name: record}, figure)


if __name__ == "__main__":
    run(main)
