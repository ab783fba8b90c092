"""Training arguments: Transformers' own, and the few words they lack."""

import inspect
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import trainer_log_levels

from .errors import UserError, one_line
from .optim import OptimizerName, check_optimizer, make_optimizer
from .strict import check_names


COUNTS = ("gradient_accumulation_steps", "global_batch_size", "eval_blocks", "final_eval_blocks", "peak_flops")
MULTIPLIERS = ("gate_lr_multiplier", "matrix_lr_multiplier")
# What the library takes out of `activation_checkpointing_kwargs` for itself, with its defaults; the rest is torch's.
CHECKPOINTING = {"every_n_layers": 1, "offload": False}
# How many seeds there are: what every generator takes.
SEEDS = 2**32
# What evaluations give, besides losses, of which less is better.
LESS_IS_BETTER = ("bits_per_byte", "perplexity")


@dataclass
class ReZeroTrainingArguments(TrainingArguments):
    """`TrainingArguments` for `ReZeroTrainer`: every field of the library keeps its name; these are added or changed.

    Added:
        global_batch_size: sequences per optimiser step over all processes. Gradient accumulation is derived from it,
            from `per_device_train_batch_size` and from the number of processes, so a recipe trains the same on any
            machine. None (default) leaves `gradient_accumulation_steps` as given.
        optimizer: `adamw` (default), `adagrad`, `sgd`, `lamb` (the paper's three) or `muon`; built by
            `rezero_hf.optim.make_optimizer`. The library's `optim` is not used.
        momentum: of `sgd`, default 0.9.
        gate_lr_multiplier: learning rate of the gates over that of the rest, default 1, the paper's. More lets gates
            that begin at 0 leave it within a short run: with AdamW at 12 layers, width 96 and 500 steps, 64 (4 is most
            of it) ends at 2.304 +- 0.031 bits per byte, 1 at 2.382 +- 0.011 (model_cards/gate_rate); at width 512 128
            ends at 1.661 +- 0.041, 1 at 2.010 +- 0.005 (model_cards/lm12_wide). Where they leave it anyway more may
            cost: the quickstart ends behind with 4 (model_cards/LOG.md, section 27).
        gate_lr_constant: hold the gates' learning rate whatever the schedule of the rest, as the authors do under a
            one-cycle schedule; default False.
        lr_drops: shares of the run, each in (0, 1), after which every rate that follows the schedule falls to a tenth,
            as the authors' do at 0.5 and 0.75 (paper, section 5); None (default) is no drop.
        eval_blocks: evaluations during training read this many blocks, evenly spaced over the split and always the
            same; None (default) reads all.
        final_eval_blocks: the same for the evaluation of validation and test at the end of a run; its numbers are the
            ones the model card shows, so only smoke tests set it.
        matrix_lr_multiplier: with Muon, learning rate of the orthogonalised matrices over that of the rest, default 1.
        nonfinite: what to do with a step whose loss or gradient is not finite: `stop` (default) ends the run and says
            which blocks and layers were at it; `skip` leaves the step out. Neither lets it reach the parameters.
        max_skipped_steps: with `skip`, how many steps of a run may be left out before it stops after all, default 10.
        peak_flops: the device's peak in FLOP/s at the run's precision, for the model FLOPs utilisation; None (default)
            looks it up by the device's name (`flops.peak_flops`), which knows no CPU.

    Changed defaults:
        train_sampling_strategy: `sequential`, because `TrainBlocks` is already in a shuffled order that is a function
            of (seed, index), which is what makes a resume exact.
        logging_nan_inf_filter: False: a step that is not finite must show.
        remove_unused_columns: False: `shift_labels` is no named argument of the model's forward.
        ddp_find_unused_parameters: False: every parameter gets a gradient in every step (zeros while alpha is 0), and
            looking for others costs a walk through the graph.
        lr_scheduler_type `warmup_stable_decay` without `num_decay_steps` in `lr_scheduler_kwargs` falls from the end of
            the warm-up on, so that a recipe says its length once.
        logging_steps 10: the library's 500 shows nothing of a short run. disable_tqdm stays the library's choice.

    Raises:
        UserError: a value is out of range, `global_batch_size` is not a multiple of what one pass over all processes
            takes, the optimiser's package is not installed, one process sees several GPUs, or accelerate was told
            another precision.
    """

    global_batch_size: int | None = field(default=None)
    optimizer: OptimizerName = field(default="adamw")
    momentum: float = field(default=0.9)
    gate_lr_multiplier: float = field(default=1.0)
    gate_lr_constant: bool = field(default=False)
    lr_drops: list[float] | None = field(default=None)
    matrix_lr_multiplier: float = field(default=1.0)
    nonfinite: Literal["stop", "skip"] = field(default="stop")
    max_skipped_steps: int = field(default=10)
    peak_flops: float | None = field(default=None)
    eval_blocks: int | None = field(default=None)
    final_eval_blocks: int | None = field(default=None)
    train_sampling_strategy: str = field(default="sequential")
    logging_nan_inf_filter: bool = field(default=False)
    remove_unused_columns: bool | None = field(default=False)
    ddp_find_unused_parameters: bool | None = field(default=False)
    logging_steps: float = field(default=10)
    # The library's own from 5.23 on, which is what their defaults are.
    activation_checkpointing: bool | None = field(default=None)
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(default=None)

    def __post_init__(self):
        self._check_values()
        if not hasattr(TrainingArguments, "activation_checkpointing"):
            # Until then it reads them under the names that it still takes for the same.
            for word in ("checkpointing", "checkpointing_kwargs"):
                said = getattr(self, f"activation_{word}") or getattr(self, f"gradient_{word}")
                setattr(self, f"activation_{word}", said)
                setattr(self, f"gradient_{word}", said)
        # The library refuses bf16 without an accelerator unless told that the CPU is meant; recipes run on both.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and best in LESS_IS_BETTER:
            # The library knows that of losses alone.
            self.greater_is_better = False
        super().__post_init__()
        self._check_devices()
        self._check_schedule()
        self._check_checkpointing()
        available = get_available_reporting_integrations()
        for tracker in self.report_to:
            if tracker not in available:
                known = ", ".join(sorted(available)) or "none"
                raise UserError(f"report_to={tracker!r}: this tracker is not installed; installed: {known}.")
        if self.global_batch_size is None:
            return
        one_pass = self.per_device_train_batch_size * self.world_size
        if self.global_batch_size % one_pass:
            raise UserError(
                f"global_batch_size={self.global_batch_size} is not a multiple of the {one_pass} sequences of one pass "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} x {self.world_size} processes); "
                "change one of them."
            )
        self.gradient_accumulation_steps = self.global_batch_size // one_pass

    def _check_devices(self):
        """What would make a run another one than the recipe says, without a word."""
        if self.n_gpu > 1:
            raise UserError(
                f"{self.n_gpu} GPUs in one process would split every batch between them; use accelerate launch "
                "--config_file scripts/accelerate/ddp.yaml, or one of them: CUDA_VISIBLE_DEVICES=0."
            )
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched != "no" and not (self.bf16 or self.fp16):
            raise UserError(
                f"accelerate was told mixed_precision={launched}, the recipe says neither bf16 nor fp16; set "
                f"training.{launched}=true, or mixed_precision: 'no' in accelerate's file."
            )

    def _check_schedule(self):
        """Else it would be made when the data are read and the model is there."""
        if not self.lr_scheduler_kwargs:
            return
        optimizer = torch.optim.SGD([torch.zeros(1)])
        steps = {"num_warmup_steps": 0, "num_training_steps": 1}
        words = self.lr_scheduler_kwargs
        if self.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            words = {"num_decay_steps": 1, **words}
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=words)
        except (TypeError, ValueError) as error:
            kind = f"lr_scheduler_type={SchedulerType(self.lr_scheduler_type).value}"
            raise UserError(
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} does not go with {kind}: {one_line(error)}"
            ) from error

    def _check_checkpointing(self):
        """Else it would be the first step that stumbles, or nothing at all."""
        said = self.activation_checkpointing_kwargs
        if not said:
            return
        named = inspect.signature(checkpoint).parameters.values()
        torchs = {word.name for word in named if word.kind is word.KEYWORD_ONLY} | {"preserve_rng_state"}
        check_names(said, {*CHECKPOINTING, *torchs}, "activation_checkpointing_kwargs: word")
        words = {**CHECKPOINTING, **said}
        every, offload = (words.pop(name) for name in CHECKPOINTING)
        if type(every) is not int or every < 1 or type(offload) is not bool:
            raise UserError(
                f"activation_checkpointing_kwargs={said}: every_n_layers has to be at least 1, offload true or false."
            )
        try:
            checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **words})
        except (TypeError, ValueError) as error:
            raise UserError(f"activation_checkpointing_kwargs={said}: {one_line(error)}") from error

    def _check_values(self):
        """What the library would only stumble over later, with a traceback."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", *COUNTS):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1.")
        for name in ("learning_rate", "seed", "num_train_epochs", "weight_decay", *MULTIPLIERS):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: must be a finite number, 0 or more.")
        if self.seed >= SEEDS:
            raise UserError(f"seed={self.seed}: must be below 2**32.")
        for name in ("adam_beta1", "adam_beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be in [0, 1).")
        if not all(0 < share < 1 for share in self.lr_drops or ()):
            raise UserError(f"lr_drops={self.lr_drops}: must be shares of the run, each between 0 and 1.")
        if self.max_steps == 0:
            raise UserError("max_steps=0: must be at least 1, or -1 to count num_train_epochs instead.")
        if self.dataloader_num_workers < 0:
            raise UserError(f"dataloader_num_workers={self.dataloader_num_workers}: must be 0 or more.")
        for name in ("log_level", "log_level_replica"):
            if getattr(self, name) not in trainer_log_levels:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; one of {', '.join(trainer_log_levels)}.")
        if self.nonfinite not in ("stop", "skip"):
            raise UserError(f"nonfinite={self.nonfinite!r} is unknown; one of stop, skip.")
        if self.max_skipped_steps < 0:
            raise UserError(f"max_skipped_steps={self.max_skipped_steps}: must be 0 or more.")
        if self.optim != TrainingArguments.optim or self.optim_args:
            raise UserError(f"optim={self.optim}: this trainer builds its own; choose with optimizer, one word.")
        check_optimizer(self.optimizer)


def optimizer_for(model: nn.Module, args: ReZeroTrainingArguments) -> torch.optim.Optimizer:
    """`optim.make_optimizer` with a run's words."""
    return make_optimizer(
        model,
        args.optimizer,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        gate_lr_multiplier=args.gate_lr_multiplier,
        matrix_lr_multiplier=args.matrix_lr_multiplier,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        momentum=args.momentum,
    )


def sequences_per_step(args: TrainingArguments) -> int:
    """Sequences that one optimiser step sees over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """The type of the matrix products."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
