"""A finished model measured on held-out text or images, and where the result is kept (`scripts/evaluate_model.py`)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
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
from .export import describe_folder, write_records
from .hub import user_section
from .image_data import EvalImages, ImageDataConfig, prepare_images
from .opening import Opened, load_processor, tokenizer_of
from .recipe import load_recipe
from .runs import read_record
from .sources import SPLITS, DataError, Source, writable_folder
from .tokenization import token_byte_lengths


# All of a source's text in one number, whichever split it is in.
ALL = "all"
# Where no run says how long a block was, it is what the model can see, and no longer than this.
LONGEST = 1024
# What an evaluation is of, beside its splits: a later one of the same replaces it.
SAME = ("source", "fingerprint", "way", "window", "stride")


def data_for(
    opened: Opened, given: str | None, cache_dir: str | None = None
) -> tuple[DataConfig | ImageDataConfig, str | None]:
    """What a model is to be measured on.

    A recipe from the Hub is read for the name of a corpus and for nothing else of this machine.

    Args:
        opened: the model.
        given: a source as recipes name it, or a recipe (`.yaml`), whose data section is taken. None: what the model
            was trained on, as the recipe beside it says.
        cache_dir: where prepared data live. Default: as `DataConfig`.

    Returns:
        The data, and the fingerprint that they had in training; None where they are given or none was recorded.

    Raises:
        UserError: nothing is given or recorded, a recipe from the Hub names files, or it is text for a model of images
            or the other way round.
    """
    config_class = ImageDataConfig if opened.of_images else DataConfig
    recorded = read_record(_beside(opened.folder, "run.json")).get("data")
    recorded = recorded if isinstance(recorded, dict) else {}
    recipe = given or _beside(opened.folder, "recipe.yaml")
    if not given and not recipe.exists():
        raise UserError(f"{opened.name}: no recipe beside it says what it was trained on; name text or images, DATA.")
    if str(recipe).endswith((".yaml", ".yml")):
        data = load_recipe(recipe).data
        if not isinstance(data, config_class):
            raise UserError(f"{recipe}: its data are not what {type(opened.model).__name__} reads.")
    elif config_class is DataConfig:
        context = getattr(opened.model.config, "max_position_embeddings", None) or LONGEST
        data = DataConfig([Source(given)], block_size=recorded.get("block_size") or min(context, LONGEST))
    else:
        data = ImageDataConfig(given)
    if not given and opened.commit:
        _check_named(opened, data)
        data = replace(data, cache_dir=None)
    return replace(data, cache_dir=cache_dir or data.cache_dir), None if given else recorded.get("fingerprint")


def _beside(folder: Path, name: str) -> Path:
    # An export's own recipe names no absolute path any more; that of its run, or of a checkpoint's run, still does.
    near = folder.absolute()
    run = near.parents[1] if (folder / MANIFEST).exists() else near.parent if near.name == "model" else near
    return next((path for path in (run / name, near / name) if path.exists()), near / name)


def _check_named(opened: Opened, data: DataConfig | ImageDataConfig) -> None:
    of_text = isinstance(data, DataConfig)
    embedded = ("python-stdlib", "enwik8") if of_text else ("digits",)
    for source in [line.source for line in data.sources] if of_text else [str(data.path or data.source)]:
        # The library reads a folder of that name first.
        on_hub = re.fullmatch(r"hub:[\w-]+/[\w.-]+", source) and not Path(source.removeprefix("hub:")).exists()
        if source not in embedded and not on_hub:
            raise UserError(f"{opened.name}: its recipe names files, {source!r}; name text or images of yours, DATA.")


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
    tokenizer, limit = tokenizer_of(opened), opened.positions
    window = window or min(data.block_size, limit or data.block_size)
    if limit is not None and window > limit:
        raise UserError(f"--window {window}: {opened.name} has positions for {limit} tokens; lower it.")
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
            split: _score_images(opened.model, EvalImages(images, split), batch_size, split) for split in splits
        },
    }


@torch.no_grad()
def _score_images(model: PreTrainedModel, images: Dataset, batch_size: int, split: str) -> dict[str, float]:
    nats, right = 0.0, 0
    for batch in _batches(images, batch_size, split):
        labels = batch["labels"].to(model.device)
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits.float()
        nats += nn.functional.cross_entropy(logits, labels, reduction="none").cpu().double().sum().item()
        right += int((logits.argmax(-1) == labels).sum())
    return {"loss": nats / len(images), "accuracy": right / len(images), "images": len(images)}


def _batches(rows: Dataset, batch_size: int, split: str) -> Iterable[dict[str, torch.Tensor]]:
    # None: no bar where nobody watches.
    return tqdm(DataLoader(rows, batch_size), desc=split, leave=False, disable=None)


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
