"""What a pretrained model can be trained to do: for each task its model classes, its columns, how rows become batches,
and what is measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers import (
    BaseImageProcessor,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .blocks import IGNORE_INDEX, EvalBlocks, TrainBlocks, held_out_blocks
from .data import DataConfig, prepare
from .errors import UserError
from .image_data import EvalImages, PreparedImages, TrainImages, accuracy_metrics, prepare_images
from .labelled import STDLIB, Row, read_labelled
from .models import (
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPForImageClassification,
    ReZeroResNetForImageClassification,
)
from .named_data import named_images, named_text
from .randomness import permute
from .sources import DataError
from .tokenization import token_byte_lengths


class Task(NamedTuple):
    """A task.

    Attributes:
        models: the class with the head it needs, by the `model_type` of a configuration.
        text_column, label_column: of the data, unless said otherwise; None where there is no choice.
        collator: makes a batch of rows, given the tokenizer; None for the Trainer's own, which stacks them.
        adapter: PEFT's word for it, which keeps a new head trained and saved.
        pipeline: the library's word for it.
    """

    models: dict[str, type[PreTrainedModel]]
    text_column: str | None
    label_column: str | None
    collator: Callable | None
    adapter: str | None
    pipeline: str


TASKS = {
    "causal-lm": Task({"rezero": ReZeroForCausalLM}, "text", None, None, "CAUSAL_LM", "text-generation"),
    "sequence-classification": Task(
        {"rezero": ReZeroForSequenceClassification},
        *("text", "label", DataCollatorWithPadding, "SEQ_CLS", "text-classification"),
    ),
    "token-classification": Task(
        {"rezero": ReZeroForTokenClassification},
        *("tokens", "tags", DataCollatorForTokenClassification, "TOKEN_CLS", "token-classification"),
    ),
    "image-classification": Task(
        {"rezero_resnet": ReZeroResNetForImageClassification, "rezero_mlp": ReZeroMLPForImageClassification},
        *(None, None, None, None, "image-classification"),
    ),
}  # fmt: skip


@dataclass
class TaskConfig:
    """What a recipe trains a language model to do: the section `task`.

    Args:
        name: `sequence-classification` or `token-classification`, with a new head, on rows of at most
            `data.block_size` tokens. None (default): language modelling, and `data` says on what.
        data: labelled text, as `labelled.read_labelled` takes it. Default: `stdlib-functions`.
        text_column, label_column: of `data`. Default: the task's.
        config_name, revision: of `hub:` data. Default: its only or default configuration, and the newest commit.
    """

    name: Literal["sequence-classification", "token-classification"] | None = None
    data: str = STDLIB
    text_column: str | None = None
    label_column: str | None = None
    config_name: str | None = None
    revision: str | None = None


class TaskData(NamedTuple):
    """What a task trains on and is measured on.

    Attributes:
        rows: in the training split.
        train: (seed, number) -> that many training rows, in an order that is a function of (seed, index); of labelled
            text also (None, number), which is as they come.
        held_out: split -> rows to measure on.
        words: further arguments of `ReZeroTrainer`, among them what evaluations during training read.
        id2label: names of the classes; None without.
        record: what to write down about them (JSON).
        processor: tokenizer or image processor, to save beside the model.
    """

    rows: int
    train: Callable[[int | None, int], Dataset]
    held_out: dict[str, Dataset]
    words: dict[str, Any]
    id2label: dict[int, str] | None
    record: dict[str, Any]
    processor: PreTrainedTokenizerBase | BaseImageProcessor


def labelled_rows(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, most: int, cache_dir: str | None = None
) -> TaskData:
    """Labelled text, for a head on every sequence or on every word.

    Args:
        task: what to read, and for which head.
        tokenizer: the model's. It pads on the right from now on, so that positions count from the first token.
        most: tokens of a row; what is beyond them is cut off, and words there are not measured: `words_cut` of the
            record says how many.
        cache_dir: as `DataConfig`'s.

    Raises:
        UserError: the data are not what the task needs, or the package `evaluate` is missing.
    """
    if find_spec("evaluate") is None:
        raise UserError("measuring accuracy needs a package: pip install 'rezero_hf[eval]'")
    about = TASKS[task.name]
    if task.data == STDLIB and (task.text_column or task.label_column):
        raise DataError(f"text_column and label_column are for data with columns; {STDLIB} has none: leave them out")
    columns = task.text_column or about.text_column, task.label_column or about.label_column
    found = read_labelled(task.data, *columns, cache_dir, task.config_name, task.revision)
    of_words = task.name == "token-classification"
    if isinstance(found.splits["train"][0].text, list) != of_words:
        needed = "lists of words" if of_words else "strings"
        raise DataError(
            f"{task.data}: {task.name} needs {needed} in the column {columns[0]!r}; choose another text_column"
        )
    tokenizer.padding_side = "right"
    encode = partial(_encode_words if of_words else _encode, tokenizer, most)
    splits = {split: [encode(row) for row in rows] for split, rows in found.splits.items()}
    fingerprint = found.record["origin"]["sha256"]
    record = found.record | {"block_size": most, "fingerprint": fingerprint}
    if of_words:
        record["words_cut"] = _drop_unlabelled(splits, found.splits, task.data)
    held_out = {split: Shuffled(splits[split], fingerprint) for split in ("validation", "test")}
    return TaskData(
        len(splits["train"]),
        partial(Shuffled, splits["train"], fingerprint),
        held_out,
        {
            "eval_dataset": held_out["validation"],
            "data_collator": about.collator(tokenizer),
            "compute_metrics": _accuracy,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
        dict(enumerate(found.classes)),
        record,
        tokenizer,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, most: int, row: Row) -> dict[str, Any]:
    # Cut here: a tokenizer that is told to truncate keeps that, and is saved with it.
    ids = tokenizer(row.text, split_special_tokens=True)["input_ids"][:most]
    return {"input_ids": ids, "labels": row.label}


def _encode_words(tokenizer: PreTrainedTokenizerBase, most: int, row: Row) -> dict[str, Any]:
    """A word's label is at its last token, the first at which a causal network has seen all of it."""
    # As in text, so that pretraining has met them.
    words = [row.text[0], *(f" {word}" for word in row.text[1:])]
    ids = tokenizer(words, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    labels = [[*[IGNORE_INDEX] * (len(word) - 1), label] for word, label in zip(ids, row.label, strict=True)]
    return {name: list(chain(*each))[:most] for name, each in (("input_ids", ids), ("labels", labels))}


def _drop_unlabelled(splits: dict[str, list[dict[str, Any]]], whole: dict[str, list[Row]], data: str) -> dict[str, int]:
    """Take out rows whose first word does not fit: they have no label, and so no loss. The number of words of each
    split that are neither trained on nor measured."""
    cut = {}
    for split, rows in splits.items():
        labelled = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows]
        cut[split] = sum(len(row.text) for row in whole[split]) - sum(labelled)
        splits[split] = [row for row, number in zip(rows, labelled, strict=True) if number]
        if not splits[split]:
            raise DataError(f"{data}: no row of {split} has a first word that fits into a block: raise block_size")
    return cut


