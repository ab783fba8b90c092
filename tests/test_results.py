"""Committed numbers: collected from a run's own files, and the only source of the README's table."""

import json
from pathlib import Path

import pytest

from rezero_hf.errors import UserError
from rezero_hf.results import collect, splice, table


ROOT = Path(__file__).parents[1]
RECORD = {
    "name": "demo",
    "seed": 3,
    "parameters": 1234567,
    "tokens": 2000000,
    "results": {"validation": {"bits_per_byte": 1.2345}, "test": {"bits_per_byte": 2.0}},
    "training_seconds": 90.0,
    "device": "a machine",
    "versions": {"torch": "9.9", "transformers": "8.8"},
    "git": {"sha": "0123456789abcdef", "dirty": True},
}


def test_a_row_shows_what_the_record_says():
    row = table([RECORD]).splitlines()[-1]
    assert row == (
        "| demo | 3 | 1,234,567 | 2,000,000 | 1.234 | 2.000 | 1.5 min | a machine | torch 9.9, transformers 8.8 | "
        "`01234567` with changes |"
    )


def test_collecting_takes_a_runs_files_without_the_machines_paths(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**RECORD, "command": "pretrain.py /somewhere/private/recipe.yaml"}))
    (tmp_path / "recipe.yaml").write_text("name: demo\n")
    rows = [{"event": "train", "step": 1}, {"event": "eval", "step": 2, "bits_per_byte": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = collect(tmp_path)
    assert record["command"] == "pretrain.py recipe.yaml"
    assert record["evaluations"] == rows[1:] and record["recipe"] == "name: demo\n"


def test_an_unfinished_run_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"run\.json is missing: .* holds no finished run"):
        collect(tmp_path)


def test_splicing_replaces_only_what_is_between_the_markers():
    document = "before\n<!-- results begin -->\nold\n<!-- results end -->\nafter\n"
    assert splice(document, "new") == "before\n<!-- results begin -->\nnew\n<!-- results end -->\nafter\n"
    with pytest.raises(UserError, match="exactly one"):
        splice("no markers", "new")


def test_the_readmes_table_is_made_from_the_committed_records():
    """Regenerated from `model_cards/results`, the README does not change: nothing in the table was typed."""
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "model_cards" / "results").glob("*.json"))]
    readme = (ROOT / "README.md").read_text()
    assert splice(readme, table(records)) == readme
