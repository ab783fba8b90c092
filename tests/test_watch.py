"""Every step is looked at before it counts: what is not finite never reaches a parameter, and is shown with its origin."""

import math

import pytest
import torch
from test_training import prepared, trainer_for  # noqa: F401

from rezero_hf.errors import UserError
from rezero_hf.runs import read_metrics


RUN = {"max_steps": 6, "global_batch_size": 4, "per_device_train_batch_size": 2, "logging_steps": 1}


def make(prepared, tmp_path, **arguments):  # noqa: F811
    return trainer_for(prepared, tmp_path, run_dir=tmp_path / "run", gate_init=0.5, **{**RUN, **arguments})


def poison(trainer, passes, factor=math.nan):
    """Multiply the head's output by something bad in some of the run's forward passes, numbered from 1."""
    seen = []

    def hook(module, inputs, output):
        if torch.is_grad_enabled():
            seen.append(1)
            return output * factor if len(seen) in passes else output

    trainer.model.lm_head.register_forward_hook(hook)


def events(tmp_path, event):
    return [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["event"] == event]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_applied(prepared, tmp_path):  # noqa: F811
    """The step, its blocks, each layer's largest activation and gate are named and recorded; no parameter is touched."""
    trainer = make(prepared, tmp_path)
    # Two passes a step: the sixth is the second of step 3, on blocks 10 and 11 of the run.
    poison(trainer, {6})
    with pytest.raises(
        UserError, match=r"step 3: the loss is nan .* on blocks \[10, 11\] of the run; the step was not app"
    ):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert [row["step"] for row in events(tmp_path, "train")] == [1, 2]
    found = events(tmp_path, "nonfinite")[0]
    assert (found["step"], found["loss"], found["blocks"]) == (3, "nan", [10, 11])
    assert set(found["largest_activation"]) == {"model.layers.0", "model.layers.1"}
    assert all(0 < value < 100 for value in found["largest_activation"].values())
    # Where a layer itself is at fault, it shows which.
    broken = make(prepared, tmp_path / "broken")
    broken.model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * math.nan)
    with pytest.raises(UserError, match=r"model\.layers\.0: [0-9.]+, alpha .*; model\.layers\.1: inf, alpha"):
        broken.train()
    assert set(found["alpha"]) == {f"model.layers.{n}.residual_norm.alpha" for n in range(2)}


def test_a_gradient_that_is_not_finite_counts_as_much(prepared, tmp_path):  # noqa: F811
    """With a finite loss no batch is to blame, so all blocks of the step are named."""
    trainer = make(prepared, tmp_path)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"step 1: the loss is 5\..* gradient norm (nan|inf), on blocks \[0, 1, 2, 3\]"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_skipped_steps_change_nothing_and_are_bounded(prepared, tmp_path):  # noqa: F811
    """The parameters after a skipped step are those before it; the log goes on with finite losses; the limit is kept."""
    trainer = make(prepared, tmp_path, nonfinite="skip", max_skipped_steps=2, lr_scheduler_type="constant")
    poison(trainer, {5, 7})
    trainer.train()
    logged = events(tmp_path, "train")
    assert [row["step"] for row in logged] == [1, 2, 5, 6]
    assert all(math.isfinite(row[name]) for row in logged for name in ("loss", "bits_per_byte", "grad_norm"))
    assert [row["step"] for row in events(tmp_path, "nonfinite")] == [3, 4]

    again = make(prepared, tmp_path / "again", nonfinite="skip", max_skipped_steps=1)
    poison(again, {5, 7})
    with pytest.raises(UserError, match="step 4 after 1 skipped steps: the loss is nan"):
        again.train()


@pytest.mark.parametrize("once", [False, True], ids=["logged every step", "logged at the end"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_leaves_parameters_moments_and_counts(prepared, tmp_path, optimizer, once):  # noqa: F811
    """Two good steps and then two bad ones end where two good ones do; only their text and loss are in the log."""
    ends = []
    for name, steps in (("good", 2), ("good and bad", 4)):
        arguments = {"nonfinite": "skip", "optimizer": optimizer, "lr_scheduler_type": "constant"}
        arguments["logging_steps"] = steps if once else 1
        trainer = make(prepared, tmp_path / name, max_steps=steps, **arguments)
        poison(trainer, {6, 7})
        trainer.train()
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        counts = [group.get("step") for group in trainer.optimizer.param_groups]
        logged = [(row["loss"], row["tokens"]) for row in events(tmp_path / name, "train")]
        ends.append(([*trainer.model.parameters()], [*map(torch.as_tensor, moments)], counts, logged))
    for first, second in zip(ends[0][:2], ends[1][:2], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert ends[0][2:] == ends[1][2:]


def test_a_leaping_loss_is_recorded_and_nothing_else(prepared, tmp_path):  # noqa: F811
    trainer = make(prepared, tmp_path, max_steps=40, global_batch_size=2, learning_rate=1e-3)
    poison(trainer, {36}, factor=300.0)
    trainer.train()
    assert trainer.state.global_step == 40
    spikes = events(tmp_path, "spike")
    assert [row["step"] for row in spikes] == [36]
    assert spikes[0]["loss"] > 5 * spikes[0]["usual"] and spikes[0]["blocks"] == [70, 71]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nonfinite": "ignore"}, "nonfinite='ignore' is unknown; one of stop, skip"),
        ({"max_skipped_steps": -1}, "max_skipped_steps=-1: must be 0 or more"),
        ({"peak_flops": 0.0}, "peak_flops=0.0: must be at least 1"),
        ({"optim": "adamw_8bit"}, "optim=.*adamw_8bit: this trainer builds its own; choose with optimizer"),
    ],
)
def test_an_argument_out_of_range_is_one_line(prepared, tmp_path, arguments, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        make(prepared, tmp_path, **arguments)
