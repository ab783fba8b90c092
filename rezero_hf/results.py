"""Committed results: a finished run's record as JSON, and the tables made from such files. No number is typed."""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError, one_line
from .markdown import join
from .markdown import table as markdown_table
from .runs import commit_name, read_metrics
from .traces import scrub


NONE = "No client's result is committed yet."
# What tells results apart: a word that those of a kind have, and the kind.
KINDS = {"comparisons": "benchmarks", "rows": "studies", "checks": "integrations"}
COLUMNS = ("run", "seed", "parameters", "tokens", "validation", "test", "training", "device", "versions", "commit")


def collect(run_dir: str | Path) -> dict[str, Any]:
    """One JSON-able record of a finished run: `run.json` without host, user and paths, with its recipe and evaluations.

    Raises:
        UserError: the folder holds no finished run, or one whose numbers are not worth keeping: a smoke run, or one
            that ended in NaN.
    """
    run_dir = Path(run_dir)
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        recipe = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
        evaluations = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["event"] == "eval"]
        (run_dir / "model" / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {run_dir} holds no finished run") from error
    if record["smoke"]:
        raise UserError(f"{run_dir} is a smoke run; its numbers mean nothing")
    for split, measured in record["results"].items():
        if not math.isfinite(measured["bits_per_byte"]):
            raise UserError(f"{run_dir} ended with {measured['bits_per_byte']} bits per byte on {split}: it diverged")
    return scrub({**record, "recipe": recipe, "evaluations": evaluations})


def collect_result(run_dir: str | Path) -> dict[str, Any]:
    """The result, scrubbed, of a study (`scripts/reproduce.py`), a benchmark or the integrations that were run whole.

    Raises:
        UserError: there is none, or its numbers are not worth keeping: a smoke run, some rows alone, a benchmark
            without some of its arms, or integrations without some of their clients.
    """
    path = Path(run_dir) / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        kind = {"size", "complete"} <= result.keys() and any(word in result for word in KINDS)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: is no result ({one_line(error)})") from error
    if not kind:
        raise UserError(f"{path}: is no result of a study, a benchmark or the integrations")
    if result["size"] == "smoke":
        raise UserError(f"{run_dir} is a smoke run; its numbers mean nothing")
    if not result["complete"]:
        missing = join([*result.get("left_out", ()), *result.get("failed", ())])
        way_out = f"it lacks {missing}" if missing else "run the same command to its end, without --only"
        raise UserError(f"{path} holds a part alone; {way_out}")
    return scrub(result)


class Committed(NamedTuple):
    """Committed results of each kind, in the order of their files' names."""

    runs: list[dict[str, Any]]
    studies: list[dict[str, Any]]
    benchmarks: list[dict[str, Any]]
    integrations: list[dict[str, Any]]


def committed(folder: str | Path) -> Committed:
    """Every result in a folder, `model_cards/results`."""
    found = Committed([], [], [], [])
    for path in sorted(Path(folder).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        kind = next((KINDS[word] for word in KINDS if word in record), "runs")
        getattr(found, kind).append(record)
    return found


def table(records: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of runs, in the order of name and seed; bits per byte, lower is better."""
    rows = []
    for record in sorted(records, key=lambda record: (record["name"], record["seed"])):
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
                f"`{commit_name(record['git'])}`",
            ]
        )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def works(check: dict[str, Any]) -> bool:
    """Whether the two things that a client's check compares are as near to each other as they have to be."""
    return check["value"] <= check["limit"]


def integrations_table(result: dict[str, Any]) -> str | None:
    """What `scripts/integrations.py` found: a line a check, and one for each client that did not run to its end."""
    rows = [
        [
            f"{check['client']} ({check['package']} {check['version']})",
            check["what"],
            f"{check['value']:.2g} {check['unit']}",
            f"{check['limit']:g}",
            "yes" if works(check) else "**no**",
        ]
        for check in result["checks"]
    ]
    rows += [[client, "", "", "", f"not installed: {package}"] for client, package in result["left_out"].items()]
    rows += [[client, "", "", "", f"**failed**: {why}"] for client, why in result["failed"].items()]
    return markdown_table(("client", "what was done and compared", "measured", "at most", "works"), rows)


def integrations_section(results: Iterable[dict[str, Any]]) -> str:
    """What the README shows: every committed table, and what it was made of."""
    parts = []
    for result in results:
        packages = ("torch", "transformers")
        versions = ", ".join(f"{package} {result['versions'][package]}" for package in packages)
        made = f"On {result['device']}, {versions}, commit `{commit_name(result['git'])}`; "
        made += f"one model of {result['checkpoint']}."
        parts += [integrations_table(result), made]
    return "\n\n".join(parts) or NONE


def measured(records: Iterable[dict[str, Any]], name: str) -> str:
    """What a recipe's header says that its committed runs reached."""
    runs = sorted((record for record in records if record["name"] == name), key=lambda record: record["seed"])
    bits = {split: [run["results"][split]["bits_per_byte"] for run in runs] for split in ("validation", "test")}
    reached = ", ".join(
        f"{' and '.join(f'{value:.3f}' for value in values)} on {split}" for split, values in bits.items()
    )
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return f"{reached} (bits per byte, seed {seeds})"


def with_entries(recipe: str, entries: Mapping[str, Iterable[str]]) -> str:
    """A recipe's text with entries at the end of its header, in place of those of the same names.

    Args:
        recipe: its text.
        entries: name, such as `Measured` -> what it says, a paragraph each.

    Raises:
        UserError: the text does not begin with such a header, `# Claim` first.
    """
    found = re.match(r"# Claim .*\n(?:# .*\n)*", recipe)
    if found is None:
        raise UserError("the recipe needs a header: lines that begin with '# ', the first with '# Claim '")
    header, lines = found[0], []
    for name, said in entries.items():
        header = re.sub(rf"^# {name} .*\n(?:#   .*\n)*", "", header, flags=re.MULTILINE)
        margins = {"initial_indent": f"# {name:<10}", "subsequent_indent": f"# {'':<10}"}
        lines += [textwrap.fill(text, 120, break_on_hyphens=False, **margins) for text in said]
    return "\n".join([header.rstrip("\n"), *lines, recipe[found.end() :]])


def splice(document: str, text: str, what: str = "results") -> str:
    """The document with everything between a pair of markers replaced by the text.

    Args:
        what: which pair: `<!-- results begin -->` and `<!-- results end -->`, or those of another word.

    Raises:
        UserError: the document has not exactly one such pair.
    """
    begin, end = f"<!-- {what} begin -->", f"<!-- {what} end -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise UserError(f"the document needs exactly one line {begin} and one line {end}")
    head, _, rest = document.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{text}\n{end}{tail}"
