"""Random changes of training images, each a function of (key, index), a whole batch at a time."""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import permutations

import numpy as np
import torch

from .randomness import uniform
from .sources import DataError


AUGMENTATIONS = ("none", "crop_flip", "superconvergence")

# The paper's for CIFAR, both: pixels of black on every side before a random crop; a flip for every other image.
PADDING = 4
# The authors' superconvergence code: brightness, contrast and saturation by factors within 1 +- this; degrees.
JITTER = 0.25
ROTATION = 2.0
_JITTER_ORDERS = np.array(list(permutations(range(3))))


def check_augmentation(augmentation: str) -> None:
    """Raise a `DataError` for a word that is none of `AUGMENTATIONS`, or whose package is missing."""
    if augmentation not in AUGMENTATIONS:
        raise DataError(f"data.augmentation is {augmentation!r}: use one of {', '.join(AUGMENTATIONS)}")
    if augmentation == "superconvergence" and find_spec("kornia") is None:
        raise DataError("data.augmentation is 'superconvergence', which needs a package: pip install kornia")


def augment(pixels: np.ndarray, augmentation: str, key: tuple[int, ...], indices: np.ndarray) -> torch.Tensor:
    """Images as a network trains on them, before normalisation.

    `crop_flip`: padded with `PADDING` black pixels on every side, cropped to its size at a random place, flipped
    horizontally with probability 1/2. `superconvergence` (the authors' repository of that name): that, then colour
    jitter in random order and a rotation by up to `ROTATION` degrees, nearest pixel, black outside. They flip last,
    which comes to the same: the angle is symmetric, and colours know no place.

    Args:
        pixels: uint8, shape (batch, channels, height, width).
        augmentation: one of `AUGMENTATIONS`.
        key: another key, other changes.
        indices: of each image in the run, shape (batch,).

    Returns:
        float32 in [0, 1], same shape.
    """
    draws = uniform(key, indices, 8)
    if augmentation != "none":
        pixels = _crop_flip(pixels, draws[:, :3])
    x = to_unit_range(pixels)
    if augmentation == "superconvergence":
        x = _rotate(_jitter(x, draws[:, 3:7]), draws[:, 7])
    return x


def to_unit_range(pixels: np.ndarray) -> torch.Tensor:
    """uint8 to float32 in [0, 1]."""
    return torch.from_numpy(pixels).float().mul_(1 / 255)


def _crop_flip(pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Draws: row and column of the crop, and whether to flip, shape (batch, 3)."""
    padded = np.pad(pixels, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, pixels.shape[2:], axis=(2, 3))
    top, left = (draws[:, :2].T * (2 * PADDING + 1)).astype(int)
    cropped = windows[np.arange(len(pixels)), :, top, left]
    flipped = draws[:, 2] < 0.5
    cropped[flipped] = cropped[flipped, ..., ::-1]
    return cropped


def _jitter(x: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Draws: the order of the three adjustments and the factor of each, shape (batch, 4)."""
    orders = _JITTER_ORDERS[(draws[:, 0] * len(_JITTER_ORDERS)).astype(int)]
    factors = torch.from_numpy(1 + JITTER * (2 * draws[:, 1:] - 1)).float()
    for turn in range(3):
        for number, adjust in enumerate(_adjustments()):
            chosen = torch.from_numpy(np.flatnonzero(orders[:, turn] == number))
            if len(chosen):
                x[chosen] = adjust(x[chosen], factors[chosen, number])
    return x


def _adjustments() -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...]:
    """Kornia's brightness, contrast and saturation that mean what PIL's and torchvision's do."""
    from kornia import enhance

    return (
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
    )


def _rotate(x: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    from kornia.geometry.transform import rotate

    angles = torch.from_numpy(ROTATION * (2 * draws - 1)).float()
    return rotate(x, angles, mode="nearest", padding_mode="zeros")
