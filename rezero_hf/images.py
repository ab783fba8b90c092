"""Image processors: stock ones of Transformers, set for a data set, so that a saved model needs no code for them."""

from transformers import ViTImageProcessorPil


# Of the training set's pixels, per channel; the deviations are the mean of each image's own (the paper's code).
CIFAR10_MEAN = [0.4914, 0.4822, 0.4465]
CIFAR10_STD = [0.2023, 0.1994, 0.2010]


def cifar_image_processor() -> ViTImageProcessorPil:
    """The processor to save beside a CIFAR model: any image to RGB, 32 x 32, [0, 1], then the paper's normalisation.

    ViT's is the one in Transformers that does this and no more. It works on PIL and numpy, without torchvision; where
    that is installed, `AutoImageProcessor` reads the same file into its torchvision twin.
    """
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": 32, "width": 32},
        image_mean=CIFAR10_MEAN,
        image_std=CIFAR10_STD,
    )