class Shuffled(Dataset):
    """Rows of a list: in order, or so many of them, every epoch in a new order that is a function of (seed, index).

    Attributes:
        fingerprint: of the labelled text; a run goes on with the same one alone.
    """

    def __init__(
        self, rows: list[dict[str, Any]], fingerprint: str, seed: int | None = None, number: int | None = None
    ) -> None:
        self.fingerprint, self._rows, self._seed = fingerprint, rows, seed
        self._number = len(rows) if number is None else number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._number:
            raise IndexError(f"row {index} of {self._number}")
        epoch, place = divmod(index, len(self._rows))
        if self._seed is not None:
            place = permute(place, len(self._rows), (self._seed, epoch))
        # Collators take rows apart.
        return dict(self._rows[place])


def _accuracy(found: EvalPrediction) -> dict[str, float]:
    from .metrics import Accuracy

    classes, labels = (np.asarray(numbers).ravel() for numbers in (found.predictions, found.label_ids))
    return Accuracy(keep_in_memory=True).compute(predictions=classes, references=labels)


def text_blocks(
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    cache_dir: str | None = None,
    eval_blocks: int | None = None,
    final_eval_blocks: int | None = None,
) -> TaskData:
    """Text for language modelling, packed and measured in bits per byte as in pretraining.

    Args:
        task: what to read: `data` as `named_text` takes it.
        tokenizer: the model's; it has to give back the text that went in.
        block_size: tokens seen at once.
        cache_dir: as `DataConfig`'s.
        eval_blocks, final_eval_blocks: as `ReZeroTrainingArguments`'.

    Raises:
        UserError: the text cannot be had or is shorter than a block, or none of it is held out for a split.
    """
    words = {name: getattr(task, name) for name in ("text_column", "config_name", "revision") if getattr(task, name)}
    config = DataConfig([named_text(task.data, **words)], block_size=block_size, cache_dir=cache_dir)
    prepared = prepare(config, tokenizer)
    for split in ("validation", "test"):
        if not prepared.totals(split)["tokens"]:
            raise DataError(
                f"{task.data} has no text for {split}: add some, or name a folder with a file of rows for each split"
            )
    return TaskData(
        prepared.totals("train")["tokens"] // block_size,
        partial(TrainBlocks, prepared),
        held_out_blocks(prepared, final_eval_blocks),
        {
            "eval_dataset": EvalBlocks(prepared, "validation", eval_blocks),
            "token_bytes": token_byte_lengths(tokenizer),
        },
        None,
        prepared.record(),
        tokenizer,
    )


def labelled_images(data: str, processor: BaseImageProcessor, cache_dir: str | None = None) -> TaskData:
    """Labelled images, normalised as the pretrained model's were.

    Args:
        data: as `named_images` takes it.
        processor: the model's.
        cache_dir: as `ImageDataConfig`'s.

    Raises:
        UserError: the images cannot be had, or have other channels than the processor normalises.
    """
    config = named_images(data, augmentation="none", cache_dir=cache_dir)
    images = prepare_images(config)
    mean, std = processor.image_mean or (), processor.image_std or ()
    if not images.channels == len(mean) == len(std):
        raise UserError(
            f"{data} holds images of {images.channels} channels, and the model's preprocessor_config.json has "
            f"image_mean for {len(mean)} and image_std for {len(std)}: both need one number for each channel."
        )
    images = PreparedImages(images.folder, replace(config, mean=list(mean), std=list(std)))
    held_out = {split: EvalImages(images, split) for split in ("validation", "test")}
    return TaskData(
        len(images.split("train")),
        partial(TrainImages, images),
        held_out,
        {"eval_dataset": held_out["validation"], "compute_metrics": accuracy_metrics},
        images.id2label,
        images.record(),
        images.image_processor(),
    )
