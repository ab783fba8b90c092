"""A YAML recipe, read strictly: a typo or a wrong type is an error, and every default is written out with the run.

A recipe has the sections `model` (fields of `ReZeroConfig`), `data` (`DataConfig`), `training`
(`ReZeroTrainingArguments`) and `smoke` (dotted overrides that shrink it to seconds), and may say its `name`. Anything
can be overridden as `section.key=value`.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from .arguments import ReZeroTrainingArguments
from .data import DataConfig
from .errors import UserError
from .models.configuration_rezero import ReZeroConfig
from .sources import Source


SECTIONS = ("model", "data", "training", "smoke")
# A multiple of 64 keeps the head's matrix on the tiles of matrix units; the padding rows are never a target.
VOCAB_MULTIPLE = 64


# Fields of the library that a recipe must not set, and where to turn instead.
NOT_OURS = {
    "output_dir": "choose the run's folder with --output",
    "hub_token": "a token does not belong in a file; log in with `hf auth login`",
    "optim": "choose the optimiser with training.optimizer",
    "optim_args": "choose the optimiser with training.optimizer",
    "data_seed": "training.seed orders the data too",
    "resume_from_checkpoint": "the same command goes on by itself; another checkpoint is named with --resume-from",
    "enable_jit_checkpoint": "a run told to stop (SIGTERM) saves by itself",
    "ignore_data_skip": "a resumed run would see its text again",
    "auto_find_batch_size": "another batch would be another run; --dry_run says what fits",
    "hub_always_push": "of the saves that wait for a push only the newest is kept",
    "do_train": "scripts/pretrain.py always trains",
    "do_eval": "scripts/pretrain.py always evaluates",
    "do_predict": "scripts/pretrain.py always evaluates",
}


# Words of `training` that say where and how a run happens and not what it computes; a resumed run may change them.
CIRCUMSTANCES = (
    *("per_device_*_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps"),
    *("logging_*", "log_*", "report_to", "run_name", "project", "trackio_*", "disable_tqdm", "debug", "peak_flops"),
    *("save_*", "push_to_hub", "hub_*", "dataloader_*", "ddp_*", "fsdp*", "deepspeed", "parallelism_config"),
    *("accelerator_config", "use_cpu", "torch_compile*", "tf32"),
    *("activation_checkpointing*", "gradient_checkpointing*"),
    *("nonfinite", "max_skipped_steps", "final_eval_blocks", "torch_empty_cache_steps", "skip_memory_metrics"),
)


class RecipeError(UserError):
    """A recipe says something that cannot be; the message names file, key and value."""


@dataclass
class Recipe:
    """One training run, checked.

    Args:
        name: of the run, whose folder is `runs/<name>`; by default the file's name without suffix.
        path: the file it came from, for messages.
        model: fields of `ReZeroConfig`.
        data: what to train on.
        training: fields of `ReZeroTrainingArguments`; the run's seed is `training.seed`.
    """

    name: str
    path: str
    model: dict[str, Any]
    data: DataConfig
    training: dict[str, Any]

    def model_config(self, tokenizer: PreTrainedTokenizerBase) -> ReZeroConfig:
        """The model's configuration, with what the recipe leaves to the tokenizer and the block size filled in.

        `vocab_size` becomes the tokenizer's, rounded up to a multiple of 64; `max_position_embeddings` the block size;
        the special token ids are always the tokenizer's.

        Raises:
            RecipeError: fields contradict each other, the tokenizer or the block size.
        """
        # Ids may have gaps, so their number is not enough.
        needed = max(tokenizer.get_vocab().values()) + 1
        fields = {
            "vocab_size": -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            "max_position_embeddings": self.data.block_size,
            **self.model,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if fields["vocab_size"] < needed:
            raise RecipeError(
                f"{self.path}: model.vocab_size={fields['vocab_size']} is smaller than the {needed} ids of "
                f"data.tokenizer={self.data.tokenizer!r}; leave it out or raise it."
            )
        if fields["max_position_embeddings"] < self.data.block_size:
            raise RecipeError(
                f"{self.path}: model.max_position_embeddings={fields['max_position_embeddings']} is smaller than "
                f"data.block_size={self.data.block_size}; leave it out or raise it."
            )
        try:
            return ReZeroConfig(**fields)
        except StrictDataclassError as error:
            raise RecipeError(f"{self.path}: model.{error.__cause__ or ' '.join(str(error).split())}") from error

    def training_arguments(self, output_dir: str | Path) -> ReZeroTrainingArguments:
        """The training arguments on this machine, writing into `output_dir`. Starts the distributed state.

        Raises:
            RecipeError: values that the arguments refuse, or a global batch that does not divide.
        """
        try:
            return ReZeroTrainingArguments(output_dir=str(output_dir), **self.training)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{self.path}: training: {error}") from error

    def resolved(self, config: ReZeroConfig) -> str:
        """The recipe as YAML with every default written out, as it is saved with the run."""
        model = {name: value for name, value in config.to_dict().items() if name in _field_types(ReZeroConfig)}
        fields = [field for field in dataclasses.fields(ReZeroTrainingArguments) if field.init]
        training = {**{field.name: _default_of(field) for field in fields}, **self.training}
        data = dataclasses.asdict(self.data)
        for name in NOT_OURS:
            training.pop(name, None)
        # Where a machine keeps its cache is nobody else's business.
        data.pop("cache_dir")
        sections = {"name": self.name, "model": model, "data": data, "training": training}
        return yaml.safe_dump(_plain(sections), sort_keys=False, allow_unicode=True, width=120)


def load_recipe(path: str | Path, overrides: typing.Iterable[str] = (), smoke: bool = False) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings, over the file and over `smoke`; values are YAML.
        smoke: apply the recipe's `smoke` section, which shrinks it to CPU seconds.

    Raises:
        RecipeError: missing or unreadable file, unknown section or key, wrong type; one line with the nearest valid
            name.
    """
    path = Path(path)
    document = _read_yaml(path)
    name = document.pop("name", path.stem)
    _check_names(document, SECTIONS, f"{path}: section")
    for section in SECTIONS:
        if not isinstance(document.setdefault(section, {}) or {}, dict):
            raise RecipeError(f"{path}: section {section} is not a mapping of keys to values.")
        document[section] = dict(document[section] or {})

    shrink = document["smoke"]
    for key, value in shrink.items():
        _override(document if smoke else {s: {} for s in SECTIONS}, key, value, f"{path}: smoke")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"override {text!r} is not of the form section.key=value.")
        try:
            _override(document, key.strip(), yaml.safe_load(value), "override")
        except yaml.YAMLError as error:
            raise RecipeError(f"override {text!r}: the value is not YAML.") from error

    model = _checked(document["model"], ReZeroConfig, f"{path}: model")
    training = _checked(document["training"], ReZeroTrainingArguments, f"{path}: training")
    for field in training:
        if field in NOT_OURS:
            raise RecipeError(f"{path}: training.{field} cannot be set in a recipe: {NOT_OURS[field]}.")
    if not name_is_plain(name):
        raise RecipeError(f"{path}: name={name!r}: must be a plain word, because it names the run's folder.")
    data = dict(document["data"])
    if "sources" in data:
        data["sources"] = _sources(data["sources"], f"{path}: data.sources")
    data = DataConfig(**_checked(data, DataConfig, f"{path}: data"))
    return Recipe(name=str(name), path=str(path), model=model, data=data, training=training)


