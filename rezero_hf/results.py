"""Committed results: a finished run's record as JSON, and the tables made from such files. No number is typed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import UserError
from .runs import read_metrics
from .verification import scrub


BEGIN, END = "<!-- results begin -->", "<!-- results end -->"
COLUMNS = ("run", "seed", "parameters", "tokens", "validation", "test", "training", "device", "versions", "commit")


def collect(run_dir: str | Path) -> dict[str, Any]:
    """One JSON-able record of a finished run: `run.json` without host, user and paths, with its recipe and evaluations.

    Raises:
        UserError: the folder holds no finished run.
    """
    run_dir = Path(run_dir)
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        recipe = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
        evaluations = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["event"] == "eval"]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {run_dir} holds no finished run") from error
    return scrub({**record, "recipe": recipe, "evaluations": evaluations})


def table(records: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of runs, in the order of name and seed; bits per byte, lower is better."""
    rows = []
    for record in sorted(records, key=lambda record: (record["name"], record["seed"])):
        git = record["git"] or {"sha": "unknown", "dirty": False}
        rows.append(
            [
                record["name"],
                str(record["seed"]),
                f"{record['parameters']:,}",
                f"{record['tokens']:,}",
                *(f"{record['results'][split]['bits_per_byte']:.3f}" for split in ("validation", "test")),
                f"{record['training_seconds'] / 60:.1f} min",
                record["device"],
                f"torch {record['versions']['torch']}, transformers {record['versions']['transformers']}",
                f"`{git['sha'][:8]}`" + (" with changes" if git["dirty"] else ""),
            ]
        )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def splice(document: str, text: str) -> str:
    """The document with everything between its result markers replaced by the text.

    Raises:
        UserError: the document has not exactly one pair of markers.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise UserError(f"the document needs exactly one line {BEGIN} and one line {END}")
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"
