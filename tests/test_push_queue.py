"""Saves reach the Hub while a run goes on, load there, can be gone on from, and never cost the run anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Refuse
from transformers import TrainerControl, TrainerState

from rezero_hf import ReZeroTrainer, ReZeroTrainingArguments, push_queue
from rezero_hf.errors import UserError
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
    environment = {**os.environ, **hub.environment(home), "OMP_NUM_THREADS": "1"}
    recipe = ROOT / "scripts" / "recipes" / "quickstart.yaml"
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), str(recipe), "--smoke", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_run_pushes_what_loads_and_goes_on_elsewhere(hub, text_file, tmp_path):
    """Every commit of a run verifies and loads without the package; another machine goes on from the repository.

    The Hub is busy at first, and is asked again. Of the checkpoints only the newest is kept there.
    """
    hub.fail("commit", Refuse(503), Refuse(429, {"Retry-After": "1"}))
    words = [f"data.sources={text_file}", f"data.cache_dir={tmp_path / 'cache'}", "training.push_to_hub=true"]
    words += [f"training.hub_model_id={REPO}", "training.hub_strategy=checkpoint"]
    done = pretrain(hub, tmp_path / "home", *words, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    initial, *commits = hub.commits(REPO)
    rows = [json.loads(line) for line in (tmp_path / "run" / "pushes.jsonl").read_text().splitlines()]
    assert [row["commit"] for row in rows] == [commit.sha for commit in commits]
    assert f"step 4 is on the Hub: {REPO}, commit {commits[-1].sha}" in done.stdout
    assert rows[0]["step"] == 2
    assert rows[0]["attempts"] == 3

    folders = [tmp_path / f"model-{number}" for number in range(len(commits))]
    for folder, commit in zip(folders, commits, strict=True):
        there = {name for name in commit.files if name.startswith("checkpoint-")}
        assert {name.partition("/")[0] for name in there} == {f"checkpoint-{4 if commit is commits[-1] else 2}"}
        for name in commit.files.keys() - initial.files.keys() - there:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(commit.files[name])
        verify_folder(folder)
        assert (b"This is step" in commit.files["README.md"]) == (commit is not commits[-1])
    alone = [sys.executable, "-I", "-c", LOAD, *map(str, folders)]
    loaded = subprocess.run(alone, capture_output=True, text=True, check=False, timeout=120)
    assert loaded.returncode == 0, loaded.stderr[-3000:]

    words = [word for word in words if "hub" not in word]
    elsewhere = [*words, "--output", tmp_path / "elsewhere", "--resume-from", f"{REPO}@{commits[-1].sha}"]
    done = pretrain(hub, tmp_path / "other-home", *elsewhere)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout
    ends = [json.loads((tmp_path / name / "run.json").read_text())["results"] for name in ("run", "elsewhere")]
    assert ends[0] == ends[1]


# A push that takes the place of the real one where only the queue is looked at: it waits for a file, then notes itself.
STAND_IN = """
import json, pathlib, sys, time
request = json.loads(sys.argv[1])
gate = pathlib.Path(request["journal"]).parent / f"go-{request['step']}"
while not gate.exists():
    time.sleep(0.01)
if gate.read_text() == "die":
    sys.exit(9)
with open(request["journal"], "a") as journal:
    journal.write(json.dumps({"step": request["step"], "commit": "c" * 40, "attempts": 1, "seconds": 0.0}) + "\\n")
