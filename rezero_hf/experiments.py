"""One run of an experiment: a recipe trained and measured, its curve and its provenance in one record.

A run that diverges is a result, not an error. A run that was finished is not repeated.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.trainer_utils import SaveStrategy

from .arguments import ReZeroTrainingArguments, sequences_per_step
from .assembly import changed
from .blocks import EvalBlocks, TrainBlocks, held_out_blocks
from .checkpoints import newest_complete
from .data import prepare
from .diagnostics import signal_record
from .durable import write_whole
from .errors import UserError, refused
from .flops import flops_per_image, flops_per_token
from .image_data import EvalImages, TrainImages, accuracy_metrics, prepare_images
from .opening import find, load_config
from .optim import OptimizerName, gates
from .recipe import Recipe, changed_words
from .runs import now, provenance, read_metrics
from .starting import Beginning, InitFrom, begin, check_same_model, load_whole
from .tasks import TASKS, labelled_rows
from .tokenization import load_tokenizer, token_byte_lengths
from .training import ReZeroTrainer, steps_over, training_steps
from .watch import NotFiniteError


RECORD = "run.json"
# The network of a recipe without a task, by its model_type.
MODELS = TASKS["causal-lm"].models | TASKS["image-classification"].models
# What of an evaluation's row is kept: the gates are kept once, and what was measured on is the same every time.
CURVE = ("loss", "bits_per_byte", "accuracy")
# What a run that begins with random weights counts on from.
NOTHING = {"steps": 0, "rows": 0, "flops": 0, "training_seconds": 0.0, "wall_seconds": 0.0, "curve": []}
# What a heat map can still show, and a committed file hold.
MOST_GATES = 512
# Rows of the training data that signals are sent through: enough for a steady mean, few enough for their Jacobians.
SIGNAL_ROWS = 4


class Setting(NamedTuple):
    """What one run needs, whatever the family.

    Attributes:
        config: of the model.
        words: arguments of the trainer besides: its data sets, and how it measures.
        held_out: split -> rows to measure at the end.
        flops: of training the model on one row of the data.
        data: what was read (JSON).
    """

    config: PreTrainedConfig
    words: dict[str, Any]
    held_out: dict[str, Dataset]
    flops: Callable[[PreTrainedModel], int]
    data: dict[str, Any]


def run_experiment(
    recipe: Recipe,
    folder: str | Path,
    signal: bool = False,
    gates_off: bool = False,
    first: Recipe | None = None,
    base: str | Path | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Train one model and measure it.

    Args:
        recipe: of any family. `training.seed` decides initial weights and the order of the data, the same for every
            form of a model.
        folder: of this run. A finished one is returned as it is, an interrupted one with checkpoints gone on with, the
            rest of an unfinished one replaced.
        signal: also record how signals and gradients travel through the net, at the start and at the end
            (`diagnostics.signal_record`).
        gates_off: also measure the trained model with every alpha at 0, on validation data.
        first: a run to make before, in the folder `FOLDER,first`. This one begins with its model, its optimiser's state
            and the data after its own, whatever `recipe.init_from.path` says, and steps, FLOP, seconds and curve count
            on from it. If it diverges, its record is this one's.
        base: the folder of a finished run that was made with `keep`. This one begins with its model, whatever
            `recipe.init_from.path` says, and counts from 0.
        keep: have a checkpoint of the last step, and leave it there: another run begins from it. A finished run without
            one is repeated.

    Returns:
        `recipe` (resolved, YAML), `data`, `seed`, provenance, `parameters`, `steps`, `rows` (of the data that were
        trained on), `flops`, `training_seconds` (evaluations excluded), `wall_seconds` (of everything, a first run
        included; only where nothing was resumed), `threads`, `peak_memory_bytes` (on a CPU of the process, with what an
        earlier run in it has left behind), `curve` (rows of what evaluations measured), `results` by split, `alpha`
        (every gate at every evaluation, for nets of up to 512), `diverged` (None, or why the run ended early), and
        `signal` and `gates_off` if asked for.

    Raises:
        UserError: the recipe cannot be run, a finished run there has another, or the process was told to stop.
    """
    folder, began = Path(folder), time.perf_counter()
    args = recipe.training_arguments(folder / "checkpoints")
    setting = set_up(recipe, args)
    resolved = recipe.resolved(setting.config)
    known = _finished(folder, resolved, setting.data, {"signal": signal, "gates_off": gates_off}, keep)
    resumes = known is None and _is_interrupted(folder, resolved)
    before, init_from = NOTHING, recipe.init_from
    if base is not None:
        init_from = replace(init_from, path=str(newest_complete(Path(base) / "checkpoints")[0]))
    if first is not None:
        place = folder.with_name(f"{folder.name},first")
        before = _first_run(first, place, folder, anew=known is None and not resumes)
        if before["diverged"] is not None:
            return before
        began = time.perf_counter()
        init_from = replace(init_from, path=str(newest_complete(place / "checkpoints")[0]))
        setting.words["train_dataset"] = setting.words["train_dataset"].after(before["rows"])
    if known is not None:
        return known
    record = provenance(args.device)
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
        write_whole(folder / "recipe.yaml", resolved)
    if keep:
        args.save_strategy, args.save_only_model = SaveStrategy.STEPS, False

    set_seed(args.seed)
    # A run that goes on has its own weights, and may outlive those it began with.
    begins = _begin(InitFrom() if resumes else init_from, recipe, setting.config, args.optimizer)
    model, diverged = begins.model, None
    with refused(f"{recipe.path}: training"):
        trainer = ReZeroTrainer(model, args, run_dir=folder, optimizer_state=begins.optimizer_state, **setting.words)
    # The optimiser alone is to hold its state from here on.
    del begins
    probe = trainer.data_collator([trainer.train_dataset[row] for row in range(SIGNAL_ROWS)])
    signals = {"start": signal_record(model, probe)} if signal else {}
    try:
        trainer.train(resume_from_checkpoint=resumes)
    except NotFiniteError as error:
        diverged = str(error)
    seconds = trainer.throughput.training_seconds()
    if trainer.told_to_stop:
        raise UserError(f"{folder}: told to stop at step {trainer.state.global_step}; the same command goes on.")
    if signal and diverged is None:
        signals["end"] = signal_record(model, probe)
    record |= {
        "finished": now(),
        "recipe": resolved,
        "seed": args.seed,
        "data": setting.data,
        "parameters": model.num_parameters(),
        **_course(trainer, seconds, setting.flops(model), before),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": trainer.throughput.most_memory(),
        "results": {} if diverged else {split: trainer.measure(rows) for split, rows in setting.held_out.items()},
        "diverged": diverged,
        **({"signal": signals} if signal else {}),
    }
    if gates_off:
        record["gates_off"] = {} if diverged else _with_gates_off(trainer, setting.held_out["validation"])
    record |= _wall_time(began, before, resumes)
    write_whole(folder / RECORD, json.dumps(record) + "\n")
    if not keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if first is not None:
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return record


