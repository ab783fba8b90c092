"""The fully connected ReZero network (arXiv 2003.04887, section 3), as a Transformers model.

Flattened images, a stem, hidden layers of one Linear and one ReLU, a linear head: the authors' notebook, at any depth.
A layer is a module of its own, at ten thousand layers too: measured there, weights stacked into a few large parameters
made a step no faster and its peak memory higher, because every backward pass copies the layers' gradients together; and
gates, figures and the watch over a run know layers by their modules' names.
"""

import math
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, ImageClassifierOutputWithNoAttention
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rezero_mlp import ReZeroMLPConfig
from .portable import PortablePreTrainedModel
from .residual import NORMS, RESIDUAL_FORMS, Residual


class ReZeroMLPLayer(nn.Module):
    """One hidden layer: the branch `F(x) = act(W x + b)`, joined to the stream by the layer's residual form."""

    def __init__(self, config: ReZeroMLPConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        # Named as the norm whose place it takes: every trainer exempts `_norm.` from weight decay, and so alpha.
        self.residual_norm = RESIDUAL_FORMS[config.residual](
            branches=("mlp",),
            make_norm=lambda: NORMS[config.norm](config.hidden_size, eps=config.norm_eps),
            gate_init=config.gate_init,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.residual_norm(hidden_states, lambda x: self.act_fn(self.linear(x)), branch="mlp")


class ReZeroMLPPreTrainedModel(PortablePreTrainedModel):
    """Initialisation, saving and the switches Transformers reads, for the fully connected models."""

    config: ReZeroMLPConfig
    config_class = ReZeroMLPConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_classes = {
        "AutoModel": "ReZeroMLPModel",
        "AutoModelForImageClassification": "ReZeroMLPForImageClassification",
    }
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReZeroMLPLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReZeroMLPLayer}

    def __init__(self, config: ReZeroMLPConfig):
        super().__init__(config)
        self._keep_in_fp32_modules_strict = ["alpha"] if RESIDUAL_FORMS[config.residual].has_gate else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Draws one module's own parameters, every layer independently.

        | module         | weight                                                                          | bias |
        | -------------- | ------------------------------------------------------------------------------- | ---- |
        | stem           | N(0, 2 / fan_in), Kaiming                                                       | 0    |
        | hidden Linears | N(0, initializer_gain^2 / hidden_size)                                          | 0    |
        | head           | N(0, 1 / (3 hidden_size)): the variance of torch's default, which the notebook has | 0 |
        | norms          | 1                                                                               | 0    |
        | residual forms | alpha = gate_init                                                               |      |
        """
        if isinstance(module, nn.Linear):
            gain = getattr(module, "init_gain", self.config.initializer_gain)
            init.normal_(module.weight, std=gain / module.in_features**0.5)
            init.zeros_(module.bias)
        elif isinstance(module, Residual):
            if module.has_gate:
                init.constant_(module.alpha, module.gate_init)
        else:
            super()._init_weights(module)


class ReZeroMLPModel(ReZeroMLPPreTrainedModel):
    """The network without a head: images in, the stream after the last layer out.

    While every alpha is 0 and `final_norm` is off, `last_hidden_state` is exactly what the stem makes of the image.
    """

    # Set by `activation_checkpointing_enable`, which hands over the function too.
    gradient_checkpointing = False

    def __init__(self, config: ReZeroMLPConfig):
        super().__init__(config)
        self.stem = nn.Linear(config.num_channels * config.image_size**2, config.hidden_size)
        self.stem.init_gain = 2**0.5
        self.act_fn = ACT2FN[config.hidden_act]
        self.layers = nn.ModuleList(ReZeroMLPLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithNoAttention:
        """Run the network.

        Args:
            pixel_values: (batch, channels, height, width), normalised as an image processor does.
            kwargs: `output_hidden_states` returns the stream before every layer and `last_hidden_state`,
                `num_hidden_layers + 1` tensors of shape (batch, hidden_size).

        Raises:
            ValueError: `pixel_values` has another shape than the configuration says, or whole numbers.
        """
        self._check(pixel_values)
        x = self.act_fn(self.stem(pixel_values.flatten(1).to(self.stem.weight.dtype)))
        run = self._run_in_segments if self.gradient_checkpointing and self.training else self._run
        return BaseModelOutputWithNoAttention(last_hidden_state=self.norm(run(self.layers, x)))

    def _run(self, layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
        return x

    def _run_in_segments(self, layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        """Keeps the stream at every sqrt(depth)-th layer, and what is between only when the backward pass is there.

        So both are of sqrt(depth) layers, where checkpointing every layer by itself would keep the stream of all. How
        often (`every_n_layers` of the library) is therefore not a choice.
        """
        length = math.isqrt(len(layers) - 1) + 1
        for start in range(0, len(layers), length):
            x = self._gradient_checkpointing_func(partial(self._run, layers[start : start + length]), x)
        return x

    def _check(self, pixel_values: torch.Tensor) -> None:
        size, channels = self.config.image_size, self.config.num_channels
        if tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but image_size={size} and "
                f"num_channels={channels} ask for (batch, {channels}, {size}, {size}); resize the images."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values has dtype {pixel_values.dtype}, so these are raw pixels; scale and normalise them as an "
                "image processor does."
            )


class ReZeroMLPForImageClassification(ReZeroMLPPreTrainedModel):
    """The network with a linear head over the classes."""

    # Only one of the losses divides by the `num_items_in_batch` of a whole step; so Trainer averages all of them.
    accepts_loss_kwargs = False

    def __init__(self, config: ReZeroMLPConfig):
        super().__init__(config)
        self.model = ReZeroMLPModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.init_gain = 3**-0.5
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutputWithNoAttention:
        """Run the network and its head; the arguments of `ReZeroMLPModel.forward`, and:

        Args:
            labels: (batch,), the class of each image, below `num_labels`.

        Returns:
            loss in nats per image when labels are given, and logits (batch, num_labels).
        """
        outputs = self.model(pixel_values, **kwargs)
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [*ReZeroMLPPreTrainedModel.auto_classes.values(), "ReZeroMLPPreTrainedModel"]  # noqa: PLE0604
