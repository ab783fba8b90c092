"""ReZeroTrainer: gate groups, bits per byte that weigh every byte once, and a record of the run."""

import math
from pathlib import Path

import pytest
import torch
from processes import run_script
from torch import nn

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainer, ReZeroTrainingArguments
from rezero_hf.arguments import sequences_per_step
from rezero_hf.blocks import EvalBlocks, TrainBlocks
from rezero_hf.data import DataConfig, prepare
from rezero_hf.errors import UserError
from rezero_hf.flops import flops_per_token
from rezero_hf.runs import read_metrics
from rezero_hf.sources import Source
from rezero_hf.tokenization import byte_tokenizer, token_byte_lengths
from rezero_hf.training import training_steps


BLOCK = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("".join(f"line {n} says {n * n}\n" for n in range(400)))
    config = DataConfig(
        sources=[Source(source=str(folder / "text.txt"))], block_size=BLOCK, cache_dir=str(folder / "cache")
    )
    return prepare(config, byte_tokenizer(), progress=False)


def trainer_for(prepared, tmp_path, run_dir=None, gate_init=0.0, model=None, **arguments):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ReZeroConfig(**{**sizes, "gate_init": gate_init, **(model or {})})
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True}
    args = ReZeroTrainingArguments(output_dir=str(tmp_path / "out"), **{**settings, "save_strategy": "no", **arguments})
    return ReZeroTrainer(
        ReZeroForCausalLM(config),
        args,
        train_dataset=TrainBlocks(prepared, args.seed, args.max_steps * sequences_per_step(args)),
        eval_dataset=EvalBlocks(prepared, "validation"),
        processing_class=byte_tokenizer(),
        token_bytes=token_byte_lengths(byte_tokenizer()),
        run_dir=run_dir,
    )


def test_bits_per_byte_is_the_sum_over_the_text_whatever_the_batch_size(prepared, tmp_path):
    """Equal to a token-by-token sum computed here, for batch sizes that do and do not divide the number of blocks."""
    blocks = EvalBlocks(prepared, "validation")
    trainer = trainer_for(prepared, tmp_path, gate_init=0.5)
    nats = tokens = text = 0
    for block in blocks:
        logits = trainer.model(block["input_ids"][None]).logits[0]
        for position, target in enumerate(block["shift_labels"].tolist()):
            if target != -100:
                nats -= nn.functional.log_softmax(logits[position], dim=-1)[target].item()
                tokens += 1
                text += target < 256
    for size in (1, 3, 64):
        trainer = trainer_for(prepared, tmp_path, gate_init=0.5, per_device_eval_batch_size=size)
        measured = trainer.measure(blocks)
        assert (measured["tokens"], measured["bytes"]) == (tokens, text)
        assert measured["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / text, rel=1e-5)


def test_a_run_records_steps_evaluations_and_every_gate(prepared, tmp_path):
    """metrics.jsonl: loss, bits per byte, gradient norm, rate, speed at each log; every alpha at each evaluation."""
    arguments = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer_for(prepared, tmp_path, run_dir=tmp_path / "run", **arguments).train()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        assert {"loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second"} <= set(row)
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=0.1)
        assert row["tokens_per_second"] > 0
    evaluations = [row for row in rows if row["event"] == "eval"]
    assert [(row["step"], row["split"]) for row in evaluations] == [(2, "validation"), (4, "validation")]
    for row in evaluations:
        assert set(row["alpha"]) == {f"model.layers.{n}.residual_norm.alpha" for n in range(2)}
        assert all(len(value) == 1 and value[0] != 0 for value in row["alpha"].values())


