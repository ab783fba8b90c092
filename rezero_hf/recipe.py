"""A YAML recipe, read strictly: a typo or a wrong type is an error, and every default is written out with the run.

A recipe has the sections `model`, `data` and `training` (`ReZeroTrainingArguments`), and may say its `name`, in
`init_from` what weights it starts from, and in `task` what a language model is to do instead of predicting text. Which
fields model and data have depends on `model.model_type`: a language model by default (`ReZeroConfig`, `DataConfig`), or
a network for images. `smoke` and `full` are dotted overrides: to seconds, and to the paper's own size. Anything can be
overridden as `section.key=value`. A recipe with a section `study` is many runs; `studies.py` reads that.
"""

import dataclasses
import typing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .arguments import ReZeroTrainingArguments
from .data import DataConfig
from .errors import one_line
from .image_data import ImageDataConfig, PreparedImages
from .models import ReZeroConfig, ReZeroMLPConfig, ReZeroResNetConfig
from .sources import Source
from .starting import InitFrom
from .strict import RecipeError, check_names, checked, default_of, field_types, made, plain
from .tasks import TaskConfig


SECTIONS = ("model", "data", "training", "init_from", "task")
# Dotted overrides, by the name of what they make of the recipe.
SIZES = ("smoke", "full")
# `model_type` -> its configuration, and that of its data.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type]] = {
    "rezero": (ReZeroConfig, DataConfig),
    "rezero_resnet": (ReZeroResNetConfig, ImageDataConfig),
    "rezero_mlp": (ReZeroMLPConfig, ImageDataConfig),
}
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
    "auto_find_batch_size": "another batch would be another run; --dry-run says what fits",
    "hub_always_push": "of the saves that wait for a push only the newest is kept",
    "do_train": "scripts/pretrain.py always trains",
    "do_eval": "scripts/pretrain.py always evaluates",
    "do_predict": "scripts/pretrain.py always evaluates",
}


# Words of `training` that say where and how a run happens and not what it computes; a resumed run may change them.
CIRCUMSTANCES = (
    *("per_device_eval_batch_size", "eval_accumulation_steps"),
    *("logging_*", "log_*", "report_to", "run_name", "project", "trackio_*", "disable_tqdm", "debug", "peak_flops"),
    *("save_*", "push_to_hub", "hub_*", "dataloader_*", "ddp_*", "fsdp*", "deepspeed", "parallelism_config"),
    *("accelerator_config", "use_cpu", "torch_compile*", "tf32"),
    *("activation_checkpointing*", "gradient_checkpointing*"),
    *("torch_empty_cache_steps", "skip_memory_metrics"),
)
# Words that it may change as well, but that show in the numbers of a finished one.
IN_ITS_NUMBERS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("nonfinite", "max_skipped_steps", "final_eval_blocks"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_blocks"),
)
# What evaluations give, by which the best checkpoint can be chosen.
MEASURED = ("loss", "bits_per_byte", "perplexity", "accuracy")


