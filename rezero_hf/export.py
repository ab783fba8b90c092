"""The publishable folder: written whole or not at all, and checked before it takes its final name.

`export_folder` adds to what `save_pretrained` writes everything a stranger needs: tokenizer or image processor, recipe,
results, figures and a model card. `verification.verify_folder` is the check.
"""

import copy
import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .assembly import check_unwrapped
from .descriptions import description_of
from .durable import files_in, write_whole
from .errors import UserError
from .figures import gate_history, gate_map, loss_curve
from .hub import render_card
from .runs import read_metrics, read_record
from .traces import scrub, scrub_recipe
from .verification import CheckpointError, verify_folder


logger = logging.getLogger(__name__)

# What turns text or pictures into a model's inputs: Trainer's `processing_class`.
Processor = PreTrainedTokenizerBase | BaseImageProcessor

# What an export consists of. A folder that holds anything else is somebody's, and is not replaced.
EXPORTED = (
    "*.py",
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "recipe.yaml",
    "run.json",
    "metrics.jsonl",
    "figures/*.png",
    "README.md",
)
# The pictures that are drawn of a run; others in that folder are somebody's.
FIGURES = ("figures/loss.png", "figures/gates.png")


def is_exported(name: str) -> bool:
    """Whether a file's path inside its folder is one that an export writes."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in EXPORTED)


def export_folder(
    model: PreTrainedModel,
    processor: Processor,
    folder: str | Path,
    *,
    run: dict[str, Any] | None = None,
    metrics: list[dict] | None = None,
    recipe_text: str | None = None,
    state_dict: dict[str, Any] | None = None,
    license: str | None = None,
) -> Path:
    """Write a folder that goes to the Hub as it is, and loads anywhere.

    Everything is written beside the final name and verified there; only then does it take that name. Whatever fails on
    the way, an older export at `folder` stays as it was. Of that older one the user's section of the card is kept.
    On several processes call it on the main one, with a model whose parameters are whole.

    Args:
        model: The model, in the precision to publish: one of `descriptions.DESCRIBED`. It is left as it was found.
        processor: Its tokenizer, whose end-of-text and padding ids the folder's configurations take over, or its image
            processor.
        folder: Where to. An earlier export there is replaced.
        run: The run's record, written to `run.json` and the card without host and user names and absolute paths.
        metrics: Rows of `metrics.jsonl`, written as they are and drawn.
        recipe_text: The resolved recipe, written to `recipe.yaml` and the card.
        state_dict: The weights, where the model's own are shards. Default: the model's.
        license: Of code and weights, as the Hub names it (`mit`, `cc-by-nc-4.0`). Default: what `run` says as its
            `license`, else what an earlier export there says, else apache-2.0; but of a model that began with another's
            weights (`init_from` of `run`) none, which is no error before it is published.

    Returns:
        The folder.

    Raises:
        CheckpointError: What was written does not verify.
        UserError: There is no card for the model: it has another head. Or an adapter is in it, not yet merged.
        UserError: `folder` holds files that no export writes, or cannot be made.
        UserError: The card in `folder` has lost the markers around the user's section.
    """
    check_unwrapped(model)
    if not isinstance(processor, Processor):
        raise UserError(f"processor={processor!r}: needs the model's tokenizer or image processor")
    # Of a link what it leads to: on that disk, and the link stays.
    folder = Path(folder).expanduser().resolve()
    partial, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    _recover(folder, partial, previous)
    _refuse_strange_files(folder)
    card = folder / "README.md"
    old_card = card.read_text(encoding="utf-8") if card.exists() else None
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another folder to export to") from error
    try:
        _write_model(model, processor, partial, state_dict)
        write_records(partial, run if license is None else {**(run or {}), "license": license}, recipe_text)
        if metrics:
            rows = "".join(json.dumps(row) + "\n" for row in metrics)
            (partial / "metrics.jsonl").write_text(rows, encoding="utf-8")
        describe_folder(partial, previous=old_card)
        try:
            verify_folder(partial, licensed=False)
        except CheckpointError as error:
            raise CheckpointError(folder, error.problems) from None
        _swap(folder, partial, previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_records(folder: Path, run: dict[str, Any] | None, recipe_text: str | None) -> None:
    """Put what is known of the run beside a model, without host and user names and absolute paths.

    Args:
        folder: where; gets `run.json` and `recipe.yaml`, each if there is one.
        run, recipe_text: as in `export_folder`.
    """
    if recipe_text:
        write_whole(folder / "recipe.yaml", scrub_recipe(recipe_text))
    if run:
        write_whole(folder / "run.json", json.dumps(scrub(run), indent=2) + "\n")


def describe_folder(folder: Path, *, figures: bool = True, previous: str | None = None) -> None:
    """Render the card, and draw the figures, of a folder from what is in it.

    Args:
        folder: holds `config.json`, and as far as they exist `run.json`, `metrics.jsonl` and `recipe.yaml`.
        figures: draw them; those that cannot be drawn stay as they are. Without, the card shows none.
        previous: the card whose user's section is to be kept. None (default): the one in the folder, if any.

    Raises:
        UserError: there is no card for the model, the one there has lost the markers around the user's section, or a
            record is damaged.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    measure = description_of(config).measure
    card, metrics, recipe = (folder / name for name in ("README.md", "metrics.jsonl", "recipe.yaml"))
    if previous is None and card.exists():
        previous = card.read_text(encoding="utf-8")
    rows = read_metrics(metrics) if metrics.exists() else []
    text = render_card(
        read_record(folder / "run.json"),
        config,
        metrics=rows,
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.exists() else None,
        figures=_write_figures(rows, folder, measure) if figures else (),
        previous=previous,
    )
    write_whole(card, str(text))


