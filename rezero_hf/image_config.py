"""Which labelled images to train on, as a recipe says it, and what is known of some data sets beforehand."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from .augmentation import check_augmentation
from .images import CIFAR10_MEAN, CIFAR10_STD
from .sources import DataError


class Known(NamedTuple):
    """What is known of a data set beforehand. `shape`: of an image. None: measured, or nothing to say."""

    notice: str
    shape: tuple[int, int, int]
    num_labels: int
    mean: list[float] | None = None
    std: list[float] | None = None
    revision: str | None = None


KNOWN = {
    "hub:uoft-cs/cifar10": Known(
        "CIFAR-10 states no licence and is meant for research; cite Krizhevsky, Learning Multiple Layers of Features "
        "from Tiny Images, 2009.",
        shape=(3, 32, 32),
        num_labels=10,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        revision="0b2714987fa478483af9968de7c934580d0bb9a2",
    ),
    "digits": Known(
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, "
        "CC BY 4.0; the 1797 images of its test set, as scikit-learn ships them.",
        shape=(1, 8, 8),
        num_labels=10,
    ),
}


@dataclass
class ImageDataConfig:
    """Which labelled images to train on.

    Args:
        source: `"hub:ORG/NAME"`, read by `datasets.load_dataset` and never by code from the Hub; `"digits"`,
            scikit-learn's 8 x 8 grey digits, nothing to download; or, with `path`, any name. Default: CIFAR-10, the
            paper's.
        path: a local copy of `source`: a folder of parquet files, or a list of them, with `train`, `test` or
            `validation` in their names and the columns' types in their metadata, as `datasets` writes them. Nothing
            is downloaded.
        config_name, revision: of a Hub data set. Default: its default one, and the commit `revision` points to now;
            of CIFAR-10 a fixed commit, which needs no network once prepared.
        image_column, label_column: default: the only columns of the types `Image` and `ClassLabel`.
        classes: numbers of those to use, which become 0, 1 and so on in this order; images of others are left out.
            Default: all.
        validation_size: images held out of the training split, evenly from every class and the same for every seed,
            if the source has no validation split. Default: a tenth, 5000 of CIFAR-10 as in He et al. 2015. 0 trains on
            all, as the paper does.
        test_size: the same for the test split, which most sources have.
        augmentation: `none`, `crop_flip` (default, the paper's: zero padding of 4 pixels, a random crop, a flip) or
            `superconvergence` (the authors': that, colour jitter and rotation). For digits only `none` makes sense.
        mean, std: per channel, what pixels in [0, 1] are normalised with. Default: the paper's for CIFAR-10, else those
            of the training pixels.
        cache_dir: where decoded images live. Default: `~/.cache/rezero_hf`.
    """

    source: str = "hub:uoft-cs/cifar10"
    path: str | list[str] | None = None
    config_name: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    classes: list[int] | None = None
    validation_size: int | None = None
    test_size: int | None = None
    augmentation: str = "crop_flip"
    mean: list[float | int] | None = None
    std: list[float | int] | None = None
    cache_dir: str | None = None

    def check(self) -> None:
        """Raise a `DataError` for values that make no sense, whatever the images are."""
        on_hub = self.path is None and self.source.startswith("hub:")
        if on_hub and self.source == "hub:":
            raise DataError("data.source: 'hub:' names no data set: write hub:ORG/NAME")
        if self.path is None and not on_hub and self.source != "digits":
            raise DataError(f"data.source is {self.source!r}: write hub:ORG/NAME or digits, or set data.path")
        if self.path is not None and (not self.path or self.source == "digits"):
            raise DataError(
                f"data.path is {self.path!r} with data.source={self.source!r}: name files and, as source, their name"
            )
        for name in ("config_name", "revision"):
            if getattr(self, name) is not None and not on_hub:
                raise DataError(f"data.{name} is only for data sets read from the Hub: remove it")
        for name in ("validation_size", "test_size"):
            if (size := getattr(self, name)) is not None and size < 0:
                raise DataError(f"data.{name} is {size}: it must be at least 0, or left out for a tenth")
        if self.classes is not None and not 1 < len(self.classes) == len(set(self.classes)):
            raise DataError(f"data.classes is {self.classes}: name two or more, each once, or leave it out for all")
        normalization = f"data.mean is {self.mean} and data.std is {self.std}"
        if (self.mean is None) != (self.std is None) or len(self.mean or []) != len(self.std or []):
            raise DataError(f"{normalization}: set both, one number for each channel, or neither")
        if not all(map(math.isfinite, self.mean or [])) or not all(0 < s < math.inf for s in self.std or []):
            raise DataError(f"{normalization}: they must be finite, and deviations above 0")
        check_augmentation(self.augmentation)

    @property
    def known(self) -> Known | None:
        return KNOWN.get(self.source)
