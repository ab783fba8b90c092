"""What is really in effect when a run starts, read off the environment and the parameters, not off the request."""

import ctypes
import math
import os
import re
import signal
import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

from .arguments import sequences_per_step
from .errors import UserError, one_line
from .optim import gates
from .planning import describe, make_plan
from .runs import cores


# What a launcher tells its processes.
LAUNCHER = re.compile(
    r"(ACCELERATE|FSDP|PARALLELISM_CONFIG|TORCHELASTIC)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
)
# Of Linux' prctl: the signal to get when the parent process ends.
PR_SET_PDEATHSIG = 1


def check_launch() -> None:
    """Make up for two things that `accelerate launch` does with a single process.

    For `--cpu --num_processes N` without MPI it announces where the processes would meet, and starts one. And it keeps
    a signal to itself: it dies of SIGTERM and leaves the process it started to train on, which nobody expects. So that
    one asks Linux to be told when its launcher is gone.

    Raises:
        UserError: several processes were asked for; says how to start them.
    """
    announced = {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= set(os.environ)
    if announced and not {"RANK", "WORLD_SIZE"} & set(os.environ):
        raise UserError(
            "several processes were asked for, but accelerate has started one: with --cpu it only starts more through "
            "MPI. Use accelerate launch --config_file scripts/accelerate/cpu.yaml --num_processes N (or --multi_gpu "
            "instead of --cpu, with training.use_cpu=true). If one process is what you want, unset MASTER_ADDR and "
            "MASTER_PORT."
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Have this process told to end (SIGTERM) when the one that started it is gone. Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def outside_the_launch() -> dict[str, str]:
    """The environment for a process that is not one of the run's, and must not join them."""
    return {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}


def sharding_of(model: nn.Module) -> str:
    """How a wrapped model is spread over the processes: `none`, `ddp`, `fsdp2`, or `hsdp` (replicas of shards)."""
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if sharded:
        replicated = any(isinstance(placement, Replicate) for placement in sharded[0].placements)
        return "hsdp" if replicated else "fsdp2"
    return "ddp" if any(isinstance(module, DistributedDataParallel) for module in model.modules()) else "none"


def is_sharded(sharding: str) -> bool:
    """Whether parameters are spread over processes under that word of `sharding_of`."""
    return sharding in ("fsdp2", "hsdp")


def shards_of(model: nn.Module) -> int:
    """How many processes share one copy of a wrapped model's parameters; 1 if they are whole."""
    parameter = next((parameter for parameter in model.parameters() if isinstance(parameter, DTensor)), None)
    if parameter is None:
        return 1
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if not isinstance(placement, Replicate))


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether a run was told to shard, by its own words or by accelerate's launcher; not whether it does."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class LaunchReport(TrainerCallback):
    """Says at the start what is in effect, and stops if it is not what was asked for.

    Args:
        trainer: a `ReZeroTrainer`.
        block_size: tokens of a sequence.
    """

    def __init__(self, trainer, block_size: int):
        self._trainer, self._block_size = trainer, block_size

    def on_train_begin(self, args, state, control, **kwargs):
        model = self._trainer.model_wrapped
        sharding = sharding_of(model)
        self._check(args, sharding)
        if state.is_world_process_zero:
            # The forecast takes seconds that are not training.
            with self._trainer.throughput.pause():
                forecast = self._forecast(args, state)
            print("\n".join([forecast, *in_effect(self._trainer, sharding)]), flush=True)

    def _forecast(self, args, state) -> str:
        config, shards = self._trainer.model.config, shards_of(self._trainer.model_wrapped)
        try:
            # Nothing is to be compared any more, and the first step waits.
            return describe(make_plan(config, args, self._block_size, state.max_steps, shards=shards, compare=False))
        except Exception as error:
            # A run is not stopped for want of a forecast.
            return f"no plan: {type(error).__name__}: {one_line(error, None)}"

    def _check(self, args, sharding: str) -> None:
        if asks_for_fsdp(args) and not is_sharded(sharding):
            raise UserError(
                f"FSDP was asked for, but the parameters are whole tensors ({sharding}): accelerate shards on "
                "accelerators only. On a CPU use scripts/accelerate/cpu.yaml; elsewhere set fsdp_version: 2, and leave "
                "use_cpu out."
            )
        if args.world_size > 1 and sharding == "none":
            raise UserError(f"{args.world_size} processes, but nothing joins their gradients; launch with accelerate.")


def in_effect(trainer, sharding: str) -> list[str]:
    """Lines about processes, sharding, precision, batch and data order, for a person to read."""
    args: Any = trainer.args
    autocast = trainer.accelerator.mixed_precision
    precision = "fp32" if autocast == "no" else f"{autocast} autocast"
    parameters = {str(parameter.dtype).removeprefix("torch.") for parameter in trainer.model.parameters()}
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    lines = [
        f"  processes    {args.world_size} on {machines} machine(s), device {args.device.type}, sharding {sharding}",
        f"  precision    {precision}, parameters {', '.join(sorted(parameters))}",
        f"  batch        {sequences_per_step(args)} sequences a step: {args.per_device_train_batch_size} per device, "
        f"{args.world_size} process(es), {args.gradient_accumulation_steps} pass(es)",
        f"  data order   a function of training.seed={args.seed} and the step; any number of processes sees the same",
    ]
    threads = torch.get_num_threads()
    if args.device.type == "cpu" and threads < cores() // args.world_size:
        lines.append(f"  threads      {threads}; more: accelerate launch --num_cpu_threads_per_process N")
    if any(alpha.dtype != torch.float32 for alpha in gates(trainer.model).values()):
        lines.append(
            "  warning      alphas are not fp32: updates smaller than 1/256 of a gate are rounded away and it stops "
            "learning; train fp32 parameters with training.bf16=true"
        )
    return lines
