"""Kill runs again and again, resume them, and compare with runs that were left alone, bit for bit.

python scripts/torture.py --output runs/torture      (make torture)

For AdamW and Muon, on one process and on two: a reference run; then the same run killed (SIGKILL to every process)
at random moments, every other time aimed inside a save, and resumed by the same command until it has finished. Losses
of all steps and the final weights must be the reference's. The table goes to OUTPUT/torture.json.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
import yaml

from rezero_hf.checkpoints import checkpoints_in, step_of
from rezero_hf.cli import run
from rezero_hf.errors import UserError
from rezero_hf.runs import provenance, read_metrics
from rezero_hf.sources import writable_folder


SCRIPTS = Path(__file__).resolve().parent
RECIPE = {
    "model": {
        **{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1},
    },
    "data": {"sources": "text.txt", "block_size": 64, "cache_dir": "cache"},
    "training": {
        **{"global_batch_size": 16, "max_steps": 120, "learning_rate": 3.0e-3, "lr_scheduler_type": "cosine"},
        **{"weight_decay": 0.1, "warmup_steps": 10, "logging_steps": 1, "disable_tqdm": True},
        **{
            "eval_strategy": "steps",
            "eval_steps": 40,
            "save_strategy": "steps",
            "save_steps": 5,
            "save_total_limit": 3,
        },
    },
}


def main(
    output: Annotated[Path, typer.Option(help="where everything goes; emptied by hand")] = Path("runs/torture"),
    kills: Annotated[int, typer.Option(help="SIGKILLs for each of the four cases")] = 8,
    seed: Annotated[int, typer.Option(help="of the moments at which runs are killed")] = 0,
):
    output = writable_folder(output, "name another folder with --output").absolute()
    if any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another folder or empty it")
    (output / "text.txt").write_text("".join(f"line {n}: {n * n % 9973} apples, {n % 7} pears\n" for n in range(20000)))
    chance, rows = random.Random(seed), []
    for optimizer in ("adamw", "muon"):
        for processes in (1, 2):
            name = f"{optimizer}-{processes}"
            recipe = output / f"{name}.yaml"
            # Four passes a step on one process, two on two: accumulation is part of what must resume.
            words = {"optimizer": optimizer, "per_device_train_batch_size": 4}
            recipe.write_text(yaml.safe_dump({**RECIPE, "training": {**RECIPE["training"], **words}}))
            reference, tortured = output / f"{name}-reference", output / name
            wait(start(recipe, reference, processes, output), reference)
            row = {"case": name, "kills": 0, "inside_save": 0, "skipped": 0, "resumed_at": []}
            while row["kills"] < kills:
                inside = row["kills"] % 2 == 0
                process = start(recipe, tortured, processes, output)
                kill(process, tortured / "checkpoints", inside, chance, row)
            finished = wait(start(recipe, tortured, processes, output), tortured)
            row["skipped"] += finished.count("passed over")
            row |= compare(reference, tortured)
            rows.append(row)
            print(json.dumps(row), flush=True)
            record = {**provenance(torch.device("cpu")), "seed": seed, "rows": rows}
            (output / "torture.json").write_text(json.dumps(record, indent=1) + "\n")
    total = {key: sum(row[key] for row in rows) for key in ("kills", "inside_save", "skipped", "mismatches")}
    print(f"in all: {total}")
    if total["mismatches"]:
        raise UserError("a resumed run differs from the one that was left alone")


def start(recipe: Path, folder: Path, processes: int, where: Path) -> subprocess.Popen:
    """The command of a user."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SCRIPTS / "accelerate" / "cpu.yaml"]
    command += ["--num_processes", processes, "--num_cpu_threads_per_process", 1]
    # A port of its own: that of a killed launcher is not free at once.
    command += ["--main_process_port", random.randint(20000, 60000)]
    command += [SCRIPTS / "pretrain.py", recipe, "--output", folder]
    log = (where / f"{folder.name}.log").open("a")
    return subprocess.Popen(list(map(str, command)), cwd=where, stdout=log, stderr=subprocess.STDOUT)


def wait(process: subprocess.Popen, folder: Path) -> str:
    """Until the run has finished; what it said."""
    log = folder.parent / f"{folder.name}.log"
    if process.wait(timeout=900) or not (folder / "run.json").exists():
        raise UserError(f"{folder.name} ended with {process.returncode}: {log.read_text()[-2000:]}")
    return log.read_text()


def kill(process: subprocess.Popen, checkpoints: Path, inside: bool, chance: random.Random, row: dict) -> None:
    """SIGKILL every process of the run, once it has got further than before: inside a save, or at any moment."""

    def newest() -> int:
        return max(map(step_of, checkpoints_in(checkpoints)), default=0)

    before = newest()
    while newest() <= before and process.poll() is None:
        time.sleep(0.002)
    if inside:
        while not list(checkpoints.glob(".checkpoint-*.partial")) and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.04))
    else:
        time.sleep(chance.uniform(0, 1.5))
    if process.poll() is not None:
        said = checkpoints.parent.with_suffix(".log").read_text()[-2000:]
        raise UserError(f"{checkpoints.parent.name} ended before it was killed: {said}")
    # The launcher gives each worker a session of its own, so a process group would not reach them.
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family)
    row["kills"] += 1
    row["inside_save"] += bool(list(checkpoints.glob(".checkpoint-*.partial")))
    row["resumed_at"].append(newest())


def compare(reference: Path, tortured: Path) -> dict:
    """Steps whose loss differs, whether the weights do, and the sum of both."""
    losses = [
        {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "train"}
        for folder in (reference, tortured)
    ]
    steps = [row["step"] for row in read_metrics(tortured / "metrics.jsonl") if row["event"] == "train"]
    differing = [step for step in losses[0] if losses[0][step] != losses[1].get(step)]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (reference, tortured)]
    found = {
        "steps": len(steps),
        "losses_differ": len(differing),
        "steps_logged_twice": len(steps) - len(set(steps)),
        "weights_differ": int(weights[0] != weights[1]),
    }
    return {**found, "mismatches": found["losses_differ"] + found["steps_logged_twice"] + found["weights_differ"]}


if __name__ == "__main__":
    run(main)
