"""What a finished model is measured on: text, labelled text or images that are named, or what it was trained on."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoints import MANIFEST
from .data import DataConfig
from .errors import UserError
from .finetuning import check_columns
from .image_data import ImageDataConfig
from .labelled import STDLIB
from .named_data import named_images, named_text
from .opening import Opened
from .recipe import load_recipe
from .runs import read_record
from .tasks import TaskConfig


# Where no run says how long a block was, it is what the model can see, and no longer than this.
LONGEST = 1024


@dataclass
class LabelledData:
    """Labelled text, for a classifier.

    Args:
        task: which, and for which head.
        block_size: tokens of a row at most.
        cache_dir: as `DataConfig`'s.
    """

    task: TaskConfig
    block_size: int
    cache_dir: str | None = None


Measurable = DataConfig | LabelledData | ImageDataConfig


def data_for(
    opened: Opened, given: str | None, cache_dir: str | None = None, **words: str
) -> tuple[Measurable, str | None]:
    """What a model is to be measured on.

    A recipe from the Hub is read for the name of a corpus and for nothing else of this machine.

    Args:
        opened: the model.
        given: data as `scripts/finetune.py` takes them for the model's task, or a recipe (`.yaml`), whose sections data
            and task are taken. None: what the model was trained on, as the recipe beside it says.
        cache_dir: where prepared data live. Default: as `DataConfig`.
        words: `text_column`, `label_column`, `config_name` and `revision` of what is given, as `TaskConfig` takes them.

    Returns:
        The data, and the fingerprint that they had in training; None where they are given or none was recorded.

    Raises:
        UserError: nothing is given or recorded, a recipe from the Hub names files, the model does not read such data,
            or `words` are not about them.
    """
    recorded = read_record(_beside(opened.folder, "run.json")).get("data")
    recorded = recorded if isinstance(recorded, dict) else {}
    recipe = given or _beside(opened.folder, "recipe.yaml")
    if not given and not recipe.exists():
        raise UserError(
            f"{opened.name}: no recipe beside it says what it was trained on; name text, rows or images, DATA."
        )
    if str(recipe).endswith((".yaml", ".yml")):
        if words:
            raise UserError(f"--{next(iter(words)).replace('_', '-')}: {recipe} says that itself; leave it out.")
        data = _of_recipe(opened, recipe)
    else:
        context = getattr(opened.model.config, "max_position_embeddings", None) or LONGEST
        data = _named(opened.task, given, recorded.get("block_size") or min(context, LONGEST), words)
    if not given and opened.commit:
        _check_named(opened, data)
        data = replace(data, cache_dir=None)
    return replace(data, cache_dir=cache_dir or data.cache_dir), None if given else recorded.get("fingerprint")


def _of_recipe(opened: Opened, path: str | Path) -> Measurable:
    recipe = load_recipe(path)
    if opened.task == recipe.task.name:
        return LabelledData(recipe.task, recipe.data.block_size, recipe.data.cache_dir)
    reads = {"causal-lm": DataConfig, "image-classification": ImageDataConfig}.get(opened.task, LabelledData)
    if not isinstance(recipe.data, reads):
        raise UserError(f"{path}: its data are not what {type(opened.model).__name__} reads.")
    return recipe.data


def _named(task: str, given: str, block_size: int, words: dict[str, str]) -> Measurable:
    about = TaskConfig(task, given, **words)
    check_columns(about)
    if task == "image-classification":
        return named_images(given)
    if task == "causal-lm":
        return DataConfig([named_text(given, **words)], block_size=block_size)
    return LabelledData(about, block_size)


def _beside(folder: Path, name: str) -> Path:
    # An export's own recipe names no absolute path any more; that of its run, or of a checkpoint's run, still does.
    near = folder.absolute()
    run = near.parents[1] if (folder / MANIFEST).exists() else near.parent if near.name == "model" else near
    return next((path for path in (run / name, near / name) if path.exists()), near / name)


def _check_named(opened: Opened, data: Measurable) -> None:
    if isinstance(data, DataConfig):
        sources, embedded = [line.source for line in data.sources], ("python-stdlib", "enwik8")
    elif isinstance(data, LabelledData):
        sources, embedded = [data.task.data], (STDLIB,)
    else:
        sources, embedded = [str(data.path or data.source)], ("digits",)
    for source in sources:
        # The library reads a folder of that name first.
        on_hub = re.fullmatch(r"hub:[\w-]+/[\w.-]+", source) and not Path(source.removeprefix("hub:")).exists()
        if source not in embedded and not on_hub:
            raise UserError(f"{opened.name}: its recipe names files, {source!r}; name text or images of yours, DATA.")
