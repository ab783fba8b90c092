"""Commit finished runs to `model_cards/results`, and write their numbers into the README and their recipes' headers.

python scripts/report.py runs/quickstart runs/quickstart.1
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from rezero_hf.cli import run
from rezero_hf.results import collect, measured_line, splice, table, with_measured_line


CARDS = Path("model_cards")


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="finished runs; none only rewrites the README")] = None,
):
    collected = [(folder, collect(folder)) for folder in runs or ()]
    results = CARDS / "results"
    results.mkdir(parents=True, exist_ok=True)
    for folder, record in collected:
        name = f"{record['name']}-seed{record['seed']}"
        (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        # The card and its pictures keep their places relative to each other.
        card = CARDS / name
        shutil.rmtree(card, ignore_errors=True)
        card.mkdir()
        shutil.copyfile(folder / "model" / "README.md", card / "README.md")
        if (folder / "model" / "figures").exists():
            shutil.copytree(folder / "model" / "figures", card / "figures")
        print(f"{folder} -> {results / name}.json, {card}")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    for name in {record["name"] for record in records}:
        recipe = Path("scripts/recipes") / f"{name}.yaml"
        text = with_measured_line(recipe.read_text(encoding="utf-8"), measured_line(records, name))
        recipe.write_text(text, encoding="utf-8")
    readme = Path("README.md")
    readme.write_text(splice(readme.read_text(encoding="utf-8"), table(records)), encoding="utf-8")


if __name__ == "__main__":
    run(main)
