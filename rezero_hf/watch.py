"""A look at every step before it counts: is it finite, does the loss leap, has this process been told to stop?"""

import math
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean, pstdev
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from .arguments import sequences_per_step
from .callbacks import gate_values
from .errors import UserError


# A loss this many standard deviations above the last steps' is recorded as a spike, once there are steps to judge by.
SPIKE_DEVIATIONS = 6.0
SPIKE_WINDOW = 64
# What a script that was told to stop ends with: 128 + SIGTERM, as if the signal had ended the process. A scheduler must
# not take the run for finished.
PREEMPTED = 143


class NotFiniteError(UserError):
    """A step's loss or gradient was not finite, and the run ends there; says where it came from."""


class StepWatch(TrainerCallback):
    """Judges each step between backward pass and update, on all processes alike.

    SIGTERM (pre-emption) only sets a flag; the step in which any process has it is finished, saved and the last.
    A loss or gradient that is not finite never reaches the parameters: `stop` ends the run, `skip` leaves the step out
    and goes on, at most `max_skipped_steps` times. A loss far above the recent ones is recorded and nothing else.

    Reading the loss waits for the device once a step, and processes exchange two numbers; both are lost in a step of
    more than a few milliseconds.

    Args:
        trainer: a `ReZeroTrainer`, which keeps the step's batches, losses and gradient norm, and the run's log.

    Attributes:
        preempted: whether the run was told to stop and has saved.
        skipped: steps left out so far.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._told_to_stop = False
        self.preempted = False
        self.skipped = 0
        self._counts: list[int | None] = []

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"recent_losses": list(self._recent), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._recent = deque(state["recent_losses"], maxlen=SPIKE_WINDOW)
        self.skipped = state["skipped"]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM inside is a request; outside it is what it was."""
        self._told_to_stop = self.preempted = False
        # Only the main thread may say what a signal does.
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(signum, frame):
            self._told_to_stop = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        told, loss, norm = self._agree(args)
        self.preempted = told > 0
        # Under fp16 an infinite gradient is how the loss scaler finds its scale; it skips the step itself.
        if not math.isfinite(loss) or not (math.isfinite(norm) or args.fp16):
            self._not_finite(args, state, loss, norm)
            return
        if len(self._recent) >= SPIKE_WINDOW // 2:
            usual = fmean(self._recent)
            if loss > usual + SPIKE_DEVIATIONS * max(pstdev(self._recent), 1e-3):
                row = {"event": "spike", "step": state.global_step + 1, "loss": loss, "usual": usual}
                self._trainer.record(state, {**row, "blocks": self._blocks(state.global_step)})
        self._recent.append(loss)

    def on_optimizer_step(self, args, state, control, **kwargs):
        for group, count in zip(self._trainer.optimizer.param_groups, self._counts, strict=False):
            if count is not None:
                group["step"] = count
        self._counts = []

    def on_step_end(self, args, state, control, **kwargs):
        if self.preempted:
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.preempted:
            # The epoch is not over; what its end would do is for the launch that goes on.
            control.should_log = control.should_evaluate = control.should_save = False
        return control

    def _agree(self, args) -> tuple[float, float, float]:
        """How many processes were told to stop, the step's loss over all of them, and its gradient norm."""
        trainer = self._trainer
        mine = torch.stack([torch.tensor(float(self._told_to_stop), device=args.device), sum(trainer.step_losses)])
        told, loss = trainer.accelerator.reduce(mine.float(), "mean").tolist()
        return told, loss, float(trainer.step_grad_norm)

    def _blocks(self, step: int) -> list[int]:
        """First and last number of the blocks that a step trains on."""
        each = sequences_per_step(self._trainer.args)
        return [step * each, (step + 1) * each - 1]

    def _not_finite(self, args, state, loss: float, norm: float) -> None:
        trainer, step = self._trainer, state.global_step + 1
        skip = args.nonfinite == "skip" and self.skipped < args.max_skipped_steps
        found = {
            "event": "nonfinite",
            "step": step,
            "skipped": skip,
            "loss": str(loss),
            "grad_norm": str(norm),
            "blocks": self._guilty_blocks(args, step - 1),
            "largest_activation": self._largest_activations(),
            "alpha": gate_values(trainer.model),
        }
        # Without gradients the optimiser leaves every parameter and every moment as it was; some count the step though.
        trainer.optimizer.zero_grad(set_to_none=True)
        self._counts = [group.get("step") for group in trainer.optimizer.param_groups]
        trainer.record(state, found)
        if skip:
            self.skipped += 1
            trainer.forget_step()
            return
        layers = "; ".join(
            f"{name}: {largest:.3g}, alpha {found['alpha'].get(f'{name}.residual_norm.alpha', '-')}"
            for name, largest in found["largest_activation"].items()
        )
        many = f" after {self.skipped} skipped steps" if self.skipped else ""
        raise NotFiniteError(
            f"step {step}{many}: the loss is {loss} and the gradient norm {norm}, on blocks {found['blocks']} of the "
            f"run; the step was not applied. Largest activation and alpha by layer: {layers}. Lower "
            "training.learning_rate or training.gate_lr_multiplier, clip with training.max_grad_norm, or leave such "
            "steps out with training.nonfinite=skip."
        )

    def _largest_activations(self) -> dict[str, float]:
        """`largest_activations` of the step's batches, over all processes."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        batches = [trainer.for_the_loss(trainer._prepare_inputs(batch)) for batch in trainer.step_batches]
        found = largest_activations(model, batches)
        mine = torch.tensor([list(found.values())], device=trainer.args.device)
        return dict(zip(found, trainer.accelerator.gather(mine).amax(0).tolist(), strict=True))

    def _guilty_blocks(self, args, step: int) -> list[int]:
        """Numbers of the blocks in the batches whose own loss is not finite; of the whole step if none's is."""
        first, last = self._blocks(step)
        size, found = args.per_device_train_batch_size, []
        for number, loss in enumerate(self._trainer.step_losses):
            if not torch.isfinite(loss):
                start = first + (number * args.world_size + args.process_index) * size
                found += range(start, start + size)
        if args.world_size > 1:
            found = gather_object(found)
        return sorted(found) or list(range(first, last + 1))


@torch.no_grad()
def largest_activations(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The largest absolute value that leaves each layer, over these batches run again; NaN counts as infinite.

    Args:
        model: a model whose layers are called `...layers.N`. Under FSDP all processes call this together.
        batches: what the model takes.

    Returns:
        Layer name -> value.
    """
    largest: dict[str, float] = {}

    def look(name):
        def hook(module, inputs, output):
            peak = output.detach().abs().float().nan_to_num(nan=math.inf).max().item()
            largest[name] = max(largest.get(name, 0.0), peak)

        return hook

    layers = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    hooks = [module.register_forward_hook(look(name)) for name, module in layers]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    return largest
