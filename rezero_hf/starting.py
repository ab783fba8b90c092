"""Where a run begins: with random weights, or with another run's model, grown, and what its optimiser remembers.

`load_whole` is how that model is loaded, here and in `scripts/surgery.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .checkpoints import MANIFEST, verify_checkpoint
from .errors import UserError
from .models import ReZeroConfig, ReZeroForCausalLM
from .optim import NamedState, OptimizerName, state_by_name
from .strict import field_types
from .surgery import changed, grow_depth
from .together import on_main


# Words of the model that may differ from the checkpoint's: depth has its own word, dropout is a part of training, and
# the rest is for generation.
FREE = (
    *("num_hidden_layers", "attention_dropout", "hidden_dropout", "embedding_dropout"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
)
OPTIMIZER = "optimizer.pt"
# What FSDP's SHARDED_STATE_DICT saves instead of a file of weights.
SHARDS = "pytorch_model_fsdp_0"
# What the libraries raise of a folder that holds no model of theirs, or a damaged one.
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass
class InitFrom:
    """What a run of a language model starts from instead of random weights.

    Args:
        path: a training checkpoint or an export on this machine, or the model at the root of `ORG/NAME` or
            `ORG/NAME@REVISION` on the Hub; none of its code is run. It must be the recipe's model, but for depth and
            dropout. From a training checkpoint the optimiser's state goes over too; schedule, steps and the order of
            the data begin anew. None (default): random weights.
        grow_to: grow it to so many layers first (`surgery.grow_depth`, the new ones at the end), and train those:
            `model.num_hidden_layers` then follows. None (default): as many as it has.
    """

    path: str | None = None
    grow_to: int | None = None


class Beginning(NamedTuple):
    """What training starts with.

    Attributes:
        model: in fp32.
        optimizer_state: what the optimiser is to remember, by parameter name; None for nothing.
        said: one line on where it comes from; None for random weights.
    """

    model: ReZeroForCausalLM
    optimizer_state: NamedState | None = None
    said: str | None = None


def begin(init_from: InitFrom, config: ReZeroConfig, optimizer: OptimizerName) -> Beginning:
    """Make a run's model: new, or loaded and grown, with its optimiser's state. All processes of a run call it.

    New parameters have no state: the optimiser meets them as it meets those of a new model.

    Args:
        init_from: which, and to what depth.
        config: of the model to train, `num_hidden_layers` being `grow_to` where that is given.
        optimizer: with which it is trained.

    Raises:
        UserError: there is no such model, it is damaged, it is another one than the recipe's, it cannot be grown to
            that depth, or its optimiser was another one.
    """
    if init_from.path is None:
        return Beginning(ReZeroForCausalLM(config))
    folder, called = Path(init_from.path), f"init_from.path={init_from.path}"
    local = folder.is_dir()
    name, _, revision = (init_from.path, "", "") if local else init_from.path.partition("@")
    where = {"revision": revision or None, "trust_remote_code": False}
    checkpoint = local and (folder / MANIFEST).exists()
    if checkpoint:
        on_main(lambda: verify_checkpoint(folder))
    try:
        # Asked for a configuration, the library makes one of whatever it finds.
        if ReZeroConfig.get_config_dict(name, **where)[0].get("model_type") != ReZeroConfig.model_type:
            raise ValueError(f"its {CONFIG_NAME} is of another model")
        found = ReZeroConfig.from_pretrained(name, **where)
        _check_same_model(init_from, found, config)
        start = changed(config, num_hidden_layers=found.num_hidden_layers)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{called}: no language model of rezero_hf is there ({one_line(error)}).") from error
    model = load_whole(name, ReZeroForCausalLM, called, config=start, dtype=torch.float, **where)
    grown, names = model, {name: name for name in model.state_dict()}
    if config.num_hidden_layers != found.num_hidden_layers:
        grown, names = grow_depth(model, config.num_hidden_layers)
    state = None
    if checkpoint and (folder / OPTIMIZER).exists():
        saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        try:
            state = state_by_name(saved, model, optimizer)
        except UserError as error:
            raise UserError(f"{error} Or export {folder} (scripts/export.py): that holds weights alone.") from error
        state = NamedState({names[name]: value for name, value in state.parameters.items()}, state.steps)
    kept = "with the optimiser's state" if state is not None else "weights alone"
    depth = f"{found.num_hidden_layers} layers"
    if grown is not model:
        depth += f", grown to {config.num_hidden_layers}"
    return Beginning(grown.train(), state, f"begins from {init_from.path}: {depth}, {kept}")


def load_whole(name: str | Path, model_class: type[PreTrainedModel], called: str, **words: Any) -> PreTrainedModel:
    """A saved model, every weight of which came from its files; `from_pretrained` draws what it does not find.

    Args:
        name: a folder, or a repository on the Hub.
        model_class: the model's class.
        called: what messages begin with.
        words: further arguments of `from_pretrained`.

    Raises:
        UserError: the weights are in shards, unreadable or of other shapes than the configuration's, or some are
            missing or left over.
    """
    if (Path(name) / SHARDS).is_dir():
        raise UserError(f"{called}: its weights are in shards; name an export of it (scripts/export.py).")
    try:
        model, loaded = model_class.from_pretrained(name, output_loading_info=True, **words)
    except UNREADABLE as error:
        raise UserError(f"{called}: its weights cannot be loaded ({one_line(error)}).") from error
    wrong = [f"{key} is missing" for key in sorted(loaded["missing_keys"])]
    wrong += [f"{key} belongs to another model" for key in sorted(loaded["unexpected_keys"])]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{called}: its weights are not those of a {model_class.__name__}: {wrong[0]}{more}.")
    return model


def one_line(error: Exception) -> str:
    """The beginning of what a library says, for the end of a message of ours."""
    return " ".join(str(error).split())[:200]


def _check_same_model(init_from: InitFrom, found: ReZeroConfig, config: ReZeroConfig) -> None:
    free = FREE if config.position_embedding == "learned" else (*FREE, "max_position_embeddings")
    differ = [
        f"{word} {getattr(found, word)!r} there, {getattr(config, word)!r} here"
        for word in field_types(ReZeroConfig)
        if word not in free and getattr(found, word) != getattr(config, word)
    ]
    if init_from.grow_to is None and found.num_hidden_layers != config.num_hidden_layers:
        differ.append(
            f"num_hidden_layers {found.num_hidden_layers} there, {config.num_hidden_layers} here (init_from.grow_to "
            "grows it)"
        )
    if differ:
        raise UserError(f"init_from.path={init_from.path} is another model than the recipe's: {'; '.join(differ[:6])}.")
