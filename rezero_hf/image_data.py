"""Labelled images, decoded once, in an order that is a function of (seed, index).

`prepare_images` decodes a source into a folder whose name is a fingerprint of it, and opens that as memory maps from
then on. What is held out for validation is chosen when they are opened, so another size decodes nothing again.

Training reads images by number. Which image the i-th one is and how it is augmented follow from the seed by arithmetic
alone, so a resumed run, a run on more machines and an uninterrupted one see the same images in the same order.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction, ViTImageProcessorPil

from .augmentation import augment, check_augmentation, to_unit_range
from .image_config import ImageDataConfig
from .image_sources import open_images
from .image_store import INDEX_NAME, ImageSplit, check_files, read_labels, verify_files, write_images
from .images import image_processor
from .randomness import permutation
from .sources import SPLITS, DataError, cache_folder, explained


__all__ = ["EvalImages", "ImageDataConfig", "PreparedImages", "TrainImages", "accuracy_metrics", "prepare_images"]

# Part of the fingerprint: raise it when the same source would give other files.
FORMAT_VERSION = 2
# What is held out is the same whatever the run's seed, so that runs compare.
_HELD_OUT_KEY = (0x1A6E5,)


def prepare_images(config: ImageDataConfig, *, progress: bool = True) -> "PreparedImages":
    """The images of a recipe: decoded now if they are missing, otherwise only opened.

    Safe to kill at any point and to run from several processes at once: one decodes, the others wait for it.

    Args:
        config: the recipe's data section.
        progress: show progress bars.

    Raises:
        DataError: a value, path or data set that cannot be used, or a package that is missing.
    """
    config.check()
    cache = cache_folder(config.cache_dir)
    # Sources explain what they cannot read, so this is about writing.
    with explained(f"cannot prepare images under {cache}", "set data.cache_dir to a folder with room and rights"):
        cache.mkdir(parents=True, exist_ok=True)
        source = open_images(config, cache)
        inputs = {"format": FORMAT_VERSION, "source": source.identity()}
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        write_images(cache / fingerprint, source, inputs, progress)
    return PreparedImages(cache / fingerprint, config)


class PreparedImages:
    """Decoded images on disk, opened and split. Made by `prepare_images`.

    Attributes:
        config: the `ImageDataConfig` it was prepared for.
        index: what `index.json` says: the source, hashes, and how many seconds the decoding took.
        num_labels, id2label: the classes, in the words of a model's configuration.
        channels: 1 (grey) or 3.
        size: height and width in pixels.
        mean, std: of each channel, what `TrainImages` and `EvalImages` normalise with.

    Raises:
        DataError: a file is damaged, the sizes of the splits leave nothing to train on, or the images are not what
            `config` says they are.
    """

    def __init__(self, folder: Path, config: ImageDataConfig) -> None:
        self.folder, self.config = folder, config
        with explained(f"{folder / INDEX_NAME} is damaged", f"delete {folder} and prepare again", kinds=Exception):
            self.index = json.loads((folder / INDEX_NAME).read_text())
            self.id2label = dict(enumerate(self.index["classes"]))
            self.channels, *size = self.index["shape"]
            check_files(folder, self.index)
        self.num_labels, self.size = len(self.id2label), tuple(size)
        known = config.known
        if known and (known.shape, known.num_labels) != ((self.channels, *self.size), self.num_labels):
            raise DataError(
                f"data.path holds images of shape {self.index['shape']} in {self.num_labels} classes, which is not "
                f"{config.source}: say in data.source what they are"
            )
        self._numbers = self._choose_classes(config.classes)
        self._rows = self._split_rows()
        if config.mean is not None and len(config.mean) != self.channels:
            numbers = len(config.mean)
            raise DataError(f"data.mean has {numbers} numbers for images of {self.channels} channels: one for each")

    def _choose_classes(self, classes: list[int] | None) -> np.ndarray:
        """The number of each stored class, -1 of those that are left out."""
        numbers = np.arange(self.num_labels)
        if classes is not None:
            if not set(classes) <= set(self.id2label):
                raise DataError(f"data.classes is {classes}, but {self.config.source} has 0 to {self.num_labels - 1}")
            numbers[:] = -1
            numbers[classes] = np.arange(len(classes))
            self.id2label = {new: self.id2label[old] for new, old in enumerate(classes)}
            self.num_labels = len(classes)
        return numbers

    def _split_rows(self) -> dict[str, tuple[str, np.ndarray]]:
        """For each split, the stored split its images are in and which ones of it."""
        stored = {split: entry["images"] for split, entry in self.index["splits"].items()}
        labels = {split: self._numbers[read_labels(self.folder, split)] for split in stored}
        rows = {split: (split, np.flatnonzero(found >= 0)) for split, found in labels.items()}
        kept = rows["train"][1]
        order = kept[_held_out_order(labels["train"][kept])]
        tenth = len(kept) // 10
        # The test images first: they stay the same when another number is held out for validation.
        for split in ("test", "validation"):
            field, size = f"{split}_size", getattr(self.config, f"{split}_size")
            if split in stored:
                if size is not None:
                    raise DataError(
                        f"data.{field} is {size}, but {self.config.source} has {stored[split]} {split} images of its "
                        "own: leave it out"
                    )
                continue
            size = tenth if size is None else size
            if size >= len(order):
                raise DataError(f"data.{field} is {size} of {len(order)} images and leaves none to train on: lower it")
            rows[split], order = ("train", np.sort(order[:size])), order[size:]
        rows["train"] = ("train", np.sort(order))
        return rows

    @property
    def mean(self) -> list[float]:
        return self._normalization[0]

    @property
    def std(self) -> list[float]:
        return self._normalization[1]

    @cached_property
    def _normalization(self) -> tuple[list[float], list[float]]:
        """Where nobody has said it, a pass over all training images: not before it is asked for."""
        mean, std = self.config.mean, self.config.std
        if mean is None and self.config.known:
            mean, std = self.config.known.mean, self.config.known.std
        if mean is None or std is None:
            return self.split("train").moments()
        return mean, std

    def split(self, split: str) -> ImageSplit:
        """The images and labels of `train`, `validation` or `test`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r} does not exist: use one of {', '.join(SPLITS)}")
        stored, rows = self._rows[split]
        found = ImageSplit(self.folder, stored, self.index["shape"], rows)
        found.labels = self._numbers[found.labels]
        return found

    def verify(self) -> None:
        """Read every file and compare its sha256 with the recorded one. Raises a `DataError` if one differs."""
        verify_files(self.folder, self.index)

    def image_processor(self) -> ViTImageProcessorPil:
        """The processor to save beside a model trained on these: it gives what `EvalImages` gives."""
        return image_processor(self.size, self.mean, self.std)

    def record(self) -> dict[str, Any]:
        """What a run writes down about its data, as JSON: hashes, versions and sizes, no absolute paths.

        `source` is what the recipe calls it and `origin` what was read: a commit, or the hashes of files, whose images
        were in `formats` (none, where nothing was decoded). `stored` has the hashes of the decoded pixels, `splits` the
        number of images after holding out.
        """
        known, origin = self.config.known, self.index["inputs"]["source"]
        return {
            "fingerprint": self.index["fingerprint"],
            "source": origin.get("name", self.config.source),
            "origin": origin,
            "formats": self.index["formats"],
            "notice": known.notice if known else None,
            "shape": self.index["shape"],
            "classes": list(self.id2label.values()),
            "stored": self.index["splits"],
            "splits": {split: len(self._rows[split][1]) for split in SPLITS},
            "augmentation": self.config.augmentation,
            "mean": self.mean,
            "std": self.std,
        }


