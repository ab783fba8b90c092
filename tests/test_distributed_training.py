"""Training on two processes (gloo): the same curve as on one, saved whole by all, resumed exactly, and never half."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from processes import run_in_group, run_script
from test_portable import CAUSAL_LM, finish, start

from rezero_hf import ReZeroForCausalLM
from rezero_hf.checkpoints import checkpoints_in, verify_checkpoint
from rezero_hf.runs import read_metrics


PROLOGUE = """
import json, os, signal, sys
sys.path.insert(0, TESTS)
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from test_resuming import At, outcome, same
from test_training import *
from rezero_hf.checkpoints import checkpoints_in
from rezero_hf.launching import sharding_of

out = Path(sys.argv[1])
text = out / "text.txt"
config = DataConfig(sources=[Source(source=str(text))], block_size=BLOCK, cache_dir=str(out / "cache"))
prepared = prepare(config, byte_tokenizer(), progress=False)
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

def make(name, model=None, **arguments):
    settings = {"global_batch_size": 8, "per_device_train_batch_size": 2, "logging_steps": 1, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, **arguments}
    return trainer_for(prepared, out / name, run_dir=out / name / "run", gate_init=0.5, model=model, **settings)

def losses(name):
    rows = read_metrics(out / name / "run" / "metrics.jsonl")
    return torch.tensor([[row["loss"], row["grad_norm"], row["bits_per_byte"]] for row in rows if row["event"] == "train"])
"""

# Accelerate shards on accelerators only. Told that these are some, it does on CPUs what it does there.
FSDP = """
from accelerate import PartialState
from accelerate.utils import DistributedType
made = ReZeroTrainingArguments.__post_init__
def as_if_on_accelerators(self):
    made(self)
    self.device
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU

def sharded(kind, **more):
    settings = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": kind, **more}
    return {"fsdp": True, "fsdp_config": {**settings, "transformer_layer_cls_to_wrap": ["ReZeroDecoderLayer"]}}
