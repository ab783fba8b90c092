"""What Transformers' Trainer lacks for ReZero pretraining, and nothing else: gate groups, bits per byte, records of the
run, a watch over every step. Saving and resuming are in `resuming.py`, what becomes of a save in `pushing.py`."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, SchedulerType

from .arguments import ReZeroTrainingArguments, optimizer_for, sequences_per_step
from .blocks import IGNORE_INDEX
from .callbacks import BitsPerByteProgress, MetricsLog, measured_in
from .data import PreparedData
from .energy import EnergyMeter
from .errors import UserError
from .export import temporarily
from .flops import flops_per_token
from .models import ReZeroConfig, ReZeroForCausalLM
from .optim import NamedState, put_state
from .pushing import PushingTrainer
from .resuming import LOG
from .throughput import Throughput
from .watch import StepWatch


def training_steps(args: ReZeroTrainingArguments, prepared: PreparedData) -> int:
    """Optimiser steps of the run: `max_steps`, or what `num_train_epochs` passes over the training tokens take.

    Raises:
        UserError: neither gives a step.
    """
    return steps_over(args, prepared.totals("train")["tokens"] // prepared.config.block_size)


def steps_over(args: ReZeroTrainingArguments, rows: int) -> int:
    """The same over a data set of so many rows.

    Raises:
        UserError: `num_train_epochs` gives no step.
    """
    if args.max_steps > 0:
        return args.max_steps
    steps = math.ceil(args.num_train_epochs * rows / sequences_per_step(args))
    if steps < 1:
        raise UserError(f"training.num_train_epochs={args.num_train_epochs} gives no step; raise it or set max_steps.")
    return steps


def _dropped(schedule: Callable[[int], float], drops: list[float], step: int) -> float:
    """A schedule's factor at a step, a tenth of it for each drop that is past."""
    return schedule(step) * 0.1 ** sum(step >= drop for drop in drops)