class _Images(Dataset):
    """Images of one split as a model takes them.

    Items are dictionaries: `pixel_values`, float32, shape (channels, height, width), normalised; `labels`, int64, shape
    (). A loader asks for a whole batch at once (`__getitems__`), which is many times faster than one by one. Any
    collator that stacks tensors will do, the Trainer's default among them.
    """

    def __init__(self, prepared: PreparedImages, split: str) -> None:
        self._images = prepared.split(split)
        if not len(self._images):
            raise DataError(f"the {split} split is empty: raise data.{split}_size")
        self._mean, self._std = (
            torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (prepared.mean, prepared.std)
        )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        places = np.asarray(indices, dtype=np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"images {places.min()} to {places.max()} of {len(self)}")
        positions = self._positions(places)
        x = self._in_unit_range(self._images.pixels(positions), places)
        x = x.sub_(self._mean).div_(self._std)
        labels = torch.from_numpy(self._images.labels[positions])
        return [{"pixel_values": image, "labels": label} for image, label in zip(x, labels, strict=True)]

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        """Where in the split each item's image is."""
        raise NotImplementedError

    def _in_unit_range(self, pixels: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        """The items' images before normalisation: float32 in [0, 1]."""
        raise NotImplementedError


class TrainImages(_Images):
    """The training images of a whole run, all epochs, by global number; every epoch has a new order.

    Image i stands at place i mod N of epoch i div N. Its augmentation is a function of (seed, i). Items are
    dictionaries of tensors: `pixel_values`, float32, shape (channels, height, width); `labels`, int64, shape ().

    Args:
        prepared: the images.
        seed: another seed, another order and other augmentations.
        length: images in the whole run: steps x global batch size. The Trainer must read them in order, as it does
            with `ReZeroTrainingArguments`.
        augmentation: one of `augmentation.AUGMENTATIONS`. Default: the configuration's.

    Attributes:
        fingerprint: of the images; a run goes on with the same one alone.

    Raises:
        DataError: an augmentation that is unknown or lacks its package.
    """

    def __init__(self, prepared: PreparedImages, seed: int, length: int, augmentation: str | None = None) -> None:
        super().__init__(prepared, "train")
        self.fingerprint = prepared.index["fingerprint"]
        self._seed, self._length = seed, length
        self._augmentation = augmentation or prepared.config.augmentation
        check_augmentation(self._augmentation)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._length

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(indices, len(self._images))
        positions = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            positions[here] = self._order(epoch)[places[here]]
        return positions

    def _in_unit_range(self, pixels: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        return augment(pixels, self._augmentation, (self._seed, 1), indices)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A batch spans two epochs at most, unless there are very few images.
            self._orders = dict(list(self._orders.items())[-1:])
            self._orders[epoch] = permutation(len(self._images), (self._seed, 0, epoch))
        return self._orders[epoch]


class EvalImages(_Images):
    """A split in order, normalised and otherwise as it is. Items are as in `TrainImages`.

    Args:
        prepared: the images.
        split: `"validation"` or `"test"` (or `"train"`, to measure overfitting).
        most: of so many images, evenly spaced over the split and always the same; None (default) is all of them.

    Raises:
        DataError: the split is empty.
    """

    def __init__(self, prepared: PreparedImages, split: str, most: int | None = None) -> None:
        super().__init__(prepared, split)
        self._length = min(len(self._images), most or len(self._images))

    def __len__(self) -> int:
        return self._length

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        return indices * len(self._images) // self._length

    def _in_unit_range(self, pixels: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        return to_unit_range(pixels)


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: `accuracy`, in [0, 1], and `error_percent`, as the paper's tables have it.

    Args:
        prediction: logits of shape (images, num_labels), alone or first in a tuple, and the labels of the images.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))
    return {"accuracy": accuracy, "error_percent": 100 * (1 - accuracy)}


def _held_out_order(labels: np.ndarray) -> np.ndarray:
    """Images in the order in which they are held out: random, and every prefix has each class in proportion."""
    order = permutation(len(labels), _HELD_OUT_KEY)
    shuffled = labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    counts = np.bincount(shuffled)
    ranks = np.empty_like(order)
    ranks[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort((ranks + 0.5) / counts[shuffled], kind="stable")]