"""


def run_on(processes, code, folder, prologue=PROLOGUE, check=True):
    """Run `code` in processes that form one gloo group; gives what they printed."""
    script = folder / f"script{len(list(folder.glob('script*')))}.py"
    body = textwrap.dedent(code) + "\nfrom rezero_hf.cli import leave_group\nleave_group()\n"
    script.write_text(prologue.replace("TESTS", repr(str(Path(__file__).parent))) + body)
    statuses, said = run_in_group(processes, script, folder)
    assert not check or set(statuses) == {0}, said[-8000:]
    return said


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {n} says {n * n}\n" for n in range(400)))
    return tmp_path


def rows(folder, name):
    return [row for row in read_metrics(folder / name / "run" / "metrics.jsonl") if row["event"] == "train"]


def test_processes_accumulation_and_checkpointing_change_no_curve(folder):
    """One process or two, 1 to 4 passes a step, activations kept or recomputed: losses and gradient norms within 1e-4.

    Sums over the batch are taken in another order, which moves fp32 losses by about 1e-7 and, after a few steps, more.
    """
    one = """
        make("one pass", per_device_train_batch_size=8).train()
        make("four passes").train()
        make("recomputed", activation_checkpointing=True).train()
        measured = make("x").measure(EvalBlocks(prepared, "validation"))
        (out / "evaluated.json").write_text(json.dumps(measured))
    """
    run_on(1, one, folder)
    two = """
        trainer = make("two")
        trainer.train()
        assert sharding_of(trainer.model_wrapped) == "ddp"
        for size in (1, 3):
            measured = make("x", per_device_eval_batch_size=size).measure(EvalBlocks(prepared, "validation"))
            if dist.get_rank() == 0:
                (out / f"evaluated-{size}.json").write_text(json.dumps(measured))
    """
    run_on(2, two, folder)
    reference = [[row[name] for name in ("loss", "grad_norm", "bits_per_byte")] for row in rows(folder, "one pass")]
    assert len(reference) == 6
    for name in ("four passes", "recomputed", "two"):
        found = [[row[key] for key in ("loss", "grad_norm", "bits_per_byte")] for row in rows(folder, name)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(reference), atol=1e-4, rtol=1e-4)
        assert [row["tokens"] for row in rows(folder, name)] == [row["tokens"] for row in rows(folder, "one pass")]
    # Every byte weighs once, whatever the batch and the processes, and the last, shorter batch counts.
    measured = json.loads((folder / "evaluated.json").read_text())
    for size in (1, 3):
        assert json.loads((folder / f"evaluated-{size}.json").read_text()) == pytest.approx(measured, rel=1e-6)


def test_two_processes_go_on_exactly_and_stop_together(folder):
    """Stopped by a signal that only one process got, resumed on two: as if left alone, to the bit, with dropout.

    Resumed on one process instead, the data keep their order: without dropout the losses agree to rounding.
    """
    code = """
        alone = make("alone", DROPOUT)
        alone.train()
        expected = outcome(out / "alone", alone)

        def tell(control):
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        told = make("told", DROPOUT)
        told.add_callback(At(2, tell))
        told.train()
        assert told.watch.preempted and told.state.global_step == 3
        again = make("told", DROPOUT)
        again.train(resume_from_checkpoint=True)
        assert sharding_of(again.model_wrapped) == "ddp"
        same(outcome(out / "told", again), expected)

        # Both processes go back to the same best model, and the last one saved stays.
        best = make("best", DROPOUT, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_total_limit=1)
        best.train()
        sums = torch.tensor([sum(parameter.double().sum() for parameter in best.model.parameters())]).double()
        assert best.accelerator.gather(sums).unique().numel() == 1
        kept = {path.name for path in checkpoints_in(out / "best" / "out")}
        assert {"checkpoint-6", f"checkpoint-{best.state.best_global_step}"} == kept

        make("plain").train()
        half = make("fewer")
        half.add_callback(At(3, tell))
        half.train()
    """
    run_on(2, code, folder)
    said = run_on(1, 'make("fewer", per_device_train_batch_size=4).train(resume_from_checkpoint=True)', folder)
    assert "the checkpoint is of 2 process(es), this launch has 1: the data keep their order" in said
    newest = checkpoints_in(folder / "alone" / "out")[0]
    finish(start(folder, CAUSAL_LM, newest, folder / "loaded"))
    assert (newest / "README.md").exists()
    plain, fewer = ([row["loss"] for row in rows(folder, name)] for name in ("plain", "fewer"))
    assert fewer == pytest.approx(plain, rel=1e-4)
    assert [row["tokens"] for row in rows(folder, "fewer")] == [row["tokens"] for row in rows(folder, "plain")]


def test_a_process_that_cannot_write_stops_all_and_a_lost_one_is_noticed(folder):
    """A full disk under the second process alone: both name it, in seconds; so does what is left when one is killed."""
    full = """
        from rezero_hf.cli import run
        def main():
            trainer = make("full")
            save = trainer._save_rng_state
            def fail(folder):
                if dist.get_rank() == 1 and trainer.state.global_step == 4:
                    raise OSError(28, "No space left on device", "there")
                save(folder)
            trainer._save_rng_state = fail
            trainer.train()
        del sys.argv[1:]
        run(main)
    """
    said = run_on(2, full, folder, check=False)
    for process in (0, 1):
        assert (
            f"[process {process}] error: there: No space left on device (process 1 of 2): the checkpoint of st" in said
        )
    assert [path.name for path in checkpoints_in(folder / "full" / "out")] == ["checkpoint-2"]
    lost = """
        from rezero_hf.cli import run
        def main():
            trainer = make("lost")
            trainer.add_callback(At(3, lambda control: dist.get_rank() == 1 and os.kill(os.getpid(), signal.SIGKILL)))
            trainer.train()
        del sys.argv[1:]
        run(main)
    """
    said = run_on(2, lost, folder, check=False)
    assert "[process 0] error: another process of this run is gone" in said
    assert "RuntimeError" not in said
    run_on(2, 'for name in ("full", "lost"): make(name).train(resume_from_checkpoint=True)', folder)
    for name in ("full", "lost"):
        assert [row["step"] for row in rows(folder, name)] == [1, 2, 3, 4, 5, 6]


def test_fully_sharded_training_is_the_same_run(folder):
    """Real FSDP2, whole and sharded checkpoints: parameters are DTensors, the curve is that of DDP, alphas are fp32 under
    bf16, resuming is exact, and what is saved or exported loads as any other folder."""
    code = """
        make("ddp", DROPOUT).train()
        ReZeroTrainingArguments.__post_init__ = as_if_on_accelerators
        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            trainer = make(kind, DROPOUT, **sharded(kind))
            trainer.train()
            assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
            assert sharding_of(trainer.model_wrapped) == "fsdp2"
            stopped = make(kind + "2", DROPOUT, **sharded(kind))
            stopped.add_callback(At(2, lambda control: os.kill(os.getpid(), signal.SIGTERM)))
            stopped.train()
            again = make(kind + "2", DROPOUT, **sharded(kind))
            again.train(resume_from_checkpoint=True)
            assert torch.equal(losses(kind), losses(kind + "2"))
            whole = trainer.accelerator.get_state_dict(trainer.model)
            resumed = again.accelerator.get_state_dict(again.model)
            assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
            if dist.get_rank() == 0:
                torch.save(whole, out / f"{kind}.pt")
        half = make("bf16", bf16=True, max_steps=2, **sharded("FULL_STATE_DICT"))
        half.train()
        held = {name: parameter.dtype for name, parameter in half.model.named_parameters() if name.endswith("alpha")}
        groups = {group["name"]: group["params"] for group in half.optimizer.param_groups}
        assert len(held) == 2 and set(held.values()) == {torch.float32}
        assert all(half.optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in groups["gates"] if p.numel())
    """
    run_on(2, code, folder, prologue=PROLOGUE + FSDP)
    reference = [row["loss"] for row in rows(folder, "ddp")]
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        assert [row["loss"] for row in rows(folder, kind)] == pytest.approx(reference, rel=1e-4)
        newest = checkpoints_in(folder / kind / "out")[0]
        assert verify_checkpoint(newest)["sharding"] == "fsdp2"
        assert len(json.loads((newest / "config.json").read_text())["auto_map"]) == 7
        assert {"modeling_rezero.py", "tokenizer.json", "README.md"} <= {path.name for path in newest.iterdir()}
    exported = folder / "exported"
    script = Path(__file__).parents[1] / "scripts" / "export.py"
    assert run_script(script, newest, exported).returncode == 0
    whole = checkpoints_in(folder / "FULL_STATE_DICT" / "out")[0]
    for kind, saved in (("FULL_STATE_DICT", whole), ("SHARDED_STATE_DICT", exported)):
        trained = torch.load(folder / f"{kind}.pt", weights_only=True)
        for name, tensor in ReZeroForCausalLM.from_pretrained(saved).state_dict().items():
            assert torch.equal(tensor, trained[name]), name
    # Each in a process that has no such package.
    finish(*(start(folder, CAUSAL_LM, saved, folder / f"alone{n}") for n, saved in enumerate((whole, exported))))
