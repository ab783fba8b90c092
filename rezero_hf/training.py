"""What Transformers' Trainer lacks for ReZero pretraining, and nothing else: gate groups, bits per byte, records."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, Trainer

from .arguments import ReZeroTrainingArguments
from .callbacks import MEASURED, BitsPerByteProgress, MetricsLog
from .data import IGNORE_INDEX, PreparedData
from .errors import UserError
from .optim import make_optimizer


def training_steps(args: ReZeroTrainingArguments, prepared: PreparedData) -> int:
    """Optimiser steps of the run: `max_steps`, or what `num_train_epochs` passes over the training tokens take.

    Raises:
        UserError: neither gives a step.
    """
    if args.max_steps > 0:
        return args.max_steps
    blocks = prepared.totals("train")["tokens"] // prepared.config.block_size
    steps = math.ceil(args.num_train_epochs * blocks / sequences_per_step(args))
    if steps < 1:
        raise UserError(f"training.num_train_epochs={args.num_train_epochs} gives no step; raise it or set max_steps.")
    return steps


def sequences_per_step(args: ReZeroTrainingArguments) -> int:
    """Sequences that one optimiser step sees over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


class ReZeroTrainer(Trainer):
    """`Trainer` with parameter groups that know gates, evaluation in bits per byte, and a record of the run.

    Takes what `Trainer` takes, and:

    Args:
        token_bytes: how many bytes of text each token id stands for (`tokenization.token_byte_lengths`), specials 0.
            With it, losses are also logged in bits per byte, and evaluation sums over the text: every token of
            `shift_labels` counts once and every byte weighs the same, whatever the batch size, the padding or the
            number of processes. Without it (None, default) evaluation is the library's.
        run_dir: where `metrics.jsonl` goes; None (default) writes none.
    """

    def __init__(
        self,
        *args,
        token_bytes: np.ndarray | None = None,
        run_dir: str | Path | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.token_bytes = None if token_bytes is None else torch.as_tensor(token_bytes, device=self.args.device)
        if self.token_bytes is not None and self.compute_metrics is None:
            self.compute_metrics = _sum_over_text
        if run_dir is not None:
            self.add_callback(MetricsLog(Path(run_dir) / "metrics.jsonl"))
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(BitsPerByteProgress)
        if self.token_bytes is not None and self.args.remove_unused_columns:
            raise UserError("remove_unused_columns=True would drop shift_labels, which the loss needs; leave it out.")
        self._seen = {"tokens": 0, "bytes": 0}
        self._tokens = 0
        self._start = self._interval_start = time.perf_counter()

    def train(self, *args, **kwargs):
        self._start = self._interval_start = time.perf_counter()
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`make_optimizer` with the words of `ReZeroTrainingArguments`; else the library's optimiser."""
        if self.optimizer is None and isinstance(self.args, ReZeroTrainingArguments):
            self.optimizer = make_optimizer(
                self.model if model is None else model,
                self.args.optimizer,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                gate_lr_multiplier=self.args.gate_lr_multiplier,
                matrix_lr_multiplier=self.args.matrix_lr_multiplier,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return super().create_optimizer(model)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.token_bytes is not None:
            targets = inputs["shift_labels"].to(self.args.device)
            self._seen["tokens"] += (targets != IGNORE_INDEX).sum()
            self._seen["bytes"] += self._bytes_of(targets).sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.token_bytes is not None:
            seconds = time.perf_counter() - self._interval_start
            tokens, text = (int(self.accelerator.reduce(self._seen[name])) for name in ("tokens", "bytes"))
            logs["bits_per_byte"] = logs["loss"] / math.log(2) * tokens / text if text else math.nan
            logs["tokens_per_second"] = tokens / seconds
            self._tokens += tokens
            logs["tokens"] = self._tokens
            logs["wall_seconds"] = round(time.perf_counter() - self._start, 3)
            self._seen = {"tokens": 0, "bytes": 0}
            self._interval_start = time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        # Evaluation does not count against the training speed of the interval it falls in.
        self._interval_start += time.perf_counter() - started
        return metrics

    def evaluate_text(self, dataset: Dataset) -> dict[str, float]:
        """Loss (nats per token), bits per byte, tokens and bytes of a whole data set, outside the metrics log."""
        metrics = self.predict(dataset, metric_key_prefix="eval").metrics
        return {name: metrics[f"eval_{name}"] for name in MEASURED}

    def prediction_step(self, model, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        """With `token_bytes`: (None, summed nats per row, [tokens, bytes] per row), which `evaluate` sums."""
        if self.token_bytes is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        targets = inputs["shift_labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        nats = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        counts = torch.stack([(targets != IGNORE_INDEX).sum(-1), self._bytes_of(targets).sum(-1)], dim=-1)
        return None, nats.view_as(targets).sum(-1), counts

    def _bytes_of(self, targets: torch.Tensor) -> torch.Tensor:
        return self.token_bytes[targets.clamp(min=0)] * (targets != IGNORE_INDEX)


def _sum_over_text(rows: EvalPrediction) -> dict[str, float]:
    nats = float(rows.predictions.sum(dtype=np.float64))
    tokens, text = (int(count) for count in rows.label_ids.sum(0))
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / text if text else math.nan,
        "tokens": tokens,
        "bytes": text,
    }
