"""Commit finished runs to `model_cards/results` and write their numbers into the README.

python scripts/report.py runs/quickstart runs/quickstart.1
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from rezero_hf.cli import run
from rezero_hf.results import collect, splice, table


RESULTS = Path("model_cards/results")


def main(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="folders of finished runs; none only rewrites the README")
    ] = None,
):
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in runs or ():
        record = collect(folder)
        name = f"{record['name']}-seed{record['seed']}"
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(folder / "model" / "README.md", RESULTS.parent / f"{name}.md")
        shutil.copytree(folder / "model" / "figures", RESULTS.parent / "figures" / name, dirs_exist_ok=True)
        print(f"{folder} -> {RESULTS / name}.json")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    readme = Path("README.md")
    readme.write_text(splice(readme.read_text(encoding="utf-8"), table(records)), encoding="utf-8")


if __name__ == "__main__":
    run(main)
