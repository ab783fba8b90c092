"""A study run again with what its committed result has chosen: shown beside it, and only beside the one it repeats."""

from pathlib import Path

import pytest

from rezero_hf.errors import UserError
from rezero_hf.repeats import cost_said, original_of, read_repeats, repeat_name, repeated_said, repeats_section
from rezero_hf.results import committed
from rezero_hf.study_plan import Row, Study
from rezero_hf.study_results import summarise


ROOT = Path(__file__).parents[1]
ROWS = {"plain": Row("without"), "rezero": Row("ReZero"), "wild": Row("too fast")}


def result(ends, finished="2026-01-01T00:00:00+00:00"):
    """A study whose rows ended at these values, a seed each; None is a run that diverged."""
    study = Study("a test", ROWS, metric="bits_per_byte", seeds=[0, 1])
    runs = {
        row: [
            {
                **{"seed": seed, "set": {}, "chosen": True, "parameters": 1, "steps": 1, "flops": 1, "threads": 2},
                **{"training_seconds": 1.0, "wall_seconds": 450.0, "peak_memory_bytes": 1, "curve": [], "alpha": []},
                **{
                    "diverged": None if end else "nan",
                    "results": {"validation": {"bits_per_byte": end}} if end else {},
                },
                **{"finished": finished, "command": "", "recipe": "training: {}\n", "data": {}, "versions": {}},
                **{"git": None, "device": "a machine (2 cores)"},
            }
            for seed, end in enumerate(values)
        ]
        for row, values in ends.items()
    }
    return summarise("demo", "cpu", study, runs)


THEN = result({"plain": (2.0, 2.2), "rezero": (1.0, 1.2), "wild": (None, None)})
NOW = result({"plain": (2.0, 2.1), "rezero": (1.1, 1.3), "wild": (None, 0.5)})
NOW |= {"repeats": THEN["finished"], "seeds": [3, 4]}


def test_each_study_stands_beside_what_it_was():
    """What it is about, how far means have moved, who diverges now; and hours, of all runs and threads."""
    # As long again was searched for what was chosen.
    then = {**THEN, "training_seconds": 2 * THEN["training_seconds"]}
    other, gpu = {**THEN, "name": "other"}, {**THEN, "name": "large", "device": ["NVIDIA H200"]}
    section = repeats_section([(NOW, then)], [THEN, other, gpu])
    ours = "ReZero: 1.100 ± 0.141 bits per byte → 1.200 ± 0.141 bits per byte"
    assert section.splitlines()[2].split(" | ")[1:] == [
        ours,
        "without: 2.100 ± 0.141 bits per byte → 2.050 ± 0.071 bits per byte",
        f"means differ by 0.075 bits per byte in the median, most in {ours}; the same order; too fast: 2 of 2 → 1 of 2 diverged",
        *("0, 1 → 3, 4", "a machine (2 cores) → a machine (2 cores)", "1.50", "3.00 |"),
    ]
    assert "All these studies (1) together take 0.8 hours on two cores, a run on each" in section
    assert "those of questions beyond the paper that are listed here (1) would take about 1.5 hours" in section
    assert "No repeat is kept of `other` so far." in section
    assert section.endswith("No repeat is kept of `large`, which are for a GPU: their headers say what they cost.")
    assert repeated_said(NOW, THEN) == f"{ours} with seeds 3, 4"
    # Nothing was tuned, or something.
    assert cost_said(NOW, then) == "45 min on two cores (a machine (2 cores))"
    then["rows"] = [{**row, "chosen": {"training.learning_rate": 1.0}} for row in then["rows"]]
    assert cost_said(NOW, then).endswith("cores)); with --search about 1.5 h")
    # The best of all now and then, but for what diverges now and then.
    swapped = {**NOW, "rows": result({"plain": (1.0, 1.1), "rezero": (1.1, 1.3), "wild": (None, 0.5)})["rows"]}
    assert "; **another order**; " in repeats_section([(swapped, then)], [])
    # A study counts once, and takes as long as its longest run.
    long = {**NOW, "rows": [{**row, "runs": [dict(run) for run in row["runs"]]} for row in NOW["rows"]]}
    long["rows"][0]["runs"][0]["wall_seconds"] = 2 * 3600.0
    again = repeats_section([(long, then), (NOW, then)], [THEN])
    assert "studies (1) together take 2.0 hours" in again and "listed here (1) would take about 2.0 hours" in again


def test_accuracy_is_shown_as_error_and_signals_are_not_held_by_where_training_ends():
    then, now = ({**one, "metric": "accuracy"} for one in (result({"rezero": (0.5, 0.7)}), NOW))
    now = {**now, "rows": result({"rezero": (0.6, 0.7)})["rows"]}
    moved = repeats_section([(now, then)], []).splitlines()[2].split(" | ")[3]
    row = "ReZero: error 40.0 ± 14.1 % → error 35.0 ± 7.1 %"
    assert moved == f"means differ by 5.0 points in the median, most in {row}; the same order"
    for one, chi in ((then, 2.0), (now, 1.0)):
        one["rows"][0]["runs"][0]["signal"] = {"end": {"jacobian": {"chi": chi}}}
    moved = repeats_section([(now, then)], []).splitlines()[2].split(" | ")[3]
    assert moved.startswith("chi at the end by a factor of 2.00 in the median, most in ReZero: chi")
    then["rows"][0]["runs"][0]["signal"]["end"]["jacobian"]["chi"] = None
    assert repeats_section([(now, then)], []).splitlines()[2].split(" | ")[3] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": "2026-02-02T00:00:00+00:00"}, "is not of the result that is committed"),
        ({"rows": THEN["rows"][:2]}, "has other rows"),
        ({"data": {"fingerprint": "of another text"}}, "differs in the data"),
        ({"data": {"stored": "hashes of other images"}}, "differs in the data"),
        ({"changed": ["training.max_steps: 5 -> 1"]}, "differs in training.max_steps: 5 -> 1"),
        ({"core_seconds": None}, "has runs of unknown time"),
    ],
)
def test_what_repeats_something_else_is_refused(change, message):
    """With the command that makes one that is kept."""
    assert original_of(NOW, [THEN]) is THEN
    found = {word: value for word, value in {**NOW, **change}.items() if value is not None}
    with pytest.raises(UserError, match=f"this repeat of demo {message}") as caught:
        original_of(found, [THEN])
    assert str(caught.value).endswith("Run: python scripts/reproduce.py scripts/recipes/demo.yaml")


@pytest.mark.parametrize("change", [{"size": "full"}, {"device": ["NVIDIA H200"]}])
def test_only_what_anyone_can_repeat_is_kept(change):
    with pytest.raises(UserError, match="is not kept: only those on CPUs are, at the size for them"):
        original_of({**NOW, **change}, [THEN])


def test_each_choice_of_seeds_has_a_file():
    assert repeat_name(NOW, THEN) == "demo-3-4"
    assert repeat_name({**NOW, "seeds": [0, 1]}, THEN) == "demo"


def test_what_is_committed_repeats_what_is_committed():
    studies = committed(ROOT / "model_cards" / "results").studies
    repeats = read_repeats(ROOT / "model_cards" / "repeats")
    assert repeats
    for path, repeat in repeats.items():
        assert path.stem == repeat_name(repeat, original_of(repeat, studies))