class ReZeroTrainer(PushingTrainer):
    """`PushingTrainer` with parameter groups that know gates, evaluation in bits per byte, and a record of the run.

    Takes what `Trainer` takes, and:

    Args:
        token_bytes: how many bytes of text each token id stands for (`tokenization.token_byte_lengths`), specials 0.
            With it, losses are also logged in bits per byte, and evaluation sums over the text: every token of
            `shift_labels` counts once and every byte weighs the same, whatever the batch size, the padding or the
            number of processes. Without it (None, default) evaluation is the library's.
        run_dir: where `metrics.jsonl` goes; None (default) writes none.
        optimizer_state: what a new optimiser is to remember (`optim.put_state`); None (default): nothing. A checkpoint
            to go on from comes after it.

    With `ReZeroTrainingArguments` every step is looked at before it counts (`watch.StepWatch`).
    """

    def __init__(
        self,
        *args,
        token_bytes: np.ndarray | None = None,
        run_dir: str | Path | None = None,
        optimizer_state: NamedState | None = None,
        **kwargs,
    ):
        super().__init__(*args, run_dir=run_dir, **kwargs)
        self.optimizer_state = optimizer_state
        if optimizer_state is not None and self.is_fsdp_enabled:
            raise UserError(
                "init_from: under FSDP a whole optimiser's state cannot go over: name an export of that checkpoint "
                "(scripts/export.py), which holds weights alone."
            )
        self.token_bytes = None if token_bytes is None else torch.as_tensor(token_bytes, device=self.args.device)
        if self.token_bytes is not None and self.compute_metrics is None:
            self.compute_metrics = _sum_over_text
        self.throughput = Throughput(self.args, self.model)
        self.energy = EnergyMeter(on=self.is_world_process_zero())
        self.record = lambda state, row: None
        if run_dir is not None:
            self.log_file = Path(run_dir) / LOG
            log = MetricsLog(self.log_file, self.throughput.training_seconds)
            self.record = log.append
            self.add_callback(log)
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(BitsPerByteProgress)
        if self.token_bytes is not None and self.args.remove_unused_columns:
            raise UserError("remove_unused_columns=True would drop shift_labels, which the loss needs; leave it out.")
        self.watch = StepWatch(self) if isinstance(self.args, ReZeroTrainingArguments) else None
        if self.watch is not None:
            self.add_callback(self.watch)
        self.step_batches: list[dict[str, torch.Tensor]] = []
        self.step_losses: list[torch.Tensor] = []
        self.step_grad_norm: torch.Tensor | float = math.nan
        self._seen = {"tokens": 0, "bytes": 0}
        self._tokens = 0

    def train(self, *args, **kwargs):
        self.throughput.start()
        self.energy.start()
        try:
            with self.watch.listening() if self.watch is not None else nullcontext():
                return super().train(*args, **kwargs)
        finally:
            self.energy.stop()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`optimizer_for` the words of `ReZeroTrainingArguments`; else the library's optimiser."""
        if self.optimizer is None and isinstance(self.args, ReZeroTrainingArguments):
            self.optimizer = optimizer_for(self.model if model is None else model, self.args)
            if self.optimizer_state is not None:
                put_state(self.optimizer, self.model if model is None else model, self.optimizer_state)
                self.optimizer_state = None
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The library's schedule, with `lr_drops` over it, and the gates left out of it under `gate_lr_constant`."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        args, given = self.args, self.args.lr_scheduler_kwargs
        if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            given = {"num_decay_steps": num_training_steps - args.get_warmup_steps(num_training_steps), **(given or {})}
        with temporarily(args, lr_scheduler_kwargs=given):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        drops = [share * num_training_steps for share in getattr(args, "lr_drops", None) or ()]
        constant = getattr(args, "gate_lr_constant", False)
        if not drops and not constant:
            return scheduler
        if not isinstance(scheduler, LambdaLR):
            word = "lr_drops" if drops else "gate_lr_constant"
            raise UserError(f"{word} does not go with lr_scheduler_type={args.lr_scheduler_type}.")
        for place, group in enumerate(scheduler.optimizer.param_groups):
            if constant and group.get("name") == "gates":
                scheduler.lr_lambdas[place] = lambda step: 1.0
                group["lr"] = group["initial_lr"]
            else:
                scheduler.lr_lambdas[place] = partial(_dropped, scheduler.lr_lambdas[place], drops)
        return scheduler

    def floating_point_ops(self, inputs) -> int:
        """What the library sums as `total_flos`: `flops_per_token` for every token, where it says 6 per parameter."""
        if not isinstance(self.model.config, ReZeroConfig):
            return super().floating_point_ops(inputs)
        rows, length = inputs["input_ids"].shape
        return rows * length * flops_per_token(self.model.config, length)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        arriving = self.throughput.waiting_for(epoch_iterator)
        batches, items = super().get_batch_samples(arriving, num_batches, device)
        self.step_batches, self.step_losses = batches, []
        self._before_step = self._tr_loss.clone(), dict(self._seen)
        return batches, items

    def get_train_dataloader(self):
        """The library's, with loader processes that outlive a signal to all: the main one decides when they end."""
        loader = super().get_train_dataloader()
        for inner in (loader, getattr(loader, "base_dataloader", loader)):
            inner.worker_init_fn = partial(_start_loader, inner.worker_init_fn)
        return loader

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.token_bytes is not None:
            targets = inputs["shift_labels"].to(self.args.device)
            # Not in place: `_before_step` has the old ones.
            self._seen["tokens"] = self._seen["tokens"] + (targets != IGNORE_INDEX).sum()
            self._seen["bytes"] = self._seen["bytes"] + self._bytes_of(targets).sum()
        loss = super().training_step(model, self.for_the_loss(inputs), num_items_in_batch)
        # A copy: a compiled step may put the next loss in the same place.
        self.step_losses.append(loss.clone())
        return loss

    def for_the_loss(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model takes it where its logits are not looked at."""
        return {**inputs, "skip_logits": True} if isinstance(self.model, ReZeroForCausalLM) else inputs

    def _get_grad_norm(self, model, grad_norm=None):
        self.step_grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.step_grad_norm

    def forget_step(self) -> None:
        """Take the current step's loss and text out of what the next log line shows."""
        loss, self._seen = self._before_step
        self._tr_loss.copy_(loss)
        self._globalstep_last_logged += 1

    @property
    def told_to_stop(self) -> bool:
        return self.watch is not None and self.watch.preempted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.token_bytes is not None:
            counts = torch.tensor([int(self._seen["tokens"]), int(self._seen["bytes"])], device=self.args.device)
            tokens, text = self.accelerator.reduce(counts).tolist()
            logs["bits_per_byte"] = logs["loss"] / math.log(2) * tokens / text if text else math.nan
            self._tokens += tokens
            length = self.step_batches[0]["input_ids"].shape[1]
            logs |= {"tokens": self._tokens, **self.throughput.interval(tokens, length)}
            self._seen = {"tokens": 0, "bytes": 0}
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        # Neither evaluating nor saving counts against the training speed of the interval it falls in.
        with self.throughput.pause():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        started = time.perf_counter()
        with self.throughput.pause():
            super()._save_checkpoint(model, trial)
        seconds = round(time.perf_counter() - started, 3)
        self.record(self.state, {"event": "save", "step": self.state.global_step, "seconds": seconds})

    def run_so_far(self) -> dict[str, Any]:
        run, state = super().run_so_far(), self.state
        if state.global_step < state.max_steps:
            run |= {"training_seconds": self.throughput.seconds(), **self.energy.record()}
            if "tokens" in run:
                run["tokens"] = run["tokens"] * state.global_step // state.max_steps
        rows = reversed(state.log_history)
        measured = next((row for row in rows if row.keys() & {"eval_bits_per_byte", "eval_accuracy"}), None)
        if measured is not None:
            run["results"] = {"validation": measured_in(measured)}
        return run

    def own_state(self) -> dict[str, Any]:
        shared = {"tokens": self._tokens, "clock": self.throughput.state(), "energy_kwh": self.energy.kwh()}
        if self.watch is not None:
            shared["watch"] = self.watch.state()
        return {"shared": shared, "each": {name: int(count) for name, count in self._seen.items()}}

    def restore_own_state(self, shared: dict[str, Any], each: list[dict[str, Any]]) -> None:
        self._tokens = shared["tokens"]
        self.throughput.start(**shared["clock"])
        self.energy.start(shared.get("energy_kwh"))
        if self.watch is not None and "watch" in shared:
            self.watch.restore(shared["watch"])
        if len(each) == self.args.world_size:
            each = [each[self.args.process_index]]
        elif self.args.process_index:
            # Only sums over all processes are ever shown: the first one takes over the counts of all there were.
            each = []
        self._seen = {name: sum(own[name] for own in each) for name in self._seen}
        self.record(self.state, {"event": "resume", "step": self.state.global_step, "world_size": self.args.world_size})

    def measure(self, dataset: Dataset) -> dict[str, float]:
        """Loss (nats) of a whole data set, outside the metrics log; of text bits per byte, tokens and bytes, of images
        accuracy."""
        return measured_in(self.predict(dataset, metric_key_prefix="eval").metrics)

    def prediction_step(self, model, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        """With `token_bytes`: (None, summed nats per row, [tokens, bytes] per row), which `evaluate` sums."""
        if self.token_bytes is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        targets = inputs["shift_labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            nats = self._nats(model, inputs["input_ids"], targets)
        counts = torch.stack([(targets != IGNORE_INDEX).sum(-1), self._bytes_of(targets).sum(-1)], dim=-1)
        return None, nats.sum(-1), counts

    def _nats(self, model, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of each token, (rows, tokens); with a model of this package never from all logits at once, as in training."""
        if isinstance(self.model, ReZeroForCausalLM):
            words = {"labels": input_ids, "shift_labels": targets, "reduction": "none", "use_cache": False}
            return model(**self.for_the_loss({"input_ids": input_ids, **words})).loss
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
        return nn.functional.cross_entropy(logits.mT, targets, reduction="none")

    def _bytes_of(self, targets: torch.Tensor) -> torch.Tensor:
        return self.token_bytes[targets.clamp(min=0)] * (targets != IGNORE_INDEX)


def _start_loader(then: Callable[[int], None] | None, number: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(number)


def _sum_over_text(rows: EvalPrediction) -> dict[str, float]:
    nats = float(rows.predictions.sum(dtype=np.float64))
    tokens, text = (int(count) for count in rows.label_ids.sum(0))
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / text if text else math.nan,
        "tokens": tokens,
        "bytes": text,
    }