"""


@pytest.fixture
def queue(monkeypatch, tmp_path):
    monkeypatch.setattr(push_queue, "COMMAND", (sys.executable, "-c", STAND_IN))
    return PushQueue(Repository(REPO), tmp_path / "run")


def saved(folder, *steps):
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        yield checkpoint


def test_a_save_that_waits_gives_way_to_a_newer_one(queue, tmp_path):
    """While one push runs, of those behind it only the newest is kept; deleting checkpoints meanwhile harms none."""
    for step, checkpoint in zip((2, 4, 6), saved(tmp_path, 2, 4, 6), strict=True):
        queue.put(checkpoint, step)
        (checkpoint / "config.json").unlink()
    (tmp_path / "run" / "go-2").touch()
    (tmp_path / "run" / "go-6").touch()
    assert queue.close(30) == f"step 6 is on the Hub: {REPO}, commit {'c' * 40}"
    assert [row["step"] for row in queue.rows()] == [2, 6]
    assert not (tmp_path / "run" / "push").exists()


def test_a_push_that_dies_or_never_ends_is_told_and_costs_nothing(queue, tmp_path, capsys):
    """A process that is killed, and one that hangs at the end of the run, are a line each."""
    first, second = saved(tmp_path, 2, 4)
    queue.put(first, 2)
    (tmp_path / "run" / "go-2").write_text("die")
    assert queue.close(30) == "step 2 is not on the Hub: the process that pushes ended with 9"
    queue.put(second, 4)
    assert queue.close(0.2) == "step 4 is not on the Hub: not done in 0 s"
    assert "step 4 was not pushed" in capsys.readouterr().out


def test_after_a_restart_the_hub_gets_what_it_lacks(queue, tmp_path, monkeypatch):
    """The newest whole checkpoint is pushed at the start of a resumed run, unless the journal knows it to be there."""
    (checkpoint,) = saved(tmp_path, 4)
    monkeypatch.setattr(push_queue, "newest_complete", lambda folder: (checkpoint, []))
    begin = [ReZeroTrainingArguments(tmp_path, report_to="none"), TrainerState(global_step=4), TrainerControl()]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "go-4").touch()
    for _ in range(2):
        queue.on_train_begin(*begin)
        queue.close(30)
    assert [row["step"] for row in queue.rows()] == [4]


def test_a_folder_that_must_not_leave_this_machine_does_not(hub, tmp_path, capsys):
    """What is not whole, or holds a token, is refused by the real process before anything is sent."""
    (checkpoint,) = saved(tmp_path, 2)
    (checkpoint / "recipe.yaml").write_text("password: hf_" + "x" * 30)
    queue = PushQueue(Repository(REPO), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(tmp_path / "home").items():
            patch.setenv(name, value)
        queue.put(checkpoint, 2)
        line = queue.close(60)
    assert line.startswith("step 2 is not on the Hub")
    assert not any(method == "POST" for method, _ in hub.requests)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "needs hub_model_id"),
        ({"hub_model_id": REPO, "hub_token": "hf_wrong"}, "401"),
        ({"hub_model_id": REPO, "hub_strategy": "checkpoint", "save_only_model": True}, "save_only_model=false"),
    ],
)
def test_what_could_never_be_pushed_is_said_before_training(hub, tiny_model, tmp_path, words, message):
    """A missing name, a token that may not write, a strategy that contradicts the saves: one line at the start."""
    args = ReZeroTrainingArguments(tmp_path, report_to="none", push_to_hub=True, max_steps=1, **words)
    with pytest.raises(UserError, match=message):
        ReZeroTrainer(tiny_model(), args)


def test_a_hub_out_of_reach_does_not_stop_a_run(hub, tiny_model, tmp_path, capsys):
    """At the start of a run a Hub that is down is a line, and so is a token gone wrong when the run goes on."""
    hub.fail("create", Refuse(503))
    args = ReZeroTrainingArguments(tmp_path, report_to="none", push_to_hub=True, hub_model_id=REPO, max_steps=1)
    ReZeroTrainer(tiny_model(), args)
    next(iter(saved(tmp_path, 2)))
    args.hub_token = "hf_wrong"
    ReZeroTrainer(tiny_model(), args)
    shown = capsys.readouterr().out
    assert shown.count("training goes on") == 2
    assert "503" in shown
    assert "401" in shown
