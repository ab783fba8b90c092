"""What a run records and shows while it trains: `metrics.jsonl`, the gates, and a progress bar in bits per byte."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from torch import nn
from transformers import ProgressCallback, TrainerCallback

from .errors import UserError
from .optim import gates


# Where PEFT keeps a module that it trains whole, and what it puts before every name.
IN_ADAPTER = re.compile(r"^base_model\.model\.|\.modules_to_save\.[^.]+(?=\.)")
# What an evaluation yields: of text nats per token, bits per byte, and what they were measured on; of images accuracy.
MEASURED = ("loss", "bits_per_byte", "tokens", "bytes", "accuracy")


def measured_in(metrics: dict[str, float]) -> dict[str, float]:
    """The measurements among Trainer's `eval_` metrics, without that prefix."""
    return {name: metrics[f"eval_{name}"] for name in MEASURED if f"eval_{name}" in metrics}


def gate_values(model: nn.Module) -> dict[str, list[float]]:
    """Every gate's value: parameter name -> list, one number or one per branch. Every rank must call it under FSDP.

    Of the two that PEFT has for a gate among its `modules_to_save`, the one that is in use, under the gate's own name.
    """
    values = {}
    for name, alpha in gates(model).items():
        if ".original_module." in name:
            continue
        whole = alpha.full_tensor() if hasattr(alpha, "full_tensor") else alpha
        values[IN_ADAPTER.sub("", name)] = whole.detach().float().cpu().tolist()
    return values


class MetricsLog(TrainerCallback):
    """Appends logs and evaluations to `metrics.jsonl`, one JSON object a line, with every alpha at each evaluation.

    Args:
        path: the file. Rows of an earlier run are kept: the caller decides whether this is a new run.
        clock: seconds of training so far, for the rows of evaluations; None (default) leaves them out.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] | None = None):
        self.path, self.clock = Path(path), clock

    def on_train_end(self, args, state, control, **kwargs):
        # A short run may have nothing to log, and who reads its log expects one.
        if state.is_world_process_zero:
            with _writing(self.path):
                self.path.touch()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.append(state, {"event": "train", "step": state.global_step, **logs})

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        alpha = gate_values(model)
        row = {"event": "eval", "step": state.global_step, "split": "validation", **measured_in(metrics)}
        clock = {} if self.clock is None else {"training_seconds": self.clock()}
        self.append(state, {**row, **clock, "alpha": alpha})

    def append(self, state, row: dict) -> None:
        """Write one row, on the main process.

        Raises:
            UserError: it cannot be written.
        """
        if state.is_world_process_zero:
            append_row(self.path, row)


def append_row(path: Path, row: dict) -> None:
    """Add one JSON object to a file of one a line. A number that is not finite, which JSON lacks, becomes null.

    Raises:
        UserError: it cannot be written.
    """
    with _writing(path), path.open("ab+") as file:
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        # A kill may have torn the last line.
        file.seek(max(file.tell() - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(("\n" * torn + line).encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make the file's folder, and say of what goes wrong inside which file it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; the same command goes on from the last complete checkpoint."
        ) from error


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class BitsPerByteProgress(ProgressCallback):
    """The usual progress bar, with loss, bits per byte and tokens/s beside it instead of a dictionary now and then."""

    SHOWN: ClassVar = {
        "loss": "loss {:.3f}",
        "bits_per_byte": "{:.3f} bits/byte",
        "tokens_per_second": "{:,.0f} tokens/s",
    }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            shown = [text.format(logs[name]) for name, text in self.SHOWN.items() if name in logs]
            self.training_bar.set_postfix_str(", ".join(shown))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None and "eval_bits_per_byte" in metrics:
            measured = f"{metrics['eval_bits_per_byte']:.3f} bits per byte on validation"
            self.training_bar.write(f"step {state.global_step}: {measured}")