def _first_run(first: Recipe, place: Path, folder: Path, anew: bool) -> dict[str, Any]:
    """The record of the run before one in `folder`. Unless that begins `anew`, it has to be there already; and it is
    looked at in any case: another one would make this one another, too.
    """
    if not anew and not (place / RECORD).exists():
        raise UserError(
            f"{place} is gone, which {folder} went on from: delete that folder too, or choose another --output."
        )
    return run_experiment(first, place, keep=anew)


def _begin(init_from: InitFrom, recipe: Recipe, config: PreTrainedConfig, optimizer: OptimizerName) -> Beginning:
    """The model of any family, new or with what is there."""
    models = MODELS if recipe.task.name is None else TASKS[recipe.task.name].models
    model_class = models[recipe.model_type]
    if init_from.path is None:
        return Beginning(model_class(config))
    if recipe.model_type != "rezero":
        folder, called = find(init_from.path)[0], f"init_from.path={init_from.path}"
        check_same_model(called, load_config(folder, called), config)
        words = {"config": config, "dtype": torch.float, "local_files_only": True, "trust_remote_code": False}
        return Beginning(load_whole(folder, model_class, called, new_head=True, **words).train())
    return begin(init_from, config, optimizer, load_tokenizer(recipe.data.tokenizer), model_class=model_class)


def _wall_time(began: float, before: dict[str, Any], resumes: bool) -> dict[str, float]:
    """Since then, with what the run before took; nothing where only a part of that is known."""
    if resumes or "wall_seconds" not in before:
        return {}
    return {"wall_seconds": round(before["wall_seconds"] + time.perf_counter() - began, 1)}


def _with_gates_off(trainer: ReZeroTrainer, rows: Dataset) -> dict[str, float]:
    """What the model measures with every alpha at 0, where it then stays."""
    for alpha in gates(trainer.model).values():
        alpha.data.zero_()
    return trainer.measure(rows)


