"""A finished model measured on held-out text or images, and where the result is kept (`scripts/evaluate_model.py`)."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoImageProcessor, PreTrainedModel

from .checkpoints import MANIFEST
from .data import IGNORE_INDEX, DataConfig, EvalBlocks, PreparedData, Source, prepare
from .errors import UserError, one_line
from .export import describe_folder, write_records
from .hub import user_section
from .image_data import EvalImages, ImageDataConfig, prepare_images
from .metrics import Accuracy, BitsPerByte, Perplexity
from .opening import Opened, tokenizer_of
from .recipe import load_recipe
from .sources import SPLITS
from .tokenization import token_byte_lengths


# All of a source's text in one number, whichever split it is in.
ALL = "all"
# Without a recipe that says how long a block is, it is what the model can see, and no longer than this.
LONGEST = 1024
# What an evaluation is of, beside its splits: a later one of the same replaces it.
SAME = ("source", "way", "window", "stride")


def data_for(opened: Opened, given: str | None, cache_dir: str | None = None) -> DataConfig | ImageDataConfig:
    """What a model is to be measured on.

    Args:
        opened: the model.
        given: a source as recipes name it, or a recipe (`.yaml`), whose data section is taken. None: what the model
            was trained on, as the recipe beside it says.
        cache_dir: where prepared data live. Default: as `DataConfig`.

    Raises:
        UserError: nothing is given or recorded, or it is text for a model of images or the other way round.
    """
    config_class = ImageDataConfig if opened.of_images else DataConfig
    given = given or _recorded(opened.folder)
    if given is None:
        raise UserError(f"{opened.name}: no recipe beside it says what it was trained on; name text or images, DATA.")
    if str(given).endswith((".yaml", ".yml")):
        data = load_recipe(given).data
        if not isinstance(data, config_class):
            raise UserError(f"{given}: its data are not what {type(opened.model).__name__} reads.")
    elif config_class is DataConfig:
        context = getattr(opened.model.config, "max_position_embeddings", None) or LONGEST
        data = DataConfig([Source(given)], block_size=min(context, LONGEST))
    else:
        data = ImageDataConfig(given)
    return replace(data, cache_dir=cache_dir or data.cache_dir)


def _recorded(folder: Path) -> Path | None:
    # An export's own recipe names no absolute path any more; that of its run, or of a checkpoint's run, still does.
    near = folder.absolute()
    run = near.parents[1] if (folder / MANIFEST).exists() else near.parent if near.name == "model" else near
    return next((path for path in (run / "recipe.yaml", near / "recipe.yaml") if path.exists()), None)


def evaluate_text(
    opened: Opened, data: DataConfig, splits: Sequence[str], window: int | None, stride: int | None, batch_size: int
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

    Returns:
        `source`, `fingerprint` (of the prepared text), `way` (blockwise or sliding), `window`, `stride`, and `results`:
        split -> `loss` (nats per token), `perplexity`, `bits_per_byte`, `accuracy` (of the most likely token),
        `tokens`, `bytes`.

    Raises:
        UserError: the tokenizer loses text, its ids are not the model's, a split is empty, the window is larger than
            the model's positions, the stride larger than the window, or the model sees the token it is to predict.
    """
    tokenizer, limit = tokenizer_of(opened), opened.positions
    window = window or min(data.block_size, limit or data.block_size)
    if limit is not None and window > limit:
        raise UserError(f"--window {window}: {opened.name} has positions for {limit} tokens; lower it.")
    stride = window if stride is None else stride
    prepared = prepare(replace(data, tokenizer=opened.name), tokenizer, to_train=False)
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


def _blocks(prepared: PreparedData, split: str, window: int, stride: int) -> Dataset:
    if split != ALL:
        return EvalBlocks(prepared, split, window=window, stride=stride)
    with_text = [split for split in SPLITS if prepared.totals(split)["tokens"]]
    return ConcatDataset([EvalBlocks(prepared, split, window=window, stride=stride) for split in with_text])


@torch.no_grad()
def _check_causal(opened: Opened, row: torch.Tensor) -> None:
    """Numbers of a model that looks ahead mean nothing, and some classes for text do unless told otherwise."""
    rows = row.repeat(2, 1).to(opened.model.device)
    rows[1, -1] = (rows[1, -1] + 1) % opened.model.config.vocab_size
    one, other = opened.model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    if not torch.allclose(one, other, rtol=1e-2, atol=1e-2):
        raise UserError(f"{opened.name}: what it says of a token depends on later ones, so it predicts nothing.")


