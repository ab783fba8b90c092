"""What a run will take, told before anything is rented: memory, arithmetic and time."""

import copy
import os
import platform
from dataclasses import dataclass
from unittest.mock import patch

import torch

from .arguments import ReZeroTrainingArguments
from .errors import UserError
from .flops import flops_per_token, peak_for
from .glibc_heap import GlibcHeap
from .markdown import duration
from .memory import MemoryPlan, language_model, plan_memory
from .models import ReZeroConfig
from .models.gating import LEAST_VALUES, least_values


@dataclass(frozen=True)
class RunPlan:
    """What a run takes.

    Attributes:
        parameters: of the model, a tied one once.
        flops_per_token: see the function of that name.
        tokens_per_step: over all devices.
        steps: optimiser steps.
        world_size: devices.
        shards: devices that share one copy of weights, gradients and optimiser state; 1 without FSDP.
        checkpointing: whether the run recomputes activations.
        plain, checkpointed: memory without and with that; None if it was not to be planned.
        peak: FLOP/s of one device; None where it is not known.
        capacity: bytes of one device; None where the device at hand is not a GPU.
    """

    parameters: int
    flops_per_token: int
    tokens_per_step: int
    steps: int
    world_size: int
    shards: int
    checkpointing: bool
    plain: MemoryPlan | None
    checkpointed: MemoryPlan | None
    peak: float | None
    capacity: int | None

    @property
    def memory(self) -> MemoryPlan:
        """The one of the two that the run will take."""
        return self.checkpointed if self.checkpointing else self.plain

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        return self.tokens * self.flops_per_token

    def hours(self, mfu: float) -> float | None:
        """Training time in hours when the share `mfu` of the devices' peak goes into the model; None without a peak."""
        return None if self.peak is None else self.flops / (self.peak * mfu * self.world_size) / 3600


