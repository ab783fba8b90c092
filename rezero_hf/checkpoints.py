"""The publishable folder: written whole or not at all, and checked before it takes its final name.

`export_folder` adds to what `save_pretrained` writes everything a stranger needs: tokenizer, generation config,
recipe, results, figures and a model card. `verify_folder` is the check alone, for a folder from anywhere.
"""

import ast
import copy
import getpass
import json
import logging
import math
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from .figures import gate_history, gate_map, loss_curve
from .hub import render_card, user_section

logger = logging.getLogger(__name__)

# What an export consists of. A folder that holds anything else is somebody's, and is not replaced.
EXPORTED = (
    "*.py",
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
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
# Pickles run code when they are loaded; optimiser states are large and nobody's business.
FORBIDDEN = (
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npz", "*.distcp", "*.pyc"),
    *("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "training_args*"),
)
# The loader refuses remote code that imports what is not installed: only what Transformers itself brings is safe.
IMPORTABLE = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy"}

# An absolute path of two parts or more, or of one telling part; not the inside of a URL or of a relative path.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w./~<*-])(?:file://)?(?:~?/[\w.+@-]+(?:/[\w.+@-]*)+|~?/(?:home|root|Users|tmp|mnt|data|scratch)\b|~/)"
    r"|\b[A-Za-z]:\\+Users\b"
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Account and host names that identify nobody, or are ordinary words in a recipe or a card.
NAMES_OF_NOBODY = {
    "root", "user", "admin", "test", "tests", "ubuntu", "debian", "runner", "docker", "nobody", "jovyan", "localhost",
    "node", "server", "worker", "data", "model", "train", "training", "python", "torch", "rezero", "alpha", "main",
}  # fmt: skip
PERSONAL_KEYS = {"user", "username", "login", "host", "hostname", "node", "nodename", "fqdn", "cwd", "home"}


class CheckpointError(ValueError):
    """A folder is not what it must be; the message lists every problem found, one a line."""

    def __init__(self, folder: Path, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join([f"{folder} is not a publishable folder:", *(f"  - {line}" for line in problems)]))


def export_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    run: dict[str, Any] | None = None,
    metrics: list[dict] | None = None,
    recipe_text: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a folder that goes to the Hub as it is, and loads anywhere.

    Everything is written beside the final name and verified there; only then does it take that name. Whatever fails on
    the way, an older export at `folder` stays as it was. Of that older one the user's section of the card is kept.
    On several processes call it on the main one, with a model whose parameters are whole.

    Args:
        model: The model, in the precision to publish. It is left as it was found.
        tokenizer: Its tokenizer, whose end-of-text and padding ids the folder's configurations take over.
        folder: Where to. An earlier export there is replaced.
        run: The run's record, written to `run.json` and the card without host and user names and absolute paths.
        metrics: Rows of `metrics.jsonl`, written as they are and drawn.
        recipe_text: The resolved recipe, written to `recipe.yaml` and the card.
        repo_id: `user/name` on the Hub, for the card's usage snippets.

    Returns:
        The folder.

    Raises:
        CheckpointError: What was written does not verify.
        FileExistsError: `folder` holds files that no export writes.
        ValueError: The card in `folder` has lost the markers around the user's section.
    """
    folder = Path(folder).absolute()
    partial, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    _recover(folder, partial, previous)
    _refuse_strange_files(folder)
    card = folder / "README.md"
    old_card = card.read_text(encoding="utf-8") if card.exists() else None
    partial.mkdir(parents=True)
    try:
        _write_model(model, tokenizer, partial)
        run = scrub(run) if run else None
        recipe_text = scrub(recipe_text) if recipe_text else None
        if recipe_text:
            (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        if run:
            (partial / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        if metrics:
            rows = "".join(json.dumps(row) + "\n" for row in metrics)
            (partial / "metrics.jsonl").write_text(rows, encoding="utf-8")
        render_card(
            run,
            model.config,
            metrics=metrics,
            recipe_text=recipe_text,
            figures=_write_figures(metrics or [], partial),
            repo_id=repo_id,
            previous=old_card,
        ).save(partial / "README.md")
        try:
            verify_folder(partial)
        except CheckpointError as error:
            raise CheckpointError(folder, error.problems) from None
        _swap(folder, partial, previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def verify_folder(folder: str | Path) -> None:
    """Check that a folder is complete, loads, and tells nothing about who made it. None of its code is run.

    Checked: the code that `auto_map` names, with everything it imports; the weights, by name, shape and finiteness,
    against the model the configuration describes; tokenizer and vocabulary; the card, its metadata and its pictures;
    no pickles, no optimiser states; no tokens, absolute paths, host or user names in its text.

    Args:
        folder: A folder as `export_folder` writes it.

    Raises:
        CheckpointError: Lists every problem, one a line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, ["there is no such folder"])
    problems: list[str] = []
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name}: is a link; what it points to would be missing elsewhere")
        elif any(fnmatch(path.name, pattern) for pattern in FORBIDDEN):
            problems.append(f"{name}: pickles, optimiser states and caches do not belong in a published folder")
        else:
            problems += _check_text(path, name)
    config = _read_json(folder, "config.json", problems)
    if config is not None:
        problems += _check_code(folder, config)
        problems += _check_model(folder, config)
    problems += _check_card(folder)
    if problems:
        raise CheckpointError(folder, problems)


