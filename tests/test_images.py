"""The image processor saved beside a CIFAR model: the paper's normalisation, by classes that Transformers has itself."""

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from rezero_hf import cifar_image_processor


PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])


def test_a_cifar_image_is_only_normalised():
    """(x / 255 - mean) / std in each channel, first in the shape; the size is CIFAR's already, so no pixel is resampled."""
    expected = ((torch.from_numpy(PIXELS) / 255 - MEAN) / STD).permute(2, 0, 1)
    found = cifar_image_processor()([Image.fromarray(PIXELS)] * 2, return_tensors="pt").pixel_values
    torch.testing.assert_close(found, torch.stack([expected] * 2))


def test_any_image_becomes_three_channels_of_32_pixels():
    """Grey, transparent, large and oblong images are taken."""
    for mode, size in (("L", (32, 32)), ("RGBA", (100, 40)), ("P", (8, 8))):
        image = Image.new(mode, size)
        assert cifar_image_processor()(image, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


def test_the_file_it_saves_is_read_by_auto(tmp_path):
    """`AutoImageProcessor` builds the same from the file, with no code but Transformers'."""
    cifar_image_processor().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.")
    image = Image.fromarray(PIXELS)
    found = loaded(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(found, cifar_image_processor()(image, return_tensors="pt").pixel_values)
