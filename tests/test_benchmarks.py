"""A benchmark's repeats cost what they cost, everything that it measures is recorded, and its script runs from start to end."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from rezero_hf.benchmark_arms import REFERENCE, SIZES
from rezero_hf.benchmark_cases import Case, Mode, peak_allocation
from rezero_hf.benchmarks import MEASURES, compare
from rezero_hf.errors import UserError
from rezero_hf.results import collect_result


ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def benchmark(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--smoke", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
    return exit.value.code


def test_peak_allocation_is_what_was_alive_at_once():
    """Bytes of tensors: two of 1 MB together, the 3 MB after they are gone, not the sum, and nothing from before."""
    before = [torch.ones(2**18)]

    def action():
        a, b = torch.ones(2**18), torch.ones(2**18)
        del a, b
        before.clear()
        return torch.ones(3 * 2**18)

    assert peak_allocation(action, CPU) == 3 * 2**20


def test_peak_memory_is_the_same_every_time():
    first, again = (compare(REFERENCE, REFERENCE, ["memory"], SIZES["smoke"], CPU, 0.0)[0]["costs"] for _ in range(2))
    assert first == again
    assert first["arm"] == first["reference"]
    assert len(first["arm"]) == 1


def test_what_is_switched_off_for_an_arm_is_off_while_it_works():
    """`during` is entered around every step and left again."""
    inside = []

    class Off:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.append(False)

    arm = type(REFERENCE)(name="off", words="", build=REFERENCE.build, imports="", during=Off)
    case = Case(arm, SIZES["smoke"], Mode("fp32", torch.float32), CPU)
    case.train(), case.memory(), case.prefill()
    assert inside == [True, False] * 3


def test_the_script_measures_everything_beside_its_limits(monkeypatch, tmp_path, capsys):
    """Tiny, two arms: every measure in every mode; the table is printed; and it is no result to commit."""
    assert benchmark(monkeypatch, "--output", tmp_path) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"command", "started", "versions", "git", "device", "threads", "sizes", "seconds"} <= set(result)
    assert [arm["name"] for arm in result["arms"]] == ["ReZero", "GPT-2"]
    measured = [(row["arm"], row["measure"], row["mode"]) for row in result["comparisons"]]
    both = [name for name in MEASURES if name not in ("load", "import")]
    expected = {(arm, name, mode) for arm in ("ReZero", "GPT-2") for name in both for mode in ("fp32", "bf16")}
    assert len(measured) == len(set(measured))
    assert set(measured) == expected | {(arm, "load", "fp32") for arm in ("ReZero", "GPT-2")}
    for row in result["comparisons"]:
        assert set(row["limits"]) == set(MEASURES[row["measure"]].limits)
        assert all(len(costs) == 1 for costs in (*row["costs"].values(), *row["limits"].values()))
    assert (tmp_path / "figures" / "benchmark.png").stat().st_size > 5000
    assert "| training, tokens/s | fp32 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="smoke run"):
        collect_result(tmp_path)


def test_an_arm_by_itself_tells_what_it_measured_in_its_last_line(monkeypatch, capsys):
    """How the script runs each arm in a process of its own."""
    assert benchmark(monkeypatch, "--only", "memory", "--arm", "GPT-2") == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["arm"], row["measure"], row["mode"]) for row in rows] == [
        ("GPT-2", "memory", "fp32"),
        ("GPT-2", "memory", "bf16"),
    ]


def test_an_unknown_measure_is_one_line(monkeypatch, capsys):
    assert benchmark(monkeypatch, "--only", "decode") == 2
    assert "error: --only: measure 'decode' is unknown" in capsys.readouterr().err
