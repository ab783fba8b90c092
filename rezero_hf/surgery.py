"""Operations on a finished network that are exact because a branch can be switched off: fold its gates away, grow it.

Both give a new model and leave the given one as it is. `pruning.py` has the third, which removes layers.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .assembly import assemble, changed, check_whole, in_layer, moved, whole_number
from .errors import UserError
from .models.residual import RESIDUAL_FORMS


# A gated form -> what it is once alpha is a part of F.
FOLDED = {"rezero": "plain", "rezero_pre_norm": "pre_norm", "rezero_tanh": "pre_tanh"}
# act(alpha * z) = alpha * act(z) for alpha >= 0.
HOMOGENEOUS = ("relu", "leaky_relu")


class Grown(NamedTuple):
    """A deeper model, and where everything went.

    Attributes:
        model: the grown model.
        names: name of each parameter and buffer in the old model -> its name in the grown one; with it an optimiser's
            state goes over.
    """

    model: PreTrainedModel
    names: dict[str, str]


def fold_gates(model: PreTrainedModel) -> PreTrainedModel:
    """The same function without gates: alpha multiplied into the weights and biases that write into the stream.

    Those are `o_proj` and `down_proj` of a language model, the Linear of a fully connected layer, and the last norm or
    convolution of a ResNet's branch. Where the branch ends in an activation (fully connected; ResNets with
    `activation_position="branch"`), alpha only goes through it if it is not negative and the activation is relu or
    leaky_relu.

    In fp32 logits agree to rounding: over heads, forms and families the largest difference measured was 2.4e-6, of
    logits up to 4.3. In a 16-bit type they agree as far as that type does: there alpha itself was rounded in every
    forward pass.

    Args:
        model: of this package, with any head or none, with a `residual` of `FOLDED`. It takes the memory of one more
            model.

    Returns:
        A model of the same class in the form that `FOLDED` names; a new one that shares nothing with `model`.

    Raises:
        UserError: it is not such a model, its weights are quantised, sharded or wrapped by an adapter, or alpha cannot
            go through the activation, or is 0 everywhere.
    """
    check_whole(model)
    config, layers = model.config, model.base_model.layers
    if config.residual not in FOLDED:
        gated = RESIDUAL_FORMS[config.residual].has_gate
        why = "its gate scales the stream too, which no form without one does" if gated else "it has no gates to fold"
        raise UserError(f"residual={config.residual!r} cannot be folded: {why}; {', '.join(FOLDED)} can.")
    alphas = [layer.residual_norm.alpha for layer in layers]
    if not any(alpha.any() for alpha in alphas):
        raise UserError("every alpha is 0: folded into them, the weights would be 0 and learn nothing; train it first.")
    _check_activation(config, alphas)
    state = dict(model.state_dict())
    for index, layer in enumerate(layers):
        gates, prefix = layer.residual_norm, f"{_prefix(model)}layers.{index}"
        for branch, writer in _writers(layer).items():
            for name in (f"{prefix}.{writer}.weight", f"{prefix}.{writer}.bias"):
                if name in state:
                    # A 0-dimensional gate leaves the weight its type, and is not rounded to it first.
                    state[name] = state[name] * gates.gate(branch, torch.promote_types(gates.alpha.dtype, torch.float))
        del state[f"{prefix}.residual_norm.alpha"]
    return assemble(model, changed(config, residual=FOLDED[config.residual]), state, {name: name for name in state})


def grow_depth(
    model: PreTrainedModel, to: int | Sequence[int], where: Literal["end", "interleaved"] | Sequence[int] = "end"
) -> Grown:
    """The same function with more layers: the new ones start switched off, and training switches them on.

    A gated layer starts at alpha = 0, or, where the model's own start is that of `output_init_scale=0`, with that start
    (alpha = `gate_init`, F = 0). Without gates, a language model's new `o_proj` and `down_proj` start at 0. Everything
    else in a new layer is drawn as at a model's start, from torch's global random numbers: as many are used as a
    model of the new depth takes.

    Logits and the gradients of the old parameters are the same bit for bit, in every precision; with dropout in
    evaluation only, because new layers draw random numbers too.

    Args:
        model: of this package, with any head or none. It takes the memory of one more model of the new depth,
            in fp32.
        to: number of layers to have; of a ResNet a list, one number for each stage.
        where: `"end"` (default) puts new layers after the old ones, so that parameters keep their names;
            `"interleaved"` spreads them evenly between, each after an old one; a list names the new layers' numbers in
            the grown network. Which trains best has not been measured (`scripts/recipes/grow.yaml`
            does). A ResNet's stages grow at their ends.

    Returns:
        The grown model, in the same precision and on the same device, and the mapping of names.

    Raises:
        UserError: it is not such a model or not whole (see `fold_gates`), its layers cannot be switched off and still
            learn, or `to` and `where` do not fit it.
    """
    check_whole(model)
    _check_can_be_closed(model.config)
    changes, places = _places(model.config, to, where)
    config = changed(model.config, **changes)
    names = {name: moved(name, dict(enumerate(places))) for name in model.state_dict()}
    fresh = type(model)(config)
    for index, layer in enumerate(fresh.base_model.layers):
        if index not in places:
            _close(layer, config)
    state = {names[name]: value for name, value in model.state_dict().items()}
    # A new tensor is of the type, and on the device, of its like in the last old layer.
    likes = {in_layer(name): value for name, value in model.state_dict().items()}
    for name, value in fresh.state_dict().items():
        if name not in state:
            state[name] = value.to(likes[in_layer(name)])
    del fresh
    return Grown(assemble(model, config, state, names), names)


def _prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _writers(layer: nn.Module) -> dict[str, str]:
    """Branch -> the module in the layer whose output, or that of the activation after it, goes into the stream."""
    if hasattr(layer, "self_attn"):
        return {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    if hasattr(layer, "linear"):
        return {"mlp": "linear"}
    parts = [name for name, part in layer.branch.named_modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d)]
    return {"conv": f"branch.{parts[-1]}"}


def _check_activation(config: PreTrainedConfig, alphas: list[torch.Tensor]) -> None:
    under = config.model_type == "rezero_mlp" or getattr(config, "activation_position", None) == "branch"
    if not under:
        return
    if config.hidden_act not in HOMOGENEOUS:
        raise UserError(
            f"hidden_act={config.hidden_act!r}: the gate stands after it, and a number only goes through "
            f"{' or '.join(HOMOGENEOUS)}."
        )
    negative = [index for index, alpha in enumerate(alphas) if (alpha < 0).any()]
    if negative:
        some = ", ".join(map(str, negative[:8])) + (", ..." if len(negative) > 8 else "")
        raise UserError(
            f"{len(negative)} of {len(alphas)} layers ({some}) have a negative alpha, which does not go through the "
            f"{config.hidden_act} before it: this network cannot be folded."
        )


def _check_can_be_closed(config: PreTrainedConfig) -> None:
    """What a new layer needs to be the identity and to get a gradient all the same."""
    ungated, family = not RESIDUAL_FORMS[config.residual].has_gate, config.model_type
    why = None
    if getattr(config, "activation_position", None) == "sum" and config.hidden_act != "relu":
        why = f"hidden_act={config.hidden_act!r} on the sum changes what goes through a layer whose branch is off"
    elif ungated and config.residual not in FOLDED.values():
        why = f"a layer of residual={config.residual!r} is never the identity, whatever F is"
    elif ungated and family == "rezero_mlp":
        why = f"without a gate (residual={config.residual!r}) a new layer's F does not start at 0"
    elif ungated and family == "rezero_resnet" and config.initialization == "default":
        why = "residual='plain' has no gate to switch a new layer off; initialization='zero_gamma' and 'fixup' have one"
    if why is not None:
        raise UserError(f"cannot grow this network: {why}.")


@torch.no_grad()
def _close(layer: nn.Module, config: PreTrainedConfig) -> None:
    """Make a new layer the identity; where the model's own start is so, it stays."""
    if layer.residual_norm.has_gate:
        if getattr(config, "output_init_scale", 1) != 0:
            layer.residual_norm.alpha.zero_()
    elif config.model_type == "rezero":
        for writer in _writers(layer).values():
            for parameter in layer.get_submodule(writer).parameters():
                parameter.zero_()