@dataclass
class Recipe:
    """One training run, checked.

    Args:
        name: of the run, whose folder is `runs/<name>`; by default the file's name without suffix.
        path: the file it came from, for messages.
        model_type: which family of models, a key of `FAMILIES`.
        model: fields of that family's configuration.
        data: what to train on.
        training: fields of `ReZeroTrainingArguments`; the run's seed is `training.seed`.
        init_from: what the run starts from.
        task: what it learns to do.
    """

    name: str
    path: str
    model_type: str
    model: dict[str, Any]
    data: DataConfig | ImageDataConfig
    training: dict[str, Any]
    init_from: InitFrom = dataclasses.field(default_factory=InitFrom)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)

    def model_config(self, tokenizer: PreTrainedTokenizerBase) -> ReZeroConfig:
        """A language model's configuration, with what the recipe leaves to the tokenizer and the block size filled in.

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
        return self._config(fields)

    def image_config(self, images: PreparedImages) -> PreTrainedConfig:
        """The configuration of a network for images, with what follows from the images filled in: channels, classes,
        and the size where the network fixes it.

        Raises:
            RecipeError: fields contradict each other.
        """
        fields = {"num_channels": images.channels, "id2label": images.id2label, **self.model}
        if "image_size" in field_types(FAMILIES[self.model_type][0]):
            fields = {"image_size": images.size[0], **fields}
        return self._config(fields)

    def _config(self, fields: dict[str, Any]) -> PreTrainedConfig:
        try:
            return FAMILIES[self.model_type][0](**fields)
        except StrictDataclassError as error:
            raise RecipeError(f"{self.path}: model.{error.__cause__ or one_line(error, None)}") from error

    def training_arguments(self, output_dir: str | Path) -> ReZeroTrainingArguments:
        """The training arguments on this machine, writing into `output_dir`. Starts the distributed state.

        Raises:
            RecipeError: values that the arguments refuse, or a global batch that does not divide.
        """
        return _arguments(output_dir, self.training, f"{self.path}: training")

    def resolved(self, config: PreTrainedConfig) -> str:
        """The recipe as YAML with every default written out, as it is saved with the run."""
        model = {name: value for name, value in config.to_dict().items() if name in field_types(type(config))}
        if self.model_type != "rezero":
            model = {"model_type": self.model_type, **model}
        fields = [field for field in dataclasses.fields(ReZeroTrainingArguments) if field.init]
        training = {**{field.name: default_of(field) for field in fields}, **self.training}
        data = dataclasses.asdict(self.data)
        for name in NOT_OURS:
            training.pop(name, None)
        # Where a machine keeps its cache is nobody else's business.
        data.pop("cache_dir")
        sections = {"name": self.name, "model": model, "data": data, "training": training}
        if self.init_from.path is not None:
            sections["init_from"] = dataclasses.asdict(self.init_from)
        if self.task.name is not None:
            sections["task"] = dataclasses.asdict(self.task)
        return yaml.safe_dump(plain(sections), sort_keys=False, allow_unicode=True, width=120)


def load_recipe(
    path: str | Path, overrides: typing.Iterable[str] = (), smoke: bool = False, full: bool = False
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings, over the file and over `smoke`; values are YAML.
        smoke: apply the recipe's `smoke` section, which shrinks it to CPU seconds.
        full: apply its `full` section, which makes it the paper's size; it must have one.

    Raises:
        RecipeError: missing or unreadable file, unknown section or key, wrong type; one line with the nearest valid
            name.
    """
    path = Path(path)
    document = read_yaml(path)
    document.pop("study", None)
    name = document.pop("name", path.stem)
    check_names(document, (*SECTIONS, *SIZES), f"{path}: section")
    for section in (*SECTIONS, *SIZES):
        if not isinstance(document.get(section) or {}, dict):
            raise RecipeError(f"{path}: section {section} is not a mapping of keys to values.")
        document[section] = dict(document.get(section) or {})
    if full and not document["full"]:
        raise RecipeError(f"{path}: has no section full; it has one size.")

    # Looked at in any case, so that a typo shows whichever size is asked for.
    for size, wanted in {"full": full, "smoke": smoke}.items():
        for key, value in document[size].items():
            if str(key).startswith("study."):
                continue
            _override(document if wanted else {s: {} for s in SECTIONS}, str(key), value, f"{path}: {size}")
    _override_all(document, overrides)

    model_type = document["model"].pop("model_type", "rezero")
    check_names([model_type], FAMILIES, f"{path}: model.model_type")
    config_class, data_class = FAMILIES[model_type]
    classes = _classes(model_type)
    for size in SIZES:
        for section, _, field in (str(key).partition(".") for key in document[size]):
            if section in classes and field != "model_type":
                check_names([field], field_types(classes[section]), f"{path}: {size}: {section} key")
    model = checked(document["model"], config_class, f"{path}: model")
    training = _training(document["training"], f"{path}: training")
    init_from = made(InitFrom, document["init_from"], f"{path}: init_from")
    if init_from != InitFrom():
        if init_from.path is None:
            raise RecipeError(f"{path}: init_from.grow_to={init_from.grow_to} needs init_from.path, what is to grow.")
        if init_from.grow_to is not None:
            if model_type != "rezero":
                raise RecipeError(f"{path}: init_from.grow_to is for language models.")
            model["num_hidden_layers"] = init_from.grow_to
            gated = str(model.get("residual", "rezero")).startswith("rezero")
            if gated and training.get("gate_lr_multiplier") == 0 and model.get("output_init_scale") != 0:
                raise RecipeError(
                    f"{path}: init_from.grow_to={init_from.grow_to} with training.gate_lr_multiplier=0: new layers "
                    "start at alpha = 0, and held there never learn; give 0.1, or set model.output_init_scale=0."
                )
    task = made(TaskConfig, document["task"], f"{path}: task")
    if task.name is not None and model_type != "rezero":
        raise RecipeError(f"{path}: task is for language models; images have their classes.")
    if not name_is_plain(name):
        raise RecipeError(f"{path}: name={name!r}: must be a plain word, because it names the run's folder.")
    data = dict(document["data"])
    if "sources" in data and data_class is DataConfig:
        data["sources"] = _sources(data["sources"], f"{path}: data.sources")
    data = made(data_class, data, f"{path}: data")
    return Recipe(str(name), str(path), model_type, model, data, training, init_from, task)


def load_language_recipe(path: str | Path, overrides: typing.Iterable[str] = (), smoke: bool = False) -> Recipe:
    """`load_recipe` of one run of a language model.

    Raises:
        RecipeError: as there, or it is of a network for images.
    """
    recipe = load_recipe(path, overrides, smoke)
    if recipe.model_type != "rezero":
        raise RecipeError(
            f"{path}: model.model_type={recipe.model_type!r} is for images; scripts/reproduce.py trains those."
        )
    if recipe.task.name is not None:
        raise RecipeError(f"{path}: task.name={recipe.task.name} is no pretraining; scripts/finetune.py does that.")
    return recipe


