"""Augmentations: the paper's crops and flips, and the superconvergence code's colours, which are PIL's."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from rezero_hf import augmentation
from rezero_hf.augmentation import AUGMENTATIONS, augment, check_augmentation
from rezero_hf.sources import DataError


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
# Draws that change nothing: the crop in the middle, no flip, factors 1, angle 0.
NEUTRAL = [0.5, 0.5, 0.9, 0.0, 0.5, 0.5, 0.5, 0.5]


def with_kornia(name):
    if name == "superconvergence":
        pytest.importorskip("kornia")


def drawing(monkeypatch, **changes):
    """Let every draw be neutral but for these: position=values for one batch."""

    def draws(key, indices, number):
        found = np.tile(NEUTRAL, (len(indices), 1))
        for position, values in changes.items():
            found[:, int(position[1:])] = values
        return found

    monkeypatch.setattr(augmentation, "uniform", draws)


def test_none_only_scales():
    """Pixels become float32 in [0, 1]."""
    found = augment(PIXELS, "none", (0,), np.arange(40))
    torch.testing.assert_close(found, torch.from_numpy(PIXELS) / 255)


def test_crop_flip_is_a_window_of_the_padded_image():
    """Each of the 81 places and both directions come, about equally often; outside the image is black."""
    image = PIXELS[0]
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
    windows = {
        padded[:, top : top + 32, left : left + 32][..., ::step].tobytes(): (top, left, step)
        for top in range(9)
        for left in range(9)
        for step in (1, -1)
    }
    number = 8100
    found = augment(np.stack([image] * number), "crop_flip", (3,), np.arange(number))
    pixels = (found * 255).round().to(torch.uint8).numpy()
    places = np.array([windows[one.tobytes()] for one in pixels])
    counts = np.bincount(places[:, 0] * 9 + places[:, 1], minlength=81)
    assert 60 < counts.min() < counts.max() < 145
    assert 0.48 < (places[:, 2] == 1).mean() < 0.52


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_does_not_depend_on_its_batch(name):
    """Alone, in other company or in another place it comes out the same, bit for bit."""
    with_kornia(name)
    indices = np.arange(40) * 7
    whole = augment(PIXELS, name, (1, 2), indices)
    assert whole.shape == PIXELS.shape
    assert whole.dtype == torch.float32
    for part in ([5], [30, 2, 17], list(range(20, 40))):
        assert torch.equal(augment(PIXELS[part], name, (1, 2), indices[part]), whole[part])


@pytest.mark.parametrize("name", AUGMENTATIONS[1:])
def test_another_key_or_index_changes_an_image_otherwise(name):
    with_kornia(name)
    one, other, later = (
        augment(PIXELS, name, key, indices)
        for key, indices in (((0,), np.arange(40)), ((1,), np.arange(40)), ((0,), np.arange(40, 80)))
    )
    assert sum(torch.equal(a, b) for a, b in zip(one, other, strict=True)) < 3
    assert sum(torch.equal(a, b) for a, b in zip(one, later, strict=True)) < 3


@pytest.mark.parametrize("order", range(6))
def test_colours_change_as_with_pil(monkeypatch, order):
    """Brightness, contrast and saturation in each order are those of PIL, but for its rounding in between."""
    pytest.importorskip("kornia")
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    drawing(monkeypatch, _3=(order + 0.5) / 6, _4=0.1, _5=0.9, _6=0.2)
    found = augment(PIXELS, "superconvergence", (0,), np.arange(40))
    for pixels, changed in zip(PIXELS, found, strict=True):
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        for number in augmentation._JITTER_ORDERS[order]:
            image = enhancers[number](image).enhance((0.8, 1.2, 0.85)[number])
        expected = torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / 255).float()
        torch.testing.assert_close(changed, expected, atol=4 / 255, rtol=0)


def test_rotations_are_small_and_fill_with_black(monkeypatch):
    """At most two degrees: the middle stays, the corners move by a pixel and let in black; angle 0 changes nothing."""
    pytest.importorskip("kornia")
    white = np.full((2, 3, 32, 32), 255, dtype=np.uint8)
    drawing(monkeypatch)
    torch.testing.assert_close(augment(PIXELS, "superconvergence", (0,), np.arange(40)), torch.from_numpy(PIXELS) / 255)
    drawing(monkeypatch, _7=[0.0, 1 - 1e-9])
    turned = augment(white, "superconvergence", (0,), np.arange(2))
    assert (turned[:, :, 4:-4, 4:-4] > 0.99).all()
    black = (turned < 0.01).float().mean((1, 2, 3))
    assert ((black > 0.002) & (black < 0.02)).all()
    left, right = augment(np.stack([PIXELS[0]] * 2), "superconvergence", (0,), np.arange(2))
    assert not torch.equal(left, right)


def test_bad_words(monkeypatch):
    """An unknown word and a missing package are one line with the way out."""
    with pytest.raises(DataError, match=r"^data.augmentation is 'flip': use one of none, crop_flip, superconvergence$"):
        check_augmentation("flip")
    monkeypatch.setattr(augmentation, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"'superconvergence', which needs a package: pip install kornia$"):
        check_augmentation("superconvergence")
