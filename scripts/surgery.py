"""Change a finished network: fold its gates away, add layers that are switched off, remove layers it does not use.

    python scripts/surgery.py fold runs/quickstart/model folded
    python scripts/surgery.py grow runs/quickstart/model grown --to 24
    python scripts/surgery.py prune runs/quickstart/model smaller --text notes.txt --threshold 0.001

FOLDER is an export or a training checkpoint; OUTPUT becomes an export of its own, with a card that says what was done.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoProcessor, PreTrainedModel

from rezero_hf.cli import numbers, read_text, run
from rezero_hf.descriptions import described_class
from rezero_hf.errors import UserError
from rezero_hf.export import Processor, export_folder
from rezero_hf.licences import license_there
from rezero_hf.models import ReZeroForCausalLM
from rezero_hf.opening import load_folder, load_processor
from rezero_hf.pruning import prune_layers
from rezero_hf.runs import read_metrics, read_record
from rezero_hf.surgery import fold_gates, grow_depth


Folder = Annotated[Path, typer.Argument(help="an export (runs/NAME/model) or a training checkpoint")]
Output = Annotated[Path, typer.Argument(help="where to; must not hold anything yet")]


def open_folder(folder: Path, output: Path) -> tuple[PreTrainedModel, Processor]:
    """The model and what makes its inputs."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; choose another folder")
    model = load_folder(folder, str(folder), described_class)
    return model, load_processor(AutoProcessor, folder, str(folder), "tokenizer or image processor")


def write(folder: Path, output: Path, model: PreTrainedModel, processor: Processor, what: str, **facts: Any) -> None:
    """Export the model with what is known of its run and of earlier operations; of another function, no results."""
    record = read_record(folder / "run.json")
    operations = [*record.get("surgery", ()), {"what": what, **facts}]
    record |= {"parameters": model.num_parameters(), "surgery": operations}
    metrics, recipe = folder / "metrics.jsonl", folder / "recipe.yaml"
    # It is not the model that lies on the Hub, and a smaller one is not what was measured.
    for word in ("repo_id", *(("results", "evaluations") if "pruning" in facts else ())):
        record.pop(word, None)
    export_folder(
        model,
        processor,
        output,
        run=record,
        metrics=read_metrics(metrics) if metrics.exists() and "pruning" not in facts else None,
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.exists() else None,
        license=license_there(folder),
    )
    print(f"{output}: {what}; {model.num_parameters():,} parameters, verified; it loads anywhere as it is")


def fold(folder: Folder, output: Output):
    """Multiply every gate into the weights that write into the stream: the same function without gates."""
    model, processor = open_folder(folder, output)
    write(folder, output, fold_gates(model), processor, "its gates were multiplied into its weights")


def grow(
    folder: Folder,
    output: Output,
    to: Annotated[str, typer.Option(help="number of layers; of a ResNet one for each stage: 5,5,5")],
    where: Annotated[str, typer.Option(help="end, interleaved, or the new layers' numbers: 1,3,5")] = "end",
):
    """Add layers that are switched off: the same function, bit for bit, with more to train."""
    model, processor = open_folder(folder, output)
    depths = numbers(to, "--to")
    places = where if where in ("end", "interleaved") else numbers(where, "--where")
    grown = grow_depth(model, depths if hasattr(model.config, "depths") or len(depths) > 1 else depths[0], places).model
    before, after = model.config.num_hidden_layers, grown.config.num_hidden_layers
    what = f"it grew from {before} to {after} layers, of which the new ones are still switched off"
    write(folder, output, grown, processor, what)


def prune(
    folder: Folder,
    output: Output,
    text: Annotated[Path, typer.Option(help="what the layers are judged on")],
    to: Annotated[int | None, typer.Option(help="how many layers stay")] = None,
    threshold: Annotated[float | None, typer.Option(help="instead: the score up to which a layer goes")] = None,
    by: Annotated[str, typer.Option(help="update (of the stream) or loss (without that layer)")] = "update",
    pieces: Annotated[int, typer.Option(min=1, help="how many pieces, from the text's beginning")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="tokens a piece")] = 256,
):
    """Remove the layers of a language model that hardly change its stream, or whose absence hardly raises its loss."""
    model, processor = open_folder(folder, output)
    if not isinstance(model, ReZeroForCausalLM):
        kind = type(model).__name__
        raise UserError(f"{folder} holds a {kind}, not judged by text alone; rezero_hf.prune_layers takes batches")
    tokens = min(tokens, model.config.max_position_embeddings)
    ids = processor(read_text(text), add_special_tokens=False)["input_ids"][: pieces * tokens]
    if len(ids) < tokens:
        raise UserError(f"{text}: {len(ids)} tokens, fewer than one piece of {tokens}; lower --tokens")
    rows = torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, 1, tokens)
    batches = [{"input_ids": row, "labels": row} for row in rows]
    smaller, report = prune_layers(model, batches, to=to, threshold=threshold, by=by)
    for layer, score in enumerate(report.scores):
        print(f"layer {layer:>4}  {by} {score:.3g}{'  removed' if layer in report.removed else ''}")
    print(f"loss {report.loss_before:.4f} -> {report.loss_after:.4f} nats per token, on {len(rows) * tokens} tokens")
    what = f"{len(report.removed)} of its {len(report.scores)} layers were removed"
    write(folder, output, smaller, processor, what, pruning=asdict(report))


if __name__ == "__main__":
    run(fold, grow, prune)
