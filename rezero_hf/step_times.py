"""What a training step costs, form against form: all of them in one process, by turns.

Runs of a study share the machine with each other and with whatever else it does, so their clocks do not compare. On a
CPU the clock is the time that one thread had its core, which is what it would take on an idle machine.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from statistics import median

import torch
from torch import nn
from transformers import set_seed

from .arguments import compute_dtype, optimizer_for
from .experiments import MODELS, set_up
from .recipe import Recipe
from .turns import by_turns


def step_times(recipes: Mapping[str, Recipe], seconds: float | None = None) -> dict[str, float]:
    """The median seconds of an optimiser step of each recipe: forward, backward, clipping and update.

    Data are not loaded while the clock runs, and nothing is logged, evaluated or saved. Models are not compiled, and
    activations not checkpointed.

    Args:
        recipes: by any name. All their models are in memory at once.
        seconds: after so many no further turn begins; default a minute on a CPU, where steps are long and others
            disturb them, and 10 on an accelerator.

    Returns:
        name -> seconds.
    """
    if seconds is None:
        seconds = 10 if torch.accelerator.is_available() else 60
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arms = {name: _Arm(recipe) for name, recipe in recipes.items()}
        # The first step makes the optimiser's state, the second meets it.
        taken = by_turns({name: arm.step for name, arm in arms.items()}, seconds, warm_up=2)
    finally:
        torch.set_num_threads(before)
    return {name: median(times) for name, times in taken.items()}


class _Arm:
    """A model, its optimiser and one batch."""

    def __init__(self, recipe: Recipe):
        args = self.args = recipe.training_arguments("unused")
        setting = set_up(recipe, args)
        set_seed(args.seed)
        self.model = MODELS[recipe.model_type](setting.config).to(args.device).train()
        # As Trainer does it, which keeps no keys and values while it trains.
        self.model.config.use_cache = args.use_cache
        self.optimizer = optimizer_for(self.model, args)
        rows = [setting.words["train_dataset"][place] for place in range(args.per_device_train_batch_size)]
        self.batch = {key: torch.stack([row[key] for row in rows]).to(args.device) for key in rows[0]}

    def step(self) -> float:
        """Take one step; its seconds."""
        args, dtype = self.args, compute_dtype(self.args)
        cast = nullcontext() if dtype is torch.float32 else torch.autocast(args.device.type, dtype)
        start = self._clock()
        for _ in range(args.gradient_accumulation_steps):
            with cast:
                loss = self.model(**self.batch).loss
            (loss / args.gradient_accumulation_steps).backward()
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._clock() - start

    def _clock(self) -> float:
        if self.args.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()
