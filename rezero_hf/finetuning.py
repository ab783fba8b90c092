"""A pretrained model made ready for a task (`scripts/finetune.py`)."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .arguments import ReZeroTrainingArguments
from .assembly import changed
from .errors import UserError
from .opening import find, load_config, load_processor
from .optim import gates
from .recipe import FAMILIES
from .starting import load_whole
from .tasks import TASKS, TaskConfig, TaskData, labelled_images, labelled_rows, text_blocks


# Every matrix of the layers: where a branch is all there is, as in a network without norms, adapting two of its seven
# matrices would be a choice nobody has measured.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


class Base(NamedTuple):
    """A model to fine-tune, found but not loaded.

    Attributes:
        name: what it was asked for by.
        folder: where its files are.
        commit: of the repository they are from; None for a folder.
        config: what it is.
        processor: its tokenizer or image processor.
    """

    name: str
    folder: Path
    commit: str | None
    config: PreTrainedConfig
    processor: PreTrainedTokenizerBase | BaseImageProcessor


def find_base(name: str, task: str) -> Base:
    """Find a model of this package, and what makes its inputs.

    Args:
        name: an export, a training checkpoint or any folder of `save_pretrained`; else `ORG/NAME` or
            `ORG/NAME@REVISION` on the Hub. None of its code is run.
        task: of `TASKS`.

    Raises:
        UserError: there is no such model, it is of another library or does not read what the task is about, or it has
            no tokenizer or image processor, or a tokenizer with more tokens than the model, or without one to pad with.
    """
    folder, commit = find(name)
    config = load_config(folder, name)
    if config.model_type not in FAMILIES:
        raise UserError(f"{name} holds a model of type {config.model_type!r}; this is for those of rezero_hf.")
    of_images, wanted = config.model_type != "rezero", task == "image-classification"
    if of_images != wanted:
        reads = ["text", "images"]
        raise UserError(
            f"{name} holds a model that reads {reads[of_images]}, and --task {task} is about {reads[wanted]}."
        )
    auto, what = (AutoImageProcessor, "image processor") if of_images else (AutoTokenizer, "tokenizer")
    processor = load_processor(auto, folder, name, what)
    if of_images:
        return Base(name, folder, commit, config, processor)
    if len(processor) > config.vocab_size:
        raise UserError(
            f"{name}: its tokenizer has {len(processor)} tokens and its model {config.vocab_size}; put the model's own "
            "tokenizer there."
        )
    if processor.pad_token is not None:
        # A head reads the last token that is no padding.
        config = changed(config, pad_token_id=processor.pad_token_id)
    elif task != "causal-lm":
        raise UserError(f"{name}: its tokenizer has no pad_token, which rows of several lengths need.")
    return Base(name, folder, commit, config, processor)


def read_task(
    base: Base, task: TaskConfig, args: ReZeroTrainingArguments, block_size: int, cache_dir: str | None = None
) -> TaskData:
    """Read the data of a task as a model takes them.

    Args:
        base: the model.
        task: which, and on what; `name` is any of `TASKS` here.
        args: of the run.
        block_size: tokens of a row at most.
        cache_dir: where prepared data live. Default: `~/.cache/rezero_hf`.

    Raises:
        UserError: the data are not what the task needs, the model has fewer positions or other channels or sizes, or
            `args` are about another task.
    """
    if task.name != "causal-lm" and (args.eval_blocks or args.final_eval_blocks):
        raise UserError(
            f"training.eval_blocks and training.final_eval_blocks are for causal-lm; {task.name} is measured on every "
            "row: leave them out."
        )
    check_columns(task)
    if task.name == "image-classification":
        data = labelled_images(task.data, base.processor, cache_dir)
        shape = tuple(data.held_out["validation"][0]["pixel_values"].shape)
        # A convolutional network takes any size.
        if shape != (base.config.num_channels, *(getattr(base.config, "image_size", side) for side in shape[1:])):
            raise UserError(f"{task.data} holds images of shape {shape}, which is not what {base.name} was made for.")
        return data
    rotary = base.config.position_embedding == "rope"
    if not rotary and block_size > base.config.max_position_embeddings:
        positions = base.config.max_position_embeddings
        raise UserError(f"--block-size {block_size}: {base.name} has positions for {positions} tokens; lower it.")
    if task.name == "causal-lm":
        return text_blocks(task, base.processor, block_size, cache_dir, args.eval_blocks, args.final_eval_blocks)
    return labelled_rows(task, base.processor, block_size, cache_dir)


def check_columns(task: TaskConfig) -> None:
    """Raise a `UserError` for a column, configuration or revision that the data of a task do not have."""
    if task.name == "image-classification" and any(dataclasses.astuple(task)[2:]):
        raise UserError(
            "--text-column, --label-column, --config-name and --revision are for text; columns of images are found by "
            "their types."
        )
    if task.name == "causal-lm" and task.label_column:
        raise UserError("--label-column is for classes; causal-lm predicts the text itself.")


def load_base(base: Base, task: str, id2label: dict[int, str] | None, from_scratch: bool = False) -> PreTrainedModel:
    """The model in fp32 with the head that a task needs: its own if that fits, else one of random weights.

    Args:
        base: the model.
        task: of `TASKS`.
        id2label: names of the classes; None for `causal-lm`.
        from_scratch: the same configuration with random weights throughout. Default: no.

    Raises:
        UserError: weights are damaged or missing, or no language model is there for `causal-lm`.
    """
    config = base.config
    if id2label is not None:
        label2id = {name: number for number, name in id2label.items()}
        config = changed(config, id2label=id2label, label2id=label2id)
    model_class = TASKS[task].models[config.model_type]
    if from_scratch:
        if task == "causal-lm":
            config = changed(config, is_causal=True)
        return model_class(config).train()
    words = {"config": config, "dtype": torch.float, "local_files_only": True, "trust_remote_code": False}
    model = load_whole(base.folder, model_class, base.name, new_head=id2label is not None, **words)
    # What an adapter says it belongs to: where the files lie on this machine tells nobody else anything.
    name = base.name.partition("@")[0] if base.commit else base.name
    model.name_or_path = model.config._name_or_path = Path(name).name if Path(name).is_absolute() else name
    return model.train()


def check_lora(args: ReZeroTrainingArguments, from_scratch: bool) -> None:
    """Raise a `UserError` for what adapters do not go with."""
    if from_scratch:
        raise UserError(
            "--lora freezes what a model has learned, and --from-scratch draws that at random: leave one of them out."
        )
    if args.push_to_hub:
        raise UserError(
            "training.push_to_hub=true pushes whole models, and --lora trains an adapter: leave it out, and push the "
            "merged model at the end, by scripts/publish.py."
        )


def add_lora(
    model: PreTrainedModel, task: str, rank: int, train_gates: bool, commit: str | None = None
) -> PreTrainedModel:
    """Freeze a language model and put adapters of PEFT on every matrix of its layers; a new head is trained along.

    Args:
        model: the model. It is changed in place.
        task: of `TASKS`.
        rank: of the adapters. Their scale is 2: lora_alpha is twice the rank.
        train_gates: train the gates too, which adapters in a layer whose gate is 0 need.
        commit: of the repository that the model is from, which the adapter names. Default: none.

    Raises:
        UserError: PEFT is not installed, or the model reads images.
    """
    if TASKS[task].adapter is None:
        raise UserError("--lora is for language models: a network for images is small enough to be trained whole.")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora needs a package: pip install peft") from error
    register_lora_targets()
    # The module that owns a layer's gate; heads are PEFT's own business.
    saved = ["residual_norm"] if train_gates else None
    lora = LoraConfig(task_type=TASKS[task].adapter, r=rank, lora_alpha=2 * rank, modules_to_save=saved)
    return get_peft_model(model, lora, revision=commit)


def register_lora_targets() -> None:
    """Tell PEFT what `LoraConfig` without `target_modules` means for `rezero`; it looks when adapters are made."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("rezero", LORA_TARGETS)


def check_gates(model: PreTrainedModel) -> None:
    """Raise a `UserError` unless the model has gates, which somebody wants held or trained."""
    if not gates(model):
        raise UserError(f"--gates: residual={model.config.residual!r} has no gates; leave it out.")


def hold_gates(model: PreTrainedModel) -> None:
    """Leave every gate as it is, whatever is trained around it."""
    for alpha in gates(model).values():
        alpha.requires_grad_(False)
