"""Residual networks for images (the CIFAR-10 experiments of arXiv 2003.04887), as a Transformers model.

`residual.py` holds the paper's equations, `initializations.py` the baselines zero-gamma and Fixup. One layer class
serves all types: what differs is how its branch is put together. Departures from the authors' code: the subsampled
shortcut of a `basic` net is not normalised (option A of He et al. 2015 has no parameters).
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention, ImageClassifierOutputWithNoAttention
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rezero_resnet import ReZeroResNetConfig
from .initializations import INITIALIZATIONS, FixupScalars
from .portable import PortablePreTrainedModel
from .residual import RESIDUAL_FORMS, Residual


KERNEL_SIZES = {"basic": (3, 3), "preact": (3, 3), "preact_bottleneck": (1, 3, 1)}


def chain(**modules: nn.Module | None) -> nn.Sequential:
    """One module after another under their names, without those that are None. An empty chain is the identity."""
    sequence = nn.Sequential()
    for name, module in modules.items():
        if module is not None:
            sequence.add_module(name, module)
    return sequence


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Keeps height and width, or divides them by `stride`. No bias, as in the authors' nets, with norms and without."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def norm_of(config: ReZeroResNetConfig, channels: int, ends_branch: bool = False) -> nn.Module | None:
    """What stands in a norm's place inside a branch."""
    if config.initialization == "fixup":
        return FixupScalars(has_scale=ends_branch)
    return nn.BatchNorm2d(channels) if config.batch_norm else None


def shift_of(config: ReZeroResNetConfig) -> FixupScalars | None:
    """Fixup's bias before a convolution or the classifier."""
    return FixupScalars() if config.initialization == "fixup" else None


def activation_of(config: ReZeroResNetConfig, channels: int) -> nn.Sequential:
    """What stands before a convolution inside a branch: norm, then activation."""
    return chain(norm=norm_of(config, channels), act=ACT2FN[config.hidden_act], shift=shift_of(config))


