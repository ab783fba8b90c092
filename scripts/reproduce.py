"""Run a table of the paper: all its rows and seeds; then write the table and the figures.

python scripts/reproduce.py scripts/recipes/mlp_depth.yaml                   # at the size of two CPU cores
python scripts/reproduce.py scripts/recipes/mlp_depth.yaml --seeds 3,4,5     # others than those that tuned it
python scripts/reproduce.py scripts/recipes/mlp_depth.yaml --search          # every row is tuned anew, all alike
python scripts/reproduce.py scripts/recipes/mlp_depth.yaml --full            # at the paper's size

What was stopped goes on with the same command: finished runs are kept. Without `--search` every row runs with what the
committed result has chosen for it (`model_cards/results`; or another, `--chosen`), and stands beside what it was there.
A recipe of which no result is committed is searched.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rezero_hf.arguments import SEEDS
from rezero_hf.cli import numbers, run
from rezero_hf.durable import write_whole
from rezero_hf.errors import UserError
from rezero_hf.recipe import load_recipe
from rezero_hf.repeats import can_be_kept, is_searched, repeated_table, unlike
from rezero_hf.runs import cores
from rezero_hf.step_times import step_times
from rezero_hf.strict import check_names
from rezero_hf.studies import run_study
from rezero_hf.study_figures import draw
from rezero_hf.study_plan import Study, load_study
from rezero_hf.study_results import chosen_in, read_result, result_name, strayed, summarise
from rezero_hf.study_tables import study_table


COMMITTED = Path(__file__).parents[1] / "model_cards" / "results"


def main(
    recipe: Annotated[Path, typer.Argument(help="a recipe with a section study")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, over the recipe, for all runs")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="where the runs go (default runs/NAME)")] = None,
    only: Annotated[str | None, typer.Option(help="run one row alone")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at a time (default: the cores; 1 on a GPU)")] = None,
    full: Annotated[bool, typer.Option("--full", help="the paper's size")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="every row for a few seconds")] = False,
    search: Annotated[bool, typer.Option("--search", help="tune every row, whatever was chosen before")] = False,
    chosen: Annotated[
        Path | None, typer.Option(help="a result of this recipe, which has tuned its rows (default: the committed one)")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="others than those that tuned the rows, as 3,4,5")] = None,
):
    if full and smoke:
        raise UserError("--full and --smoke are two sizes; choose one")
    if (smoke or search) and chosen is not None:
        raise UserError(f"{'--smoke' if smoke else '--search'} tunes rows, --chosen takes them as tuned; choose one")
    size = "full" if full else "smoke" if smoke else "cpu"
    study = load_study(recipe, size)
    if only is not None:
        check_names([only], study.rows, f"{recipe}: --only: row")
    plan = load_recipe(recipe, overrides or (), smoke, full)
    committed = COMMITTED / f"{result_name({'name': plan.name, 'size': size})}.json"
    if chosen is None and not (smoke or search) and committed.exists():
        chosen = committed
    if seeds is not None and chosen is None:
        raise UserError("--seeds takes others than those that tuned the rows: nothing has, or --search does it here")
    kinds = [plan.name, *([] if size == "cpu" else [size]), *([] if chosen is None else ["chosen"])]
    if seeds is not None:
        study = replace(study, seeds=other_seeds(seeds, study.seeds))
        kinds += map(str, study.seeds)
    output = output or Path("runs") / "-".join(kinds)
    if jobs is None:
        jobs = 1 if torch.accelerator.is_available() else cores()
    study = study.smallest() if smoke else study
    words = {"only": only, "overrides": tuple(overrides or ()), "size": size, "jobs": jobs}
    there = None
    if chosen is not None:
        there = read_result(chosen, plan.name, size)
        if not is_searched(there):
            raise UserError(f"{chosen} ran with what another result had chosen; give that one")
        words["chosen"] = chosen_in(there, recipe)
        file = output / "result.json"
        if file.exists() and is_searched(read_result(file, plan.name, size)):
            raise UserError(f"{output} holds the result of a search, which would be lost; choose another --output")
    print(how_tuned(study, there, smoke or search), flush=True)
    changed = strayed(there, recipe, words["overrides"]) if there else []
    runs = run_study(recipe, study, output, **words)
    if only is not None:
        part = summarise(plan.name, size, study, runs)
        print(study_table(part) if there is None else beside(part, there, changed))
        return
    times = None
    if study.baseline is not None:
        # What was chosen comes first.
        best = {cell.name: cell.overrides(runs[cell.name][0]["set"]) for cell in study.cells()}
        tuned = {name: load_recipe(recipe, [*said, *words["overrides"]], smoke, full) for name, said in best.items()}
        times = step_times(tuned, 2 if smoke else None)
    result = summarise(plan.name, size, study, runs, times)
    print(study_table(result))
    if there is not None:
        # Which one: a study that is searched anew has another.
        result |= {"repeats": there["finished"], "changed": changed}
        if jobs > cores():
            # Runs that wait for each other have no time of their own.
            result.pop("core_seconds", None)
        print(f"\n{beside(result, there, changed)}")
    # The result comes last, and is there only with all that belongs to it.
    (output / "result.json").unlink(missing_ok=True)
    shutil.rmtree(output / "figures", ignore_errors=True)
    for picture in draw(result, output / "figures"):
        print(picture)
    write_whole(output / "result.json", json.dumps(result, indent=1) + "\n")
    if not smoke and (there is None or (can_be_kept(result) and not unlike(result, there, changed))):
        print(f"commit it with: python scripts/report.py {output}")


def how_tuned(study: Study, there: dict[str, Any] | None, search: bool) -> str:
    if not any(study.tuned(cell) for cell in study.cells()):
        return "no row of this study is tuned"
    if there is not None:
        return f"every row runs with what the result of {there['finished'][:10]} has chosen; --search tunes them anew"
    return "every row is tuned" if search else "no committed result of this recipe in this size: every row is tuned"


def beside(here: dict[str, Any], there: dict[str, Any], changed: list[str]) -> str:
    differs = unlike(here, there, changed)
    remark = f"Now and then differ in {differs}.\n\n" if differs else ""
    return remark + repeated_table(here, there)


def other_seeds(text: str, known: list[int]) -> list[int]:
    seeds = numbers(text, "--seeds")
    if len({*seeds, *known}) < len(seeds) + len(known) or not all(0 <= seed < SEEDS for seed in seeds):
        raise UserError(f"--seeds {text}: each once, from 0 to 2**32 - 1, and none of the recipe's ({known})")
    return seeds


if __name__ == "__main__":
    run(main)
