"""Measure training, generation, memory and start-up beside other libraries, by turns; write the table and the figure.

python scripts/benchmark.py [--only decode_1] [--mode bf16] [--minutes 25] [--output DIR]     (make benchmark)

Nothing else should run on the machine, though what compares are ratios of neighbours in time. It takes the minutes
and two or three more. What others disturbed is measured once more at the end, and whenever it is called with `--again`.
`--only` and `--mode` print the table and write nothing, unless told where. `--smoke` is ReZero beside GPT-2, tiny, for
seconds. `--only decode_1 --profile ReZero` compares nothing and prints where the time goes, on a CPU.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging

from rezero_hf.benchmark_arms import ARMS, REFERENCE, SIZES, installed, parameters
from rezero_hf.benchmark_cases import modes
from rezero_hf.benchmark_profile import time_table
from rezero_hf.benchmark_report import benchmark_figure, benchmark_table, disturbed
from rezero_hf.benchmarks import LEAST, MEASURES, alone, chosen, compare, compare_imports, expected
from rezero_hf.cli import run
from rezero_hf.errors import UserError
from rezero_hf.runs import git_state, provenance
from rezero_hf.strict import check_names


def main(
    only: Annotated[str | None, typer.Option(help=f"one of {', '.join(MEASURES)}")] = None,
    mode: Annotated[str | None, typer.Option(help="fp32, bf16 or, on a GPU, 'bf16, compiled'")] = None,
    output: Annotated[Path | None, typer.Option(help="where the result goes (default runs/benchmark)")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="about as long as all repeats take")] = 25.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: an accelerator, if there is one)")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="tiny models, two arms, without import times")] = False,
    again: Annotated[bool, typer.Option("--again", help="of the result in DIR only what was disturbed")] = False,
    profile: Annotated[str | None, typer.Option(help="of this arm, where the time of --only goes, on a CPU")] = None,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    if only is not None:
        check_names([only], MEASURES, "--only: measure")
    here = torch.accelerator.current_accelerator() or torch.device("cpu")
    where = torch.device("cpu") if device == "cpu" else here
    if where.type not in SIZES or device not in (None, where.type):
        raise UserError(f"--device {device or where.type}: take cpu, or cuda where there is one (here: {here.type})")
    within = {each.name: each for each in modes(where)}
    if mode is not None:
        check_names([mode], within, "--mode: mode")
        within = {mode: within[mode]}
    size = "smoke" if smoke else where.type
    if output is None and only is None and mode is None:
        output = Path("runs") / ("benchmark" if size == "cpu" else f"benchmark-{size}")
    if output and output.is_file():
        raise UserError(f"--output {output} is a file; name a folder")
    if again and (only or mode):
        raise UserError("--again measures what was disturbed: leave out --only and --mode")
    # torch's profiler tells when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    names = [only] if only else [name for name in MEASURES if not (smoke and name == "import")]
    arms, left_out = installed(ARMS)
    arms = {arm.name: arm for arm in arms if not smoke or arm.name in (REFERENCE.name, "GPT-2")}
    # Part -> about how many seconds a repeat of all of it takes.
    parts = {
        name: sum(MEASURES[each].turn for _, each in chosen(arm, names, within.values())) for name, arm in arms.items()
    }
    parts = {name: turn for name, turn in parts.items() if turn}
    if profile is not None:
        check_names([profile], arms, "--profile: arm")
        which = [of for of, each in chosen(arms[profile], [only], within.values()) if not MEASURES[each].once]
        if not which or where.type != "cpu":
            timed = ", ".join(name for name, measure in MEASURES.items() if measure.cost and not measure.once)
            raise UserError(f"--profile {profile} takes --device cpu and an --only that it takes part in: {timed}")
        for each in which:
            print(f"{MEASURES[only].label}, {each.name}:\n\n{time_table(arms[profile], only, SIZES[size], each)}\n")
        return
    if "import" in names:
        parts["import"] = MEASURES["import"].turn
    if not parts:
        raise UserError(f"--only {only} is not measured in --mode {mode}")

    def measured(name):
        seconds = 60 * minutes * parts[name] / sum(parts.values())
        if name == "import":
            return compare_imports(arms.values(), REFERENCE, seconds)
        seconds, least = (0, 1) if smoke else (seconds, LEAST)
        return compare(arms[name], REFERENCE, names, SIZES[size], where, seconds, least, [*within.values()])

    if part is not None:
        # Alone in a process, which prints what was measured.
        for row in measured(part):
            print(json.dumps(row), flush=True)
        return

    result = {"name": "benchmark", "size": size, **provenance(where), "threads": torch.get_num_threads()}
    # Of a checkout that is not installed the commit says what it is.
    others = {arm.package for arm in arms.values()} - {"rezero_hf"}
    result["versions"] |= {package: metadata.version(package) for package in sorted(others)}
    result |= {"sizes": asdict(SIZES[size]), "left_out": left_out, "failed": {}, "comparisons": [], "again": []}
    result["arms"] = [
        {word: getattr(arm, word) for word in ("name", "words", "peer", "package")}
        | {"parameters": parameters(arm, SIZES[size])}
        for arm in arms.values()
    ]
    result["complete"] = False
    if again:
        result = _begun(output, result)

    def write():
        if output:
            output.mkdir(parents=True, exist_ok=True)
            (output / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")

    # Whatever happens from here on, an older result is not taken for this one.
    write()
    for name, package in left_out.items():
        print(f"{name} is left out: pip install {package}")
    start = time.perf_counter() - result.get("seconds", 0)
    for name in parts if not again else ():
        print(f"{name} ...", flush=True)
        rows, failed = (measured(name), None) if smoke else alone([sys.executable, *sys.argv, "--part", name])
        result["comparisons"] += rows
        result["failed"] |= {name: failed} if failed else {}
        result["seconds"] = round(time.perf_counter() - start)
        write()
    for row in disturbed(result) if not smoke else ():
        words = ["arm", "measure", "mode"]
        print(f"{row['arm']} once more, because the machine was busy during {_what(row)} ...", flush=True)
        which = ["--part", row["arm"], "--only", row["measure"], "--mode", row["mode"]]
        rows, failed = alone([sys.executable, *(word for word in sys.argv if word != "--again"), *which])
        result["failed"] |= {row["arm"]: failed} if failed else {}
        if rows:
            result["again"].append({word: row[word] for word in (*words, "costs")} | {"git": git_state()})
            row.update(rows[0])
        result["seconds"] = round(time.perf_counter() - start)
        write()
    wanted = expected(arms.values(), names, within.values())
    wanted -= {(row["arm"], row["measure"], row["mode"]) for row in result["comparisons"]}
    wrong = {} if smoke else {row["arm"]: f"the machine was busy during {_what(row)}" for row in disturbed(result)}
    wrong |= {arm: f"{measure} {of} is missing" for arm, measure, of in sorted(wanted)}
    result["failed"] = wrong | result["failed"]
    result["complete"] = not (only or mode or left_out or result["failed"])
    write()
    print(benchmark_table(result))
    if output:
        print(benchmark_figure(result, output / "figures" / "benchmark.png"))
    if result["failed"]:
        raise UserError(
            "not measured, or not well: " + "; ".join(f"{name} ({why})" for name, why in result["failed"].items())
        )
    if result["complete"] and not smoke:
        print(f"commit it with: python scripts/report.py {output}")


def _begun(output: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The result in a folder, a part of which was disturbed, if it was made as one would be now."""
    path = output / "result.json"
    if not path.is_file():
        raise UserError(f"--again: there is no {path}")
    result = json.loads(path.read_text(encoding="utf-8"))
    for word in ("device", "threads", "versions", "sizes", "arms", "left_out"):
        if result.get(word) != now[word]:
            raise UserError(f"--again: {path} was made with other {word}; measure all of it")
    if not disturbed(result):
        raise UserError(f"--again: nothing was disturbed in {path}")
    return now | result | {"failed": {}, "complete": False}


def _what(row: dict[str, Any]) -> str:
    return f"{row['measure']} {row['mode']}"


if __name__ == "__main__":
    run(main)