def changed_words(before: str, after: str) -> list[str]:
    """Where two resolved recipes differ in what a run computes, as lines `section.key: OLD -> NEW`.

    Words of `CIRCUMSTANCES` may differ.

    Args:
        before, after: resolved recipes, as YAML.
    """
    changed = []
    old, new = (yaml.safe_load(text) for text in (before, after))
    for section in ("model", "data", "training"):
        for key in sorted(old.get(section, {}).keys() | new[section].keys()):
            was, now = old.get(section, {}).get(key), new[section].get(key)
            circumstance = section == "training" and any(fnmatch(key, pattern) for pattern in CIRCUMSTANCES)
            if was != now and not circumstance:
                changed.append(f"{section}.{key}: {was} -> {now}")
    return changed


def name_is_plain(name: Any) -> bool:
    """Whether a run may be called that: one folder's name, not a path."""
    return isinstance(name, str) and bool(name.strip(". ")) and Path(name).name == name


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error}).") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: not a recipe: the file must be a mapping with the sections {', '.join(SECTIONS)}.")
    return document


def _override(document: dict[str, dict], key: str, value: Any, where: str) -> None:
    section, dot, field = key.partition(".")
    if not dot or section not in SECTIONS[:-1]:
        raise RecipeError(f"{where}: {key!r} is not section.key with a section of {', '.join(SECTIONS[:-1])}.")
    document[section][field] = value


def _sources(value: Any, where: str) -> list[Source]:
    """One line or a list of lines, each a name or a mapping of `Source` fields."""
    lines = value if isinstance(value, list) else [value]
    sources = []
    for number, line in enumerate(lines):
        fields = line if isinstance(line, dict) else {"source": line}
        sources.append(Source(**_checked(fields, Source, f"{where}[{number}]")))
    return sources


def _checked(values: dict[str, Any], cls: type, where: str) -> dict[str, Any]:
    """The values, each checked against the dataclass field of its name."""
    types = _field_types(cls)
    _check_names(values, types, f"{where}: key")
    checked = {}
    for name, value in values.items():
        expected = types[name]
        members = typing.get_args(expected) or (expected,)
        checked[name] = _as_meant(value, members)
        try:
            type_validator(name, checked[name], expected)
        except TypeError as error:
            hint = " (YAML reads 3e-4 as text; write 3.0e-4)" if isinstance(value, str) and _is_number(value) else ""
            raise RecipeError(f"{where}.{name}={value!r}: expected {_describe(expected)}{hint}.") from error
    return checked


def _as_meant(value: Any, members: tuple) -> Any:
    """Undo two readings of YAML: a whole number where only a float is due, and `no` where only a word is."""
    if isinstance(value, int) and not isinstance(value, bool) and float in members and int not in members:
        return float(value)
    if value is False and str in members and bool not in members:
        return "no"
    return value


def _check_names(given: typing.Iterable[str], known: typing.Iterable[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:40])}."
            raise RecipeError(f"{where} {name!r} is unknown; {hint}")


def _field_types(cls: type) -> dict[str, Any]:
    """The fields a recipe may set, with their types: a configuration's own ones, not the hundred it inherits."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if issubclass(cls, ReZeroConfig):
        fields = [field for field in fields if field.name in cls.__annotations__]
    return {field.name: field.type for field in fields}


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(expected)))
    return expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")


def _default_of(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    """The value in types that YAML writes plainly: enums by value, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
