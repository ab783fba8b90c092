"""A run that was stopped and resumed is, bit for bit, the run that was left alone; what stands in the way is said.

Processes that are really killed are the business of `scripts/torture.py` and of `test_distributed_training.py`.
"""

import errno
import json
import os
import shutil
import signal
import sys

import psutil
import pytest
import torch
from test_training import prepared, trainer_for  # noqa: F401
from transformers import TrainerCallback

from rezero_hf import ReZeroForCausalLM
from rezero_hf.checkpoints import checkpoints_in, verify_checkpoint
from rezero_hf.errors import UserError
from rezero_hf.runs import read_metrics
from rezero_hf.verification import verify_text


# Dropout, accumulation, a schedule, and a log line whose interval no save is a multiple of.
RUN = {
    "max_steps": 12,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 6,
}
WITH_DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
MEASURED = ("event", "step", "loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens", "bytes", "alpha")


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


def make(prepared, folder, *callbacks, **arguments):  # noqa: F811
    trainer = trainer_for(prepared, folder, run_dir=folder / "run", model=WITH_DROPOUT, **{**RUN, **arguments})
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def outcome(folder, trainer):
    """What a run measured, by event and step, and the weights it ended with."""
    rows = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if row["event"] in ("train", "eval")]
    rows = [{name: row[name] for name in MEASURED if name in row} for row in rows]
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return rows, weights


def same(first, second):
    assert first[0] == second[0]
    for name, tensor in first[1].items():
        assert torch.equal(second[1][name], tensor), name


@pytest.fixture(scope="module", params=["adamw", "muon"])
def alone(prepared, tmp_path_factory, request):  # noqa: F811
    """A run that was left alone: optimiser, what it measured, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = make(prepared, folder, optimizer=request.param)
    trainer.train()
    return request.param, outcome(folder, trainer), folder


def crash(control):
    raise KeyboardInterrupt


def test_a_run_resumed_twice_measures_and_ends_like_one_left_alone(alone, prepared, tmp_path):  # noqa: F811
    """Stopped short in steps 5 and 9, which are repeated: every row of the log and every weight is the same."""
    optimizer, expected, _ = alone
    for stop in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            make(prepared, tmp_path, At(stop, crash), optimizer=optimizer).train(resume_from_checkpoint=stop > 5)
    trainer = make(prepared, tmp_path, optimizer=optimizer)
    trainer.train(resume_from_checkpoint=True)
    same(outcome(tmp_path, trainer), expected)
    seconds = [row["wall_seconds"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "wall_seconds" in row]
    assert seconds == sorted(seconds)


# A meter that a test turns; it is not asked for a network, a file or a country.
CODECARBON = """
meter = 0.0
class OfflineEmissionsTracker:
    def __init__(self, save_to_file, **words):
        assert not save_to_file
    def start_task(self):
        self.before = meter
    def stop_task(self):
        return type("EmissionsData", (), {"energy_consumed": meter - self.before})
"""


class Meter(TrainerCallback):
    """A kilowatt-hour a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        sys.modules["codecarbon"].meter += 1


@pytest.mark.parametrize(("broken", "expected"), [(False, {"energy_kwh": 12.0}), (True, {})])
def test_the_energy_of_a_run_is_that_of_all_its_launches(prepared, tmp_path, monkeypatch, broken, expected):  # noqa: F811
    """As codecarbon estimates it; where that fails the run goes on, and says nothing of its energy."""
    (tmp_path / "codecarbon.py").write_text(
        CODECARBON.replace("self.before = meter", "0 / 0") if broken else CODECARBON
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "codecarbon", raising=False)
    with pytest.raises(KeyboardInterrupt):
        make(prepared, tmp_path, Meter(), At(3, crash)).train()
    again = make(prepared, tmp_path, Meter())
    again.train(resume_from_checkpoint=True)
    # What was lost with the first launch, after its save, is not known to the second.
    assert again.energy.record() == expected and again.state.global_step == 12