def _places(config: PreTrainedConfig, to: Any, where: Any) -> tuple[dict[str, Any], list[int]]:
    """What changes in the configuration, and the new number of each old layer."""
    asked = to
    if hasattr(config, "depths"):
        depths = config.depths
        to = [whole_number(depth) for depth in to] if isinstance(to, Sequence) else []
        fits = len(to) == len(depths) and None not in to and where == "end"
        if not fits or any(new < old for new, old in zip(to, depths, strict=True)) or to == depths:
            raise UserError(
                f"to={asked!r}, where={where!r}: a ResNet grows at the ends of its stages; depths={depths} can grow to "
                "a list of as many numbers, none smaller and one larger."
            )
        starts = [sum(to[:stage]) for stage in range(len(to))]
        places = [start + index for start, depth in zip(starts, depths, strict=True) for index in range(depth)]
        return {"depths": to}, places
    depth = config.num_hidden_layers
    to = whole_number(to)
    if to is None or to <= depth:
        raise UserError(f"to={asked!r}: the network has {depth} layers, and grows to a larger whole number.")
    if where == "end":
        places = list(range(depth))
    elif where == "interleaved":
        places = [index * to // depth for index in range(depth)]
    else:
        given = [whole_number(place) for place in where] if isinstance(where, Sequence) else []
        new = set(given)
        if len(given) != to - depth or len(new) != len(given) or not new <= set(range(to)):
            raise UserError(
                f"where={where!r}: end, interleaved, or a list of the {to - depth} new layers' numbers, each in "
                f"0 ... {to - 1}."
            )
        places = [index for index in range(to) if index not in new]
    return {"num_hidden_layers": to}, places


__all__ = ["Grown", "fold_gates", "grow_depth"]
