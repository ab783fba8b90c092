"""A study run again with what its committed result has chosen: shown beside it, and only beside the one it repeats."""

from pathlib import Path

import pytest

from rezero_hf.errors import UserError
from rezero_hf.repeats import check_repeats, read_repeats, repeated_said, repeats_section
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
                **{"git": None, "device": "a machine"},
            }
            for seed, end in enumerate(values)
        ]
        for row, values in ends.items()
    }
    return summarise("demo", "cpu", study, runs)


THEN = result({"plain": (2.0, 2.2), "rezero": (1.0, 1.2), "wild": (None, None)})
NOW = {**result({"plain": (2.0, 2.1), "rezero": (1.1, 1.3), "wild": (None, 3.0)}), "repeats": THEN["finished"]}


def test_each_row_stands_beside_what_it_was():
    """The row farthest off is named, and one that diverges otherwise; hours are those of all runs and threads."""
    then = {**THEN, "training_seconds": 2 * THEN["training_seconds"]}
    section = repeats_section([NOW], [then], ["demo", "other"])
    line = section.splitlines()[2]
    assert "1.100 ± 0.141 bits per byte → 1.200 ± 0.141 bits per byte (ReZero)" in line
    assert "2.100 ± 0.141 bits per byte → 2.050 ± 0.071 bits per byte (without)" in line
    farthest = "ReZero, 1.100 ± 0.141 → 1.200 ± 0.141 bits per byte; too fast diverges otherwise"
    # Each run lasts 450 s on two threads; the search had trained for as long again as what it chose.
    assert f"| {farthest} | 1.50 | 3.00 | a machine |" in line
    assert "together 1.5, so 0.8 hours on two cores." in section
    assert "0.0 hours on two cores for the paper's tables, 1.5 for the others" in section
    assert section.endswith("Not run again so far: `other`.")
    assert repeated_said(NOW, THEN) == f"with --chosen, 1.50 core-hours, a machine; farthest row: {farthest}"


def test_a_repeat_of_a_result_that_was_replaced_is_refused():
    check_repeats(NOW, [THEN])
    for results in ([], [{**THEN, "finished": "2026-02-02T00:00:00+00:00"}], [{**THEN, "size": "full"}]):
        with pytest.raises(UserError, match=r"demo: what was run again is the result of 2026-01-01.*with --chosen"):
            check_repeats(NOW, results)


def test_what_is_committed_repeats_what_is_committed():
    studies = committed(ROOT / "model_cards" / "results").studies
    repeats = read_repeats(ROOT / "model_cards" / "repeats")
    assert repeats
    for repeat in repeats:
        check_repeats(repeat, studies)