def test_the_share_of_the_peak_is_reckoned_from_the_models_own_arithmetic(prepared, tmp_path):
    """`mfu` is FLOPs per token times tokens per second over the peak the recipe names; without a peak there is none."""
    for peak in (None, 1e12):
        trainer = trainer_for(prepared, tmp_path, run_dir=tmp_path / str(peak), logging_steps=2, peak_flops=peak)
        trainer.train()
        rows = read_metrics(tmp_path / str(peak) / "metrics.jsonl")
        flops = flops_per_token(trainer.model.config, BLOCK)
        for row in rows:
            speed = row["tokens_per_second_per_device"]
            assert ("mfu" in row) is (peak is not None)
            assert peak is None or row["mfu"] == pytest.approx(speed * flops / peak)
            assert 0 <= row["data_wait_fraction"] < 1 and row["peak_memory_bytes"] > 1e8
        assert trainer.state.total_flos == 4 * 4 * BLOCK * flops


def test_accumulating_gives_the_same_losses_gradients_and_weights(prepared, tmp_path):
    """One pass of 8 sequences and four of 2: the loss of a step is a mean over all its targets, however they arrive."""
    runs = []
    for per_device in (8, 2):
        batch = {"global_batch_size": 8, "per_device_train_batch_size": per_device, "logging_steps": 1}
        trainer = trainer_for(prepared, tmp_path, tmp_path / str(per_device), gate_init=0.5, **batch)
        trainer.train()
        rows = read_metrics(tmp_path / str(per_device) / "metrics.jsonl")
        weights = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
        runs.append(([row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights))
    (losses, norms, weights), (again_losses, again_norms, again_weights) = runs
    assert again_losses == pytest.approx(losses, rel=1e-4)
    assert again_norms == pytest.approx(norms, rel=1e-3)
    assert torch.allclose(weights, again_weights, atol=2e-4)


def test_the_same_seed_trains_the_same_and_another_does_not(prepared, tmp_path):
    def final(seed):
        trainer = trainer_for(prepared, tmp_path, seed=seed)
        trainer.train()
        return trainer.model.lm_head.weight

    assert torch.equal(final(1), final(1))
    assert not torch.equal(final(1), final(2))


def test_the_optimiser_is_ours_with_gate_groups(prepared, tmp_path):
    """Recipe words reach the optimiser, and the schedule scales every group's own rate."""
    trainer = trainer_for(prepared, tmp_path, gate_lr_multiplier=3.0, weight_decay=0.1, lr_scheduler_type="linear")
    trainer.create_optimizer_and_scheduler(4)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert groups["gates"]["lr"] == pytest.approx(3e-2) and groups["gates"]["weight_decay"] == 0.0
    assert groups["matrices"]["lr"] == pytest.approx(1e-2) and groups["matrices"]["weight_decay"] == 0.1


def rates_of(trainer, steps):
    """The learning rate of each group in each of the first steps."""
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps):
        rates.append({group["name"]: group["lr"] for group in trainer.optimizer.param_groups})
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return {name: [rate[name] for rate in rates] for name in rates[0]}


def test_gates_can_keep_their_rate_under_a_schedule(prepared, tmp_path):
    """With `gate_lr_constant` the gates' rate is the same in every step, and the others' follow the schedule."""
    words = {"gate_lr_multiplier": 3.0, "gate_lr_constant": True, "lr_scheduler_type": "linear", "warmup_steps": 2}
    rates = rates_of(trainer_for(prepared, tmp_path, **words), 4)
    assert rates["gates"] == pytest.approx([3e-2] * 4)
    assert rates["matrices"] == pytest.approx([0.0, 5e-3, 1e-2, 5e-3])


def test_rates_drop_where_a_recipe_says(prepared, tmp_path):
    """To a tenth after each share of the run, the gates with the rest; shares outside the run are refused."""
    rates = rates_of(trainer_for(prepared, tmp_path, lr_scheduler_type="constant", lr_drops=[0.5, 0.75]), 8)
    assert rates["matrices"] == rates["gates"] == pytest.approx([1e-2] * 4 + [1e-3] * 2 + [1e-4] * 2)
    with pytest.raises(UserError, match=r"lr_drops=\[1.5\]: must be shares of the run"):
        trainer_for(prepared, tmp_path, lr_drops=[1.5])


