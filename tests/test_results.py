"""Committed numbers: collected from a run's own files, and the only source of the README's table."""

import json
import re
from pathlib import Path

import pytest

from rezero_hf.errors import UserError
from rezero_hf.results import (
    collect,
    collect_result,
    committed,
    integrations_table,
    splice,
    table,
    with_entries,
)
from rezero_hf.study_results import retold, strayed


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
    "smoke": False,
}


@pytest.fixture
def run(tmp_path):
    """A finished run's folder; a function that changes its record."""
    rows = [{"event": "train", "step": 1}, {"event": "eval", "step": 2, "bits_per_byte": 1.5}]
    (tmp_path / "recipe.yaml").write_text("name: demo\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("card")

    def record(**changes):
        (tmp_path / "run.json").write_text(json.dumps({**RECORD, **changes}))
        return tmp_path

    return record


def test_a_row_shows_what_the_record_says():
    row = table([RECORD]).splitlines()[-1]
    assert row == (
        "| demo | 3 | 1,234,567 | 2,000,000 | 1.234 | 2.000 | 1.5 min | a machine | torch 9.9, transformers 8.8 | "
        "`01234567 with changes` |"
    )


def test_collecting_takes_a_runs_files_without_the_machines_paths(run):
    record = collect(run(command="pretrain.py /somewhere/private/recipe.yaml"))
    assert record["command"] == "pretrain.py recipe.yaml"
    assert record["evaluations"] == [{"event": "eval", "step": 2, "bits_per_byte": 1.5}]
    assert record["recipe"] == "name: demo\n"


def test_a_run_that_is_no_result_is_refused(run, tmp_path):
    """Unfinished, smoke and diverged runs cannot replace a committed number."""
    with pytest.raises(UserError, match=r"run\.json is missing: .* holds no finished run"):
        collect(tmp_path)
    with pytest.raises(UserError, match="is a smoke run"):
        collect(run(smoke=True))
    with pytest.raises(UserError, match="nan bits per byte on test: it diverged"):
        collect(run(results={"test": {"bits_per_byte": float("nan")}}))


def test_splicing_replaces_only_what_is_between_the_markers():
    document = "before\n<!-- results begin -->\nold\n<!-- results end -->\nafter\n"
    assert splice(document, "new") == "before\n<!-- results begin -->\nnew\n<!-- results end -->\nafter\n"
    with pytest.raises(UserError, match="exactly one"):
        splice("no markers", "new")


def test_a_clients_failure_is_shown():
    """A number beyond its limit, a client that is not there and one that failed are rows of the table, like successes."""
    check = {"client": "PEFT", "package": "peft", "version": "1.0", "what": "merged", "unit": "of a logit"}
    check |= {"value": 1e-6, "limit": 1e-5}
    result = {
        "checks": [check, {**check, "value": 0.5}],
        "left_out": {"TRL": "trl"},
        "failed": {"lm-eval": "ValueError: no such task"},
    }
    assert integrations_table(result).splitlines()[2:] == [
        "| PEFT (peft 1.0) | merged | 1e-06 of a logit | 1e-05 | yes |",
        "| PEFT (peft 1.0) | merged | 0.5 of a logit | 1e-05 | **no** |",
        "| TRL |  |  |  | not installed: trl |",
        "| lm-eval |  |  |  | **failed**: ValueError: no such task |",
    ]


def test_committed_studies_are_of_their_recipes_as_they_are():
    """Each recipe would make its result again: its rows, its words, what they are tuned over."""
    studies = committed(ROOT / "model_cards" / "results").studies
    assert studies
    for result in studies:
        assert strayed(result, ROOT / "scripts" / "recipes" / f"{result['name']}.yaml") == []


def test_committed_studies_are_told_as_their_recipes_tell_now():
    """Titles, labels, notes and which rows are compared: `report.py` takes them from the recipe."""
    for result in committed(ROOT / "model_cards" / "results").studies:
        recipe = ROOT / "scripts" / "recipes" / f"{result['name']}.yaml"
        assert retold({**result, "note": "old", "ours": "gone"}, recipe) == result


def test_a_result_is_collected_without_the_machines_paths(tmp_path):
    result = {
        "size": "cpu",
        "complete": True,
        "comparisons": [],
        "command": "scripts/benchmark.py --output /home/somebody/secret/runs",
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert collect_result(tmp_path)["command"] == "scripts/benchmark.py --output runs"


def test_a_study_or_benchmark_that_is_no_result_is_refused(tmp_path):
    """Smoke runs and single rows or measures cannot replace a committed table."""
    for changes, message in (({"size": "smoke"}, "smoke run"), ({"complete": False}, "a part alone")):
        (tmp_path / "result.json").write_text(json.dumps({"size": "cpu", "complete": True, "rows": [], **changes}))
        with pytest.raises(UserError, match=message):
            collect_result(tmp_path)
    for text in ('{"size": "cpu"', "[]", '{"complete": true}', '{"size": "cpu", "complete": true}'):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(UserError, match=r"result.json: is no result"):
            collect_result(tmp_path)


def test_what_a_header_says_takes_the_place_of_what_it_said():
    recipe = "# Claim     it works\n# Cost      much,\n#           and more\n#\n# Why.\nmodel: {}\n"
    once = with_entries(recipe, {"Measured": ["1.5 " * 40], "Repeated": ["2.5"]})
    assert once.startswith("# Claim     it works\n# Cost      much,\n#           and more\n# Measured  1.5 1.5")
    assert once.endswith(
        "1.5\n#           1.5 1.5 1.5 1.5 1.5 1.5 1.5 1.5 1.5 1.5 1.5 1.5 1.5\n# Repeated  2.5\n#\n# Why.\nmodel: {}\n"
    )
    assert with_entries(once, {"Measured": [], "Repeated": []}) == recipe
    with pytest.raises(UserError, match="needs a header"):
        with_entries("model: {}", {"Measured": ["1"]})


def test_every_committed_card_shows_pictures_that_are_there():
    cards = sorted((ROOT / "model_cards").glob("*/README.md"))
    assert cards
    for card in cards:
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.read_text()):
            assert (card.parent / picture).exists(), f"{card}: {picture}"
