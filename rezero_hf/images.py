"""Image processors: stock ones of Transformers, set for a data set, so that a saved model needs no code for them."""

from transformers import ViTImageProcessorPil


# Of the training set's pixels, per channel; the deviations are the mean of each image's own (the paper's code).
CIFAR10_MEAN = [0.4914, 0.4822, 0.4465]
CIFAR10_STD = [0.2023, 0.1994, 0.2010]


def image_processor(size: tuple[int, int], mean: list[float], std: list[float]) -> ViTImageProcessorPil:
    """The processor to save beside an image classifier: any image to `size`, [0, 1], then (x - mean) / std.

    ViT's is the one in Transformers that does this and no more. It works on PIL and numpy, without torchvision; where
    that is installed, `AutoImageProcessor` reads the same file into its torchvision twin.

    Args:
        size: height and width in pixels. Other images are resampled, without keeping their proportions.
        mean, std: of each channel, for pixels in [0, 1]. With three, any image is made RGB first; with one, images
            must be grey.
    """
    return ViTImageProcessorPil(
        do_convert_rgb=len(mean) == 3,
        size={"height": size[0], "width": size[1]},
        image_mean=list(mean),
        image_std=list(std),
    )


def cifar_image_processor() -> ViTImageProcessorPil:
    """`image_processor` for CIFAR: RGB, 32 x 32, the paper's normalisation."""
    return image_processor((32, 32), CIFAR10_MEAN, CIFAR10_STD)