def script_arguments(
    output_dir: str | Path, defaults: dict[str, Any], overrides: typing.Iterable[str]
) -> ReZeroTrainingArguments:
    """The training arguments of a script without a recipe, checked as a recipe's.

    Args:
        output_dir: where checkpoints go.
        defaults: the script's own.
        overrides: `training.key=value` strings over them.

    Raises:
        RecipeError: another section, an unknown key, a wrong type, or values that the arguments refuse.
    """
    document = {"training": dict(defaults)}
    _override_all(document, overrides)
    return _arguments(output_dir, _training(document["training"], "training"), "training")


def changed_words(before: str, after: str, finished: bool = False) -> list[str]:
    """Where two resolved recipes differ in what a run computes, as lines `section.key: OLD -> NEW`.

    Words of `CIRCUMSTANCES` may differ. A word that `before` does not have was added to the package since: it had its
    default, so that a long run outlives an update.

    Args:
        before, after: resolved recipes, as YAML.
        finished: compare a run that is over with one to be made; else (default) one to be gone on with, which may
            change what `IN_ITS_NUMBERS` has, too.
    """
    changed = []
    free = CIRCUMSTANCES if finished else (*CIRCUMSTANCES, *IN_ITS_NUMBERS)
    old, new = (yaml.safe_load(text) for text in (before, after))
    for section, words in _classes(new["model"].get("model_type", "rezero")).items():
        defaults = {field.name: plain(default_of(field)) for field in dataclasses.fields(words)}
        known, given = defaults | old.get(section, {}), new.get(section, {})
        for key in sorted(old.get(section, {}).keys() | given.keys()):
            was, now = known.get(key), given.get(key)
            circumstance = section == "training" and any(fnmatch(key, pattern) for pattern in free)
            if was != now and not circumstance:
                changed.append(f"{section}.{key}: {was} -> {now}")
    return changed


def name_is_plain(name: Any) -> bool:
    """Whether a run may be called that: one folder's name, not a path."""
    return isinstance(name, str) and bool(name.strip(". ")) and Path(name).name == name


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, to which a key that is given twice is a mistake, and not the later of the two."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        RecipeError: it cannot be read, or holds something else.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error}).") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {one_line(error, None)}") from error
    if not isinstance(document, dict):
        raise RecipeError(
            f"{path}: not a recipe: the file must be a mapping with the sections {', '.join((*SECTIONS, *SIZES))}."
        )
    return document


def _classes(model_type: str) -> dict[str, type]:
    """Section -> the class whose fields its keys are."""
    return dict(zip(SECTIONS, (*FAMILIES[model_type], ReZeroTrainingArguments, InitFrom, TaskConfig), strict=True))


def _training(values: dict[str, Any], where: str) -> dict[str, Any]:
    training = checked(values, ReZeroTrainingArguments, where)
    for field in training:
        if field in NOT_OURS:
            raise RecipeError(f"{where}.{field} cannot be set in a recipe: {NOT_OURS[field]}.")
    for field in ("eval", "save", "logging"):
        # A run is one epoch to the library, however often it goes through its data.
        if str(training.get(f"{field}_strategy")) == "epoch":
            share = f"{field}_strategy: steps with {field}_steps: 0.1, say, a tenth of the run"
            raise RecipeError(f"{where}.{field}_strategy=epoch would be once, at the end of the run; take {share}.")
    best = str(training.get("metric_for_best_model") or "loss").removeprefix("eval_")
    check_names([best], MEASURED, f"{where}.metric_for_best_model")
    return training


def _arguments(output_dir: str | Path, training: dict[str, Any], where: str) -> ReZeroTrainingArguments:
    try:
        return ReZeroTrainingArguments(output_dir=str(output_dir), **training)
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise RecipeError(f"{where}: {one_line(error, None)}") from error


def _override_all(document: dict[str, dict], overrides: typing.Iterable[str]) -> None:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"override {text!r} is not of the form section.key=value.")
        try:
            _override(document, key.strip(), yaml.safe_load(value), "override")
        except yaml.YAMLError as error:
            raise RecipeError(f"override {text!r}: the value is not YAML.") from error


def _override(document: dict[str, dict], key: str, value: Any, where: str) -> None:
    sections = [section for section in SECTIONS if section in document]
    section, dot, field = key.partition(".")
    if not dot or section not in sections:
        raise RecipeError(f"{where}: {key!r} is not section.key with a section of {', '.join(sections)}.")
    document[section][field] = value


def _sources(value: Any, where: str) -> list[Source]:
    """One line or a list of lines, each a name or a mapping of `Source` fields."""
    lines = value if isinstance(value, list) else [value]
    sources = []
    for number, line in enumerate(lines):
        fields = line if isinstance(line, dict) else {"source": line}
        sources.append(made(Source, fields, f"{where}[{number}]"))
    return sources
