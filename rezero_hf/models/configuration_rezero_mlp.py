"""Configuration of the fully connected ReZero network."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


@strict
class ReZeroMLPConfig(PreTrainedConfig):
    """Everything that shapes a `ReZeroMLPModel`. The default is the paper's net for CIFAR-10 (section 3), 32 layers of
    width 256, but for `num_labels`; `paper` makes that one, or a deeper.

    Size:
        image_size (`int`, default 32): height and width of an image in pixels. A fully connected net fixes it.
        num_channels (`int`, default 3): colours of an image.
        hidden_size (`int`, default 256): width of the stream and of every hidden layer.
        num_hidden_layers (`int`, default 32): hidden layers between the stem and the head, of one Linear each. Time
            and memory are the same for each of ten thousand. That deep, give gates a smaller rate: at 3e-3 (Adagrad,
            the notebook's) their first step together threw the loss from 2.3 to 14,000, at a tenth of it
            (`gate_lr_multiplier=0.1`) the loss fell from the start.
        num_labels (`int`, default 2, the library's): classes, or `id2label`, which names them; `paper` has 10.

    Residual form (`residual.py` has the equations):
        residual (default `"rezero"`): `rezero`, `rezero_pre_norm`, `rezero_tanh`, `pre_norm`, `pre_tanh`,
            `post_norm`, `branch_norm` or `plain`; without a skip, `none` (the paper's vanilla net) or `norm`.
        gate_init (`float`, default 0): initial alpha. 0 makes every layer the identity; 1 is the paper's ablation.
        norm (default `"layer"`): LayerNorm (the paper's baselines) or RMSNorm (`"rms"`), wherever a norm is used. Each
            layer has its own, where the authors' notebook shares one among all.
        norm_eps (`float`, default 1e-5): added to the variance; torch's value.
        final_norm (`bool`, default False): a norm between the last layer and the head. The paper has none; a `pre_norm`
            stream grows with depth without it.

    Inside the branches:
        hidden_act (`str`, default `"relu"`, the paper's): activation of the stem and of every hidden layer.
        initializer_gain (`float`, default sqrt(2), or 0.5 for `plain`): hidden matrices are drawn with variance
            gain^2 / hidden_size. sqrt(2) keeps the second moment through a ReLU (the paper's 2 / width), which is
            right for a gated or normed branch as for a net without skips. A `plain` layer adds that branch to the
            stream, whose second moment grows by up to 1 + gain^2 / 2 + 2 gain / sqrt(2 pi) a layer: 3.1 times with
            sqrt(2), 1.5 times with the authors' sqrt(0.25).

    Raises:
        StrictDataclassFieldValidationError: a field has the wrong type or an unknown word.
        StrictDataclassClassValidationError: a value is out of range.
    """

    model_type = "rezero_mlp"
    # `save_pretrained` of the configuration alone ships its own file, so AutoConfig works where the package is absent.
    _auto_class = "AutoConfig"
    # The module that owns alpha is sharded by itself, because alpha stays fp32; the norms in it do not.
    base_model_fsdp_plan = {
        "layers.*": "free_full_weight",
        "layers.*.residual_norm.norms.mlp": "free_full_weight",
    }

    image_size: int = 32
    num_channels: int = 3
    hidden_size: int = 256
    num_hidden_layers: int = 32

    residual: Literal[
        "rezero",
        "rezero_pre_norm",
        "rezero_tanh",
        "pre_norm",
        "pre_tanh",
        "post_norm",
        "branch_norm",
        "plain",
        "none",
        "norm",
    ] = "rezero"
    gate_init: float | int = 0.0
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    final_norm: bool = False

    hidden_act: str = "relu"
    initializer_gain: float | int | None = None

    def __post_init__(self, **kwargs):
        if self.initializer_gain is None:
            self.initializer_gain = 0.5 if self.residual == "plain" else 2**0.5
        # Plans name modules, and the library checks that each is there.
        if self.residual != "rezero_pre_norm":
            self.base_model_fsdp_plan = {"layers.*": "free_full_weight"}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks beyond types; run by `@strict` when the config is made and when it is saved."""
        for field in ("image_size", "num_channels", "hidden_size", "num_hidden_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1.")
        for field in ("norm_eps", "initializer_gain"):
            if not 0.0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)}: must be positive.")
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init={self.gate_init}: must be a finite number; 0 is ReZero.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; one of {', '.join(sorted(ACT2FN))}.")

    @classmethod
    def paper(cls, num_hidden_layers: int = 32, **kwargs) -> "ReZeroMLPConfig":
        """The paper's nets for CIFAR-10 (section 3): 10 classes, width 256; from 10,000 layers on, the notebook's 150.

        Args:
            num_hidden_layers: depth; the paper's comparison has 32, the authors' notebook 64.
            kwargs: any field, over these values; 10 classes unless `num_labels` or `id2label` says otherwise.
        """
        sizes = {"num_hidden_layers": num_hidden_layers, "hidden_size": 256 if num_hidden_layers < 10_000 else 150}
        classes = {} if "id2label" in kwargs else {"num_labels": 10}
        return cls(**{**sizes, **classes, **kwargs})


__all__ = ["ReZeroMLPConfig"]