def scrub(record: Any) -> Any:
    """Copy a record without what only the machine it was made on needs to know.

    Absolute paths shrink to their last part, names of user and host become `<user>` and `<host>`, and fields that hold
    one of them or a directory of theirs are dropped.

    Args:
        record: Text, or anything JSON can hold.
    """
    if isinstance(record, dict):
        return {key: scrub(value) for key, value in record.items() if str(key).lower() not in PERSONAL_KEYS}
    if isinstance(record, list | tuple):
        return [scrub(value) for value in record]
    if not isinstance(record, str):
        return record
    text = ABSOLUTE_PATH.sub(lambda found: found.group().rstrip("/\\").rpartition("/")[2] or "<home>", record)
    text = TOKEN.sub("<token>", text)
    for kind, name in _own_names():
        text = re.sub(_whole(name), f"<{kind}>", text)
    return text


def _write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # What the tokenizer does not define stays as the model has it.
    ids = {name: value for name, value in ids.items() if value is not None}
    generation_config = copy.deepcopy(model.generation_config) if model.can_generate() else None
    if generation_config is not None:
        generation_config.update(**ids, use_cache=True)
        # Else the ids would be read from the model's configuration again.
        generation_config._from_model_config = False
    # Trainer switches the cache off in the configuration of the model it trains.
    with (
        _temporarily(model.config, **ids, use_cache=True),
        _temporarily(model, generation_config=generation_config),
    ):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _temporarily(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name, None) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _write_figures(metrics: list[dict], folder: Path) -> list[str]:
    """Draw what the rows hold; returns the pictures' paths inside the folder."""
    if metrics and find_spec("matplotlib") is None:
        logger.warning("The folder gets no figures: matplotlib is not installed (pip install matplotlib).")
        return []
    figures = []
    if any(math.isfinite(row.get("bits_per_byte") or math.nan) for row in metrics):
        figures.append(loss_curve(metrics, folder / "figures" / "loss.png"))
    if gate_history(metrics) is not None:
        figures.append(gate_map(metrics, folder / "figures" / "gates.png"))
    return [path.relative_to(folder).as_posix() for path in figures]


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
        raise FileExistsError(f"{folder} is a file; choose another folder to export to")
    strange = [
        name
        for name in (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
        if not any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in EXPORTED)
    ]
    if strange:
        raise FileExistsError(
            f"{folder} holds files that no export writes ({_some(strange)}) and is not replaced; "
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


def _check_text(path: Path, name: str) -> list[str]:
    """Secrets and traces of the machine in one file, when it is text."""
    if path.suffix in (".safetensors", ".png"):
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    problems = [f"{name}: holds an access token ({found.group()[:6]}...)" for found in TOKEN.finditer(text)]
    # Vocabularies are learnt from text, in which paths and names are ordinary words.
    if name in ("tokenizer.json", "vocab.json", "merges.txt"):
        return problems
    # An escaped line break would hide that a path begins after it.
    text = re.sub(r"\\[nrt]", "  ", text)
    for found in ABSOLUTE_PATH.finditer(text):
        problems.append(f"{name}:{text.count(chr(10), 0, found.start()) + 1}: holds an absolute path, {found.group()}")
    if name == "README.md":
        # In their own section people may sign.
        text = text.replace(user_section(text) or "", "")
    # The package's own source was not written by this machine.
    for kind, own in [] if path.suffix == ".py" else _own_names():
        if re.search(_whole(own), text):
            problems.append(f"{name}: holds this machine's {kind} name, {own}")
    return problems


def _own_names() -> list[tuple[str, str]]:
    """(kind, name) of this host and account, as far as they identify somebody."""
    host = socket.gethostname()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that no account has.
        user = ""
    names = dict.fromkeys([("host", host), ("host", host.partition(".")[0]), ("user", user)])
    return [(kind, name) for kind, name in names if len(name) > 3 and name.lower() not in NAMES_OF_NOBODY]


def _whole(name: str) -> str:
    """Pattern of a name as a word; before a slash it is a namespace on the Hub, which is public anyway."""
    return rf"(?<!\w){re.escape(name)}(?![\w/])"


def _check_code(folder: Path, config: dict) -> list[str]:
    """Every class that `auto_map` names is defined in the folder, and its code imports nothing that is missing."""
    auto_map = config.get("auto_map") or {}
    problems = [
        f"config.json: auto_map lacks {auto}; without it the folder loads only where rezero_hf is installed"
        for auto in ("AutoConfig", "AutoModel")
        if auto not in auto_map
    ]
    trees: dict[str, ast.Module] = {}
    for path in sorted(folder.glob("*.py")):
        try:
            trees[path.stem] = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            problems.append(f"{path.name}: not valid Python ({_line(error)})")
    for auto, target in auto_map.items():
        module, _, name = str(target).rpartition(".")
        if "--" in module:
            problems.append(f"config.json: auto_map {auto} points to another repository, {target}")
        elif not (folder / f"{module}.py").is_file():
            problems.append(f"config.json: auto_map {auto} is {target}, but there is no {module}.py")
        elif module in trees and not any(
            isinstance(node, ast.ClassDef) and node.name == name for node in trees[module].body
        ):
            problems.append(f"config.json: auto_map {auto} is {target}, but {module}.py defines no class {name}")
    for stem, tree in trees.items():
        file = folder / f"{stem}.py"
        # The loader looks for relative imports line by line, also inside docstrings, and stops at what it misses.
        wanted = set(get_relative_imports(file))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                if node.level > 1 or not node.module or "." in node.module:
                    problems.append(
                        f"{file.name}:{node.lineno}: remote code can only import by `from .module import name`"
                    )
                else:
                    wanted.add(node.module)
        for module in sorted(wanted):
            if not (folder / f"{module}.py").is_file():
                problems.append(f"{file.name}: imports .{module}, but there is no {module}.py")
        for package in sorted(set(get_imports(file)) - IMPORTABLE - set(sys.stdlib_module_names)):
            problems.append(f"{file.name}: imports {package}, which a user of Transformers may not have")
    return problems


def _check_model(folder: Path, raw: dict) -> list[str]:
    """The weights against the model the configuration describes, and the tokenizer against both."""
    problems: list[str] = []
    stored = _stored_tensors(folder, problems)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        architecture = (config.architectures or ["none"])[0]
        auto = next(
            (auto for auto, target in (raw.get("auto_map") or {}).items() if target.endswith(f".{architecture}")), None
        )
        if auto is None:
            return [*problems, f"config.json: architectures names {architecture}, which is not in auto_map"]
        with torch.device("meta"):
            model = getattr(transformers, auto).from_config(config, trust_remote_code=False)
    # Whatever a configuration can be wrong about, down to an error inside the model, is one problem of the folder.
    except Exception as error:
        return [*problems, f"config.json: describes no model that this version can build ({_line(error)})"]
    if config.get_text_config().use_cache is False:
        problems.append("config.json: use_cache is false; generation would be slow for every user")
    problems += _check_tokenizer(folder, config.vocab_size)

    if stored is None:
        return problems
    tied = model.all_tied_weights_keys
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    if missing := sorted(expected.keys() - stored.keys()):
        problems.append(f"weights: missing {_some(missing)}")
    if extra := sorted(stored.keys() - expected.keys() - tied.keys()):
        problems.append(f"weights: {architecture} has no {_some(extra)}")
    for name in sorted(expected.keys() & stored.keys()):
        if stored[name] != expected[name]:
            problems.append(f"weights: {name} is {stored[name]}, the configuration says {expected[name]}")
    return problems


def _stored_tensors(folder: Path, problems: list[str]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all stored tensors, each read once and looked at for non-finite values; None if unreadable."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        problems.append("weights: there is no safetensors file")
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    home: dict[str, str] = {}
    not_finite = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_tensor(name)
                    shapes[name], home[name] = tuple(tensor.shape), path.name
                    if tensor.is_floating_point() and not tensor.float().isfinite().all():
                        not_finite.append(name)
        except (SafetensorError, OSError) as error:
            problems.append(f"{path.name}: cannot be read, truncated or damaged ({_line(error)})")
            return None
    if not_finite:
        problems.append(f"weights: not finite in {_some(not_finite)}")
    if len(files) > 1 or (folder / "model.safetensors.index.json").exists():
        index = _read_json(folder, "model.safetensors.index.json", problems)
        if index is not None and index.get("weight_map") != home:
            problems.append("model.safetensors.index.json: does not agree with the safetensors files beside it")
    return shapes


def _check_tokenizer(folder: Path, vocab_size: int) -> list[str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Missing and damaged files show as almost any exception.
    except Exception as error:
        return [f"tokenizer: cannot be loaded ({_line(error)})"]
    problems = []
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        problems.append(f"tokenizer: has token id {largest}, beyond the model's vocab_size {vocab_size}")
    generation = _read_json(folder, "generation_config.json", problems) or {}
    for name in ("eos_token_id", "pad_token_id"):
        ours, theirs = generation.get(name), getattr(tokenizer, name)
        if theirs is not None and ours != theirs:
            problems.append(f"generation_config.json: {name} is {ours}, the tokenizer's is {theirs}")
    return problems


def _check_card(folder: Path) -> list[str]:
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md: there is no model card"]
    try:
        card = ModelCard.load(path)
    # Broken YAML and YAML that is not a card raise different errors.
    except Exception as error:
        return [f"README.md: the metadata do not parse ({_line(error)})"]
    metadata = card.data.to_dict()
    problems = [
        f"README.md: the metadata lack {field}"
        for field in ("license", "library_name", "pipeline_tag")
        if not metadata.get(field)
    ]
    for target in re.findall(r"\]\(([^)\s#]+)\)", card.text):
        if "://" not in target and not (folder / target).is_file():
            problems.append(f"README.md: shows {target}, which is not in the folder")
    return problems


def _read_json(folder: Path, name: str, problems: list[str]) -> dict | None:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problems.append(f"{name}: is not a JSON object")
    except FileNotFoundError:
        problems.append(f"{name}: is missing")
    except ValueError as error:
        problems.append(f"{name}: is not valid JSON ({_line(error)})")
    return None


def _line(error: Exception) -> str:
    """An exception as part of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _some(names: list[str], limit: int = 4) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
