"""Saves reach the Hub while a run goes on, load there, can be gone on from, and never cost the run anything."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Refuse
from processes import run_script
from transformers import TrainerCallback

from rezero_hf import (
    ReZeroForQuestionAnswering,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroTrainer,
    ReZeroTrainingArguments,
    export_folder,
    push_queue,
)
from rezero_hf.checkpoints import checkpoints_in, newest_complete, verify_checkpoint
from rezero_hf.errors import UserError
from rezero_hf.image_data import EvalImages, ImageDataConfig, TrainImages, accuracy_metrics, prepare_images
from rezero_hf.publishing import Repository
from rezero_hf.push_queue import PushQueue
from rezero_hf.verification import verify_folder


ROOT = Path(__file__).parents[1]
REPO = "me/run"

# Loads every folder it is given, where the package cannot be found.
LOAD = """
import sys
sys.modules["rezero_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = AutoTokenizer.from_pretrained(folder)("class ", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == 8
    assert model.config.use_cache and (__import__("pathlib").Path(folder) / "README.md").exists()
"""


def pretrain(hub, home, *words):
    recipe = ROOT / "scripts" / "recipes" / "quickstart.yaml"
    return run_script(ROOT / "scripts" / "pretrain.py", recipe, "--smoke", *words, hub=(hub, home))


def test_a_run_pushes_what_loads_and_can_be_gone_on_from(hub, text_file, tmp_path):
    """Every commit of a run verifies, loads without the package, and holds a whole checkpoint.

    The Hub is busy at first, and is asked again. Of the checkpoints only the newest is kept there, and those on disk
    stay as they were written.
    """
    hub.fail("commit", Refuse(503), Refuse(429, {"Retry-After": "1"}))
    words = [f"data.sources={text_file}", f"data.cache_dir={tmp_path / 'cache'}", "training.push_to_hub=true"]
    words += [f"training.hub_model_id={REPO}", "training.hub_strategy=checkpoint", "training.save_total_limit=2"]
    done = pretrain(hub, tmp_path / "home", *words, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    initial, *commits = hub.commits(REPO)
    rows = [json.loads(line) for line in (tmp_path / "run" / "pushes.jsonl").read_text().splitlines()]
    assert [row["commit"] for row in rows] == [commit.sha for commit in commits]
    assert f"step 4 is on the Hub: {REPO}, commit {commits[-1].sha}" in done.stdout
    assert (rows[0]["step"], rows[0]["attempts"]) == (2, 3)
    for checkpoint in checkpoints_in(tmp_path / "run" / "checkpoints"):
        verify_checkpoint(checkpoint)

    folders = [tmp_path / f"commit-{number}" for number in range(len(commits))]
    for folder, commit in zip(folders, commits, strict=True):
        for name in commit.files.keys() - initial.files.keys():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(commit.files[name])
        (checkpoint,) = checkpoints_in(folder)
        assert checkpoint.name == ("checkpoint-4" if commit is commits[-1] else "checkpoint-2")
        assert newest_complete(folder) == (checkpoint, [])
        checkpoint.rename(folder.with_name(f"{folder.name}-{checkpoint.name}"))
        verify_folder(folder)
        assert (b"This is step" in commit.files["README.md"]) == (commit is not commits[-1])
    alone = [sys.executable, "-I", "-c", LOAD, *map(str, folders)]
    loaded = subprocess.run(alone, capture_output=True, text=True, check=False, timeout=120)
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def test_a_script_of_ones_own_pushes_too(hub, tiny_model, tokenizer, tmp_path, monkeypatch):
    """`ReZeroTrainer` with the library's words alone: what it saves is on the Hub when `train` is over."""
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    words = {"max_steps": 1, "save_steps": 1, "report_to": "none", "push_to_hub": True, "hub_model_id": REPO}
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
    args = ReZeroTrainingArguments(tmp_path / "out", **words)
    trainer = ReZeroTrainer(tiny_model(eos_token_id=256), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert [row.get("failed") for row in trainer.pushes.rows()] == [None]
    assert hub.commits(REPO)[-1].message == "Step 1"
    for word in ({"revision": "dev"}, {"tags": ["x"]}):
        with pytest.raises(UserError, match="say it in the training arguments"):
            trainer.push_to_hub(**word)


def test_an_image_classifier_is_pushed_and_exported_too(hub, tmp_path, monkeypatch):
    """What it saves is on the Hub with its image processor, accuracy and data in the card, and verifies; a checkpoint on
    disk becomes the same by `scripts/export.py`."""
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    images = prepare_images(
        ImageDataConfig("digits", augmentation="none", cache_dir=str(tmp_path / "cache")), progress=False
    )
    config = ReZeroMLPConfig(
        image_size=8, num_channels=1, hidden_size=16, num_hidden_layers=2, id2label=images.id2label
    )
    words = {"max_steps": 1, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "report_to": "none"}
    args = ReZeroTrainingArguments(tmp_path / "run" / "out", push_to_hub=True, hub_model_id=REPO, **words)
    trainer = ReZeroTrainer(
        ReZeroMLPForImageClassification(config),
        args,
        train_dataset=TrainImages(images, 0, 64),
        eval_dataset=EvalImages(images, "validation"),
        compute_metrics=accuracy_metrics,
        processing_class=images.image_processor(),
        run_dir=tmp_path / "run",
        run={"name": "digits", "data": images.record()},
    )
    trainer.train()
    assert [row.get("failed") for row in trainer.pushes.rows()] == [None]
    initial, commit = hub.commits(REPO)
    there = tmp_path / "there"
    for name in commit.files.keys() - initial.files.keys():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(commit.files[name])
    verify_folder(there)
    card = (there / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert f'from_pretrained("{REPO}")' in card
    assert "type: accuracy" in card
    assert "CC BY 4.0" in card

    command = ["export.py", str(tmp_path / "run" / "out" / "checkpoint-1"), str(tmp_path / "exported")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
    assert not end.value.code
    for name in ("model.safetensors", "preprocessor_config.json", "modeling_rezero_mlp.py"):
        assert (tmp_path / "exported" / name).read_bytes() == commit.files[name]
    assert json.loads((tmp_path / "exported" / "run.json").read_text())["name"] == "digits"
    assert "CC BY 4.0" in (tmp_path / "exported" / "README.md").read_text()


# A push that takes the place of the real one where only the queue is looked at: it waits for a file, then notes itself.
STAND_IN = """
import json, pathlib, sys, time
request = json.loads(sys.argv[1])
beside = sorted(path.name for path in pathlib.Path(request["staged"], "beside").glob("*"))
gate = pathlib.Path(request["journal"]).parent / f"go-{request['step']}"
while not gate.exists():
    time.sleep(0.01)
if gate.read_text() == "die":
    sys.exit(9)
with open(request["journal"], "a") as journal:
    row = {"step": request["step"], "to": request["to"], "commit": "c" * 40, "attempts": 1, "seconds": 0.0}
    journal.write("\\n" + json.dumps({**row, "checkpoints": beside}) + "\\n")
"""


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """Makes a queue whose pushes are stand-ins, and which does not wait long for last words."""
    monkeypatch.setattr(push_queue, "COMMAND", (sys.executable, "-c", STAND_IN))
    monkeypatch.setattr(push_queue, "LAST_WORDS", 0.1)
    (tmp_path / "run").mkdir()

    def make(strategy="every_save"):
        return PushQueue(Repository(REPO), tmp_path / "run" / "pushes.jsonl", tmp_path / "run" / "out", strategy)

    return make


def saved(folder, *steps):
    checkpoints = []
    for step in steps:
        checkpoints.append(folder / f"checkpoint-{step}")
        checkpoints[-1].mkdir(parents=True)
        (checkpoints[-1] / "config.json").write_text("{}")
    return checkpoints


def go(tmp_path, *steps, how=""):
    for step in steps:
        (tmp_path / "run" / f"go-{step}").write_text(how)


def test_a_save_that_waits_gives_way_to_a_newer_one(queue, tmp_path):
    """While one push runs, of those behind it only the newest is kept; deleting checkpoints meanwhile harms none."""
    pushes = queue()
    for checkpoint in saved(tmp_path, 2, 4, 6):
        pushes.saved(checkpoint)
        (checkpoint / "config.json").unlink()
    go(tmp_path, 2, 6)
    assert pushes.close(30) == f"step 6 is on the Hub: {REPO}, commit {'c' * 40}"
    assert [row["step"] for row in pushes.rows()] == [2, 6]
    assert not list((tmp_path / "run" / "out").iterdir())


def test_a_push_that_dies_or_never_ends_is_told_and_costs_nothing(queue, tmp_path, capsys):
    """A process that is killed is a line, also where one of the same step came through; one that hangs at the end of
    the run is ended, and the finished model still gets its turn."""
    pushes, (first, second) = queue(), saved(tmp_path, 2, 4)
    pushes.put(first, 2)
    go(tmp_path, 2)
    assert "is on the Hub" in pushes.close(30)
    go(tmp_path, 2, how="die")
    pushes.put(first, 2)
    assert pushes.close(30) == "step 2 is not on the Hub: the process that pushes ended with 9"
    pushes.put(second, 4)
    pushes.put(first, 2)
    go(tmp_path, 2)
    assert "step 2 is on the Hub" in pushes.close(30, grace=0.1)
    assert "step 4 was not pushed: not done in" in capsys.readouterr().out


def test_what_is_wrong_with_the_journal_does_not_reach_the_run(queue, tmp_path, monkeypatch, capsys):
    """A line that a kill tore, a file that cannot be written, a process that cannot start: a line on the screen."""
    pushes, (first, second) = queue(), saved(tmp_path, 2, 4)
    pushes.journal.write_text('{"step": 1, "comm')
    go(tmp_path, 2)
    pushes.put(first, 2)
    assert "step 2 is on the Hub" in pushes.close(30)
    monkeypatch.setattr(push_queue, "COMMAND", ("/nowhere/python",))
    pushes.journal = tmp_path / "run"
    pushes.put(second, 4)
    shown = capsys.readouterr().out
    assert "step 4 was not pushed: no process to push from" in shown
    assert "Is a directory" in shown


@pytest.mark.parametrize("end", [KeyboardInterrupt, UserError])
def test_a_run_that_fails_says_what_is_not_on_the_hub(
    queue, hub, tiny_model, tokenizer, tmp_path, monkeypatch, capsys, end
):
    """The process that pushes ends with it; a line and a row are left of its push, and the run's own error comes out."""
    monkeypatch.setattr(push_queue, "STOP_PATIENCE", 0.1)

    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise end("the run failed")

    words = {"max_steps": 2, "save_steps": 1, "report_to": "none", "push_to_hub": True, "hub_model_id": REPO}
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 16
    args = ReZeroTrainingArguments(tmp_path / "run" / "out", hub_token=hub.token, **words)
    words = {"train_dataset": rows, "processing_class": tokenizer, "run_dir": tmp_path / "run", "callbacks": [Fail()]}
    trainer = ReZeroTrainer(tiny_model(), args, **words)
    trainer.waits_for_pushes = False
    with pytest.raises(end, match="the run failed"):
        trainer.train()
    assert "step 1 is not on the Hub: not done in" in capsys.readouterr().out
    assert ["not done" in row["failed"] for row in trainer.pushes.rows()] == [True]


def test_after_a_restart_the_hub_gets_what_it_lacks(queue, tmp_path):
    """The checkpoint that a run goes on from is pushed, unless the journal knows it to be in this place."""
    (checkpoint,) = saved(tmp_path, 4)
    go(tmp_path, 4)
    for strategy in ("every_save", "every_save", "checkpoint"):
        pushes = queue(strategy)
        pushes.resumed(checkpoint)
        pushes.close(30)
    assert [row["to"] for row in pushes.rows()] == [f"{REPO} (every_save)", f"{REPO} (checkpoint)"]


@pytest.fixture
def requests(monkeypatch):
    """What each push is asked for."""
    asked, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **kw: asked.append(json.loads(command[-1])) or popen(command, **kw)
    )
    return asked


def test_no_checkpoint_is_left_out_where_all_are_wanted(queue, requests, tmp_path):
    """One that waited goes with the next; of an earlier run's there, none would be gone on from by mistake."""
    pushes = queue("all_checkpoints")
    for checkpoint in saved(tmp_path, 2, 4, 6):
        pushes.saved(checkpoint)
    go(tmp_path, 2, 6)
    pushes.close(30)
    assert [row["checkpoints"] for row in pushes.rows()] == [["checkpoint-2"], ["checkpoint-4", "checkpoint-6"]]
    assert [(request["keep"], request["keep_up_to"]) for request in requests] == [([], 0), ([2], 0)]


def test_a_checkpoint_whose_push_failed_goes_with_the_next(queue, tmp_path):
    """Where all are wanted; the folder that was linked for it is gone afterwards."""
    pushes, (first, second) = queue("all_checkpoints"), saved(tmp_path, 2, 4)
    go(tmp_path, 2, how="die")
    go(tmp_path, 4)
    pushes.saved(first)
    while not pushes.rows():
        pushes.on_step_end(None, None, None)
    pushes.saved(second)
    pushes.close(30)
    assert pushes.rows()[-1]["checkpoints"] == ["checkpoint-2", "checkpoint-4"]
    assert not list((tmp_path / "run" / "out").iterdir())


def test_a_run_that_goes_on_elsewhere_keeps_its_earlier_checkpoints(queue, requests, tmp_path):
    """No journal there knows of them; later ones on the Hub are another run's."""
    pushes, (checkpoint,) = queue("all_checkpoints"), saved(tmp_path, 8)
    go(tmp_path, 8)
    pushes.resumed(checkpoint)
    pushes.close(30)
    assert [(request["keep"], request["keep_up_to"]) for request in requests] == [([], 8)]


def test_a_folder_that_must_not_leave_this_machine_does_not(hub, tokenizer, tiny_model, tmp_path, monkeypatch):
    """A whole model with a token in its recipe is refused by the real process, and nothing is sent."""
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    folder = export_folder(tiny_model(), tokenizer, tmp_path / "model")
    (folder / "recipe.yaml").write_text("password: hf_" + "x" * 30)
    pushes = PushQueue(Repository(REPO), tmp_path / "pushes.jsonl", tmp_path / "out")
    pushes.put(folder, 2)
    line = pushes.close(60)
    assert "step 2 is not on the Hub" in line
    assert "recipe.yaml: holds an access token" in line
    assert not any(method == "POST" for method, _ in hub.requests)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "needs hub_model_id"),
        ({"hub_model_id": REPO, "hub_token": "hf_wrong"}, "401"),
        ({"hub_model_id": REPO, "hub_strategy": "checkpoint", "save_only_model": True}, "save_only_model=false"),
    ],
)
def test_what_could_never_be_pushed_is_said_before_training(hub, tiny_model, tokenizer, tmp_path, words, message):
    """A missing name, a token that may not write, a strategy that contradicts the saves: one line at the start."""
    args = ReZeroTrainingArguments(tmp_path, report_to="none", push_to_hub=True, max_steps=1, **words)
    with pytest.raises(UserError, match=message):
        ReZeroTrainer(tiny_model(), args, processing_class=tokenizer)


