"""The check of a publishable folder: complete, loadable anywhere, silent about who made it. None of its code is run."""

import ast
import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from .errors import UserError, one_line
from .traces import find_traces


# Pickles run code when they are loaded; optimiser states are large and nobody's business.
FORBIDDEN = (
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npz", "*.distcp", "*.pyc"),
    *("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "training_args*"),
)
# The loader refuses remote code that imports what is not installed: only what Transformers itself brings is safe.
IMPORTABLE = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy"}


class CheckpointError(UserError):
    """A folder is not what it must be; the message lists every problem found, one a line."""

    def __init__(self, folder: Path, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join([f"{folder} is not a publishable folder:", *(f"  - {line}" for line in problems)]))


def verify_folder(folder: str | Path, *, licensed: bool = True) -> None:
    """Check that a folder is complete, loads, and tells nothing about who made it. None of its code is run.

    Checked: the code that `auto_map` names, with everything it imports; the weights, by name, shape and finiteness,
    against the model the configuration describes; tokenizer and vocabulary, or image processor; the card, its metadata
    and its pictures; no pickles, no optimiser states; no tokens, absolute paths, host or user names in its text.

    Args:
        folder: A folder as `export_folder` writes it.
        licensed: Its card has to name a licence. Default: yes, as for whatever is published.

    Raises:
        CheckpointError: Lists every problem, one a line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, ["there is no such folder"])
    problems: list[str] = []
    config = _read_json(folder, "config.json", problems)
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name}: is a link; what it points to would be missing elsewhere")
        elif any(fnmatch(path.name, pattern) for pattern in FORBIDDEN):
            problems.append(f"{name}: pickles, optimiser states and caches do not belong in a published folder")
        else:
            problems += find_traces(path, name, _classes(config))
    if config is not None:
        problems += _check_code(folder, config)
        problems += _check_model(folder, config)
    problems += _check_card(folder, licensed)
    if problems:
        raise CheckpointError(folder, problems)


def verify_text(folder: str | Path) -> None:
    """Check that the text of a folder holds no tokens, absolute paths, host or user names, whatever else it holds.

    Raises:
        CheckpointError: Lists every problem, one a line.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    classes = _classes(_read_json(folder, "config.json", []))
    problems = [line for path in files for line in find_traces(path, path.relative_to(folder).as_posix(), classes)]
    if problems:
        raise CheckpointError(folder, problems)


def _classes(config: dict | None) -> list[str]:
    """The names that a classifier gives: its user's words, which are meant to be published."""
    names = (config or {}).get("id2label")
    return [str(name) for name in names.values()] if isinstance(names, dict) else []


def _check_code(folder: Path, config: dict) -> list[str]:
    """Every class that `auto_map` names is defined in the folder, and its code imports nothing that is missing."""
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        return [f"config.json: auto_map is {auto_map!r}, and not a mapping"]
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
    """The weights against the model the configuration describes, and what makes its inputs against it."""
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
    if model.can_generate() and config.get_text_config().use_cache is False:
        problems.append(
            "config.json: use_cache is false; generation would be slow for every user (Trainer leaves it so): set it "
            "to true, or write the folder with export_folder"
        )
    takes_images = model.main_input_name == "pixel_values"
    problems += _check_image_processor(folder, config) if takes_images else _check_tokenizer(folder, model)

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


def _check_image_processor(folder: Path, config: PreTrainedConfig) -> list[str]:
    """What it makes of a picture has the shape that the model takes."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        return [f"image processor: cannot be loaded ({_line(error)})"]
    channels, size = config.num_channels, getattr(config, "image_size", None)
    try:
        # PIL has a mode for 1 to 4 channels; grey pictures have no axis for them.
        picture = Image.fromarray(np.zeros((40, 50) if channels == 1 else (40, 50, channels), np.uint8))
        made = tuple(processor(picture, return_tensors="pt").pixel_values.shape)
    except Exception as error:
        return [f"image processor: cannot process a picture of {channels} channel(s) ({_line(error)})"]
    # A convolutional net has no image_size: it takes any.
    taken = (1, channels, *(made[2:] if size is None else (size, size)))
    return [f"image processor: makes {made} of a picture, the model takes {taken}"] if made != taken else []


def _check_tokenizer(folder: Path, model: PreTrainedModel) -> list[str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Missing and damaged files show as almost any exception.
    except Exception as error:
        return [f"tokenizer: cannot be loaded ({_line(error)})"]
    problems, vocab_size = [], model.config.vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        problems.append(f"tokenizer: has token id {largest}, beyond the model's vocab_size {vocab_size}")
    if not model.can_generate():
        return problems
    generation = _read_json(folder, "generation_config.json", problems) or {}
    for name in ("eos_token_id", "pad_token_id"):
        ours, theirs = generation.get(name), getattr(tokenizer, name)
        # Trainer writes a list of ends.
        if theirs is not None and theirs not in (ours if isinstance(ours, list) else [ours]):
            problems.append(f"generation_config.json: {name} is {ours}, the tokenizer's is {theirs}")
    return problems


def _check_card(folder: Path, licensed: bool) -> list[str]:
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
        f"README.md: the metadata lack {field}" for field in ("library_name", "pipeline_tag") if not metadata.get(field)
    ]
    if licensed and not metadata.get("license"):
        problems.append("README.md: the metadata lack license, that of the model it began with or yours: say --license")
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
    return f"{type(error).__name__}: {one_line(error)}"


def _some(names: list[str], limit: int = 4) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
