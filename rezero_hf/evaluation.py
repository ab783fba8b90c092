"""A finished model measured on held-out text, labelled text or images, and where the result is kept
(`scripts/evaluate_model.py`)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoImageProcessor, PreTrainedModel

from .blocks import IGNORE_INDEX, EvalBlocks
from .checkpoints import MANIFEST
from .data import DataConfig, PreparedData, prepare
from .errors import UserError
from .evaluation_data import LabelledData
from .export import describe_folder, write_records
from .hub import user_section
from .image_data import EvalImages, ImageDataConfig, prepare_images
from .opening import Opened, load_processor, tokenizer_of
from .runs import read_record
from .sources import SPLITS, DataError, writable_folder
from .tasks import TaskData, labelled_rows
from .tokenization import token_byte_lengths


# All of a source's text in one number, whichever split it is in.
ALL = "all"
# What an evaluation is of, beside its splits: a later one of the same replaces it.
SAME = ("source", "fingerprint", "way", "window", "stride")


def evaluate_text(
    opened: Opened,
    data: DataConfig,
    splits: Sequence[str],
    window: int | None,
    stride: int | None,
    batch_size: int,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Measure a causal language model on text, in blocks of `window` tokens that begin every `stride` (`EvalBlocks`).

    Every token is scored once, separators between documents included; bytes are those of the text.

    Args:
        opened: the model.
        data: the text. Its `tokenizer` is not used: the model has its own.
        splits: which of train, validation, test and all.
        window: None: the block size of `data`, or less if the model cannot see so much.
        stride: None: `window`, each block alone, which is how training evaluates.
        batch_size: blocks at once.
        fingerprint: what the prepared text must have. None (default): any.

    Returns:
        `source`, `fingerprint` (of the prepared text), `way` (blockwise or sliding), `window`, `stride`, and `results`:
        split -> `loss` (nats per token), `perplexity`, `bits_per_byte`, `accuracy` (of the most likely token),
        `tokens`, `bytes`.

    Raises:
        UserError: the package `evaluate` is missing, the tokenizer loses text, its ids are not the model's, a split is
            empty, the text has another fingerprint, the window is larger than the model's positions, the stride larger
            than the window, or the model sees the token it is to predict.
    """
    if find_spec("evaluate") is None:
        raise UserError("measuring text needs a package: pip install 'rezero_hf[eval]'")
    tokenizer, window = tokenizer_of(opened), _window(opened, window, data.block_size)
    stride = window if stride is None else stride
    prepared = prepare(replace(data, tokenizer=opened.name), tokenizer)
    _check_same(opened, prepared.index["fingerprint"], fingerprint)
    prepared.check_vocab(opened.model.config.vocab_size)
    blocks = {split: _blocks(prepared, split, window, stride) for split in splits}
    _check_causal(opened, next(iter(blocks.values()))[0]["input_ids"])
    token_bytes = torch.from_numpy(token_byte_lengths(tokenizer))
    return {
        "source": [source["source"] for source in prepared.record()["sources"]],
        "fingerprint": prepared.index["fingerprint"],
        "way": "blockwise" if stride == window else "sliding",
        "window": window,
        "stride": stride,
        "results": {
            split: _score_text(opened.model, rows, token_bytes, batch_size, split) for split, rows in blocks.items()
        },
    }


def _window(opened: Opened, asked: int | None, usual: int) -> int:
    limit = opened.positions
    window = asked or min(usual, limit or usual)
    if limit is not None and window > limit:
        raise UserError(f"--window {window}: {opened.name} has positions for {limit} tokens; lower it.")
    return window


def _check_same(opened: Opened, found: str, recorded: str | None) -> None:
    if recorded not in (None, found):
        raise UserError(
            f"{opened.name}: what its recipe names is not what it was trained on (fingerprint {found}, recorded "
            f"{recorded}); name what to measure it on, DATA."
        )


def _blocks(prepared: PreparedData, split: str, window: int, stride: int) -> Dataset:
    parts = [part for part in SPLITS if split in (part, ALL) and prepared.totals(part)["tokens"]]
    if not parts:
        raise UserError(f"--split {split}: the data have no text in it; name another one, or other data.")
    return ConcatDataset([EvalBlocks(prepared, part, window=window, stride=stride) for part in parts])