def test_a_hub_out_of_reach_does_not_stop_a_run(hub, tiny_model, tokenizer, tmp_path, capsys):
    """At the start of a run a Hub that is down is a line, and so is a token gone wrong when the run goes on."""
    hub.fail("create", Refuse(503))
    args = ReZeroTrainingArguments(tmp_path, report_to="none", push_to_hub=True, hub_model_id=REPO, max_steps=1)
    ReZeroTrainer(tiny_model(), args, processing_class=tokenizer)
    saved(tmp_path, 2)
    args.hub_token = "hf_wrong"
    ReZeroTrainer(tiny_model(), args, processing_class=tokenizer)
    shown = capsys.readouterr().out
    assert shown.count("training goes on") == 2
    assert "503" in shown
    assert "401" in shown


def test_another_model_is_not_pushed_by_halves(hub, tiny_model, tokenizer, tmp_path):
    """A head without a card, and a model without its tokenizer, are refused before training."""
    args = ReZeroTrainingArguments(tmp_path, report_to="none", push_to_hub=True, hub_model_id=REPO, max_steps=1)
    with pytest.raises(UserError, match=r"pushes ReZeroForCausalLM, .* with tokenizer or image processor"):
        ReZeroTrainer(tiny_model(ReZeroForQuestionAnswering), args, processing_class=tokenizer)
    with pytest.raises(UserError, match=r"pushes ReZeroForCausalLM, .* with tokenizer or image processor"):
        ReZeroTrainer(tiny_model(), args)
    assert not hub.requests