def test_a_run_told_to_stop_saves_the_step_and_goes_on(alone, prepared, tmp_path):  # noqa: F811
    """SIGTERM in step 3, where no save is due: step 4 is finished and saved, and nothing shows in what follows."""
    optimizer, expected, _ = alone
    told = make(prepared, tmp_path, At(3, lambda control: os.kill(os.getpid(), signal.SIGTERM)), optimizer=optimizer)
    before = signal.getsignal(signal.SIGTERM)
    told.train()
    assert told.watch.preempted and told.state.global_step == 4
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints_in(told.args.output_dir)[0].name == "checkpoint-4"
    trainer = make(prepared, tmp_path, optimizer=optimizer)
    trainer.train(resume_from_checkpoint=True)
    same(outcome(tmp_path, trainer), expected)


@pytest.mark.parametrize(
    "arguments", [{"save_only_model": True}, {"save_total_limit": 1, "load_best_model_at_end": True}]
)
def test_the_checkpoint_of_a_stop_is_there_to_go_on_from(prepared, tmp_path, arguments):  # noqa: F811
    """Whatever is saved along the way and however little is kept."""
    arguments = {**arguments, "eval_steps": 2}
    told = make(prepared, tmp_path, At(8, lambda control: os.kill(os.getpid(), signal.SIGTERM)), **arguments)
    told.train()
    assert checkpoints_in(told.args.output_dir)[0].name == "checkpoint-9"
    again = make(prepared, tmp_path, **arguments)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12 and not again.watch.preempted


def test_a_signal_to_every_process_leaves_the_data_loaders_to_the_main_one(prepared, tmp_path):  # noqa: F811
    """Schedulers send SIGTERM to all: with loader processes too, the step is finished and saved."""

    def tell(control):
        for process in [psutil.Process(), *psutil.Process().children()]:
            process.terminate()

    told = make(prepared, tmp_path, At(3, tell), dataloader_num_workers=1)
    told.train()
    assert told.watch.preempted and checkpoints_in(told.args.output_dir)[0].name == "checkpoint-4"


def test_a_resumed_run_follows_this_launchs_intervals_and_remembers_why_it_stopped(prepared, tmp_path):  # noqa: F811
    """Saves and log lines come as often as now asked for; the rows of the stop and of the save stay in the log."""
    trainer = make(prepared, tmp_path)
    passes = []

    def poison(module, inputs, output):
        passes.append(torch.is_grad_enabled())
        return output * (float("nan") if sum(passes) == 13 and passes[-1] else 1.0)

    trainer.model.lm_head.register_forward_hook(poison)
    with pytest.raises(UserError, match="step 7: the loss is nan"):
        trainer.train()
    again = make(prepared, tmp_path, save_steps=3, logging_steps=1)
    again.train(resume_from_checkpoint=True)
    assert {path.name for path in checkpoints_in(tmp_path / "out")} >= {"checkpoint-9", "checkpoint-12"}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "train"] == [5, *range(7, 13)]
    assert [row["step"] for row in rows if row["event"] == "nonfinite"] == [7]
    assert [row["step"] for row in rows if row["event"] == "save"] == [2, 4, 6, 9, 12]


def test_a_step_left_out_again_after_a_resume_is_in_the_log_once(prepared, tmp_path):  # noqa: F811
    """Skipped in step 5, stopped short in step 6, resumed from step 4: the log has one row of it."""

    def poisoned(*callbacks):
        trainer = make(prepared, tmp_path, *callbacks, nonfinite="skip")
        bad = lambda module, inputs, output: output * (float("nan") if trainer.state.global_step == 4 else 1.0)  # noqa: E731
        trainer.model.lm_head.register_forward_hook(lambda *call: bad(*call) if torch.is_grad_enabled() else None)
        return trainer

    with pytest.raises(KeyboardInterrupt):
        poisoned(At(6, crash)).train()
    poisoned().train(resume_from_checkpoint=True)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "nonfinite"] == [5]


