"""A benchmark's numbers: ratios, limits and verdicts on costs that are known, and pages that show losses like wins."""

import json

import pytest

from rezero_hf.benchmark_report import (
    NONE,
    advantage,
    benchmark_card,
    benchmark_figure,
    benchmark_section,
    benchmark_table,
    relatives_table,
    shares,
    value,
    verdict,
)
from rezero_hf.results import committed
from rezero_hf.turns import Spread


def row(arm, measure, costs, reference, tokens=None, limits=None, flops=None, peak_flops=None):
    both = {"arm": costs, "reference": reference}
    words = {"tokens": tokens, "limits": limits or {}, "flops": flops, "peak_flops": peak_flops}
    return {"arm": arm, "measure": measure, "mode": "fp32", "costs": both, **words}


def arm(name, peer):
    return {
        "name": name,
        "words": "words",
        "package": "package",
        "peer": peer,
        "parameters": {"training": 1, "generation": 2},
    }


COMPARISONS = [
    row("ReZero", "decode_1", [2.0, 2.0], [2.0, 2.2], 64, {"products alone": [1.5, 1.5], "bandwidth": [0.5, 0.5]}),
    row("pre-norm", "decode_1", [0.5] * 6, [2.0] * 6, 64),
    row("GPT-2", "decode_1", [1.0, 1.1] * 3, [2.5] * 6, 64),
    row("Llama", "decode_1", [4.0] * 6, [2.0] * 6, 64),
    row("ReZero", "memory", [6e8], [6e8]),
    row("GPT-2", "memory", [9e8], [6e8]),
]
RESULT = {
    **{"name": "benchmark", "size": "cpu", "complete": True, "command": "benchmark.py", "device": "a machine"},
    **{"threads": 2, "seconds": 60, "versions": {"torch": "9.9"}, "git": None},
    "sizes": {
        **{"hidden_size": 512, "heads": 8, "vocab_size": 320, "training_layers": 6, "generation_layers": 12},
        **{"context": 256, "batch": 4, "prompt": 32, "new_tokens": 64, "read": 1},
    },
    "arms": [arm("ReZero", False), arm("pre-norm", False), arm("GPT-2", True), arm("Llama", True)],
    "comparisons": COMPARISONS,
}


def test_an_advantage_is_what_the_arm_costs_more():
    """Above 1 for ReZero, in time as in memory."""
    assert advantage(COMPARISONS[3]) == Spread(2.0, 2.0, 2.0)
    assert advantage(COMPARISONS[5]).median == 1.5
    assert advantage(COMPARISONS[2]).median == pytest.approx(0.42)


def test_values_are_in_the_measures_unit():
    """Tokens per second from seconds, milliseconds, megabytes."""
    assert value(COMPARISONS[0]) == 32.0
    assert value(COMPARISONS[3], "reference") == 32.0
    assert value(COMPARISONS[5]) == pytest.approx(900.0)
    assert value(row("ReZero", "load", [0.25], [0.25])) == 250.0


def test_shares_are_of_the_limit_in_the_same_turn():
    assert shares(COMPARISONS[0]) == {"products alone": 0.75, "bandwidth": 0.25}
    known = row("ReZero", "train", [2.0], [2.0], 8, {"matrix products": [1.5]}, flops=1e12, peak_flops=4e12)
    assert shares(known) == {"matrix products": 0.75, "peak (MFU)": 0.125}


@pytest.mark.parametrize(
    ("measure", "costs", "expected"),
    [
        ("train", [1.2] * 9 + [0.9], "ahead"),
        ("train", [0.8] * 6, "behind"),
        ("train", [1.2] * 8 + [0.9] * 2, "not told apart"),
        ("train", [1.2] * 5, "not told apart"),
        ("train", [1.009] * 25, "even"),
        ("memory", [1.2], "ahead"),
    ],
)
def test_a_verdict_is_more_than_chance_and_more_than_the_last_digit_shown(measure, costs, expected):
    assert verdict(row("GPT-2", measure, costs, [1.0] * len(costs))) == expected


def test_the_table_shows_the_best_peer_and_a_loss_as_a_loss():
    """The fastest of other libraries counts, not a relative of ours; ReZero's value is that of the same turns."""
    memory, speed = benchmark_table(RESULT).splitlines()[2:]
    assert memory == "| peak memory of a step, MB | fp32 | 600 |  | GPT-2: 900 | 1.50 (1.50 to 1.50) | ahead |"
    assert speed == (
        "| decode, batch 1, tokens/s | fp32 | 25.6 | 75% of products alone; 25% of bandwidth | GPT-2: 61 | "
        "0.42 (0.40 to 0.44) | behind |"
    )


def test_what_is_not_a_peer_is_shown_beside_rezero_as_shipped():
    """How many times as fast it writes: the inverse of what ReZero is better by. Chance is no number; peers are
    elsewhere."""
    header, _, line = relatives_table(RESULT).splitlines()
    assert header == "| speed of generation, relative to ReZero as shipped | batch 1, fp32 |"
    assert line == "| pre-norm: words | 4.00 (4.00 to 4.00) |"
    chance = row("pre-norm", "decode_1", [0.5, 4.0] * 3, [2.0] * 6, 64)
    assert (
        relatives_table(RESULT | {"comparisons": [chance]}).splitlines()[-1] == "| pre-norm: words | not told apart |"
    )
    assert relatives_table(RESULT | {"comparisons": []}) is None


def test_the_page_has_every_arm():
    page = benchmark_card(RESULT)
    for each in ("ReZero", "pre-norm", "GPT-2", "Llama"):
        assert f"\n| {each} | fp32 | " in page
    assert "| Llama | fp32 | 16 |  | 2.00 (2.00 to 2.00) | ahead | 6 |" in page
    assert "from a prompt of 32" in page


def test_the_section_says_so_while_nothing_is_committed():
    assert benchmark_section([]) == NONE
    section = benchmark_section([RESULT])
    assert benchmark_table(RESULT) in section
    assert "[a machine](model_cards/benchmark/README.md), 2 threads:" in section


def test_the_figure_is_drawn(tmp_path):
    assert benchmark_figure(RESULT, tmp_path / "figures" / "benchmark.png").stat().st_size > 5000


def test_committed_results_are_told_apart(tmp_path):
    for name, record in {"a": {"rows": []}, "b": RESULT, "c": {"name": "run"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = committed(tmp_path)
    assert (found.runs, found.studies, found.benchmarks) == ([{"name": "run"}], [{"rows": []}], [RESULT])