@torch.no_grad()
def _score_text(
    model: PreTrainedModel, blocks: Dataset, token_bytes: torch.Tensor, batch_size: int, split: str
) -> dict[str, float]:
    bits, perplexity, accuracy = (kind(keep_in_memory=True) for kind in (BitsPerByte, Perplexity, Accuracy))
    tokens = text = 0
    for batch in _batches(blocks, batch_size, split):
        targets = batch["shift_labels"]
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits.float().flatten(0, 1)
        nats = nn.functional.cross_entropy(logits, targets.flatten().to(model.device), reduction="none")
        nats, scored = nats.view_as(targets).sum(-1).cpu(), targets != IGNORE_INDEX
        read = (token_bytes[targets.clamp(min=0)] * scored).sum(-1)
        bits.add_batch(predictions=nats, references=read)
        perplexity.add_batch(predictions=nats, references=scored.sum(-1))
        accuracy.add_batch(predictions=logits.argmax(-1).cpu()[scored.flatten()], references=targets[scored])
        tokens, text = tokens + int(scored.sum()), text + int(read.sum())
    return perplexity.compute() | bits.compute() | accuracy.compute() | {"tokens": tokens, "bytes": text}


def evaluate_images(opened: Opened, data: ImageDataConfig, splits: Sequence[str], batch_size: int) -> dict[str, Any]:
    """Measure an image classifier of this package; pictures are normalised as its image processor says.

    Args:
        opened: the model.
        data: the images.
        splits: which of train, validation and test.
        batch_size: images at once.

    Returns:
        `source`, `fingerprint`, and `results`: split -> `loss` (nats per image), `accuracy`, `images`.

    Raises:
        UserError: there is no image processor, the images or classes are not of the model's shape or number, or a split
            is empty.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(opened.folder, local_files_only=True)
    # Of any kind, as for tokenizers.
    except Exception as error:
        raise UserError(f"{opened.name} holds no image processor ({one_line(error)}).") from error
    config = opened.model.config
    images = prepare_images(replace(data, mean=processor.image_mean, std=processor.image_std, augmentation="none"))
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
            split: _score_images(opened.model, EvalImages(images, split), batch_size, split) for split in splits
        },
    }


@torch.no_grad()
def _score_images(model: PreTrainedModel, images: Dataset, batch_size: int, split: str) -> dict[str, float]:
    accuracy, nats = Accuracy(keep_in_memory=True), 0.0
    for batch in _batches(images, batch_size, split):
        labels = batch["labels"].to(model.device)
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits.float()
        nats += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        accuracy.add_batch(predictions=logits.argmax(-1).cpu(), references=batch["labels"])
    return {"loss": nats / len(images), **accuracy.compute(), "images": len(images)}


def _batches(rows: Dataset, batch_size: int, split: str) -> Iterable[dict[str, torch.Tensor]]:
    # None: no bar where nobody watches.
    return tqdm(DataLoader(rows, batch_size), desc=split, leave=False, disable=None)


def keep(opened: Opened, record: dict[str, Any]) -> str:
    """Write an evaluation into `run.json` beside the model, where its card reads it, and render the card again.

    That is, if the folder is an export, with a card of this package. It takes the place of an earlier evaluation of the
    same split of the same source in the same way.

    Args:
        opened: the model.
        record: of the evaluation, with its provenance.

    Returns:
        One line on where it is.
    """
    folder, card = opened.folder, opened.folder / "README.md"
    if opened.commit or (folder / MANIFEST).exists():
        return "not kept beside the model: only an export of this machine has room for it (--output FILE keeps it)"
    if not card.is_file() or user_section(card.read_text(encoding="utf-8")) is None:
        return f"not kept beside the model: {folder} has no card of rezero_hf (--output FILE keeps it)"
    path = folder / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = []
    for earlier in run.get("evaluations", []):
        again = record["results"] if all(earlier.get(word) == record.get(word) for word in SAME) else {}
        if results := {split: found for split, found in earlier["results"].items() if split not in again}:
            kept.append(earlier | {"results": results})
    write_records(folder, run | {"evaluations": [*kept, record]}, None)
    describe_folder(folder)
    return f"kept in {path}, and shown by the card beside it"
