"""Where labelled images come from: data sets of the Hub, parquet files, scikit-learn's digits."""

import glob
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .hub_corpora import SPLIT_NAMES, current_version, label_of, load_version
from .image_config import ImageDataConfig
from .sources import DataError, explained, memory_file, read_once, sha256_of


class LabelledImage(NamedTuple):
    """uint8 pixels of shape (channels, height, width), 1 channel for grey and 3 for everything else, and a class."""

    pixels: np.ndarray
    label: int


class ImageSource(ABC):
    """Labelled images in up to three splits.

    Attributes:
        label: names the source in messages, without absolute paths.
        formats: of the images' files, as far as they were read: `JPEG`, `PNG`. JPEG loses detail, and accuracy with it.
    """

    label: str

    def __init__(self) -> None:
        self.formats: set[str] = set()

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the content, as JSON, known without decoding anything."""

    @abstractmethod
    def read(self) -> tuple[list[str], dict[str, Iterator[LabelledImage]]]:
        """The names of the classes, and the images of each split there is, `train` among them."""


def open_images(config: ImageDataConfig, cache_dir: Path) -> ImageSource:
    """The source that a checked configuration names.

    Raises:
        DataError: there is no such file, or scikit-learn is missing.
    """
    if config.path is not None:
        return ImageFiles(config, cache_dir)
    return Digits() if config.source == "digits" else HubImages(config, cache_dir)


class Digits(ImageSource):
    """scikit-learn's `load_digits`. Its 17 shades of grey are spread over 0 to 255."""

    label = "digits"

    def __init__(self) -> None:
        super().__init__()
        if find_spec("sklearn") is None:
            raise DataError("data.source is 'digits', which needs a package: pip install scikit-learn")

    def identity(self) -> dict[str, Any]:
        return {"kind": "digits"}

    def read(self) -> tuple[list[str], dict[str, Iterator[LabelledImage]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        return [str(name) for name in digits.target_names], {"train": map(LabelledImage, pixels, digits.target)}


class _TypedColumns(ImageSource):
    """Images in a data set of the library `datasets`, whose columns have types."""

    way_out: str

    def __init__(self, config: ImageDataConfig) -> None:
        super().__init__()
        self._config = config
        self._columns = {"image_column": config.image_column, "label_column": config.label_column}

    @abstractmethod
    def _load(self) -> dict[str, Any]:
        """The data set's splits by their own names."""

    def read(self) -> tuple[list[str], dict[str, Iterator[LabelledImage]]]:
        from datasets import ClassLabel, Image

        dataset = self._load()
        splits = {split: next((n for n in names if n in dataset), None) for split, names in SPLIT_NAMES.items()}
        if splits["train"] is None:
            raise DataError(f"{self.label} has no split named train, only {', '.join(dataset)}: {self.way_out}")
        classes, found = [], {}
        for split, name in splits.items():
            if name is None:
                continue
            features = dataset[name].features or {}
            image = self._column(features, Image, "image_column")
            label = self._column(features, ClassLabel, "label_column")
            if classes and features[label].names != classes:
                raise DataError(f"{self.label}: the splits do not have the same classes: {self.way_out}")
            classes = features[label].names
            rows = enumerate(dataset[name].select_columns([image, label]))
            found[split] = self._rows(((f"row {i} of {name}", row[image], row[label]) for i, row in rows), len(classes))
        return classes, found

    def _column(self, features: dict[str, Any], kind: type, field: str) -> str:
        typed = [name for name, feature in features.items() if isinstance(feature, kind)]
        asked, what = self._columns[field], f"columns of type {kind.__name__}"
        if asked is not None and asked not in typed:
            raise DataError(f"data.{field} is {asked!r}, but {self.label} has as {what}: {', '.join(typed) or 'none'}")
        if not typed:
            raise DataError(
                f"{self.label} has no {what} among {', '.join(features)}: write it with the library `datasets`, which "
                "records types"
            )
        if asked is None and len(typed) > 1:
            raise DataError(f"{self.label} has {len(typed)} {what}, {', '.join(typed)}: choose one with data.{field}")
        return asked or typed[0]

    def _rows(self, rows: Iterator[tuple[str, Any, int | None]], num_labels: int) -> Iterator[LabelledImage]:
        # The library and its readers raise a dozen unrelated types for what is one thing to a user.
        with explained(f"{self.label} cannot be read", self.way_out, kinds=Exception):
            for where, image, label in rows:
                if image is None:
                    raise DataError(f"{self.label}: {where} has no image: {self.way_out}")
                # datasets writes -1 where there is none.
                if label is None or not 0 <= label < num_labels:
                    raise DataError(f"{self.label}: {where} has label {label} of {num_labels} classes: {self.way_out}")
                # Pillow would clip deeper pixels to white.
                if image.mode[0] in "IF":
                    raise DataError(f"{self.label}: {where} has mode {image.mode}: convert it to 8 bits per channel")
                if image.format is not None:
                    self.formats.add(image.format)
                if image.mode in ("1", "L"):
                    yield LabelledImage(np.asarray(image.convert("L"))[None], label)
                else:
                    yield LabelledImage(np.asarray(image.convert("RGB")).transpose(2, 0, 1), label)


class HubImages(_TypedColumns):
    """A data set by its Hub id or in a local folder, read by `datasets.load_dataset`."""

    way_out = "check its name, config_name, revision and files, and the network, or use another data set"

    def __init__(self, config: ImageDataConfig, cache_dir: Path) -> None:
        super().__init__(config)
        self._name = os.path.expanduser(config.source.removeprefix("hub:"))
        self.label = label_of(self._name)
        revision = config.revision or (config.known.revision if config.known else None)
        self._version_of = (self.label, self._name, config.config_name, revision)
        self._memory = memory_file(cache_dir, ["images", *self._version_of])
        self._version: str | None = None

    def identity(self) -> dict[str, Any]:
        if self._version is None:
            self._version = current_version(*self._version_of, self._memory)
        named = {"config_name": self._config.config_name, "version": self._version}
        kind = "hub" if self.label.startswith("hub:") else "local"
        return {"kind": kind, "name": self.label, **named, **self._columns}

    def _load(self) -> dict[str, Any]:
        return load_version(*self._version_of, self.identity()["version"])


class ImageFiles(_TypedColumns):
    """Parquet files on this machine. They are read as they are, without the library's own copy."""

    way_out = "check the files of data.path"

    def __init__(self, config: ImageDataConfig, cache_dir: Path) -> None:
        super().__init__(config)
        self._cache_dir = cache_dir
        self._splits: dict[str, list[Path]] = {}
        for path in self._paths(config.path):
            words = re.split("[^a-z]+", path.stem.lower())
            split = next((split for split, names in SPLIT_NAMES.items() if set(names) & set(words)), None)
            if split is None:
                raise DataError(f"data.path: {path.name} has neither train, validation nor test in its name: rename it")
            self._splits.setdefault(split, []).append(path)
        self.label = "data.path"

    @staticmethod
    def _paths(given: str | list[str]) -> list[Path]:
        paths = []
        for name in [given] if isinstance(given, str) else given:
            path = Path(os.path.expanduser(name))
            found = sorted(Path(p) for p in glob.glob(f"{glob.escape(str(path))}/**/*.parquet", recursive=True))
            if not path.exists() or (path.is_dir() and not found):
                raise DataError(f"data.path: {path} {'has no .parquet files' if path.exists() else 'does not exist'}")
            paths += found if path.is_dir() else [path]
        return paths

    def identity(self) -> dict[str, Any]:
        files = {}
        for split, paths in self._splits.items():
            memory = memory_file(self._cache_dir, ["image files", [os.path.abspath(path) for path in paths]])
            with explained("data.path cannot be read", self.way_out):
                digests = read_once(paths, sha256_of, memory)
            files[split] = [{"name": path.name, "sha256": sha} for path, sha in zip(paths, digests, strict=True)]
        return {"kind": "files", "files": files, **self._columns}

    def _load(self) -> dict[str, Any]:
        from datasets import load_dataset

        files = {split: [str(path) for path in paths] for split, paths in self._splits.items()}
        with explained(f"{self.label} cannot be read", self.way_out, kinds=Exception):
            return load_dataset("parquet", data_files=files, streaming=True)
