"""Compare the planned memory of a run with what real steps take, a process for each case.

python scripts/measure_memory.py [--only 50m] [--heap] [--output memory.json]

On a CPU the measure is the process's highest resident size less that before the model was built, on a GPU what torch
allocated at the most. The planned bytes are those of the tensors: so that resident size means just these, glibc is told
to give every one its own pages. `--heap` leaves glibc as it is, and compares with the resident bytes planned for that.
"""

import contextlib
import itertools
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainer, ReZeroTrainingArguments
from rezero_hf.benchmarks import alone
from rezero_hf.cli import result_file, run
from rezero_hf.durable import write_whole
from rezero_hf.errors import UserError
from rezero_hf.planning import make_plan
from rezero_hf.rehearsal import RandomTokens
from rezero_hf.strict import check_names


# Size -> tokens of a sequence, sequences of a pass: seconds to a minute or two on two CPU cores.
SIZES = {"50m": (512, 4), "125m": (512, 2), "350m": (256, 2)}
# The second step meets the optimiser's state; holes in the heap grow for a few more.
STEPS = 4


def measure(case: dict) -> dict:
    """Planned and measured bytes of one case, in this process."""
    heap = case.pop("heap")
    block_size, sequences = SIZES[case["size"]]
    config = ReZeroConfig.preset(case["size"])
    with tempfile.TemporaryDirectory() as folder:
        words = {"bf16": case["precision"] == "bf16", "optimizer": case["optimizer"]}
        words |= {"activation_checkpointing": case["checkpointing"]}
        words |= {"per_device_train_batch_size": sequences, "max_steps": STEPS, "disable_tqdm": True}
        args = ReZeroTrainingArguments(folder, save_strategy="no", report_to="none", **words)
        memory = make_plan(config, args, block_size, STEPS).memory
        before = psutil.Process().memory_info().rss
        trainer = ReZeroTrainer(
            ReZeroForCausalLM(config),
            args,
            train_dataset=RandomTokens(config.vocab_size, block_size, STEPS * sequences),
        )
        trainer.train()
    if args.device.type == "cuda":
        measured = torch.cuda.max_memory_allocated()
    else:
        # Linux counts in KiB.
        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    planned = memory.peak if not heap or memory.resident is None else memory.resident
    return {**case, "device": args.device.type, "planned": planned, "measured": measured}


def main(
    only: Annotated[str | None, typer.Option(help="50m, 125m or 350m")] = None,
    heap: Annotated[bool, typer.Option("--heap", help="leave glibc as it is")] = False,
    output: Annotated[Path | None, typer.Option(help="where the numbers go as JSON")] = None,
    case: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    if case:
        with contextlib.redirect_stdout(sys.stderr):
            row = measure(json.loads(case))
        print(json.dumps(row))
        return
    output = output and result_file(output, "--output")
    if only is not None:
        check_names([only], SIZES, "--only: size")
    rows = []
    print("| size | precision | optimizer | checkpointing | planned GB | measured GB | planned / measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    environment = os.environ if heap else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    words = {
        "size": [only] if only else list(SIZES),
        "precision": ["fp32", "bf16"],
        "optimizer": ["adamw", "muon"],
        "checkpointing": [False, True],
    }
    for values in itertools.product(*words.values()):
        case = json.dumps(dict(zip(words, values, strict=True), heap=heap))
        found, failed = alone([sys.executable, __file__, "--case", case], environment)
        if failed:
            raise UserError(f"{case} could not be measured: {failed}")
        rows.append(row := found[-1])
        planned, measured = row["planned"] / 1e9, row["measured"] / 1e9
        cells = [*map(str, values), f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
        if output:
            write_whole(output, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
