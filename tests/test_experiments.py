"""One run of a study gives a whole record, is not repeated, and every row of every committed study goes through."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from processes import run_script

from rezero_hf import ReZeroMLPForImageClassification, ReZeroTrainer, studies
from rezero_hf.errors import UserError
from rezero_hf.experiments import MODELS, run_experiment
from rezero_hf.flops import flops_per_token
from rezero_hf.recipe import load_language_recipe, load_recipe
from rezero_hf.results import collect_result
from rezero_hf.step_times import step_times
from rezero_hf.studies import run_study
from rezero_hf.study_figures import draw
from rezero_hf.study_page import study_card
from rezero_hf.study_plan import load_study
from rezero_hf.study_results import summarise
from rezero_hf.study_tables import study_table
from rezero_hf.tokenization import byte_tokenizer


ROOT = Path(__file__).parents[1]
STUDIES = [path for path in sorted((ROOT / "scripts" / "recipes").glob("*.yaml")) if "\nstudy:" in path.read_text()]
ROWS = [(path, cell) for path in STUDIES for cell in load_study(path).smallest().cells()]
TINY = """
model: {model_type: rezero_mlp, hidden_size: 8, num_hidden_layers: 3}
data: {source: digits, augmentation: none}
training: {global_batch_size: 16, per_device_train_batch_size: 16, max_steps: 6, eval_strategy: steps, eval_steps: 2,
  save_strategy: "no", optimizer: adagrad, learning_rate: 0.1, report_to: none, disable_tqdm: true}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def run_in_threads(monkeypatch):
    """A study's runs in this process: others take seconds to start."""
    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(studies, "parent_process", threading.main_thread)
    monkeypatch.setattr(studies._run, "stopping", threading.Event(), raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where the text and the images of a study come from in a test."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"line {n} says {n * n}\n" for n in range(600)))
    cache = f"data.cache_dir={folder / 'cache'}"
    rows = [{"text": f"def f{n}(x):", "label": n % 2} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = [cache, f"data.sources={folder / 'text.txt'}", f"task.data={folder / 'rows.jsonl'}"]
    return {"rezero": text, "rezero_mlp": [cache], "rezero_resnet": [cache]}


@pytest.mark.parametrize(("path", "cell"), ROWS, ids=lambda value: getattr(value, "stem", None) or value.name)
def test_a_row_of_a_committed_study_runs_small(path, cell, data, tmp_path):
    """A few steps with its own words, and with the measurements that its study asks for."""
    study = load_study(path)
    kind = load_recipe(path).model_type
    # Depth is for the real thing.
    shallow = [] if kind == "rezero_resnet" else ["model.num_hidden_layers=3"]
    # Beginning from a base has a test of its own.
    shallow += ["init_from.path=null"] if study.base_of(cell) else []
    recipe, first = (
        None if said is None else load_recipe(path, [*said, *shallow, *data[kind], "training.max_steps=2"], smoke=True)
        for said in (cell.overrides({}), cell.first({}))
    )
    run = run_experiment(recipe, tmp_path / "run", signal=study.signal, gates_off=study.gates_off, first=first)
    assert run["diverged"] is None
    assert run["curve"][-1]["step"] == (2 if first is None else 4)
    assert study.metric in run["results"]["validation"]
    assert run["results"]["validation"][study.metric] == run["curve"][-1][study.metric] or kind == "rezero"
    assert set(run) >= ({"signal"} if study.signal else set()) | ({"gates_off"} if study.gates_off else set())


def test_a_record_says_everything_and_a_finished_run_is_not_repeated(recipe, tmp_path):
    """Curve, results by split, cost and provenance; the same again is read, and is not overwritten by another recipe."""
    first = run_experiment(load_recipe(recipe), tmp_path / "run", gates_off=True)
    assert [point["step"] for point in first["curve"]] == [2, 4, 6]
    assert set(first["results"]) == {"train", "validation", "test"}
    assert first["parameters"] == 64 * 8 + 8 + 3 * (8 * 8 + 8 + 1) + 8 * 10 + 10
    # Three passes of two operations a weight, for every image of every step.
    assert first["flops"] == 6 * 16 * 3 * 2 * (64 * 8 + 3 * 64 + 8 * 10)
    assert {"versions", "git", "device", "command", "started", "finished", "data", "peak_memory_bytes"} <= set(first)
    assert first["gates_off"]["loss"] != first["results"]["validation"]["loss"]
    assert [found["step"] for found in first["alpha"]] == [2, 4, 6]
    again = run_experiment(load_recipe(recipe, ["training.logging_steps=7"]), tmp_path / "run")
    assert again == first
    with pytest.raises(UserError, match=r"finished run with other words \(training\.seed: 42 -> 1\)"):
        run_experiment(load_recipe(recipe, ["training.seed=1"]), tmp_path / "run")


def test_an_interrupted_run_goes_on_from_its_checkpoint(recipe, tmp_path, monkeypatch):
    """Stopped in step 5, it ends as if it had not been, and its curve has every point once."""
    words = ["training.save_strategy=steps", "training.save_steps=2"]
    expected = run_experiment(load_recipe(recipe, words), tmp_path / "whole")

    def stop(trainer, *args, **kwargs):
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    training_step = ReZeroTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReZeroTrainer, "training_step", stop)
        run_experiment(load_recipe(recipe, words), tmp_path / "run")
    steps = []
    monkeypatch.setattr(
        ReZeroTrainer,
        "training_step",
        lambda trainer, *a, **k: steps.append(trainer.state.global_step) or training_step(trainer, *a, **k),
    )
    run = run_experiment(load_recipe(recipe, words), tmp_path / "run")
    assert steps == [4, 5]
    assert run["results"] == expected["results"]
    # How long the whole took is known of the one alone.
    assert expected["wall_seconds"] >= expected["training_seconds"] and "wall_seconds" not in run
    measured = [[(point["step"], point["loss"]) for point in record["curve"]] for record in (run, expected)]
    assert measured[0] == measured[1]


def test_a_run_told_to_stop_is_not_finished(recipe, tmp_path, monkeypatch):
    """SIGTERM in step 3 leaves no result but a checkpoint; the same again goes on and ends like one left alone."""
    expected = run_experiment(load_recipe(recipe), tmp_path / "whole")

    def stop(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(trainer, *args, **kwargs)

    training_step = ReZeroTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(UserError, match="told to stop at step 3"):
        patch.setattr(ReZeroTrainer, "training_step", stop)
        run_experiment(load_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    assert run_experiment(load_recipe(recipe), tmp_path / "run")["results"] == expected["results"]


def test_a_run_that_diverges_is_a_result(recipe, tmp_path):
    """It ends with the step and the reason, and what was measured until then."""
    words = [
        "training.learning_rate=1.0e+30",
        "training.optimizer=sgd",
        "training.eval_steps=1",
        "model.residual=plain",
    ]
    run = run_experiment(load_recipe(recipe, words), tmp_path / "run", gates_off=True)
    assert "the step was not applied" in run["diverged"]
    assert run["results"] == run["gates_off"] == {}
    assert run["steps"] < 6


@pytest.fixture
def text_recipe(tmp_path, data):
    """Overrides -> a tiny language model, trained at a constant rate."""
    path = tmp_path / "text.yaml"
    training = yaml.safe_load(TINY)["training"] | {"lr_scheduler_type": "constant", "final_eval_blocks": 8}
    path.write_text(
        "model: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, gate_init: 0.5}\n"
        f"data: {{block_size: 16}}\ntraining: {json.dumps(training)}\n"
    )
    return lambda *more: load_recipe(path, [*data["rezero"], *more])


def test_a_row_in_two_parts_ends_as_one_in_one(text_recipe, data, tmp_path, monkeypatch):
    """Weights, the optimiser's state, data, steps and FLOP go on where the first part ended; curve and table say so."""
    path = Path(text_recipe().path)
    rows = {
        "whole": {"label": "whole"},
        "parts": {"label": "parts", "first": {"training.max_steps": 4}, "set": {"training.max_steps": 2}},
    }
    path.write_text(path.read_text() + f"study: {json.dumps({'item': 'a test', 'seeds': [0], 'rows': rows})}\n")
    run_in_threads(monkeypatch)
    study = load_study(path)
    runs = run_study(path, study, tmp_path / "runs", overrides=(*data["rezero"], "training.optimizer=muon"))
    result = summarise("text", "cpu", study, runs)
    whole, parts = (runs[name][0] for name in rows)
    read = ("step", "flops", "bits_per_byte")
    assert len({str([[point[word] for word in read] for point in run["curve"]]) for run in (whole, parts)}) == 1
    same = ("steps", "rows", "flops", "parameters", "results")
    assert [parts[word] for word in same] == [whole[word] for word in same]
    seconds = [point["training_seconds"] for point in parts["curve"]]
    assert seconds == sorted(seconds)
    assert len({line.split("|")[5] for line in study_table(result).splitlines()[2:]}) == 1
    assert "began with another run's model" in study_card(result, [])
    assert next(path.name for path in draw(result, tmp_path)) == "curves.png"


def test_rows_begin_from_a_base_that_is_made_once(text_recipe, data, tmp_path, monkeypatch):
    """The base is trained once; a row with its own task takes over the network's weights, and counts from 0."""
    path = Path(text_recipe().path)
    base = {"task.name": None, "training.max_steps": 4, "training.learning_rate": 0.1}
    rows = {
        "scratch": {"label": "scratch"},
        "held": {"label": "held", "set": {"init_from.path": "base", "training.gate_lr_multiplier": 0.0}},
    }
    study = {"item": "a test", "metric": "accuracy", "seeds": [0], "rows": rows, "bases": {"base": base}}
    path.write_text(path.read_text() + f"task: {{name: sequence-classification}}\nstudy: {json.dumps(study)}\n")
    run_in_threads(monkeypatch)
    trained, train = [], ReZeroTrainer.train
    watched = lambda trainer, **kwargs: trained.append(type(trainer.model).__name__) or train(trainer, **kwargs)  # noqa: E731
    monkeypatch.setattr(ReZeroTrainer, "train", watched)
    study = load_study(path)
    runs = run_study(path, study, tmp_path / "runs", overrides=tuple(data["rezero"]))
    assert trained == ["ReZeroForCausalLM"] + ["ReZeroForSequenceClassification"] * 2
    base = json.loads((tmp_path / "runs" / "bases" / "base" / "run.json").read_text())
    ended = base["alpha"][-1]["alpha"]
    assert all(abs(value[0] - 0.5) > 1e-3 for value in ended.values())
    assert [each["alpha"] for run in runs["held"] for each in run["alpha"]] == [ended] * 3
    assert {name: [run["steps"] for run in row] for name, row in runs.items()} == {
        "bases/base": [4],
        "scratch": [6],
        "held": [6],
    }
    result = summarise("text", "cpu", study, runs)
    assert result["training_seconds"] == round(sum(run["training_seconds"] for row in runs.values() for run in row))
    assert "`base` (max_steps 4, learning_rate 0.1, " in study_card(result, [])
    shutil.rmtree(tmp_path / "runs" / "bases" / "base")
    with pytest.raises(
        UserError, match=r"bases/base is gone, which held in .*runs began from: delete those folders too"
    ):
        run_study(path, study, tmp_path / "runs", overrides=tuple(data["rezero"]))
    with pytest.raises(UserError, match=r"base 'bse' is unknown; did you mean 'base'"):
        path.write_text(path.read_text().replace('path": "base', 'path": "bse'))
        load_study(path)


def test_a_network_for_images_begins_from_another_and_its_head_anew(recipe, data, tmp_path):
    """With other classes the head is drawn, and all else is the base's, which only a rate of 0 leaves as it was."""
    words = [*data["rezero_mlp"], "training.max_steps=2"]
    base = run_experiment(load_recipe(recipe, [*words, "data.classes=[0,1,2]"]), tmp_path / "base", keep=True)
    new = load_recipe(recipe, [*words, "data.classes=[3,4]", "training.learning_rate=0.0"])
    run = run_experiment(new, tmp_path / "run", base=tmp_path / "base", keep=True)
    assert run["alpha"][-1]["alpha"] == base["alpha"][-1]["alpha"]
    models = [tmp_path / name / "checkpoints" / "checkpoint-2" for name in ("base", "run")]
    one, other = (ReZeroMLPForImageClassification.from_pretrained(folder).state_dict() for folder in models)
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("model."))
    assert one["classifier.weight"].shape[0] == 3 and other["classifier.weight"].shape[0] == 2
    other = load_recipe(recipe, [*words, "model.hidden_size=6", "model.hidden_act=gelu"])
    with pytest.raises(
        UserError, match=r"is another model than the recipe's: hidden_size 8 there, 6 here; hidden_act 'relu' there"
    ):
        run_experiment(other, tmp_path / "other", base=tmp_path / "base")


def test_what_another_run_begins_from_is_kept_for_as_long_as_it_is_needed(text_recipe, tmp_path, monkeypatch):
    """Killed in between, a grown run goes on without repeating the shallow one, unless its checkpoint is gone."""
    grown = text_recipe("init_from.path=first", "init_from.grow_to=4", "init_from.where=interleaved")
    shallow, place, kept = text_recipe(), tmp_path / "run", tmp_path / "run,first" / "checkpoints" / "checkpoint-6"
    trained, train = [], ReZeroTrainer.train

    def stop_deep(trainer, **kwargs):
        trained.append(trainer.model.config.num_hidden_layers)
        if stop and trained[-1] == 4:
            raise KeyboardInterrupt
        return train(trainer, **kwargs)

    monkeypatch.setattr(ReZeroTrainer, "train", stop_deep)
    for stop, gone, expected in ((True, False, [2, 4]), (True, False, [4]), (False, True, [2, 4]), (False, False, [])):
        trained.clear()
        if gone:
            shutil.rmtree(kept)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            run = run_experiment(grown, place, first=shallow)
        assert trained == expected
        assert (kept / "optimizer.pt").exists() == stop
    each = [6 * 16 * 16 * flops_per_token(plan.model_config(byte_tokenizer()), 16) for plan in (shallow, grown)]
    first = json.loads((tmp_path / "run,first" / "run.json").read_text())
    assert run["wall_seconds"] > first["wall_seconds"] >= first["training_seconds"] > 0
    assert run["flops"] == sum(each) and run["curve"][2]["flops"] == each[0]
    assert [point["step"] for point in run["curve"]] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(
        UserError, match=r"run,first holds a finished run with other words \(training\.max_steps: 6 -> 5"
    ):
        run_experiment(grown, place, first=text_recipe("training.max_steps=5"))
    shutil.rmtree(tmp_path / "run,first")
    with pytest.raises(UserError, match=r"run,first is gone, which .*run went on from: delete that folder too"):
        run_experiment(grown, place, first=shallow)


def test_a_study_whose_first_run_diverges_has_that_as_its_result(text_recipe, tmp_path):
    wild = text_recipe("training.optimizer=sgd", "training.learning_rate=1.0e+30", "training.max_grad_norm=0")
    grown = text_recipe("init_from.path=first", "init_from.grow_to=4")
    for _ in range(2):
        assert "the step was not applied" in run_experiment(grown, tmp_path / "run", first=wild)["diverged"]


def test_the_script_tunes_and_draws(recipe, tmp_path):
    """One command gives table, pictures and a result without a path of this machine; every run is kept on its own."""
    study = {
        "item": "a test", "metric": "accuracy", "seeds": [0, 1], "extend": 0, "baseline": "plain", "target_at": 0.5,
        "search": {"training.learning_rate": [0.05, 0.1]},
        "rows": {name: {"label": name, "set": {"model.residual": name}} for name in ("plain", "rezero")},
    }  # fmt: skip
    recipe.write_text(f"{TINY}study: {json.dumps(study)}\n")

    words = ["--output", tmp_path / "runs", "--jobs", "1", f"data.cache_dir={tmp_path / 'cache'}"]
    done = run_script(ROOT / "scripts" / "reproduce.py", recipe, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "runs" / "result.json").read_text())
    assert [row["label"] for row in result["rows"]] == ["plain", "rezero"]
    assert all(len(row["runs"]) == 2 and len(row["tried"]) == 3 for row in result["rows"])
    assert str(tmp_path) not in json.dumps(result)
    pictures = {path.name for path in (tmp_path / "runs" / "figures").iterdir()}
    assert pictures == {"curves.png", "steps.png", "gates_rezero.png"}
    assert len(list((tmp_path / "runs").rglob("run.json"))) == 6
    assert done.stdout.count("| rezero |") == 1

    # Once more where that is committed, with what it chose: no other run, and the same numbers.
    script = tmp_path / "scripts" / "reproduce.py"
    committed = tmp_path / "model_cards" / "results" / f"{recipe.stem}.json"
    for source, copy in ((ROOT / "scripts" / "reproduce.py", script), (tmp_path / "runs" / "result.json", committed)):
        copy.parent.mkdir(parents=True)
        shutil.copy(source, copy)
    words[1] = tmp_path / "again"
    done = run_script(script, recipe, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = f"every row runs with what the result of {result['finished'][:10]} has chosen; --search tunes them anew\n"
    assert done.stdout.startswith(chosen)
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert [row["chosen"] for row in again["rows"]] == [row["chosen"] for row in result["rows"]]
    assert len(list((tmp_path / "again").rglob("run.json"))) == 4
    assert done.stdout.count("| +0.0 |") == 2
    assert again["repeats"] == result["finished"] and again["core_seconds"] > 0
    # To search all the same finds what was searched: every run is there.
    done = run_script(script, recipe, *words[2:], "--output", tmp_path / "runs", "--search")
    assert done.returncode == 0, done.stderr[-3000:]
    searched = json.loads((tmp_path / "runs" / "result.json").read_text())
    assert [row["tried"] for row in searched["rows"]] == [row["tried"] for row in result["rows"]]
    # Other words are run with what was chosen, and named; the command that would commit that is not offered.
    shorter = ("training.max_steps=4", "--only", "rezero", "--output", tmp_path / "shorter")
    done = run_script(script, recipe, *words[2:], *shorter)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Now and then differ in training.max_steps: 6 -> 4.\n" in done.stdout and "report.py" not in done.stdout
    # Other seeds have their own folder; without a choice they would be another search.
    chosen = ("--chosen", tmp_path / "runs" / "result.json")
    done = run_script(ROOT / "scripts" / "reproduce.py", recipe, *words[2:], *chosen, "--seeds", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    other = json.loads((tmp_path / "runs" / f"{recipe.stem}-chosen-7" / "result.json").read_text())
    assert [run["seed"] for row in other["rows"] for run in row["runs"]] == [7, 7]
    for wrong in (
        ["--seeds", "7"],
        [*chosen, "--search"],
        [*chosen, "--smoke"],
        [*chosen, "--seeds", "7,7"],
        [*chosen, "--seeds", "0"],
        [*chosen, "--seeds", "a"],
        [*chosen, "--output", tmp_path / "runs"],
    ):
        done = run_script(ROOT / "scripts" / "reproduce.py", recipe, *words[2:], *wrong, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, wrong
    assert "repeats" not in collect_result(tmp_path / "runs") and collect_result(tmp_path / "again") == again


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_no_run_outlives_its_study(recipe, tmp_path, by):
    """A study that ends takes its workers along, also one that first saves what it was doing; no further run begins."""
    recipe.write_text(
        TINY.replace("max_steps: 6", "max_steps: 1000000").replace('save_strategy: "no"', "save_strategy: steps")
        + "study: {item: a test, metric: loss, seeds: [0], rows: {a: {label: a}, b: {label: b}}}\n"
    )
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", recipe, "--jobs", "1", "--output", tmp_path / "runs"]
    # In a suite that runs in the background an interrupt is ignored from the start.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    study = subprocess.Popen(command, cwd=tmp_path, **quiet, **heard)
    log = tmp_path / "runs" / "a" / "seed=0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"event": "eval"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(study.pid).children(recursive=True)
    study.send_signal(by)
    study.wait(timeout=60)
    assert workers and not psutil.wait_procs(workers, timeout=60)[1]
    assert '"event": "save"' in log.read_text()
    assert not (tmp_path / "runs" / "b" / "seed=0" / "metrics.jsonl").exists()


def test_a_finished_run_of_other_data_or_other_numbers_is_not_taken_for_this_one(recipe, tmp_path):
    run = load_recipe(recipe)
    run_experiment(run, tmp_path / "run")
    for word in ("nonfinite=skip", "per_device_train_batch_size=8"):
        with pytest.raises(UserError, match=rf"a finished run with other words \(training\.{word.partition('=')[0]}"):
            run_experiment(load_recipe(recipe, [f"training.{word}"]), tmp_path / "run")
    run_experiment(load_recipe(recipe, ["training.logging_steps=7"]), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["data"]["fingerprint"] = "another"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="what data names was something else then"):
        run_experiment(run, tmp_path / "run")


def test_a_run_of_labelled_text_is_of_those_rows_alone(text_recipe, tmp_path):
    """With one row changed neither a finished run is taken for this one nor an interrupted one gone on with."""
    rows = [{"text": f"def f{n}(x):", "label": n % 2} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = text_recipe("task.name=sequence-classification", f"task.data={path}")
    run_experiment(run, tmp_path / "run", keep=True)
    run_experiment(run, tmp_path / "run")
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], {"text": "another", "label": 1}]))
    with pytest.raises(UserError, match="what data names was something else then"):
        run_experiment(run, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match="was trained on other data"):
        run_experiment(run, tmp_path / "run")


def test_a_run_that_cannot_be_made_ends_the_study_with_one_line(recipe, tmp_path):
    """The worker's own error comes out, and the others are not waited for."""
    recipe.write_text(f"{TINY}study: {{item: a test, metric: loss, seeds: [0, 1], rows: {{a: {{label: a}}}}}}\n")
    with pytest.raises(UserError, match=r"data\.path is '/nowhere'"):
        run_study(recipe, load_study(recipe), tmp_path / "runs", overrides=("data.path=/nowhere",))


def test_arguments_that_trainer_refuses_are_one_line(recipe, tmp_path):
    with pytest.raises(UserError, match=r"tiny\.yaml: training: .*metric_for_best_model"):
        run_experiment(load_recipe(recipe, ["training.save_strategy=best"]), tmp_path / "run")


def test_an_image_recipe_is_not_for_the_pretraining_script(recipe):
    with pytest.raises(UserError, match=r"scripts/reproduce\.py trains those"):
        load_language_recipe(recipe)


def test_steps_of_several_forms_are_timed_by_turns(recipe, data, monkeypatch):
    """Every form takes a step before any takes its next, backwards every other turn, after two of warm-up; the caller's threads are as before."""
    threads, taken = torch.get_num_threads(), []

    def watched(config):
        model = ReZeroMLPForImageClassification(config)
        model.register_forward_pre_hook(lambda *_: taken.append(config.num_hidden_layers))
        return model

    monkeypatch.setitem(MODELS, "rezero_mlp", watched)
    forms = {
        name: load_recipe(recipe, [f"model.num_hidden_layers={layers}", *data["rezero_mlp"]])
        for name, layers in {"shallow": 2, "deep": 4}.items()
    }
    found = step_times(forms, seconds=0.0)
    assert taken == [2, 4] * 3 + [4, 2] + [2, 4]
    assert set(found) == {"shallow", "deep"} and all(seconds > 0 for seconds in found.values())
    assert torch.get_num_threads() == threads