def _course(trainer: ReZeroTrainer, seconds: float, flops: int, before: dict[str, Any]) -> dict[str, Any]:
    """What a run went through and what that took, counted on from the one before it.

    Args:
        trainer: has trained.
        seconds: of that.
        flops: for one row of the data.
        before: that record, or `NOTHING`.
    """

    def at(step: int, seconds: float) -> dict[str, float]:
        rows = step * sequences_per_step(trainer.args)
        own = {"steps": step, "rows": rows, "flops": rows * flops, "training_seconds": seconds}
        return {name: before[name] + value for name, value in own.items()}

    curve, alpha = list(before["curve"]), []
    for row in read_metrics(trainer.log_file):
        if row["event"] != "eval":
            continue
        then = at(row["step"], row["training_seconds"])
        shown = {"step": then["steps"], "training_seconds": then["training_seconds"], "flops": then["flops"]}
        curve.append(shown | {name: row[name] for name in CURVE if name in row})
        if len(row["alpha"]) <= MOST_GATES:
            alpha.append({"step": then["steps"], "alpha": row["alpha"]})
    return {**at(trainer.state.global_step, seconds), "curve": curve, "alpha": alpha}


def set_up(recipe: Recipe, args: ReZeroTrainingArguments) -> Setting:
    """Prepare the data and the configuration of a run; `args.max_steps` is set to its steps.

    Raises:
        UserError: the data cannot be had, or give no step.
    """
    if recipe.task.name is not None:
        return _labelled(recipe, args)
    return _text(recipe, args) if recipe.model_type == "rezero" else _images(recipe, args)


def _finished(
    folder: Path, resolved: str, data: dict[str, Any], asked: dict[str, bool], keep: bool
) -> dict[str, Any] | None:
    """The record of a finished run, if it has what is asked for, and a checkpoint to begin from if that is.

    Raises:
        UserError: it is of another recipe or of other data, and hours of work.
    """
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    # Where the data lie is not what they are.
    changed = [
        line for line in changed_words(known["recipe"], resolved, finished=True) if not line.startswith("data.path")
    ]
    if not changed and known["data"].get("fingerprint") != data.get("fingerprint"):
        changed = ["what data names was something else then: another Python's standard library, or other files"]
    if changed:
        raise UserError(
            f"{folder} holds a finished run with other words ({'; '.join(changed)[:300]}): choose another --output, or "
            "delete it."
        )
    whole = not keep or known["diverged"] is not None or newest_complete(folder / "checkpoints")[0] is not None
    return known if whole and all(name in known for name, wanted in asked.items() if wanted) else None


def _is_interrupted(folder: Path, resolved: str) -> bool:
    """Whether the folder holds this run, stopped on the way, with a checkpoint to go on from."""
    written = folder / "recipe.yaml"
    same = written.exists() and not changed_words(written.read_text(encoding="utf-8"), resolved)
    return same and newest_complete(folder / "checkpoints")[0] is not None


def _text(recipe: Recipe, args: ReZeroTrainingArguments) -> Setting:
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
    return Setting(
        config,
        words,
        held_out_blocks(prepared, args.final_eval_blocks),
        lambda model: length * flops_per_token(config, length),
        prepared.record(),
    )


def _labelled(recipe: Recipe, args: ReZeroTrainingArguments) -> Setting:
    tokenizer, length = load_tokenizer(recipe.data.tokenizer), recipe.data.block_size
    rows = labelled_rows(recipe.task, tokenizer, length, recipe.data.cache_dir)
    config = changed(recipe.model_config(tokenizer), id2label=rows.id2label)
    args.max_steps = steps_over(args, rows.rows)
    words = {"train_dataset": rows.train(args.seed, args.max_steps * sequences_per_step(args)), **rows.words}
    # As if every row were as long as it may be: the same for all rows of a table.
    flops = length * flops_per_token(config, length)
    return Setting(config, words, rows.held_out, lambda model: flops, rows.record)


def _images(recipe: Recipe, args: ReZeroTrainingArguments) -> Setting:
    images = prepare_images(recipe.data)
    config = recipe.image_config(images)
    args.max_steps = steps_over(args, len(images.split("train")))
    words = {
        "train_dataset": TrainImages(images, args.seed, args.max_steps * sequences_per_step(args)),
        "eval_dataset": EvalImages(images, "validation"),
        "compute_metrics": accuracy_metrics,
    }
    held_out = {split: EvalImages(images, split) for split in ("validation", "test")}
    # As many as of the validation split tell whether the training images are fit better.
    held_out["train"] = EvalImages(images, "train", len(held_out["validation"]))
    pixels = held_out["validation"][0]["pixel_values"]
    return Setting(config, words, held_out, lambda model: flops_per_image(model, pixels), images.record())