def test_the_newest_whole_checkpoint_is_taken_and_the_others_named(alone, prepared, tmp_path, capsys):  # noqa: F811
    optimizer, expected, folder = alone
    shutil.copytree(folder / "out", tmp_path / "out", dirs_exist_ok=True)
    newest, second, third = checkpoints_in(tmp_path / "out")[:3]
    (newest / "optimizer.pt").unlink()
    with (second / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    trainer = make(prepared, tmp_path, optimizer=optimizer)
    trainer.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert f"passed over: {newest / 'optimizer.pt'} is missing" in said
    assert f"passed over: {second / 'model.safetensors'} has changed since it was written" in said
    assert f"going on from {third}" in said
    same(outcome(tmp_path, trainer), expected)


def test_every_checkpoint_is_a_model_that_loads(alone):
    """With code, whole auto_map, tokenizer and card, and no pickle of arguments."""
    _, (_, weights), folder = alone
    newest = checkpoints_in(folder / "out")[0]
    model = ReZeroForCausalLM.from_pretrained(newest)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert len(json.loads((newest / "config.json").read_text())["auto_map"]) == 7
    names = {path.name for path in newest.iterdir()}
    assert {"modeling_rezero.py", "portable.py", "tokenizer.json"} <= names and "training_args.bin" not in names
    assert "This is step" not in (newest / "README.md").read_text()
    assert "This is step 2 of 12" in (checkpoints_in(folder / "out")[-1] / "README.md").read_text()
    verify_text(newest)


def test_the_best_model_is_among_the_whole_ones(prepared, tmp_path):  # noqa: F811
    """`load_best_model_at_end` finds it, rotation spares it, and a resumed run still knows it."""
    best = {"load_best_model_at_end": True, "save_total_limit": 1, "eval_steps": 2, "learning_rate": 0.3}
    trainer = make(prepared, tmp_path, At(8, crash), **best)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = make(prepared, tmp_path, **best)
    trainer.train(resume_from_checkpoint=True)
    evaluations = {
        row["step"]: row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["event"] == "eval"
    }
    step = min(evaluations, key=evaluations.get)
    kept = {path.name for path in checkpoints_in(tmp_path / "out")}
    assert f"checkpoint-{step}" in kept
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[step])


@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_full_disk_ends_in_one_line_and_loses_nothing(prepared, tmp_path, part):  # noqa: F811
    """Whatever part does not fit, the half of it is gone, the checkpoint before it stays, and the run goes on from there."""
    trainer = make(prepared, tmp_path, save_total_limit=1)
    original = getattr(trainer, part)

    def fail(*args, **kwargs):
        if trainer.state.global_step >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))
        return original(*args, **kwargs)

    setattr(trainer, part, fail)
    with pytest.raises(UserError, match=r"No space left on device: the checkpoint of step 4 was not saved; make room"):
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path / "out")] == ["checkpoint-2"]
    assert not list((tmp_path / "out").glob(".*"))
    again = make(prepared, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12


def test_what_cannot_be_resumed_is_one_line(alone, prepared, tmp_path):  # noqa: F811
    optimizer, _, folder = alone
    with pytest.raises(
        UserError, match="has no complete checkpoint to go on from; --restart begins anew:\n  there is none"
    ):
        make(prepared, tmp_path).train(resume_from_checkpoint=True)
    shutil.copytree(folder / "out", tmp_path / "out", dirs_exist_ok=True)
    with pytest.raises(
        UserError, match=r"was trained with 4 sequences a step, this launch has 8: set training\.global_b"
    ):
        make(prepared, tmp_path, global_batch_size=8, optimizer=optimizer).train(resume_from_checkpoint=True)
    elsewhere = make(prepared, tmp_path, optimizer=optimizer)
    elsewhere.train_dataset.fingerprint = "another"
    with pytest.raises(UserError, match=rf"was trained on other data \({prepared.fingerprint}, now another\): files, "):
        elsewhere.train(resume_from_checkpoint=True)
    other = trainer_for(prepared, tmp_path, model={"num_hidden_layers": 3}, optimizer=optimizer, **RUN)
    with pytest.raises(
        UserError, match=r"the checkpoint does not fit this model: \d+ names differ, such as model.layers.2"
    ):
        other.train(resume_from_checkpoint=True)
    sharded = make(prepared, tmp_path, optimizer=optimizer)
    sharded.is_fsdp_enabled = True
    with pytest.raises(UserError, match=r"was written under none, this launch is under FSDP .*: launch it as before"):
        sharded.train(resume_from_checkpoint=True)
    weights_only = make(prepared, tmp_path / "weights", save_only_model=True, max_steps=2)
    weights_only.train()
    newest = checkpoints_in(tmp_path / "weights" / "out")[0]
    assert not verify_checkpoint(newest)["resumable"]
    with pytest.raises(UserError, match="holds weights alone"):
        make(prepared, tmp_path / "weights").train(resume_from_checkpoint=str(newest))
