"""Where a run begins: with random weights, or with another run's model, grown, and what its optimiser remembers.

`load_whole` is how that model is loaded, here and in `opening`.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import CONFIG_NAME, cached_file, logging

from .assembly import changed
from .checkpoints import MANIFEST, verify_checkpoint
from .errors import UserError, one_line
from .models import ReZeroConfig, ReZeroForCausalLM
from .optim import NamedState, OptimizerName, state_by_name
from .strict import field_types
from .surgery import grow_depth
from .together import everywhere, on_main


# Words of the model that may differ from the checkpoint's: depth has its own word, dropout is a part of training, and
# the rest is for generation.
FREE = (
    *("num_hidden_layers", "attention_dropout", "hidden_dropout", "embedding_dropout"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
)
# What FSDP's SHARDED_STATE_DICT saves instead of a file of weights.
SHARDS = f"{FSDP_MODEL_NAME}_0"
# What the libraries raise of a folder that holds no model of theirs, a damaged one, or one that needs another package.
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError),
    *(SafetensorError, StrictDataclassError),
)


@dataclass
class InitFrom:
    """What a run starts from instead of random weights.

    A network for images takes over the weights alone, and not those of a head for another number of classes. It must be
    the recipe's in every other word.

    Args:
        path: a training checkpoint or an export on this machine, or the model at the root of `ORG/NAME` or
            `ORG/NAME@REVISION` on the Hub; none of its code is run. It must be the recipe's model and vocabulary, but
            for depth and dropout. From a training checkpoint the optimiser's state goes over too, but not by way of
            FSDP: a checkpoint written under it gives weights alone (one of `SHARDED_STATE_DICT` must become an export
            first, by `scripts/export.py`), and a run under it refuses a checkpoint with such a state. Schedule, steps
            and the order of the data begin anew. None (default): random weights.
        grow_to: grow it to so many layers first (`surgery.grow_depth`), and train those: `model.num_hidden_layers` then
            follows. None (default): as many as it has.
        where: the new layers go: to the `end` (default), or `interleaved` with the old ones.
    """

    path: str | None = None
    grow_to: int | None = None
    where: Literal["end", "interleaved"] = "end"


class Beginning(NamedTuple):
    """What training starts with.

    Attributes:
        model: in fp32; of language modelling, or the class that `begin` was asked for.
        optimizer_state: what the optimiser is to remember, by parameter name; None for nothing.
        said: one line on where it comes from; None for random weights.
    """

    model: PreTrainedModel
    optimizer_state: NamedState | None = None
    said: str | None = None


def begin(
    init_from: InitFrom,
    config: ReZeroConfig,
    optimizer: OptimizerName,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sharded: bool = False,
    model_class: type[PreTrainedModel] = ReZeroForCausalLM,
) -> Beginning:
    """Make a run's model: new, or loaded and grown, with its optimiser's state. All processes of a run call it.

    New parameters have no state: the optimiser meets them as it meets those of a new model.

    Args:
        init_from: which, and to what depth.
        config: of the model to train, `num_hidden_layers` being `grow_to` where that is given.
        optimizer: with which it is trained.
        tokenizer: of the text to train on; where the model has one too, both must have the same vocabulary. None
            (default): not compared.
        sharded: train under FSDP, where a whole optimiser's state cannot go over. Default: no.
        model_class: the network with another head than the language model's: weights alone go over, and the head is
            new where that model's was another one.

    Raises:
        UserError: there is no such model, some processes do not see its folder, it is damaged, it or its vocabulary is
            another one than the recipe's, it cannot be grown to that depth, its optimiser was another one, or has a
            state under FSDP.
    """
    if init_from.path is None:
        return Beginning(model_class(config))
    folder, called = Path(init_from.path).expanduser(), f"init_from.path={init_from.path}"
    # The main process says what it is: to one that does not see the folder, its path would be a name on the Hub.
    local, remembers = on_main(lambda: _look_at(folder))
    remembers = remembers and model_class is ReZeroForCausalLM
    everywhere(lambda: _check_seen(folder, local, called), "every process has to see it")
    if remembers and sharded:
        raise UserError(
            f"{called}: under FSDP a whole optimiser's state cannot go over: name an export of it (scripts/export.py), "
            "which holds weights alone."
        )
    name, _, revision = (str(folder), "", "") if local else init_from.path.partition("@")
    where = {"revision": revision or None, "trust_remote_code": False}
    try:
        # Asked for a configuration, the library makes one of whatever it finds.
        if ReZeroConfig.get_config_dict(name, **where)[0].get("model_type") != ReZeroConfig.model_type:
            raise ValueError(f"its {CONFIG_NAME} is of another model")
        found = ReZeroConfig.from_pretrained(name, **where)
        free = {*FREE} if config.position_embedding == "learned" else {*FREE, "max_position_embeddings"}
        check_same_model(called, found, config, free - ({"num_hidden_layers"} if init_from.grow_to is None else set()))
        start = changed(config, num_hidden_layers=found.num_hidden_layers)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{called}: no language model of rezero_hf is there ({one_line(error)}).") from error
    if tokenizer is not None:
        _check_same_vocabulary(called, name, revision or None, tokenizer)
    where |= {"config": start, "dtype": torch.float}
    model = load_whole(name, model_class, called, new_head=model_class is not ReZeroForCausalLM, **where)
    grown, names = model, {name: name for name in model.state_dict()}
    if config.num_hidden_layers != found.num_hidden_layers:
        grown, names = grow_depth(model, config.num_hidden_layers, init_from.where)
    state = None
    if remembers:
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        try:
            state = state_by_name(saved, model, optimizer)
        except UserError as error:
            raise UserError(f"{error} Or export {folder} (scripts/export.py): that holds weights alone.") from error
        state = NamedState({names[name]: value for name, value in state.parameters.items()}, state.steps)
    kept = "with the optimiser's state" if state is not None else "weights alone"
    depth = f"{found.num_hidden_layers} layers"
    if grown is not model:
        depth += f", grown to {config.num_hidden_layers} ({init_from.where})"
    return Beginning(grown.train(), state, f"begins from {init_from.path}: {depth}, {kept}")


def load_whole(
    name: str | Path, model_class: type[PreTrainedModel], called: str, new_head: bool = False, **words: Any
) -> PreTrainedModel:
    """A saved model, every weight of which came from its files; `from_pretrained` draws what it does not find.

    Args:
        name: a folder, or a repository on the Hub.
        model_class: the model's class.
        called: what messages begin with.
        new_head: what lies outside the base model may be another one there: it is drawn, as `from_pretrained` does.
            Default: no.
        words: further arguments of `from_pretrained`.

    Raises:
        UserError: the weights are in shards, unreadable or of other shapes than the configuration's, or some are
            missing or left over.
    """
    if (Path(name) / SHARDS).is_dir():
        raise UserError(f"{called}: its weights are in shards; name an export of it (scripts/export.py).")
    try:
        with _quiet() if new_head else nullcontext():
            model, loaded = model_class.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=new_head, **words
            )
    except UNREADABLE as error:
        raise UserError(f"{called}: its weights cannot be loaded ({one_line(error)}).") from error
    found = {
        "is missing": loaded["missing_keys"],
        "belongs to another model": loaded["unexpected_keys"],
        "has another shape": {key for key, *_ in loaded["mismatched_keys"]},
    }
    wrong = [
        f"{key} {what}"
        for what, keys in found.items()
        for key in sorted(keys)
        if not new_head or key.startswith(f"{model_class.base_model_prefix}.")
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{called}: its weights are not those of a {model_class.__name__}: {wrong[0]}{more}.")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Spare the library's table of what was not in the files, where that is as it should be."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _look_at(folder: Path) -> tuple[bool, bool]:
    """Whether there is such a folder, and whether it is a checkpoint, which is verified, with an optimiser's state."""
    if folder.is_file():
        raise UserError(f"init_from.path={folder} is a file; name the folder of a model")
    checkpoint = (folder / MANIFEST).exists()
    if checkpoint:
        verify_checkpoint(folder)
    return folder.is_dir(), checkpoint and (folder / OPTIMIZER_NAME).exists()


