"""Commit finished runs to `model_cards/`, and write their numbers into README, docs and their recipes' headers.

python scripts/report.py runs/quickstart runs/quickstart.1 runs/mlp_depth runs/mlp_depth-chosen runs/benchmark
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from rezero_hf.benchmark_report import benchmark_card, benchmark_section
from rezero_hf.cli import run
from rezero_hf.errors import UserError
from rezero_hf.repeats import cost_said, original_of, read_repeats, repeat_name, repeated_said, repeats_section
from rezero_hf.results import (
    collect,
    collect_result,
    committed,
    integrations_section,
    measured,
    splice,
    table,
    with_entries,
)
from rezero_hf.study_overview import studies_section, study_measured
from rezero_hf.study_page import study_card
from rezero_hf.study_results import result_name, retold, strayed


CARDS = Path("model_cards")


def main(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="folders of finished results; none only rewrites the README")
    ] = None,
):
    results = CARDS / "results"
    results.mkdir(parents=True, exist_ok=True)
    for folder in runs or ():
        whole = (folder / "result.json").exists()
        record = collect_result(folder) if whole else collect(folder)
        if "repeats" in record:
            original = original_of(record, committed(results).studies)
            refuse_strayed(original, results / f"{result_name(original)}.json")
            file = CARDS / "repeats" / f"{repeat_name(record, original)}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(record) + "\n", encoding="utf-8")
            print(f"{folder} -> {file}")
            continue
        if whole and "rows" in record:
            refuse_strayed(record, folder)
        name = result_name(record) if whole else f"{record['name']}-seed{record['seed']}"
        text = json.dumps(record, indent=None if whole else 1)
        (results / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        if whole and "checks" in record:
            print(f"{folder} -> {results / name}.json")
            continue
        # The card and its pictures keep their places relative to each other.
        card, source = CARDS / name, folder if whole else folder / "model"
        shutil.rmtree(card, ignore_errors=True)
        card.mkdir()
        if (source / "figures").exists():
            shutil.copytree(source / "figures", card / "figures")
        if not whole:
            shutil.copyfile(source / "README.md", card / "README.md")
        print(f"{folder} -> {results / name}.json, {card}")
    for result in committed(results).studies:
        told = retold(result, recipe_of(result))
        if told != result:
            (results / f"{result_name(result)}.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    records, studies, benchmarks, integrations = committed(results)
    pairs = []
    for path, repeat in read_repeats(CARDS / "repeats").items():
        try:
            pairs.append((retold(repeat, recipe_of(repeat)), original_of(repeat, studies)))
        except UserError as error:
            path.unlink()
            print(f"{path} is gone: {error}")
    for result in benchmarks:
        (CARDS / result_name(result) / "README.md").write_text(benchmark_card(result), encoding="utf-8")
    for result in studies:
        card = CARDS / result_name(result)
        figures = [path.name for path in (card / "figures").glob("*.png")]
        (card / "README.md").write_text(study_card(result, figures), encoding="utf-8")
    recipes = {path.stem: path for path in Path("scripts/recipes").glob("*.yaml")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in recipes.items()}
    for name, text in texts.items():
        said = [study_measured(result) for result in studies if result["name"] == name]
        said += [measured(records, name)] if any(record["name"] == name for record in records) else []
        again = [pair for pair in pairs if pair[0]["name"] == name]
        # What was not run again costs what its author has guessed.
        entries = {"Cost": [cost_said(*again[0])]} if again else {}
        entries |= {"Measured": said, "Repeated": [repeated_said(*pair) for pair in again]}
        recipes[name].write_text(with_entries(text, entries), encoding="utf-8")
    sections = {
        "results": table(records),
        "studies": studies_section(studies, [name for name, text in texts.items() if "\nstudy:" in text]),
        "benchmark": benchmark_section(benchmarks),
        "integrations": integrations_section(integrations),
    }
    write_sections(Path("README.md"), sections)
    ours = [result for result in studies if result["size"] == "cpu"]
    write_sections(Path("docs/reproducing.md"), {"repeats": repeats_section(pairs, ours)})


def recipe_of(result: dict[str, Any]) -> Path:
    return Path("scripts/recipes") / f"{result['name']}.yaml"


def refuse_strayed(result: dict[str, Any], where: Path):
    recipe = recipe_of(result)
    if lines := strayed(result, recipe):
        raise UserError(f"{where} is not what {recipe} makes now ({'; '.join(lines)[:300]}): run it again.")


def write_sections(document: Path, sections: dict[str, str]):
    text = document.read_text(encoding="utf-8")
    for name, section in sections.items():
        text = splice(text, section, name)
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
