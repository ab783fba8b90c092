"""Launched as a user does, on one machine or on two that are one: what is in effect is said, and a trap is no silent loss."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import free_port

from rezero_hf import verify_folder
from rezero_hf.checkpoints import checkpoints_in
from rezero_hf.runs import read_metrics


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "scripts" / "accelerate"
RECIPE = {
    "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"sources": "text.txt", "block_size": 32, "cache_dir": "cache"},
    "training": {
        **{"global_batch_size": 4, "per_device_train_batch_size": 1, "max_steps": 6, "logging_steps": 1},
        **{"save_steps": 2, "final_eval_blocks": 4, "disable_tqdm": True, "use_cpu": True},
    },
}


@pytest.fixture
def workplace(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {n} says {n * n}\n" for n in range(2000)))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def launch(workplace, *options, arguments=()):
    """Start `accelerate launch` on the recipe; gives the process, its output to be read."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", *options]
    command += [ROOT / "scripts" / "pretrain.py", "tiny.yaml", *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=workplace,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def errors(output):
    return [line for line in output.splitlines() if "error: " in line]


def test_every_configuration_says_whether_it_was_run():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"cpu", "ddp", "fsdp2", "fsdp2_hsdp", "multi_node"}
    for path in CONFIGS.glob("*.yaml"):
        assert re.match(r"# (Run: |Not run yet: )", path.read_text()), path.name


def test_processes_that_were_asked_for_and_not_started_are_missed(workplace):
    """`--cpu --num_processes 2` starts one process without a word: it stops and says how to get two."""
    options = ["--quiet", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    process = launch(workplace, *options, "--mixed_precision", "no", "--dynamo_backend", "no")
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert len(errors(output)) == 1 and "several processes were asked for, but accelerate has started one" in output
    assert "scripts/accelerate/cpu.yaml" in output and not (workplace / "runs").exists()


def test_sharding_that_is_not_in_effect_is_missed(workplace):
    """FSDP on CPUs silently becomes DDP: every process says so, and nothing is trained."""
    port = str(free_port())
    process = launch(
        workplace, "--config_file", CONFIGS / "fsdp2.yaml", "--num_processes", "2", "--main_process_port", port
    )
    output = process.communicate(timeout=180)[0]
    assert process.returncode != 0
    assert "FSDP was asked for, but the parameters are whole tensors (ddp)" in output
    assert not list((workplace / "runs").glob("*/metrics.jsonl"))


def test_two_machines_train_one_model(workplace):
    """Two launchers on 127.0.0.1 that meet by address: one run, its banner, its folder."""
    port = str(free_port())
    options = ["--config_file", CONFIGS / "multi_node.yaml", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    machines = [
        launch(workplace, *options, "--main_process_port", port, "--machine_rank", str(rank)) for rank in (0, 1)
    ]
    first, second = (machine.communicate(timeout=240)[0] for machine in machines)
    assert [machine.returncode for machine in machines] == [0, 0], first[-3000:] + second[-3000:]
    for said in (
        "processes    2 on 2 machine(s), device cpu, sharding ddp",
        "precision    fp32, parameters float32",
        "batch        4 sequences a step: 1 per device, 2 process(es), 2 pass(es)",
        "data order   a function of training.seed=42 and the step",
        "parameters, ",
        "FLOP per token",
        "memory",
    ):
        assert said in first and said not in second
    verify_folder(workplace / "runs" / "tiny" / "model")
    rows = [row for row in read_metrics(workplace / "runs" / "tiny" / "metrics.jsonl") if row["event"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * 32
        assert row["tokens_per_second"] == pytest.approx(2 * row["tokens_per_second_per_device"])
        assert 0 < row["data_wait_fraction"] < 1 and row["peak_memory_bytes"] > 1e8


def test_a_run_whose_launcher_is_told_to_stop_saves_and_goes_on_by_the_same_command(workplace):
    """SIGTERM to `accelerate launch`, which would leave its process behind: that one saves and ends. Then it finishes."""
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    recipe = {**RECIPE, "training": {**RECIPE["training"], "max_steps": 60}}
    (workplace / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    process = launch(workplace, *options)
    run = workplace / "runs" / "tiny"
    deadline = time.monotonic() + 120
    while not checkpoints_in(run / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    # The output stays open for as long as the training process lives.
    told = process.communicate(timeout=60)[0]
    assert re.search(r"told to stop: saved at step \d+ of 60; the same command goes on", told), told[-2000:]
    again = launch(workplace, *options)
    output = again.communicate(timeout=180)[0]
    assert again.returncode == 0 and "going on from" in output, output[-3000:]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, 61))
    assert [row["event"] for row in rows].count("resume") == 1
    verify_folder(run / "model")