def _check_seen(folder: Path, expected: bool, called: str) -> None:
    if folder.is_dir() != expected:
        raise UserError(f"{called}: a folder on some processes only")


def _check_same_vocabulary(called: str, name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    there_or_not = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(name, "tokenizer.json", revision=revision, **there_or_not)
    if file is None:
        return
    try:
        there = Tokenizer.from_file(file).get_vocab()
    # The library raises nothing narrower.
    except Exception as error:
        raise UserError(f"{called}: its tokenizer.json cannot be read ({one_line(error)}).") from error
    if differ := sorted(there.items() ^ tokenizer.get_vocab().items()):
        raise UserError(
            f"{called}: its vocabulary is not that of data.tokenizer: {len(differ)} entries are of one alone, such as "
            f"{differ[0][0]!r} with the id {differ[0][1]}; train with the tokenizer that lies there."
        )


def check_same_model(
    called: str, found: PreTrainedConfig, config: PreTrainedConfig, free: Collection[str] = ()
) -> None:
    """Raise a `UserError` unless a saved configuration is the recipe's, of any family, but for the words in `free`."""
    words = ["model_type"] if type(found) is not type(config) else field_types(type(config))
    differ = [
        f"{word} {getattr(found, word)!r} there, {getattr(config, word)!r} here"
        + (" (init_from.grow_to grows it)" if word == "num_hidden_layers" and isinstance(config, ReZeroConfig) else "")
        for word in words
        if word not in free and getattr(found, word) != getattr(config, word)
    ]
    if differ:
        raise UserError(f"{called} is another model than the recipe's: {'; '.join(differ[:6])}.")
