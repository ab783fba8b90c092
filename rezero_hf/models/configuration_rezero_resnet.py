"""Configuration of the ReZero residual networks for images."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


PREACT = {
    18: {"layer_type": "preact", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    34: {"layer_type": "preact", "depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512]},
    50: {"layer_type": "preact_bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}


@strict
class ReZeroResNetConfig(PreTrainedConfig):
    """Everything that shapes a `ReZeroResNetModel`. The default is the paper's ResNet-20 for CIFAR, with ReZero.

    Size, in the words of Transformers' `ResNetConfig`:
        num_channels (`int`, default 3): channels of an image.
        embedding_size (`int`, default 16): channels of the stem, a 3x3 convolution at full resolution.
        hidden_sizes (`list[int]`, default (16, 32, 64)): channels of the stream in each stage. Every stage but the
            first halves height and width.
        depths (`list[int]`, default (3, 3, 3)): residual layers in each stage.
        layer_type (default `"basic"`): what a branch is. `basic`, He et al. 2015 for CIFAR: two 3x3 convolutions,
            each with its norm, and a shortcut without parameters (subsampled, new channels 0: option A). `preact`,
            He et al. 2016: norm and activation come before each convolution, the shortcut is a 1x1 convolution of the
            activated input where the shape changes. `preact_bottleneck`: 1x1, 3x3 and 1x1 convolutions, a quarter as
            wide between them.
        hidden_act (`str`, default `"relu"`, the paper's): the activation.

    Residual form (`residual.py` has the equations):
        residual (default `"rezero"`): `rezero`, `plain` or `gated`.
        gate_init (`float`, default 0): initial alpha. 0 makes every layer its shortcut.
        activation_position (`str`, default None): where a `basic` layer's last activation is. `branch` has it in F,
            under the gate, and none on the sum: y = x + alpha * relu(z), the authors' code. `sum` has it on the sum:
            y = relu(x + alpha * z), the ordinary ResNet. None is `sum` for `plain`, else `branch`. The pre-activation
            types have neither.

    Norms and initialisation:
        batch_norm (`bool`, default True): BatchNorm in the branches.
        stem_batch_norm (`bool`, default None): BatchNorm after the stem of a `basic` net. None is on, with and without
            `batch_norm`, as in the authors' net without norms, but off for Fixup, which has none anywhere. The stem of
            a pre-activation net is a bare convolution.
        initialization (default `"default"`): `default` draws convolutions with Kaiming's normal rule (fan out), the
            authors', and those of a pre-activation net with norms by torch's own, the usual code's.
            `zero_gamma` and `fixup` (`initializations.py`) are baselines for the `plain` form: the last BatchNorm of a
            branch, or its last convolution, starts at 0; `fixup` needs `batch_norm=False`.

    The number of classes is Transformers' `num_labels` (default 2) or `id2label`; `cifar` and `preact` have 10.

    Raises:
        StrictDataclassFieldValidationError: a field has the wrong type or an unknown word.
        StrictDataclassClassValidationError: a value is out of range, or fields contradict each other.
    """

    model_type = "rezero_resnet"
    # `save_pretrained` of the configuration alone ships its own file, so AutoConfig works where the package is absent.
    _auto_class = "AutoConfig"
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    num_channels: int = 3
    embedding_size: int = 16
    hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    depths: list[int] | tuple[int, ...] = (3, 3, 3)
    layer_type: Literal["basic", "preact", "preact_bottleneck"] = "basic"
    hidden_act: str = "relu"

    residual: Literal["rezero", "plain", "gated"] = "rezero"
    gate_init: float | int = 0.0
    activation_position: Literal["branch", "sum"] | None = None

    batch_norm: bool = True
    stem_batch_norm: bool | None = None
    initialization: Literal["default", "zero_gamma", "fixup"] = "default"

    def __post_init__(self, **kwargs):
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        basic = self.layer_type == "basic"
        if self.activation_position is None and basic:
            self.activation_position = "sum" if self.residual == "plain" else "branch"
        if self.stem_batch_norm is None:
            self.stem_batch_norm = basic and self.initialization != "fixup"
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Residual layers of all stages; Transformers counts hidden states with it."""
        return sum(self.depths)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        raise ValueError(f"num_hidden_layers={value}: is the sum of depths; give depths, the layers of each stage.")

    def validate_architecture(self):
        """Checks beyond types; run by `@strict` when the config is made and when it is saved."""
        self._check_sizes()
        self._check_places()
        self._check_initialization()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; one of {', '.join(sorted(ACT2FN))}.")
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init={self.gate_init}: must be a finite number; 0 is ReZero.")

    def _check_sizes(self):
        for field in ("num_channels", "embedding_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1.")
        for field in ("hidden_sizes", "depths"):
            if not getattr(self, field) or min(getattr(self, field)) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: needs one number per stage, each at least 1.")
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} and depths={self.depths} must name the same number of stages."
            )
        widths = [self.embedding_size, *self.hidden_sizes]
        if self.layer_type == "basic" and widths != sorted(widths):
            raise ValueError(
                f"embedding_size={self.embedding_size} and hidden_sizes={self.hidden_sizes} shrink: the shortcut of "
                "layer_type='basic' can only add channels; use layer_type='preact'."
            )
        if self.layer_type == "preact_bottleneck" and any(width % 4 for width in self.hidden_sizes):
            raise ValueError(f"hidden_sizes={self.hidden_sizes}: must be multiples of 4, a bottleneck is a quarter.")

    def _check_places(self):
        if self.layer_type == "basic":
            return
        if self.activation_position is not None:
            raise ValueError(
                f"activation_position={self.activation_position!r} is for layer_type='basic'; {self.layer_type!r} ends "
                "in a convolution and has no last activation: leave it out."
            )
        if self.stem_batch_norm:
            raise ValueError(
                f"stem_batch_norm=True is for layer_type='basic'; the stem of {self.layer_type!r} is a bare "
                "convolution: leave it out."
            )

    def _check_initialization(self):
        word = f"initialization={self.initialization!r}"
        if self.initialization == "default":
            return
        if self.residual != "plain":
            raise ValueError(
                f"{word} with residual={self.residual!r}: a branch that starts at 0 under a gate that does too gets no "
                "gradient; use residual='plain'."
            )
        if self.activation_position == "branch":
            raise ValueError(
                f"{word} with activation_position='branch': the branch starts at 0, where a ReLU passes no gradient; "
                "use activation_position='sum'."
            )
        if self.initialization == "zero_gamma" and not self.batch_norm:
            raise ValueError(f"{word} is about a BatchNorm's gamma: use batch_norm=True, or initialization='fixup'.")
        if self.initialization == "zero_gamma" and self.layer_type != "basic":
            raise ValueError(
                f"{word} with layer_type={self.layer_type!r}: its branches end in a convolution, and a norm of 0 "
                "before the last ReLU passes no gradient; use layer_type='basic'."
            )
        if self.initialization == "fixup" and (self.batch_norm or self.stem_batch_norm):
            raise ValueError(f"{word} is for nets without BatchNorm: use batch_norm=False and no stem_batch_norm.")

    @classmethod
    def cifar(cls, depth: int = 20, **kwargs) -> "ReZeroResNetConfig":
        """The CIFAR ResNets of He et al. 2015 and of the paper's comparison: three stages, 16, 32 and 64 channels.

        Args:
            depth: 6n + 2 layers with weights, n residual layers of two convolutions in each stage: 20, 56, 110, ...
            kwargs: any field, over these values; 10 classes unless `num_labels` or `id2label` says otherwise.

        Raises:
            ValueError: no n gives that depth.
        """
        n, remainder = divmod(depth - 2, 6)
        if n < 1 or remainder:
            raise ValueError(f"depth={depth}: a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, ..., 56, ..., 110.")
        return cls(**{"depths": [n] * 3, **_ten_classes(kwargs), **kwargs})

    @classmethod
    def preact(cls, depth: int = 18, **kwargs) -> "ReZeroResNetConfig":
        """The pre-activation ResNets of He et al. 2016 for CIFAR: a stem of 64 channels, four stages.

        Like the authors' code, and unlike He et al., without a norm and an activation after the last layer.

        Args:
            depth: 18, 34, or 50 (bottlenecks).
            kwargs: any field, over these values; 10 classes unless `num_labels` or `id2label` says otherwise.

        Raises:
            ValueError: there is no preset of that depth.
        """
        if depth not in PREACT:
            raise ValueError(f"depth={depth}: a pre-activation ResNet has {', '.join(map(str, PREACT))} layers.")
        return cls(**{"embedding_size": 64, **PREACT[depth], **_ten_classes(kwargs), **kwargs})


def _ten_classes(given: dict) -> dict:
    return {} if "id2label" in given else {"num_labels": 10}


__all__ = ["ReZeroResNetConfig"]
