"""A model by its name, here or on the Hub, ready to be used. None of its code is run."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checkpoints import MANIFEST, verify_checkpoint
from .descriptions import DESCRIBED
from .errors import UserError, one_line
from .starting import UNREADABLE, load_whole


# Weights and what describes them, at the root of a repository; checkpoints to go on from lie in folders beside.
WANTED = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.yaml", "*.jinja"],
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
    def of_images(self) -> bool:
        return self.model.main_input_name == "pixel_values"

    @property
    def positions(self) -> int | None:
        """Tokens that a language model can take at once; None where there is no such limit."""
        config = self.model.config
        rotary = getattr(config, "position_embedding", None) == "rope"
        return None if rotary else getattr(config, "max_position_embeddings", None)


def open_model(name: str) -> Opened:
    """Load a causal language model of any architecture in Transformers, or an image classifier of this package.

    Args:
        name: an export, a training checkpoint or any folder of `save_pretrained`; else `ORG/NAME` or
            `ORG/NAME@REVISION` on the Hub.

    Raises:
        UserError: there is no such model, it is damaged, or it is of another kind.
    """
    folder, commit = _find(name)
    if (folder / MANIFEST).exists():
        verify_checkpoint(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"{name} holds no model ({one_line(error)}).") from error
    head = (config.architectures or ["a model without a head"])[0]
    classes = {model_class.__name__: model_class for model_class in DESCRIBED}
    if head in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        classes[head] = AutoModelForCausalLM
    if head not in classes:
        raise UserError(
            f"{name} holds {head}, which is neither a causal language model nor an image classifier of rezero_hf."
        )
    model = load_whole(folder, classes[head], name, trust_remote_code=False)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return Opened(name, folder, commit, model.eval().to(device))


def tokenizer_of(opened: Opened) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a language model.

    Raises:
        UserError: there is none, or the model reads images.
    """
    if opened.of_images:
        kind = type(opened.model).__name__
        raise UserError(f"{opened.name} holds {kind}, which reads images; a language model is needed.")
    try:
        # Of some models the library makes an empty tokenizer where there is none.
        if not any(next(opened.folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab.*", "*.model")):
            raise FileNotFoundError("no tokenizer.json")
        return AutoTokenizer.from_pretrained(opened.folder, local_files_only=True, trust_remote_code=False)
    # Of any kind, as in `tokenization.load_tokenizer`.
    except Exception as error:
        raise UserError(
            f"{opened.name} holds no tokenizer ({one_line(error)}); put the model's own there: "
            "tokenizer.save_pretrained(FOLDER)."
        ) from error


def _find(name: str) -> tuple[Path, str | None]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", repository):
        raise UserError(f"{name}: there is no such folder.")
    try:
        found = Path(snapshot_download(repository, revision=revision or None, **WANTED))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"{name}: there is no such folder, and it cannot be had from the Hub ({one_line(error)})."
        ) from error
    return found, found.name
