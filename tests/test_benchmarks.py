"""A benchmark's repeats cost what they cost, everything that it measures is recorded, and its script runs from start to end."""

import json
import runpy
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rezero_hf import benchmarks
from rezero_hf.benchmark_arms import ARMS, REFERENCE, SIZES, TRAINING
from rezero_hf.benchmark_cases import Case, Mode, modes, peak_allocation
from rezero_hf.benchmark_report import benchmark_card, disturbed
from rezero_hf.benchmarks import MEASURES, alone, chosen, compare, compare_imports
from rezero_hf.errors import UserError
from rezero_hf.models.gating import LEAST_VALUES
from rezero_hf.results import collect_result


ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FP32, COMPILED = Mode("fp32", torch.float32), Mode("bf16, compiled", torch.bfloat16, compiled=True)


def benchmark(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
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
    first, again = (
        next(compare(REFERENCE, REFERENCE, ["memory"], SIZES["smoke"], CPU, 0.0))["costs"] for _ in range(2)
    )
    assert first == again
    assert first["arm"] == first["reference"]
    assert len(first["arm"]) == 1


def test_a_naive_gate_keeps_more(monkeypatch):
    """The two arms take different paths: the one keeps outputs of branches, and the other goes on not to."""
    monkeypatch.setitem(LEAST_VALUES, "cpu", 0)
    # Tokens enough for the gate to go on a matrix.
    sizes = replace(SIZES["smoke"], hidden_size=32, batch=8)
    naive = next(arm for arm in ARMS if arm.name == "ReZero, naive gate")
    costs = [row["costs"] for row in compare(naive, REFERENCE, ["memory"], sizes, CPU, 0.0)]
    assert all(each["arm"] > each["reference"] for each in costs)


def test_what_is_switched_off_for_an_arm_is_off_while_it_works():
    """`during` is entered around every step and left again."""
    inside = []

    class Off:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.append(False)

    case = Case(replace(REFERENCE, during=Off), SIZES["smoke"], FP32, CPU)
    case.train(), case.memory(), case.prefill()
    assert inside == [True, False] * 3


def test_an_arm_is_compiled_for_no_more_than_it_takes_part_in():
    arm = replace(REFERENCE, measures=("train", "load", "import"), compiled=(*TRAINING, "load"))
    assert chosen(arm, MEASURES, [FP32, COMPILED]) == [(FP32, "train"), (FP32, "load"), (COMPILED, "train")]
    assert chosen(replace(arm, compiled=()), ["train"], [COMPILED]) == []


def test_imports_take_turns_all_together():
    arms = [replace(REFERENCE, imports="import json"), replace(REFERENCE, name="other", imports="import json")]
    rows = compare_imports([*arms, replace(arms[1], name="none", measures=TRAINING)], REFERENCE, 0.0)
    assert [row["arm"] for row in rows] == ["ReZero", "other"]
    assert rows[1]["costs"]["reference"] == rows[0]["costs"]["arm"]
    assert len(rows[1]["costs"]["arm"]) == 6


@pytest.mark.parametrize(
    ("end", "failed"),
    [
        ("", None),
        ("import os; os.abort()", "SIGABRT"),
        ("raise OSError('no\\n  room')", "room"),
        ("exit(3)", "no reason"),
    ],
)
def test_rows_of_a_process_outlive_it(end, failed):
    """What was finished counts; why the rest was not is the signal or the last line."""
    text = f"print('a word'); print('{{\"arm\": 1}}', flush=True)\n{end}"
    assert alone([sys.executable, "-c", text]) == ([{"arm": 1}], failed)


def test_the_script_measures_everything_beside_its_limits(monkeypatch, tmp_path, capsys):
    """Tiny, two arms: every measure in every mode; the table is printed; and it is no result to commit."""
    assert benchmark(monkeypatch, "--smoke", "--output", tmp_path) == 0
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


def test_an_arm_beside_which_rezero_was_slow_was_measured_on_a_busy_machine():
    """ReZero is in every arm's process, so what slows one of these down shows in it."""
    costs = {"GPT-2": [3.0, 2.9, 3.1], "Llama": [1.0, 9.0, 1.1], "GPT-NeoX": [1.2, 1.1, 1.0]}
    rows = [
        {"arm": arm, "measure": "prefill", "mode": "bf16", "costs": {"arm": ours, "reference": ours}}
        for arm, ours in costs.items()
    ]
    assert disturbed({"comparisons": rows}) == rows[:1]
    assert not disturbed({"comparisons": rows[1:]})


def fake_part(command, slow=(), lost=()):
    """The rows that a process for a part prints, made up; ReZero is slow in those measures, and those are not there."""
    words = dict(pairwise(command))
    part, names = words["--part"], [words["--only"]] if "--only" in words else list(MEASURES)
    arms = {arm.name: arm for arm in ARMS}
    if part == "import":
        which = [(name, "import", "fp32") for name, arm in arms.items() if "import" in arm.measures]
    else:
        which = [(part, name, mode.name) for mode, name in chosen(arms[part], names, modes(CPU))]
    return [
        {"arm": arm, "measure": name, "mode": mode, "limits": {}, "tokens": 1, "flops": None, "peak_flops": None}
        | {"costs": {"arm": [2.0] * 6, "reference": [2.0 if name in slow else 1.0] * 6}}
        for arm, name, mode in which
        if name not in lost
    ]


def test_what_was_disturbed_is_measured_once_more_at_the_end_and_whenever_asked(monkeypatch, tmp_path, capsys):
    """That measure of that arm alone, with the commit it was measured at and what it took before; the rest stays."""
    slow, calls = ["load", "load"], []

    def fake(command):
        assert "--again" not in command
        words = dict(pairwise(command))
        calls.append([words[word] for word in ("--part", "--only", "--mode") if word in words])
        found = slow[:1] if words["--part"] == "Llama" else []
        if found:
            slow.pop()
        return fake_part(command, found), None

    monkeypatch.setattr(benchmarks, "alone", fake)
    monkeypatch.setitem(SIZES, "cpu", SIZES["smoke"])
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path) == 2
    assert calls[-1] == ["Llama", "load", "fp32"] and [*map(len, calls)] == [1] * (len(calls) - 1) + [3]
    assert capsys.readouterr().err.endswith("not well: Llama (the machine was busy during load fp32)\n")
    before = json.loads((tmp_path / "result.json").read_text())
    assert not before["complete"]

    done = len(calls)
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path, "--again") == 0
    assert calls[done:] == [["Llama", "load", "fp32"]]
    after = json.loads((tmp_path / "result.json").read_text())
    assert after["complete"] and not after["failed"] and after["started"] == before["started"]
    assert [(row["arm"], row["costs"]["reference"][0]) for row in after["again"]] == [("Llama", 2.0)] * 2
    others = [[row for row in each["comparisons"] if row["measure"] != "load"] for each in (before, after)]
    assert others[0] == others[1]
    assert "load fp32 beside Llama" in benchmark_card(after)

    capsys.readouterr()
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path, "--again") == 2
    assert capsys.readouterr().err.endswith(f"nothing was disturbed in {tmp_path / 'result.json'}\n")
    (tmp_path / "result.json").write_text(json.dumps(after | {"threads": 64}))
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path, "--again") == 2
    assert "was made with other threads; measure all of it" in capsys.readouterr().err
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path / "none", "--again") == 2
    assert "there is no" in capsys.readouterr().err


