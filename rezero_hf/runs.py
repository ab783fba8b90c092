"""A run's folder and what it says of itself: versions, commit, device and command beside its numbers.

`runs/NAME/` holds `recipe.yaml` (resolved), `metrics.jsonl` (one JSON object a line), `run.json` (provenance and
results) and `model/`, the publishable folder.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, one_line


PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "pytorch_optimizer"),
    "rezero_hf",
)


def read_metrics(path: str | Path) -> list[dict]:
    """Read a run's `metrics.jsonl`, one JSON object per line, in file order.

    Args:
        path: The file. Empty lines are passed over.

    Raises:
        UserError: A line is torn or is not a JSON object; the message names the file and the line.
        FileNotFoundError: There is no such file.
    """
    rows = []
    # Split at newlines only: str.splitlines also cuts at characters that JSON strings may hold.
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not valid JSON ({error}); a run killed while writing tears its last line: delete it"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def read_record(path: str | Path) -> dict[str, Any]:
    """What a `run.json` says; nothing without a file.

    Raises:
        UserError: it cannot be read, or holds no JSON object.
    """
    path = Path(path)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); without that file there is no record") from error


def provenance(device: torch.device) -> dict[str, Any]:
    """What is needed to run the same thing again: `command`, `started`, `versions`, `git`, `device`; JSON types only.

    `git` is None outside a checkout; packages that are not installed are left out.

    Args:
        device: the device that computes.
    """
    return {
        "command": shlex.join(sys.argv),
        "started": now(),
        "versions": versions(),
        "git": git_state(),
        "device": device_name(device),
    }


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether it has uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout: only one that tracks this file counts.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def commit_name(git: dict[str, Any] | None) -> str:
    """What `git_state` found, for people."""
    return f"{git['sha'][:8]}{' with changes' if git['dirty'] else ''}" if git else "unknown"


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()} ({cores()} core{'s' if cores() > 1 else ''})"


def is_processor(name: str) -> bool:
    """Whether that is what `device_name` calls a processor, and no accelerator."""
    return name.endswith((" core)", " cores)"))


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
