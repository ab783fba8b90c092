"""Checkpoints on disk: a folder with its name is whole, and what is not whole is found out and said."""

import json
import os
import signal
import textwrap

import pytest
from hub_server import httpx
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_script

from rezero_hf import checkpoints
from rezero_hf.checkpoints import (
    MANIFEST,
    IncompleteCheckpointError,
    begin_checkpoint,
    checkpoints_in,
    fetch_checkpoint,
    finish_checkpoint,
    newest_complete,
    partial_of,
    rotate,
    verify_checkpoint,
)
from rezero_hf.errors import UserError


FILES = {"model.safetensors": b"weights" * 99, "optimizer.pt": b"moments" * 99, "shards/part-0.bin": b"half"}


def save(folder, step, **record):
    """A whole checkpoint of a few small files."""
    checkpoint = folder / f"checkpoint-{step}"
    partial = begin_checkpoint(checkpoint)
    for name, content in FILES.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content + str(step).encode())
    finish_checkpoint(checkpoint, {"step": step, "resumable": True, **record})
    return checkpoint


def test_a_whole_checkpoint_verifies_and_gives_its_record(tmp_path):
    found = verify_checkpoint(save(tmp_path, 5, world_size=2))
    assert (found["step"], found["world_size"]) == (5, 2)
    assert set(found["files"]) == set(FILES)


def test_what_a_system_leaves_in_a_folder_is_not_the_checkpoints(tmp_path):
    """A file browser's and a network file system's files damage nothing, and do not go along."""
    checkpoint = save(tmp_path, 5)
    for name in (".DS_Store", "shards/._part-0.bin", ".nfs000000000001", "Thumbs.db"):
        (checkpoint / name).write_bytes(b"")
    assert verify_checkpoint(checkpoint)["step"] == 5

    def another(found):
        raise UserError(f"{found.name} is of another run")

    with pytest.raises(UserError, match="checkpoint-5 is of another run"):
        fetch_checkpoint(str(checkpoint), tmp_path / "run" / "checkpoints", another)
    assert checkpoints_in(tmp_path / "run" / "checkpoints") == []
    fetched = fetch_checkpoint(str(checkpoint), tmp_path / "run" / "checkpoints")
    assert sum(path.is_file() for path in fetched.rglob("*")) == len(FILES) + 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "was never finished"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "complete.json is damaged"),
        (
            lambda folder: (folder / MANIFEST).write_text('{"format": 9, "files": {}}'),
            "has format 9, this version reads 1",
        ),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: os.truncate(folder / "optimizer.pt", 10), "optimizer.pt has 10 bytes instead of 695"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"x" * 695), "optimizer.pt has changed"),
        (lambda folder: (folder / "shards" / "part-1.bin").write_bytes(b""), "part-1.bin does not belong"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    """Whichever file is missing, cut, changed or strange, the message says which, and the next older one is taken."""
    save(tmp_path, 5)
    damage(save(tmp_path, 10))
    with pytest.raises(IncompleteCheckpointError, match=message):
        verify_checkpoint(tmp_path / "checkpoint-10")
    folder, skipped = newest_complete(tmp_path)
    assert folder == tmp_path / "checkpoint-5"
    assert len(skipped) == 1 and message in skipped[0]


@settings(max_examples=20)
@given(st.sampled_from(sorted(FILES)), st.integers(0, 2**32), st.integers(1, 255))
def test_any_changed_byte_is_found(tmp_path_factory, name, where, change):
    folder = save(tmp_path_factory.mktemp("run"), 5)
    content = bytearray((folder / name).read_bytes())
    content[where % len(content)] ^= change
    (folder / name).write_bytes(content)
    with pytest.raises(IncompleteCheckpointError, match=f"{name} has changed since it was written"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("when", ["in the middle of a file", "before the manifest", "before the rename"])
def test_a_save_that_was_killed_never_counts(tmp_path, when):
    """Its folder never had the name; the checkpoint before it is the newest; the next save clears it away."""
    save(tmp_path, 5)
    code = """
        import os, signal, sys
        from pathlib import Path
        from rezero_hf import checkpoints
        die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "before the manifest":
            checkpoints.write_whole = die
        folder = Path(sys.argv[1]) / "checkpoint-10"
        partial = checkpoints.begin_checkpoint(folder)
        (partial / "model.safetensors").write_bytes(b"half of it")
        if sys.argv[2] == "in the middle of a file":
            die()
        Path.rename = die
        checkpoints.finish_checkpoint(folder, {"step": 10, "resumable": True})
    """
    (tmp_path / "save.py").write_text(textwrap.dedent(code))
    assert run_script(tmp_path / "save.py", tmp_path, when).returncode == -signal.SIGKILL
    assert partial_of(tmp_path / "checkpoint-10").is_dir()
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-5", [])
    save(tmp_path, 15)
    assert {path.name for path in tmp_path.iterdir()} == {"save.py", "checkpoint-5", "checkpoint-15"}


def test_weights_alone_are_nothing_to_go_on_from(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10, resumable=False)
    folder, skipped = newest_complete(tmp_path)
    assert folder.name == "checkpoint-5"
    assert skipped == [f"{tmp_path / 'checkpoint-10'} holds weights alone (save_only_model)"]
    assert newest_complete(tmp_path / "nowhere") == (None, [])


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 7), st.sets(st.integers(1, 6)))
def test_rotation_keeps_the_newest_and_the_best(tmp_path_factory, limit, saved, best, unfinished):
    """At most `limit` stay, the best among them; the newest always; a folder that was never finished is left alone."""
    folder = tmp_path_factory.mktemp("run")
    for step in range(1, saved + 1):
        save(folder, step)
        if step in unfinished and step < saved:
            (folder / f"checkpoint-{step}" / MANIFEST).unlink()
    rotate(folder, saved, limit, f"elsewhere/checkpoint-{best}")
    left = {int(path.name.rpartition("-")[2]) for path in checkpoints_in(folder)}
    finished = {step for step in range(1, saved + 1) if step not in unfinished or step == saved}
    assert saved in left and left >= set(range(1, saved + 1)) - finished
    assert {best} & finished <= left
    room = max(limit, len({saved, best} & finished))
    assert len(left & finished) == min(room, len(finished))
    newest = sorted(finished - {best}, reverse=True)
    assert set(newest[: len(left & finished - {best})]) == left & finished - {best}