@torch.no_grad()
def _check_causal(opened: Opened, row: torch.Tensor) -> None:
    """Numbers of a model that looks ahead mean nothing, and some classes for text do unless told otherwise."""
    rows = row.repeat(2, 1).to(opened.model.device)
    rows[1, -1] = (rows[1, -1] + 1) % opened.model.config.vocab_size
    one, other = opened.model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    # A diverged model's are no numbers, but it need not look ahead for that.
    if not torch.allclose(one, other, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UserError(f"{opened.name}: what it says of a token depends on later ones, so it predicts nothing.")


@torch.no_grad()
def _score_text(
    model: PreTrainedModel, blocks: Dataset, token_bytes: torch.Tensor, batch_size: int, split: str
) -> dict[str, float]:
    from .metrics import BitsPerByte, Perplexity

    bits, perplexity = BitsPerByte(keep_in_memory=True), Perplexity(keep_in_memory=True)
    right = tokens = text = 0
    for batch in _batches(blocks, batch_size, split):
        targets = batch["shift_labels"]
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits.float().flatten(0, 1)
        nats = nn.functional.cross_entropy(logits, targets.flatten().to(model.device), reduction="none")
        nats, scored = nats.cpu().double().view_as(targets).sum(-1), targets != IGNORE_INDEX
        read = (token_bytes[targets.clamp(min=0)] * scored).sum(-1)
        bits.add_batch(predictions=nats, references=read)
        perplexity.add_batch(predictions=nats, references=scored.sum(-1))
        right += int((logits.argmax(-1).cpu().view_as(targets) == targets).sum())
        tokens, text = tokens + int(scored.sum()), text + int(read.sum())
    counts = {"accuracy": right / tokens, "tokens": tokens, "bytes": text}
    return perplexity.compute() | bits.compute() | counts


def evaluate_labels(
    opened: Opened,
    data: LabelledData,
    splits: Sequence[str],
    window: int | None,
    batch_size: int,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Measure a classifier of texts or of words on rows, as they are split for fine-tuning (`labelled.read_labelled`).

    The classes of model and data are matched by their names; a model whose classes have none, `LABEL_0`, takes whole
    numbers for them.

    Args:
        opened: the model.
        data: the rows.
        splits: which of train, validation, test and all.
        window: tokens of a row at most; words beyond it are not measured. None: the block size of `data`, or less if
            the model cannot see so much.
        batch_size: rows at once.
        fingerprint: what the rows must have. None (default): any.

    Returns:
        `source`, `fingerprint`, `way` (row by row), `window` and `stride`, which are the same, and `results`: split ->
        `loss` (nats per text or word), `accuracy`, `texts` or `words`.

    Raises:
        UserError: the package `evaluate` is missing, the tokenizer has no token to pad with, the data are not what the
            task needs, have another fingerprint or a class that the model does not know, or the window is larger than
            the model's positions.
    """
    tokenizer, window = tokenizer_of(opened), _window(opened, window, data.block_size)
    if tokenizer.pad_token is None:
        raise UserError(f"{opened.name}: its tokenizer has no pad_token, which rows of several lengths need.")
    # A head reads the last token that is no padding.
    opened.model.config.pad_token_id = tokenizer.pad_token_id
    rows = labelled_rows(data.task, tokenizer, window, data.cache_dir)
    _check_same(opened, rows.record["fingerprint"], fingerprint)
    numbers, words = _numbers(opened, data.task.data, rows), {"collate_fn": rows.words["data_collator"]}
    parts = {"train": rows.train(None, rows.rows), **rows.held_out}
    chosen = {split: ConcatDataset(parts.values()) if split == ALL else parts[split] for split in splits}
    counted = "words" if opened.task == "token-classification" else "texts"
    return {
        "source": [rows.record["source"]],
        "fingerprint": rows.record["fingerprint"],
        "way": "row by row",
        "window": window,
        "stride": window,
        "results": {
            split: _score_classes(opened.model, some, batch_size, split, counted, numbers, **words)
            for split, some in chosen.items()
        },
    }


def _numbers(opened: Opened, name: str, rows: TaskData) -> torch.Tensor:
    """The model's number of each class of the data."""
    known = {str(label): number for number, label in opened.model.config.id2label.items()}
    found = [known.get(label, known.get(f"LABEL_{label}")) for label in rows.id2label.values()]
    if None in found:
        label = rows.id2label[found.index(None)]
        raise UserError(f"{name}: {opened.name} does not know the class {label!r}, only {', '.join(known)[:200]}.")
    return torch.tensor(found)


def evaluate_images(
    opened: Opened, data: ImageDataConfig, splits: Sequence[str], batch_size: int, fingerprint: str | None = None
) -> dict[str, Any]:
    """Measure an image classifier of this package; pictures are normalised as its image processor says.

    Args:
        opened: the model.
        data: the images.
        splits: which of train, validation and test.
        batch_size: images at once.
        fingerprint: what the prepared images must have. None (default): any.

    Returns:
        `source`, `fingerprint`, and `results`: split -> `loss` (nats per image), `accuracy`, `images`.

    Raises:
        UserError: there is no image processor, the images or classes are not of the model's shape or number or have
            another fingerprint, or a split is empty.
    """
    processor = load_processor(AutoImageProcessor, opened.folder, opened.name, "image processor")
    config = opened.model.config
    images = prepare_images(replace(data, mean=processor.image_mean, std=processor.image_std, augmentation="none"))
    _check_same(opened, images.index["fingerprint"], fingerprint)
    # A convolutional network takes any size.
    expected = (config.num_channels, config.num_labels, getattr(config, "image_size", images.size[0]))
    if (images.channels, images.num_labels, images.size[0]) != expected:
        raise UserError(
            f"{data.source} holds images of shape {(images.channels, *images.size)} in {images.num_labels} classes, "
            f"which is not what {opened.name} was made for."
        )
    return {
        "source": [images.record()["source"]],
        "fingerprint": images.index["fingerprint"],
        "results": {
            split: _score_classes(opened.model, EvalImages(images, split), batch_size, split, "images")
            for split in splits
        },
    }


@torch.no_grad()
def _score_classes(
    model: PreTrainedModel,
    rows: Dataset,
    batch_size: int,
    split: str,
    counted: str,
    numbers: torch.Tensor | None = None,
    **words: Any,
) -> dict[str, float]:
    nats, right, scored = 0.0, 0, 0
    for batch in _batches(rows, batch_size, split, **words):
        labels = batch["labels"].flatten()
        logits = model(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"}).logits
        logits, labelled = logits.float().flatten(0, -2).cpu(), labels != IGNORE_INDEX
        logits, labels = logits[labelled], labels[labelled] if numbers is None else numbers[labels[labelled]]
        nats += nn.functional.cross_entropy(logits, labels, reduction="none").double().sum().item()
        right, scored = right + int((logits.argmax(-1) == labels).sum()), scored + len(labels)
    return {"loss": nats / scored, "accuracy": right / scored, counted: scored}


def _batches(rows: Dataset, batch_size: int, split: str, **words: Any) -> Iterable[dict[str, torch.Tensor]]:
    # None: no bar where nobody watches.
    return tqdm(DataLoader(rows, batch_size, **words), desc=split, leave=False, disable=None)


def why_not_kept(opened: Opened) -> str | None:
    """Why `keep` cannot be used with a model; None if it can. To be asked before the work that would be lost.

    Raises:
        UserError: `run.json` is damaged.
    """
    folder, card = opened.folder, opened.folder / "README.md"
    if opened.commit or (folder / MANIFEST).exists():
        return "only an export on this machine has room for an evaluation"
    if not card.is_file() or user_section(card.read_text(encoding="utf-8")) is None:
        return f"{folder} has no card of rezero_hf"
    read_record(folder / "run.json")
    try:
        writable_folder(folder, "its record stays as it is")
    except DataError as error:
        return str(error)
    return None


def keep(opened: Opened, record: dict[str, Any]) -> None:
    """Write an evaluation into `run.json` beside the model, where its card reads it, and render the card again.

    It takes the place of an earlier evaluation of the same split of the same data in the same way.

    Args:
        opened: the model, of which `why_not_kept` says nothing.
        record: of the evaluation, with its provenance.
    """
    run, kept = read_record(opened.folder / "run.json"), []
    for earlier in run.get("evaluations", []):
        again = record["results"] if all(earlier.get(word) == record.get(word) for word in SAME) else {}
        if results := {split: found for split, found in earlier["results"].items() if split not in again}:
            kept.append(earlier | {"results": results})
    write_records(opened.folder, run | {"evaluations": [*kept, record]}, None)
    describe_folder(opened.folder)
