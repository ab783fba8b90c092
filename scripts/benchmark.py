"""Measure training, generation, memory and start-up beside other libraries, by turns; write the table and the figure.

python scripts/benchmark.py [--only decode_1] [--minutes 24] [--output runs/benchmark]      (make benchmark)

Nothing else should run on the machine, though what compares are ratios of neighbours in time. It takes the minutes
and a few more. `--smoke` is ReZero beside GPT-2, tiny, for seconds.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils import logging

from rezero_hf.benchmark_arms import ARMS, REFERENCE, SIZES, installed, parameters
from rezero_hf.benchmark_report import benchmark_figure, benchmark_table
from rezero_hf.benchmarks import MEASURES, compare
from rezero_hf.cli import run
from rezero_hf.errors import UserError
from rezero_hf.runs import provenance
from rezero_hf.strict import check_names


def main(
    only: Annotated[str | None, typer.Option(help=f"one of {', '.join(MEASURES)}")] = None,
    output: Annotated[Path | None, typer.Option(help="where the result goes (default runs/benchmark)")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="about as long as all repeats take")] = 24.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="tiny models, two arms, without import times")] = False,
    arm: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    if only is not None:
        check_names([only], MEASURES, "--only: measure")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    size = "smoke" if smoke else device.type
    if size not in SIZES:
        raise UserError(f"device {size}: there are no sizes for it in rezero_hf/benchmark_arms.py")
    names = [only] if only else [name for name in MEASURES if not (smoke and name == "import")]
    arms, left_out = installed(ARMS)
    if smoke:
        arms = [found for found in arms if found.name in (REFERENCE.name, "GPT-2")]
    # torch's profiler tells when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def measured(found):
        seconds = 0.0 if smoke else 60 * minutes / len(arms)
        return compare(found, REFERENCE, names, SIZES[size], device, seconds, least=1 if smoke else 3)

    if arm is not None:
        # Alone in a process, whose last line is what was measured.
        print(json.dumps(measured(next(found for found in arms if found.name == arm))))
        return
    output = output or Path("runs") / ("benchmark" if size == "cpu" else f"benchmark-{size}")
    output.mkdir(parents=True, exist_ok=True)
    result = {"name": "benchmark", "size": size, **provenance(device)}
    result |= {"threads": torch.get_num_threads(), "sizes": asdict(SIZES[size]), "arms": [], "left_out": left_out}
    result["comparisons"], start = [], time.perf_counter()
    for name, package in left_out.items():
        print(f"{name} is left out: the package {package} is not installed (pip install 'rezero_hf[benchmark]')")
    for found in arms:
        print(f"{found.name} ...", flush=True)
        if smoke:
            result["comparisons"] += measured(found)
        else:
            command = [sys.executable, *sys.argv, "--arm", found.name]
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"{found.name} could not be measured; the reason is above")
            result["comparisons"] += json.loads(done.stdout.splitlines()[-1])
        version = f"{found.package} {metadata.version(found.package)}"
        words = {"name": found.name, "words": found.words, "peer": found.peer, "version": version}
        result["arms"].append({**words, "parameters": parameters(found, SIZES[size])})
        result["complete"] = only is None and found is arms[-1]
        result["seconds"] = round(time.perf_counter() - start)
        (output / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(benchmark_table(result))
    print(benchmark_figure(result, output / "figures" / "benchmark.png"))
    if size != "smoke" and only is None:
        print(f"commit it with: python scripts/report.py {output}")


if __name__ == "__main__":
    run(main)