def test_a_result_that_lacks_comparisons_is_not_complete(monkeypatch, tmp_path, capsys):
    """Whatever was measured once more since: a process that died left some out, an interrupted run whole arms."""
    slow = ["load"]

    def fake(command):
        if dict(pairwise(command))["--part"] != "Llama":
            return fake_part(command), None
        return fake_part(command, slow, ["decode_8"]), None if "--only" in command else "SIGKILL"

    monkeypatch.setattr(benchmarks, "alone", fake)
    monkeypatch.setitem(SIZES, "cpu", SIZES["smoke"])
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path) == 2
    assert "Llama (SIGKILL)" in capsys.readouterr().err
    slow.clear()
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path, "--again") == 2
    assert capsys.readouterr().err.endswith("Llama (decode_8 fp32 is missing)\n")
    assert not json.loads((tmp_path / "result.json").read_text())["complete"]


def test_an_arm_that_fails_is_named_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    """The table has the others, the end is an error, and nothing can be committed, an older result neither."""
    (tmp_path / "result.json").write_text('{"size": "cpu", "complete": true}')

    def fake(command):
        assert not json.loads((tmp_path / "result.json").read_text())["complete"]
        return ([], "SIGKILL") if command[-1] == "Llama" else (fake_part(command), None)

    monkeypatch.setattr(benchmarks, "alone", fake)
    monkeypatch.setitem(SIZES, "cpu", SIZES["smoke"])
    assert benchmark(monkeypatch, "--device", "cpu", "--output", tmp_path) == 2
    said = capsys.readouterr()
    assert said.err.endswith("error: not measured, or not well: Llama (SIGKILL)\n")
    assert "| time to first token, ms | fp32 | " in said.out
    result = json.loads((tmp_path / "result.json").read_text())
    measured = {row["arm"] for row in result["comparisons"] if row["measure"] != "import"}
    assert measured == {arm.name for arm in ARMS if arm.name != "Llama"}
    assert {"rezero", "x_transformers"} <= set(result["versions"])
    with pytest.raises(UserError, match="a part alone; it lacks Llama"):
        collect_result(tmp_path)