def make_plan(
    config: ReZeroConfig,
    args: ReZeroTrainingArguments,
    block_size: int,
    steps: int,
    world_size: int | None = None,
    shards: int = 1,
    device: str | None = None,
    compare: bool = True,
) -> RunPlan:
    """Plan a run. Allocates nothing, and leaves random numbers and the distributed state alone.

    Not in the plan: what a device's driver and libraries take, a GPU's holes between allocations, what
    `torch.compile` saves, evaluation. With dropout it is high for a GPU, which keeps a byte for each dropped feature
    where the CPU, whose operators are counted, keeps a whole number. Bytes resident on a CPU are planned for one
    process with glibc, by the MALLOC_MMAP_THRESHOLD_ it finds in the environment.

    Args:
        config: the model's configuration.
        args: precision, optimiser, sequences per device and accumulation; `peak_flops` in place of the table's.
            `global_batch_size`, where set, is divided among `world_size` devices anew.
        block_size: tokens of a sequence.
        steps: optimiser steps.
        world_size: devices; None (default) is what `args` found.
        shards: devices that share the weights under FSDP; 1 (default) is none.
        device: kind of device the run is for, `"cpu"` or `"cuda"`; None (default) is what `args` found. Only a CPU
            keeps attention probabilities, and only for dropout.
        compare: also plan what it would take with activation checkpointing, or without it where the run has it. That
            takes seconds as well. Default True.

    Raises:
        UserError: `global_batch_size` does not divide, or `shards` does not divide `world_size`.
    """
    world_size = world_size or args.world_size
    one_pass = args.per_device_train_batch_size * world_size
    sequences = args.global_batch_size or one_pass * args.gradient_accumulation_steps
    if sequences % one_pass:
        raise UserError(f"global_batch_size={sequences} is not a multiple of the {one_pass} sequences of one pass.")
    if world_size % shards:
        raise UserError(f"shards={shards} does not divide the {world_size} devices.")
    # As Trainer does it, which keeps no keys and values while it trains.
    planned = copy.deepcopy(config)
    planned.use_cache = args.use_cache
    device = device or args.device.type
    if device != "cpu":
        planned.attention_dropout = 0.0
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in language_model(planned).parameters())
    # The second pass of an accumulation meets the gradients of the first; further ones meet no more.
    passes = min(2, sequences // one_pass)
    has_heap = device == "cpu" and world_size == 1 and platform.libc_ver()[0] == "glibc"
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    heap = GlibcHeap(int(threshold) if threshold.isdecimal() else None) if has_heap else None
    checkpointing = bool(args.activation_checkpointing)

    def memory(recomputing: bool) -> MemoryPlan | None:
        taken = recomputing is checkpointing
        if not taken and not compare:
            return None
        # A heap only for the plan that is carried out, for it takes as long again.
        placed = heap if taken else None
        # Tensors without data all say that they are on a CPU.
        with patch.dict(LEAST_VALUES, cpu=least_values(device)):
            return plan_memory(planned, args, block_size, passes, world_size > 1, shards, recomputing, placed)

    on_gpu = device == args.device.type == "cuda"
    return RunPlan(
        parameters=parameters,
        flops_per_token=flops_per_token(config, block_size),
        tokens_per_step=sequences * block_size,
        steps=steps,
        world_size=world_size,
        shards=shards,
        checkpointing=checkpointing,
        plain=memory(False),
        checkpointed=memory(True),
        peak=peak_for(args),
        capacity=torch.cuda.get_device_properties(args.device).total_memory if on_gpu else None,
    )


def describe(plan: RunPlan, mfu: float = 0.4) -> str:
    """The plan for people: a line each for model, run, memory and time, in SI units (1 GB is 1e9 bytes).

    Args:
        plan: what `make_plan` returned.
        mfu: share of the peak that goes into the model, default 0.4, as large dense models reach on GPUs. Without a
            known peak there is no time.
    """
    memory, other = plan.memory, plan.plain if plan.checkpointing else plan.checkpointed
    parts = {
        "weights": memory.weights,
        "gathered weights": memory.gathered,
        "16-bit copies": memory.copies,
        "gradients": memory.gradients,
        "buckets": memory.buckets,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "loss": memory.loss,
    }
    shown = ", ".join(f"{name} {_si(size)}B" for name, size in parts.items() if size)
    fits = ""
    if plan.capacity is not None:
        fits = f" of {_si(plan.capacity)}B: {'fits' if memory.peak <= plan.capacity else 'DOES NOT FIT'}"
    on, off = ("with", "without") if plan.checkpointing else ("without", "with")
    devices = f"{plan.world_size} device{'s' * (plan.world_size > 1)}"
    lines = [
        f"model   {_si(plan.parameters)} parameters, {_si(plan.flops_per_token)}FLOP per token",
        f"run     {plan.steps:,} steps x {plan.tokens_per_step:,} tokens = {_si(plan.tokens)} tokens, "
        f"{_si(plan.flops)}FLOP on {devices}",
        f"memory  {_si(memory.peak)}B per device{fits} ({shown}; not all at once)",
        f"        that is {on} activation checkpointing; {off} it {_si(other.peak)}B"
        if other is not None
        else f"        that is {on} activation checkpointing; --dry-run says how much {off} it",
    ]
    if memory.resident is not None:
        # Without holes a step of 50M takes 10.8 s of CPU instead of 9.1.
        line = f"        on a CPU the process grows by about {_si(memory.resident)}B, for glibc's heap has holes"
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            line += (
                "; MALLOC_MMAP_THRESHOLD_=1048576 in the environment avoids them, and steps take about a fifth longer"
            )
        lines.append(line)
    if (hours := plan.hours(mfu)) is not None:
        total = f"{duration(3600 * hours)}, {hours * plan.world_size:,.2f} device hours"
        lines.append(f"time    {total}, at {mfu:.0%} of {_si(plan.peak)}FLOP/s per device")
    return "\n".join(lines)


def _si(number: float) -> str:
    """Three digits and an SI prefix, ready for a unit."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} Z"