def test_a_decay_without_a_length_takes_the_rest_of_the_run(prepared, tmp_path):
    """1 - sqrt(t) from the end of the warm-up to the end of the run; a length that is given is kept."""
    words = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2}
    rates = rates_of(trainer_for(prepared, tmp_path, **words, lr_scheduler_kwargs={"decay_type": "1-sqrt"}), 6)
    falling = [1e-2 * (1 - math.sqrt(step / 4)) for step in range(4)]
    assert rates["matrices"] == pytest.approx([0.0, 5e-3, *falling])
    given = {"decay_type": "linear", "num_decay_steps": 2}
    rates = rates_of(trainer_for(prepared, tmp_path, **words, lr_scheduler_kwargs=given), 6)
    assert rates["matrices"] == pytest.approx([0.0, 5e-3, 1e-2, 1e-2, 1e-2, 5e-3])


def test_epochs_become_steps(prepared, tmp_path):
    """`num_train_epochs` passes over the training blocks, rounded up to whole steps; none is an error."""
    blocks = prepared.totals("train")["tokens"] // BLOCK
    args = trainer_for(prepared, tmp_path).args
    args.max_steps, args.num_train_epochs = -1, 2.0
    assert training_steps(args, prepared) == math.ceil(2 * blocks / 4)
    args.num_train_epochs = 0.0
    with pytest.raises(UserError, match=r"num_train_epochs=0.0 gives no step; raise it or set max_steps"):
        training_steps(args, prepared)


def test_tensorboard_gets_the_losses_and_bits_per_byte(prepared, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    run = tmp_path / "run"
    trainer_for(prepared, tmp_path, run, report_to=["tensorboard"], logging_steps=1).train()
    events = EventAccumulator(str(next((tmp_path / "tensorboard").rglob("events.*")).parent)).Reload()
    rows = read_metrics(run / "metrics.jsonl")
    for name in ("loss", "bits_per_byte", "tokens_per_second"):
        logged = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert logged == pytest.approx({row["step"]: row[name] for row in rows})


def test_trackio_gets_the_losses_and_bits_per_byte(prepared, tmp_path, monkeypatch):
    """In a process of its own, because trackio reads its folder's name when it is imported."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_training import *
config = DataConfig(sources=[Source(source={prepared.config.sources[0].source!r})], block_size=BLOCK,
                    cache_dir={prepared.config.cache_dir!r})
trainer = trainer_for(prepare(config, byte_tokenizer()), Path({str(tmp_path)!r}), report_to=["trackio"],
                      logging_steps=1, project="demo")
trainer.train()
"""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "train.py").write_text(code)
    done = run_script(tmp_path / "train.py")
    assert done.returncode == 0, done.stderr[-3000:]
    stored = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*demo*") if path.is_file())
    assert b"bits_per_byte" in stored and b"grad_norm" in stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be at least 1"),
        ({"global_batch_size": 0}, "global_batch_size=0: must be at least 1"),
        ({"eval_blocks": 0}, "eval_blocks=0: must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be a finite number, 0 or more"),
        ({"seed": -1}, "seed=-1: must be a finite number, 0 or more"),
        ({"num_train_epochs": math.inf}, "num_train_epochs=inf: must be a finite number"),
        ({"adam_beta1": 2.0}, r"adam_beta1=2.0: must be in \[0, 1\)"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1, or -1"),
        ({"optimizer": "adam"}, "optimizer='adam' is unknown; one of adamw, adagrad, sgd, lamb"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop shift_labels"),
    ],
)
def test_an_argument_out_of_range_is_one_line(prepared, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        trainer_for(prepared, tmp_path, **arguments)


def test_a_missing_package_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("rezero_hf.optim.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer='muon' needs a package: pip install pytorch-optimizer"):
        ReZeroTrainingArguments(output_dir=str(tmp_path), optimizer="muon")