@contextmanager
def rescue(
    model: PreTrainedModel,
    processor: Processor,
    folder: str | Path,
    state_dict: dict[str, Any] | None = None,
) -> Iterator[None]:
    """Save the bare model to `folder` if the body fails: a trained model is not lost to a full disk or a broken figure.

    On several processes the main one saves; what fails on another is raised there as it is.

    Raises:
        UserError: the body failed; says why and where the weights are.
    """
    try:
        yield
    except Exception as error:
        if not PartialState().is_main_process:
            raise
        model.save_pretrained(folder, state_dict=state_dict)
        processor.save_pretrained(folder)
        raise UserError(
            f"{error}\nThe model was trained, but not published; its weights are safe in {folder}."
        ) from error


def _write_model(model: PreTrainedModel, processor: Processor, folder: Path, state_dict: dict[str, Any] | None) -> None:
    with _generating_as(processor, model) if model.can_generate() else caching(model):
        model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


@contextmanager
def _generating_as(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Iterator[None]:
    """Give a model its tokenizer's ids, and the cache, inside the block."""
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # What the tokenizer does not define stays as the model has it.
    ids = {name: value for name, value in ids.items() if value is not None}
    generation_config = copy.deepcopy(model.generation_config)
    known, end = generation_config.eos_token_id, ids.get("eos_token_id")
    # A chat model may have other ends beside its tokenizer's.
    ends = {"eos_token_id": known if end in known else [end, *known]} if isinstance(known, list) and end else {}
    generation_config.update(**{**ids, **ends}, use_cache=True)
    # Else the ids would be read from the model's configuration again.
    generation_config._from_model_config = False
    with temporarily(model, generation_config=generation_config), temporarily(model.config, **ids), caching(model):
        yield


def caching(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Switch the cache on inside the block, which Trainer switches off in the configuration of a model it trains.

    Also under a head that does not generate: a language model may begin with its weights.
    """
    return temporarily(model.config, use_cache=True) if hasattr(model.config, "use_cache") else nullcontext()


@contextmanager
def temporarily(target: Any, **values: Any) -> Iterator[None]:
    """Give an object's attributes other values inside the block."""
    before = {name: getattr(target, name, None) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _write_figures(metrics: list[dict], folder: Path, measure: str) -> list[str]:
    """Draw what the rows hold; returns the paths inside the folder of the pictures that are there then."""
    loss, gates = (folder / name for name in FIGURES)
    if metrics and find_spec("matplotlib") is None:
        logger.warning("The folder gets no new figures: matplotlib is not installed (pip install matplotlib).")
    else:
        if any(math.isfinite(row.get(measure) or math.nan) for row in metrics):
            loss_curve(metrics, loss, measure)
        if gate_history(metrics) is not None:
            gate_map(metrics, gates)
    return [path.relative_to(folder).as_posix() for path in (loss, gates) if path.exists()]


def _recover(folder: Path, partial: Path, previous: Path) -> None:
    """Clean up after an export that was killed: the older folder gets its name back if the newer never took it."""
    if previous.exists():
        if folder.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(folder)
    if partial.exists():
        shutil.rmtree(partial)


def _refuse_strange_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another folder to export to")
    found = files_in(folder)
    strange = [name for name in found if not is_exported(name)]
    if found and "README.md" not in found:
        # Code and weights have any name; every export has a card.
        strange = found
    if strange:
        raise UserError(
            f"{folder} holds files that no export writes ({', '.join(strange[:4])}) and is not replaced; "
            "move them away or choose another folder"
        )


def _swap(folder: Path, partial: Path, previous: Path) -> None:
    """Give the finished folder its name. No system call does this to two directories, hence the way back."""
    if not folder.exists():
        partial.rename(folder)
        return
    folder.rename(previous)
    try:
        partial.rename(folder)
    except BaseException:
        previous.rename(folder)
        raise
    shutil.rmtree(previous)
