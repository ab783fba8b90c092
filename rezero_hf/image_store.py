"""Decoded images on disk: flat files of pixels and labels, memory-mapped, written whole or not at all.

Decoding fifty thousand small files takes longer than an epoch of a small net, so it is done once. A folder of images
appears by one rename when everything in it is on disk.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .durable import sync, write_whole, written_once
from .image_sources import ImageSource, LabelledImage
from .sources import DataError, explained


INDEX_NAME = "index.json"
LABEL_TYPE = np.dtype("<i8")


def write_images(folder: Path, source: ImageSource, inputs: dict[str, Any], progress: bool) -> None:
    """See to it that `folder` holds the source's images and their index, written by this process or by another.

    Whoever writes holds a file lock, which ends with its process; the others wait. What a killed process left is
    thrown away: it is seconds of work.

    Raises:
        DataError: the source cannot be read, or its images differ in shape.
    """
    written_once(folder, INDEX_NAME, lambda: _write(folder, source, inputs, progress), progress)


def _write(folder: Path, source: ImageSource, inputs: dict[str, Any], progress: bool) -> None:
    """Write beside `folder`, then rename."""
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        start = time.monotonic()
        classes, splits = source.read()
        writer = _Writer(partial, source.label, progress)
        index = {"fingerprint": folder.name, "inputs": inputs, "classes": classes}
        index["splits"] = {split: writer.write(split, images) for split, images in splits.items()}
        index |= {
            "shape": writer.shape,
            "formats": sorted(source.formats),
            "seconds": round(time.monotonic() - start, 1),
        }
        write_whole(partial / INDEX_NAME, json.dumps(index, indent=1))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Without an index this is somebody's half-deleted copy.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)


class _Writer:
    """Splits to files, one after the other. `shape`: of the first image and so of all."""

    def __init__(self, folder: Path, label: str, progress: bool) -> None:
        self._folder, self._label, self._progress = folder, label, progress
        self.shape: list[int] | None = None

    def write(self, split: str, images: Iterable[LabelledImage]) -> dict[str, Any]:
        """Returns the split's entry in the index."""
        labels, digest = [], hashlib.sha256()
        bar = tqdm(images, f"decoding {self._label}, {split}", unit=" images", disable=not self._progress, delay=1)
        with _pixels_of(self._folder, split).open("wb") as file:
            for image in bar:
                self._check(image.pixels, f"{self._label}: image {len(labels)} of {split}")
                data = image.pixels.tobytes()
                file.write(data)
                digest.update(data)
                labels.append(image.label)
        if not labels:
            raise DataError(f"{self._label}: {split} has no images: use another data set")
        packed = np.array(labels, dtype=LABEL_TYPE)
        packed.tofile(_labels_of(self._folder, split))
        for path in (_pixels_of(self._folder, split), _labels_of(self._folder, split)):
            sync(path)
        labels_sha256 = hashlib.sha256(packed.tobytes()).hexdigest()
        return {"images": len(labels), "pixels_sha256": digest.hexdigest(), "labels_sha256": labels_sha256}

    def _check(self, pixels: np.ndarray, where: str) -> None:
        shape = list(pixels.shape)
        self.shape = self.shape or shape
        if shape != self.shape:
            raise DataError(
                f"{where} has the shape {shape} (channels, height, width), others have {self.shape}: make them all "
                "alike beforehand"
            )


class ImageSplit:
    """Images of one split by position, read from the memory map of the split they are stored in.

    Args:
        folder: the images on disk.
        stored: name of the split there.
        shape: of an image.
        rows: which of the stored images these are, in order.

    Attributes:
        labels: int64, shape (images,).
    """

    def __init__(self, folder: Path, stored: str, shape: list[int], rows: np.ndarray) -> None:
        self._path, self._shape, self._rows = _pixels_of(folder, stored), tuple(shape), rows
        self.labels = read_labels(folder, stored)[rows]
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._rows)

    # Loader processes open their own maps; a pickled map would be a copy of the whole file.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def pixels(self, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A copy of these images, by default of all: uint8, shape (images, channels, height, width)."""
        if self._map is None:
            self._map = np.memmap(self._path, dtype=np.uint8, mode="r").reshape(-1, *self._shape)
        return self._map[self._rows[positions]]

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels in [0, 1], exact: from counts of the 256 values.

        Raises:
            DataError: a channel has only one value, so its deviation is 0.
        """
        counts = np.zeros((self._shape[0], 256), dtype=np.int64)
        for start in range(0, len(self), 1000):
            pixels = self.pixels(slice(start, start + 1000))
            for channel in range(len(counts)):
                counts[channel] += np.bincount(pixels[:, channel].ravel(), minlength=256)
        shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = shares @ values
        variance = (shares * (values - mean[:, None]) ** 2).sum(1)
        if not variance.all():
            raise DataError("a channel has the same value in every training image: set data.mean and data.std")
        return mean.tolist(), np.sqrt(variance).tolist()


def read_labels(folder: Path, split: str) -> np.ndarray:
    """The labels of a stored split: int64, shape (images,)."""
    return np.fromfile(_labels_of(folder, split), dtype=LABEL_TYPE).astype(np.int64)


def check_files(folder: Path, index: dict[str, Any]) -> None:
    """Raise a `DataError` if a file is not there or not as long as the index says."""
    for split, entry in index["splits"].items():
        sizes = {_pixels_of: int(np.prod(index["shape"])), _labels_of: LABEL_TYPE.itemsize}
        for name, size in sizes.items():
            path = name(folder, split)
            found = path.stat().st_size if path.is_file() else None
            if found != entry["images"] * size:
                problem = "is missing" if found is None else f"has {found} bytes instead of {entry['images'] * size}"
                raise DataError(f"{path} {problem}: delete {folder} and prepare again")


def verify_files(folder: Path, index: dict[str, Any]) -> None:
    """Raise a `DataError` if the content of a file is not what was written."""
    for split, entry in index["splits"].items():
        for path, sha256 in (
            (_pixels_of(folder, split), entry["pixels_sha256"]),
            (_labels_of(folder, split), entry["labels_sha256"]),
        ):
            with explained(f"{path} cannot be read", f"delete {folder} and prepare again"), path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256:
                raise DataError(f"{path} has changed since it was written: delete {folder} and prepare again")


def _pixels_of(folder: Path, split: str) -> Path:
    return folder / f"{split}.pixels"


def _labels_of(folder: Path, split: str) -> Path:
    return folder / f"{split}.labels"
