"""A push is one commit or none, whatever the Hub does, and what is there afterwards loads."""

import os
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import DROP, DROP_AFTER, Refuse, Slow
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

from rezero_hf import ReZeroForCausalLM, export_folder, publishing
from rezero_hf.errors import UserError
from rezero_hf.export import describe_folder
from rezero_hf.hub import USER_SECTION
from rezero_hf.licences import license_there
from rezero_hf.opening import find
from rezero_hf.publishing import PushError, Repository, check_access, push_folder
from rezero_hf.staging import make_publishable, stage


REPO = "me/model"
WHERE = Repository(REPO)
HTML = b"<html>busy</html>"


@pytest.fixture
def exported(tmp_path, tokenizer, tiny_model):
    return export_folder(tiny_model(), tokenizer, tmp_path / "export")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits between attempts are cut short; their lengths are a test's own business."""
    monkeypatch.setattr(publishing, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(publishing, "LONGEST_WAIT", 0.05)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_arrives_in_one_commit_and_loads_there(hub, exported, tiny_model, ids):
    """All files in the first push's only commit; the model is loaded from the Hub at that commit, and is the same."""
    pushed = push_folder(exported, WHERE, "Step 10")
    initial, commit = hub.commits(REPO)
    assert (commit.sha, commit.message, pushed.attempts) == (pushed.commit, "Step 10", 1)
    assert commit.files.keys() == names(exported) | initial.files.keys()
    model = ReZeroForCausalLM.from_pretrained(REPO, revision=pushed.commit)
    assert model(ids).logits.equal(tiny_model()(ids).logits)


def test_pushing_the_same_again_changes_nothing(hub, exported):
    """No second commit; the answer is the commit that holds the folder."""
    first = push_folder(exported, WHERE, "Step 10")
    assert push_folder(exported, WHERE, "Step 10").commit == first.commit
    assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize(
    ("route", "fault"),
    [
        *[(route, fault) for route in ("create", "info", "commit") for fault in (Refuse(503), DROP, DROP_AFTER)],
        ("commit", Refuse(429, {"RateLimit": '"api";r=0;t=0'})),
        ("validate_yaml", Refuse(504, body=HTML)),
        ("preupload", Refuse(503, {"Retry-After": "0"})),
        ("lfs_batch", DROP),
        ("lfs_upload", DROP_AFTER),
        ("lfs_verify", Refuse(500, {"Retry-After": "0"})),
        ("commit", Slow(0.05)),
    ],
)
def test_whatever_fails_on_the_way_the_push_is_made_once(hub, exported, route, fault):
    """Refused, dropped before or after it was done, garbled or slow: in the end one whole commit."""
    hub.fail(route, fault)
    push_folder(exported, WHERE, "Step 10")
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit", "Step 10"]
    assert hub.commits(REPO)[-1].files.keys() >= names(exported)


def test_it_waits_as_long_as_the_hub_asks(hub, exported):
    """A Retry-After on the commit, where the client itself honours none."""
    lines = []
    hub.fail("commit", Refuse(429, {"Retry-After": "1"}))
    pushed = push_folder(exported, WHERE, "Step 10", tell=lines.append)
    assert pushed.seconds >= 1
    assert pushed.attempts == 2
    assert "429" in lines[0]
    assert "trying again in 1 s" in lines[0]


def test_somebody_elses_commit_in_between_is_built_upon(hub, exported):
    """Another file that arrives between look and commit is kept: the stale commit is refused, and made anew."""
    push_folder(exported, WHERE, "Step 10")
    (exported / "metrics.jsonl").write_text('{"event": "train", "step": 20, "loss": 1.0}\n')
    held = hub.hold("commit")
    done = threading.Thread(target=push_folder, args=(exported, WHERE, "Step 20"))
    done.start()
    held.wait()
    HfApi().create_commit(REPO, [CommitOperationAdd("notes.txt", b"mine")], commit_message="Notes")
    held.release()
    done.join(30)
    assert [commit.message for commit in hub.commits(REPO)[1:]] == ["Step 10", "Notes", "Step 20"]
    assert hub.commits(REPO)[-1].files["notes.txt"] == b"mine"


def test_killed_between_upload_and_commit_it_leaves_nothing_half(hub, exported, tmp_path):
    """SIGKILL after the weights went up: no commit; the same command again makes one and does not send them twice."""
    held = hub.hold("commit")
    command = [sys.executable, "scripts/publish.py", str(exported), REPO, "--push"]
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as client:
        held.wait()
        client.kill()
    held.release()
    assert len(hub.commits(REPO)) == 1
    push_folder(exported, WHERE, "Step 10")
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit", "Step 10"]
    assert len([path for method, path in hub.requests if method == "PUT"]) == 1


def publish(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("scripts/publish.py", run_name="__main__")
    return end.value.code


def test_the_script_pushes_what_a_stranger_loads(hub, exported, tiny_model, ids, monkeypatch, capsys):
    """One commit with a card under the repository's name, which the library loads and fetches whole, byte for byte. A
    folder that is refused leaves no repository behind."""
    (exported / "config.json").rename(exported / "kept.json")
    assert publish(monkeypatch, exported, REPO, "--push") == 2
    assert "no config.json" in capsys.readouterr().err and not any("create" in path for _, path in hub.requests)
    (exported / "kept.json").rename(exported / "config.json")
    assert not publish(monkeypatch, exported, REPO, "--push", "--message", "First", "--license", "mit")
    commit = hub.commits(REPO)[-1]
    assert commit.message == "First" and f"commit {commit.sha}" in capsys.readouterr().out
    there = f"{REPO}@{commit.sha}"
    assert license_there(there) == license_there(find(there)[0]) == "mit"
    fetched = Path(snapshot_download(REPO, revision=commit.sha))
    assert names(fetched) == commit.files.keys()
    assert all((fetched / name).read_bytes() == content for name, content in commit.files.items())
    card = (fetched / "README.md").read_text()
    assert f'from_pretrained("{REPO}")' in card and "\nlicense: mit\n" in card
    model = ReZeroForCausalLM.from_pretrained(REPO, revision=commit.sha)
    assert model(ids).logits.equal(tiny_model()(ids).logits)


def test_files_of_an_earlier_push_go_and_others_stay(hub, exported):
    """Shards, recipe and records that the new push has not, and the checkpoint before, leave in the same commit; a
    stranger's files do not."""
    push_folder(exported, WHERE, "Step 10")
    strangers = {"handler.py", "notes.txt", "model_ema/weights.safetensors", "figures/diagram.png"}
    earlier = [
        *("model-00001-of-00002.safetensors", "figures/gates.png", "checkpoint-10/model.safetensors"),
        *("recipe.yaml", "metrics.jsonl", "preprocessor_config.json", *sorted(strangers)),
    ]
    HfApi().create_commit(REPO, [CommitOperationAdd(name, b"old") for name in earlier], commit_message="Earlier")
    push_folder(exported, WHERE, "Step 20", keep=lambda step: step == 10)
    there = hub.commits(REPO)[-1].files.keys()
    assert {"checkpoint-10/model.safetensors", *strangers} <= there
    lines = []
    push_folder(exported, WHERE, "Step 30", tell=lines.append)
    assert hub.commits(REPO)[-1].files.keys() & set(earlier) == strangers
    assert "removes checkpoint-10/model.safetensors" in lines[0]


def test_a_folder_that_loses_files_on_the_way_deletes_none_on_the_hub(hub, exported, tmp_path, monkeypatch):
    """Gone between two attempts, it is an error; what was pushed before stays whole."""
    push_folder(exported, WHERE, "Step 10")
    doomed = stage(exported, tmp_path / "doomed") / "root"
    (doomed / "recipe.yaml").write_text("changed: yes")
    hub.fail("commit", Refuse(503))
    monkeypatch.setattr(publishing.time, "sleep", lambda seconds: shutil.rmtree(doomed, ignore_errors=True))
    with pytest.raises(PushError):
        push_folder(doomed, WHERE, "Step 20")
    with pytest.raises(PushError, match="holds nothing to push"):
        push_folder(doomed, WHERE, "Step 20")
    assert hub.commits(REPO)[-1].files.keys() >= names(exported)


def test_staging_and_describing_leave_the_source_as_it_was(exported, tmp_path):
    """The source vouches for its files by hash: a new card for the push is not written through a link."""
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    ready = make_publishable(stage(exported, tmp_path / "staged"), "me/other-name")
    assert "me/other-name" in (ready / "README.md").read_text()
    describe_folder(ready)
    assert "me/other-name" in (ready / "README.md").read_text()
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before
    assert (ready / "model.safetensors").samefile(exported / "model.safetensors")


def test_what_a_reader_wrote_into_the_card_on_the_hub_stays(hub, exported):
    """The user's section there is carried into the new card; a card of somebody's own is not overwritten."""
    push_folder(exported, WHERE, "Step 10")
    card = hub.commits(REPO)[-1].files["README.md"].decode()
    edited = card.replace(USER_SECTION[0], f"{USER_SECTION[0]}\n\nTrained on a Tuesday.")
    HfApi().create_commit(REPO, [CommitOperationAdd("README.md", edited.encode())], commit_message="Edit")
    (exported / "README.md").write_text(card.replace("## Usage", "## How to use"))
    push_folder(exported, WHERE, "Step 20")
    merged = hub.commits(REPO)[-1].files["README.md"].decode()
    assert "Trained on a Tuesday." in merged
    assert "## How to use" in merged
    (exported / "README.md").write_text(card.replace(USER_SECTION[0], f"{USER_SECTION[0]}\n\nOn a Wednesday."))
    with pytest.raises(UserError, match="another than the one here"):
        push_folder(exported, WHERE, "Step 30")
    HfApi().create_commit(REPO, [CommitOperationAdd("README.md", b"# Mine")], commit_message="My own")
    for act in (lambda: push_folder(exported, WHERE, "Step 30"), lambda: check_access(WHERE)):
        with pytest.raises(UserError, match="not one of this package's"):
            act()
    assert hub.commits(REPO)[-1].files["README.md"] == b"# Mine"


def test_a_section_written_here_reaches_a_hub_that_has_none(hub, exported, tmp_path):
    """Nor does the README of metadata alone that the website makes for a licence stand in the way: the card takes it over,
    unless another one was said."""
    HfApi().create_repo(REPO)
    website = [CommitOperationAdd("README.md", b"---\nlicense: cc-by-4.0\n---\n")]
    HfApi().create_commit(REPO, website, commit_message="Licence")
    card = (exported / "README.md").read_text()
    (exported / "README.md").write_text(card.replace(USER_SECTION[0], f"{USER_SECTION[0]}\n\nMade at home."))
    push_folder(exported, WHERE, "Step 10")
    there = hub.commits(REPO)[-1].files["README.md"]
    assert b"Made at home." in there and b"apache-2.0" not in there
    assert b"\nlicense: cc-by-4.0\n" in there and b"Code and weights: cc-by-4.0." in there
    push_folder(make_publishable(stage(exported, tmp_path / "staged"), REPO, "mit"), WHERE, "Step 20")
    assert b"\nlicense: mit\n" in hub.commits(REPO)[-1].files["README.md"]


def test_a_branch_is_made_and_leaves_main_alone(hub, exported):
    """A revision is a branch of its own."""
    push_folder(exported, Repository(REPO, revision="second-try"), "Step 10")
    assert hub.commits(REPO)[-1].message == "initial commit"
    assert hub.commits(REPO, "second-try")[-1].message == "Step 10"


@pytest.mark.parametrize(
    ("where", "message"), [(Repository(REPO, token="hf_wrong"), "401"), (Repository("not a name"), "not a name")]
)
def test_what_cannot_pass_is_said_at_once(hub, exported, where, message):
    """A wrong token and a wrong name are one line, without a second attempt."""
    for act in (lambda: push_folder(exported, where, "Step 10"), lambda: check_access(where)):
        with pytest.raises(PushError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["me/run/more", "not a name", f"{REPO}@", f"{REPO}@a b", f"{REPO}@a@b"])
def test_a_dry_run_refuses_what_a_push_would(exported, monkeypatch, capsys, name):
    """A name that no repository can have, before anything is prepared."""
    assert publish(monkeypatch, exported, name) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {name}: ") and said.err.count("\n") == 1


def test_a_hub_that_does_not_answer_is_given_up(hub, monkeypatch):
    """Nor does the start of a run hang on it."""
    monkeypatch.setattr(publishing, "ACCESS_TIMEOUT", 0.2)
    hub.fail("create", Slow(1.0))
    assert "timed out" in check_access(WHERE)


def test_patience_ends(hub, exported):
    """A Hub that stays down is given up after the time that was granted, with the reason."""
    hub.fail("create", *[Refuse(503)] * 100)
    with pytest.raises(PushError, match=r"gave up after \d+ attempt.*503"):
        push_folder(exported, WHERE, "Step 10", patience=0.3)


def test_a_hub_that_is_down_at_the_start_is_no_error(hub):
    """`check_access` then says so and lets the run begin; otherwise it makes the repository."""
    hub.fail("create", Refuse(503))
    assert "503" in check_access(WHERE)
    assert check_access(WHERE) is None
    assert len(hub.commits(REPO)) == 1