def test_rotation_does_not_count_what_the_run_passed_over(tmp_path):
    """A damaged checkpoint of a later step does not push out the whole one just written."""
    save(tmp_path, 5)
    (save(tmp_path, 10) / "optimizer.pt").unlink()
    save(tmp_path, 7)
    rotate(tmp_path, 7, 1)
    assert {path.name for path in checkpoints_in(tmp_path)} == {"checkpoint-10", "checkpoint-7"}
    assert newest_complete(tmp_path)[0].name == "checkpoint-7"


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path):
    (save(tmp_path, 5) / "optimizer.pt").unlink()
    save(tmp_path, 5)
    assert verify_checkpoint(tmp_path / "checkpoint-5")["step"] == 5
    assert json.loads((tmp_path / "checkpoint-5" / MANIFEST).read_text())["files"].keys() == FILES.keys()


def test_the_newest_whole_checkpoint_of_a_repository_is_fetched(hub, tmp_path):
    """Damaged ones are passed over, older ones not downloaded; one in shards, which needs a pickle, is refused; two that fetch get one."""
    for step in (1, 2, 4):
        save(tmp_path / "made", step)
    (tmp_path / "made" / "checkpoint-4" / "optimizer.pt").unlink()
    HfApi().create_repo("me/run")
    HfApi().upload_folder(repo_id="me/run", folder_path=tmp_path / "made")
    for _ in range(2):
        fetched = fetch_checkpoint("me/run@main", tmp_path / "run" / "checkpoints")
        assert fetched == tmp_path / "run" / "checkpoints" / "checkpoint-2"
        assert verify_checkpoint(fetched)["step"] == 2
    read = [path for method, path in hub.requests if "/resolve/" in path]
    assert any("checkpoint-4/" in path for path in read) and not any("checkpoint-1/" in path for path in read)

    sharded = begin_checkpoint(tmp_path / "shards" / "checkpoint-6")
    (sharded / ".metadata").write_bytes(b"a pickle")
    finish_checkpoint(tmp_path / "shards" / "checkpoint-6", {"step": 6, "resumable": True})
    HfApi().upload_folder(repo_id="me/run", folder_path=tmp_path / "shards")
    with pytest.raises(UserError, match="checkpoint-6 is in shards, whose description torch reads as a pickle"):
        fetch_checkpoint("me/run", tmp_path / "other" / "checkpoints")
    with pytest.raises(UserError, match="neither a folder nor a Hub repository"):
        fetch_checkpoint("me/nothing", tmp_path / "other" / "checkpoints")


def test_a_connection_lost_while_a_checkpoint_is_fetched_is_one_line(tmp_path, monkeypatch):
    """What the client says once it has given up trying again."""

    def lost(*_, **__):
        raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")

    monkeypatch.setattr(checkpoints, "snapshot_download", lost)
    with pytest.raises(UserError, match=r"me/run is neither .* can be read \(peer closed connection"):
        fetch_checkpoint("me/run", tmp_path / "checkpoints")
