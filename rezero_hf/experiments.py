"""One run of an experiment: a recipe trained and measured, its curve and its provenance in one record.

A run that diverges is a result, not an error. A run that was finished is not repeated.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from transformers import PreTrainedModel, set_seed

from .arguments import ReZeroTrainingArguments, sequences_per_step
from .checkpoints import newest_complete
from .data import EvalBlocks, TrainBlocks, held_out_blocks, prepare
from .diagnostics import signal_record
from .durable import write_whole
from .flops import flops_per_image, flops_per_token
from .image_data import EvalImages, TrainImages, accuracy_metrics, prepare_images
from .models import ReZeroForCausalLM, ReZeroMLPForImageClassification, ReZeroResNetForImageClassification
from .optim import gates
from .recipe import Recipe
from .runs import now, provenance, read_metrics
from .tokenization import load_tokenizer, token_byte_lengths
from .training import ReZeroTrainer, training_steps
from .watch import NotFiniteError


RECORD = "run.json"
IMAGE_MODELS = {"rezero_resnet": ReZeroResNetForImageClassification, "rezero_mlp": ReZeroMLPForImageClassification}
# What of an evaluation's row is kept: the gates are kept once, and what was measured on is the same every time.
CURVE = ("step", "training_seconds", "loss", "bits_per_byte", "accuracy")
# Rows of the training data that signals are sent through: enough for a steady mean, few enough for their Jacobians.
SIGNAL_ROWS = 4


class _Setting(NamedTuple):
    """What one run needs, whatever the family.

    Attributes:
        model: freshly drawn.
        words: further arguments of the trainer: its data sets, and how it measures.
        held_out: split -> rows to measure at the end.
        resolved: the recipe with every default.
        flops_per_row: of training on one row of the data.
        data: what was read (JSON).
    """

    model: PreTrainedModel
    words: dict[str, Any]
    held_out: dict[str, Dataset]
    resolved: str
    flops_per_row: int
    data: dict[str, Any]


def run_experiment(recipe: Recipe, folder: str | Path, signal: bool = False, gates_off: bool = False) -> dict[str, Any]:
    """Train one model and measure it.

    Args:
        recipe: of any family. `training.seed` decides initial weights and the order of the data, the same for every
            form of a model.
        folder: of this run. A finished one of the same recipe is returned as it is, an interrupted one with checkpoints
            gone on with, anything else there replaced.
        signal: also record how signals and gradients travel through the net, at the start and at the end
            (`diagnostics.signal_record`).
        gates_off: also measure the trained model with every alpha at 0, on validation data.

    Returns:
        `recipe` (resolved, YAML), `data`, `seed`, provenance, `parameters`, `steps`, `flops`, `training_seconds`
        (evaluations excluded), `peak_memory_bytes` (on a CPU of the process, so of the largest run in it), `curve`
        (rows of what evaluations measured), `results` by split, `alpha` at the last evaluation, `diverged` (None, or
        why the run ended early), and `signal` and `gates_off` if asked for.

    Raises:
        UserError: the recipe cannot be run.
    """
    folder = Path(folder)
    args = recipe.training_arguments(folder / "checkpoints")
    record = provenance(args.device)
    set_seed(args.seed)
    setting = _text(recipe, args) if recipe.model_type == "rezero" else _images(recipe, args)
    known = _finished(folder, setting.resolved, {"signal": signal, "gates_off": gates_off})
    if known is not None:
        return known
    resumes = _is_interrupted(folder, setting.resolved)
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
        write_whole(folder / "recipe.yaml", setting.resolved)

    model, diverged = setting.model, None
    trainer = ReZeroTrainer(model, args, run_dir=folder, **setting.words)
    probe = trainer.data_collator([trainer.train_dataset[row] for row in range(SIGNAL_ROWS)])
    signals = {"start": signal_record(model, probe)} if signal else {}
    try:
        trainer.train(resume_from_checkpoint=resumes)
    except NotFiniteError as error:
        diverged = str(error)
    if signal and diverged is None:
        signals["end"] = signal_record(model, probe)
    evaluations = [row for row in read_metrics(trainer.log_file) if row["event"] == "eval"]
    record |= {
        "finished": now(),
        "recipe": setting.resolved,
        "seed": args.seed,
        "data": setting.data,
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "flops": trainer.state.global_step * sequences_per_step(args) * setting.flops_per_row,
        "training_seconds": trainer.throughput.training_seconds(),
        "peak_memory_bytes": trainer.throughput.peak_memory(),
        "curve": [{name: row[name] for name in CURVE if name in row} for row in evaluations],
        "alpha": evaluations[-1]["alpha"] if evaluations else {},
        "results": {} if diverged else {split: trainer.measure(rows) for split, rows in setting.held_out.items()},
        "diverged": diverged,
    }
    if signal:
        record["signal"] = signals
    if gates_off:
        for alpha in gates(model).values():
            alpha.data.zero_()
        record["gates_off"] = {} if diverged else trainer.measure(setting.held_out["validation"])
    write_whole(folder / RECORD, json.dumps(record) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def _finished(folder: Path, resolved: str, asked: dict[str, bool]) -> dict[str, Any] | None:
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    measured = all(name in known for name, wanted in asked.items() if wanted)
    return known if measured and known["recipe"] == resolved else None


def _is_interrupted(folder: Path, resolved: str) -> bool:
    """Whether the folder holds this run, stopped on the way, with a checkpoint to go on from."""
    written = folder / "recipe.yaml"
    same = written.exists() and written.read_text(encoding="utf-8") == resolved
    return same and newest_complete(folder / "checkpoints")[0] is not None


def _text(recipe: Recipe, args: ReZeroTrainingArguments) -> _Setting:
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    config = recipe.model_config(tokenizer)
    prepared = prepare(recipe.data, tokenizer)
    args.max_steps = training_steps(args, prepared)
    words = {
        "train_dataset": TrainBlocks(prepared, args.seed, args.max_steps * sequences_per_step(args)),
        "eval_dataset": EvalBlocks(prepared, "validation", args.eval_blocks),
        "token_bytes": token_byte_lengths(tokenizer),
    }
    length = recipe.data.block_size
    return _Setting(
        ReZeroForCausalLM(config),
        words,
        held_out_blocks(prepared, args.final_eval_blocks),
        recipe.resolved(config),
        length * flops_per_token(config, length),
        prepared.record(),
    )


def _images(recipe: Recipe, args: ReZeroTrainingArguments) -> _Setting:
    images = prepare_images(recipe.data)
    config = recipe.image_config(images)
    if args.max_steps < 1:
        args.max_steps = math.ceil(args.num_train_epochs * len(images.split("train")) / sequences_per_step(args))
    model = IMAGE_MODELS[recipe.model_type](config)
    words = {
        "train_dataset": TrainImages(images, args.seed, args.max_steps * sequences_per_step(args)),
        "eval_dataset": EvalImages(images, "validation"),
        "compute_metrics": accuracy_metrics,
    }
    held_out = {split: EvalImages(images, split) for split in ("train", "validation", "test")}
    pixels = held_out["validation"][0]["pixel_values"]
    return _Setting(model, words, held_out, recipe.resolved(config), flops_per_image(model, pixels), images.record())