def test_a_profile_tells_where_the_time_goes(monkeypatch, capsys):
    """Shares of one repeat, Python's among them, that sum to it; what cannot be profiled is one line."""
    assert benchmark(monkeypatch, "--smoke", "--only", "train", "--mode", "fp32", "--profile", "GPT-2") == 0
    title, _, header, _, *lines = capsys.readouterr().out.rstrip().splitlines()
    assert title == "training, fp32:" and header == "| operation | calls | ms | share |"
    assert any(line.startswith("| aten::mm | ") for line in lines) and "between operations" in lines[-1]
    assert 95 <= sum(int(line.split("|")[4].strip(" %")) for line in lines) <= 105
    for words in (["--only", "import"], ["--only", "memory"], [], ["--only", "train", "--profile", "Bert"]):
        assert benchmark(monkeypatch, "--smoke", "--profile", "GPT-2", *words) == 2
        assert "error: --profile" in capsys.readouterr().err


def test_an_arm_by_itself_prints_what_it_measured(monkeypatch, capsys):
    """How the script runs each arm in a process of its own."""
    assert benchmark(monkeypatch, "--smoke", "--only", "memory", "--part", "GPT-2") == 0
    rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(row["arm"], row["measure"], row["mode"]) for row in rows] == [
        ("GPT-2", "memory", "fp32"),
        ("GPT-2", "memory", "bf16"),
    ]


def test_one_measure_alone_is_printed_and_not_written(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert benchmark(monkeypatch, "--smoke", "--only", "first_token") == 0
    assert "| time to first token, ms | fp32 |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "decode"), "--only: measure 'decode' is unknown"),
        (("--output", __file__), f"--output {__file__} is a file; name a folder"),
        (("--device", "tpu"), "--device tpu: take cpu, or cuda where there is one"),
        (("--only", "load", "--mode", "bf16"), "--only load is not measured in --mode bf16"),
    ],
)
def test_bad_input_is_one_line(words, message, monkeypatch, capsys):
    assert benchmark(monkeypatch, "--smoke", *words) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_what_a_layer_costs_is_measured(monkeypatch, capsys):
    """The cost names a step's time, its products' alone, and a memory that holds what its layers keep."""
    monkeypatch.setattr(sys, "argv", ["measure_depth.py", "--case", "MLP:2", "--seconds", "0"])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "scripts" / "measure_depth.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    # No comparison of the times: a busy machine can halt either one.
    assert exit.value.code == 0 and found["step"] > 0 and found["products"] > 0
    # At least the input, the output and the gradient of two layers, in fp32.
    assert found["peak"] > 2 * 3 * 4 * 128 * 150
