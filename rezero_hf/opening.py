"""A model by its name, here or on the Hub, and what makes its inputs, ready to be used. None of its code is run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checkpoints import MANIFEST, verify_checkpoint
from .errors import HUB_FAILURES, UserError, one_line
from .starting import UNREADABLE, load_whole
from .tasks import TASKS


# The classes of this package, by the names that configurations have for them.
OURS = {model_class.__name__: model_class for task in TASKS.values() for model_class in task.models.values()}
# Weights, what describes them, and the card for its licence, at the root of a repository; checkpoints to go on from
# lie in folders beside.
WANTED = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.yaml", "*.jinja", "README.md"],
    "ignore_patterns": ["*/*"],
}


class Opened(NamedTuple):
    """An opened model.

    Attributes:
        name: what it was asked for by.
        folder: where its files are.
        commit: of the repository they are from; None for a folder.
        model: in eval mode, in the precision it was saved in, on the accelerator if there is one.
    """

    name: str
    folder: Path
    commit: str | None
    model: PreTrainedModel

    @property
    def task(self) -> str:
        """What it does, of `TASKS`; models that are not of this package write text."""
        return next((name for name, task in TASKS.items() if type(self.model) in task.models.values()), "causal-lm")

    @property
    def of_images(self) -> bool:
        return self.model.main_input_name == "pixel_values"

    @property
    def positions(self) -> int | None:
        """Tokens that a language model can take at once; None where there is no such limit."""
        config = self.model.config
        rotary = getattr(config, "position_embedding", None) == "rope"
        return None if rotary else getattr(config, "max_position_embeddings", None)


def open_model(name: str) -> Opened:
    """Load a causal language model of any architecture in Transformers, or a classifier of this package.

    Args:
        name: an export, a training checkpoint or any folder of `save_pretrained`; else `ORG/NAME` or
            `ORG/NAME@REVISION` on the Hub.

    Raises:
        UserError: there is no such model, it is damaged, or it is of another kind.
    """

    def choose(config: PreTrainedConfig) -> type:
        head = (config.architectures or ["a model without a head"])[0]
        if head in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return AutoModelForCausalLM
        if head in OURS:
            return OURS[head]
        raise UserError(f"{name} holds {head}, which is neither a causal language model nor a classifier of rezero_hf.")

    folder, commit = find(name)
    model = load_folder(folder, name, choose)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return Opened(name, folder, commit, model.eval().to(device))


def load_folder(folder: Path, name: str, choose: Callable[[PreTrainedConfig], type]) -> PreTrainedModel:
    """The whole model that is saved in a folder; a training checkpoint is verified first.

    Args:
        folder: where.
        name: what messages begin with.
        choose: gives the class for a configuration, or raises a `UserError`.

    Raises:
        UserError: there is no model, it is an adapter or damaged, or a package that it needs is missing.
    """
    model_class = choose(load_config(folder, name))
    return load_whole(folder, model_class, name, local_files_only=True, trust_remote_code=False)


def load_config(folder: Path, name: str) -> PreTrainedConfig:
    """The configuration, whose `architectures` are strings, of the model in a folder; a checkpoint is verified first.

    Raises:
        UserError: as `load_folder`.
    """
    # The library would fetch the model that it belongs to.
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{name} holds an adapter; merge it into its model and save that (PEFT's merge_and_unload).")
    if (folder / MANIFEST).exists():
        verify_checkpoint(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"{name} holds no model ({one_line(error)}).") from error
    heads = config.architectures
    if heads is not None and not (isinstance(heads, list) and all(isinstance(head, str) for head in heads)):
        raise UserError(f"{name} holds no model (architectures is {heads!r} in its config.json, no list of names).")
    return config


def load_processor(auto_class: type, folder: Path, name: str, what: str) -> Any:
    """What makes a model's inputs, by `AutoTokenizer`, `AutoImageProcessor` or `AutoProcessor`.

    Raises:
        UserError: there is no `what`.
    """
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Of any kind, as in `tokenization.load_tokenizer`.
    except Exception as error:
        raise UserError(
            f"{name} holds no {what} ({one_line(error)}); put the model's own there by its save_pretrained(FOLDER)."
        ) from error


def tokenizer_of(opened: Opened) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a language model.

    Raises:
        UserError: there is none, or the model reads images.
    """
    if opened.of_images:
        kind = type(opened.model).__name__
        raise UserError(f"{opened.name} holds {kind}, which reads images; a language model is needed.")
    # Of some models the library makes an empty tokenizer where there is none.
    if not any(next(opened.folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab.*", "*.model")):
        raise UserError(f"{opened.name} holds no tokenizer; put the model's own there by its save_pretrained(FOLDER).")
    return load_processor(AutoTokenizer, opened.folder, opened.name, "tokenizer")


def find(name: str) -> tuple[Path, str | None]:
    """Where a model's files are, fetched from the Hub if they are there, and then at which commit.

    Raises:
        UserError: nothing has that name.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise UserError(f"{name} is a file; name the folder of a model.")
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", repository):
        raise UserError(f"{name}: there is no such folder.")
    try:
        found = Path(snapshot_download(repository, revision=revision or None, **WANTED))
    except HUB_FAILURES as error:
        raise UserError(
            f"{name}: there is no such folder, and it cannot be had from the Hub ({one_line(error)})."
        ) from error
    return found, found.name