def branch_of(config: ReZeroResNetConfig, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The branch F of one layer; the first 3x3 convolution has the stride."""
    kernel_sizes = KERNEL_SIZES[config.layer_type]
    inner_channels = out_channels // 4 if config.layer_type == "preact_bottleneck" else out_channels
    widths = [in_channels, *[inner_channels] * (len(kernel_sizes) - 1), out_channels]
    parts = {}
    for index, kernel_size in enumerate(kernel_sizes):
        if index > 0:
            parts[f"act{index}"] = activation_of(config, widths[index])
        own_stride = stride if index == kernel_sizes.index(3) else 1
        parts[f"conv{index + 1}"] = convolution(widths[index], widths[index + 1], kernel_size, own_stride)
    if config.layer_type == "basic" or config.initialization == "fixup":
        parts["norm"] = norm_of(config, out_channels, ends_branch=True)
    if config.activation_position == "branch":
        parts["act"] = ACT2FN[config.hidden_act]
    return chain(**parts)


class ReZeroResNetPadShortcut(nn.Module):
    """Option A of He et al. 2015: every `stride`-th pixel, and new channels that are 0. No parameters."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class ReZeroResNetLayer(GradientCheckpointingLayer):
    """One branch, joined to the stream by the residual form; where the shape changes the stream takes the shortcut.

    `entry` is what branch and shortcut both see of the input: all of it in a `basic` layer, the activated input in a
    pre-activation one. A stream whose shape stays passes by the entry.
    """

    def __init__(self, config: ReZeroResNetConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        basic = config.layer_type == "basic"
        self.entry = chain(shift=shift_of(config)) if basic else activation_of(config, in_channels)
        self.branch = branch_of(config, in_channels, out_channels, stride)
        self.shortcut = None
        if (in_channels, stride) != (out_channels, 1):
            pad = ReZeroResNetPadShortcut(out_channels - in_channels, stride)
            self.shortcut = pad if basic else convolution(in_channels, out_channels, 1, stride)
        self.act = ACT2FN[config.hidden_act] if config.activation_position == "sum" else nn.Identity()
        # Named as the norm whose place it takes: every trainer exempts `_norm.` from weight decay, and so alpha.
        # No form offered here has norms of its own.
        self.residual_norm = RESIDUAL_FORMS[config.residual](("conv",), nn.Identity, gate_init=config.gate_init)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        entered = self.entry(hidden_states)
        x = hidden_states if self.shortcut is None else self.shortcut(entered)
        return self.act(self.residual_norm(x, lambda _: self.branch(entered), branch="conv"))


class ReZeroResNetPreTrainedModel(PortablePreTrainedModel):
    """Initialisation, saving and the switches Transformers reads, for every ReZero residual network.

    Activation checkpointing changes no gradient, but runs each BatchNorm twice a step, so its running statistics
    follow the batches about twice as fast.
    """

    config: ReZeroResNetConfig
    config_class = ReZeroResNetConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_classes = {
        "AutoModel": "ReZeroResNetModel",
        "AutoModelForImageClassification": "ReZeroResNetForImageClassification",
    }
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReZeroResNetLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReZeroResNetLayer}

    def __init__(self, config: ReZeroResNetConfig):
        super().__init__(config)
        self._keep_in_fp32_modules_strict = ["alpha"] if RESIDUAL_FORMS[config.residual].has_gate else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Draws one module's own parameters, every layer independently.

        | module            | weight                                  | bias                         |
        | ----------------- | --------------------------------------- | ---------------------------- |
        | convolution       | s N(0, 2 / fan_out), Kaiming            |                              |
        | in a PreAct net   | U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))  |                              |
        | BatchNorm         | s 1                                     | 0                            |
        | Fixup's scalars   | 1                                       | 0                            |
        | classifier        | s U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))| the same, torch's own rule   |
        | residual forms    | alpha = gate_init                       |                              |

        s is the module's `init_scale`, 1 unless a baseline initialisation has tagged it. A PreAct net with norms is
        drawn by torch's own rule, as the usual code does: no norm is on the sum that its branches add up to, and by
        Kaiming's a plain PreAct-18 of half the width is at 9.0 nats over its first 20 steps, against 2.4 (SGD, 0.1).
        """
        scale = getattr(module, "init_scale", 1.0)
        if isinstance(module, nn.Conv2d) and self.config.layer_type != "basic" and self.config.batch_norm:
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            init.copy_(module.weight, scale * module.weight)
        elif isinstance(module, nn.Linear):
            bound = scale * module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, FixupScalars):
            init.zeros_(module.bias)
            if module.scale is not None:
                init.ones_(module.scale)
        elif isinstance(module, Residual):
            if module.has_gate:
                init.constant_(module.alpha, module.gate_init)
        else:
            super()._init_weights(module)
            if isinstance(module, nn.BatchNorm2d):
                init.constant_(module.weight, scale)


class ReZeroResNetModel(ReZeroResNetPreTrainedModel):
    """The network without a head: images in, the stream after the last layer and its mean over pixels out."""

    def __init__(self, config: ReZeroResNetConfig):
        super().__init__(config)
        stem, basic = config.embedding_size, config.layer_type == "basic"
        self.stem = chain(
            conv=convolution(config.num_channels, stem, 3),
            norm=nn.BatchNorm2d(stem) if config.stem_batch_norm else shift_of(config) if basic else None,
            act=ACT2FN[config.hidden_act] if basic else None,
        )
        self.layers = nn.ModuleList()
        in_channels = stem
        for stage, (channels, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                self.layers.append(ReZeroResNetLayer(config, in_channels, channels, stride))
                in_channels = channels
        INITIALIZATIONS[config.initialization]([layer.branch for layer in self.layers])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Run the network.

        Args:
            pixel_values: (batch, num_channels, height, width), normalised; any height and width.

        Returns:
            `last_hidden_state` (batch, channels, rows, columns) and `pooler_output` (batch, channels);
            `hidden_states`, when asked for, are the stream before each residual layer and after the last.

        Raises:
            ValueError: `pixel_values` has another shape, or raw pixels.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: must be (batch, {self.config.num_channels}, "
                "height, width), the second being config.num_channels."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values has dtype {pixel_values.dtype}, so these are raw pixels; scale and normalise them as an "
                "image processor does."
            )
        hidden_states = self.stem(pixel_values.to(self.stem.conv.weight.dtype))
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states, pooler_output=hidden_states.mean((2, 3))
        )


class ReZeroResNetForImageClassification(ReZeroResNetPreTrainedModel):
    """The network with a linear classifier on the mean over pixels."""

    # Only one of the losses divides by the `num_items_in_batch` of a whole step; so Trainer averages all of them.
    accepts_loss_kwargs = False

    def __init__(self, config: ReZeroResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReZeroResNetModel(config)
        self.shift = shift_of(config) or nn.Identity()
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        if config.initialization == "fixup":
            self.classifier.init_scale = 0.0
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutputWithNoAttention:
        """Run the network and its classifier.

        Args:
            pixel_values: as in `ReZeroResNetModel.forward`.
            labels: (batch,) of class numbers. `config.problem_type` can make it a regression, or (batch, num_labels)
                of independent labels; when None it is read off `num_labels` and the type of the labels.

        Returns:
            loss (cross-entropy in nats per image, unless `problem_type` says otherwise) when labels are given, and
            logits (batch, num_labels).
        """
        outputs = self.model(pixel_values, **kwargs)
        logits = self.classifier(self.shift(outputs.pooler_output))
        loss = self.loss_function(labels, logits, self.config, **kwargs) if labels is not None else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [*ReZeroResNetPreTrainedModel.auto_classes.values(), "ReZeroResNetPreTrainedModel"]  # noqa: PLE0604
