"""A model made from another's weights: checked before, copied after, every name in its new place."""

import copy
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .errors import UserError
from .models import FAMILIES


_LAYER = re.compile(r"((?:model\.)?layers\.)(\d+)\.(.*)")


def check_unwrapped(model: PreTrainedModel) -> None:
    """Raise a `UserError` if an adapter is in the model or around it."""
    if hasattr(model, "peft_config"):
        kind = type(model).__name__
        raise UserError(f"{kind} is wrapped by an adapter: merge it into the weights first (merge_and_unload).")


def check_ours(model: PreTrainedModel) -> None:
    """Raise a `UserError` unless the model is one of this package's, with nothing around it."""
    check_unwrapped(model)
    kind = type(model).__name__
    if not isinstance(model, tuple(FAMILIES)):
        # Remote code is a module of its own, whatever it was copied from.
        remote = type(model).__module__.startswith("transformers_modules")
        how = " that this package knows: it came with its own code; import rezero_hf first, and load it again"
        raise UserError(f"{kind} is not a model of rezero_hf{how if remote else ''}.")


def check_plain(model: PreTrainedModel) -> None:
    """Raise a `UserError` unless the model is one of this package's in plain floating-point weights that are there."""
    check_ours(model)
    kind = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise UserError(f"{kind} is quantised: do this to the model it was made from, and quantise the result.")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.is_floating_point():
            what = "on no device" if parameter.is_meta else f"a {type(parameter.data).__name__} of {parameter.dtype}"
            raise UserError(
                f"{kind}: {name} is {what}; this takes plain floating-point weights: load the model unquantised, "
                "unsharded and not offloaded."
            )


def check_whole(model: PreTrainedModel) -> None:
    """Raise a `UserError` unless the model is one of this package's, whole, in plain floating-point weights."""
    check_plain(model)
    kind = type(model).__name__
    if len(devices := {parameter.device for parameter in model.parameters()}) > 1:
        raise UserError(f"{kind} lies on {len(devices)} devices: load it on one, without device_map.")
    expected = _skeleton(model, model.config).state_dict()
    found = model.state_dict()
    wrong = [name for name in found if name not in expected or found[name].shape != expected[name].shape]
    if wrong or len(found) != len(expected):
        name = next(iter(wrong), "something missing")
        raise UserError(
            f"{kind} is not what its configuration describes ({name}): merge an adapter into the weights first, and "
            "load quantised weights unquantised."
        )


def assemble(
    model: PreTrainedModel, config: PreTrainedConfig, state: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> PreTrainedModel:
    """A model of the same class, mode and generation settings, with another configuration and copies of given weights.

    Args:
        model: what it is made from.
        config: of the new one.
        state: every parameter and persistent buffer of the new one.
        names: name in `model` -> name in the new one, of what it has in common with it; `requires_grad` is kept.
    """
    new = _skeleton(model, config)
    held = {_storage(value) for value in model.state_dict().values()}
    parts = {name: value.detach() for name, value in state.items()}
    new.load_state_dict(
        {name: value.clone() if _storage(value) in held else value for name, value in parts.items()}, assign=True
    )
    new.tie_weights()
    for name, parameter in model.named_parameters():
        if name in names:
            new.get_parameter(names[name]).requires_grad_(parameter.requires_grad)
    if (rotary := getattr(model.base_model, "rotary_emb", None)) is not None:
        # Its buffers are not saved, and it knows how long a sequence they were last stretched for.
        new.base_model.rotary_emb = copy.deepcopy(rotary)
        new.base_model.rotary_emb.config = config
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.train(model.training)


def changed(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """A copy of a configuration with other values, checked, and with everything that follows from them."""
    new = type(config).from_dict({**config.to_dict(), **changes})
    new._attn_implementation = config._attn_implementation
    return new


def whole_number(value: Any) -> int | None:
    """An integer of any kind, NumPy's too, as Python's; None of what is none."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def moved(name: str, places: Mapping[int, int]) -> str:
    """A parameter's name once layer `n` is layer `places[n]`; names outside the layers stay."""
    found = _LAYER.match(name)
    return name if found is None else f"{found[1]}{places[int(found[2])]}.{found[3]}"


def in_layer(name: str) -> str | None:
    """A parameter's name within its layer."""
    found = _LAYER.match(name)
    return None if found is None else found[3]


def layer_of(name: str) -> int | None:
    """The number of the layer a parameter belongs to."""
    found = _LAYER.match(name)
    return None if found is None else int(found[2])


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model without storage; no random numbers are drawn for it."""
    with torch.device("meta"), init.no_init_weights():
        return type(model)(config)


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()
