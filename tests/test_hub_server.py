"""The Hub that tests push to is one to the real client: it keeps what it is given, and fails only and exactly as asked."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hub_server import DROP, DROP_AFTER, Refuse, Slow, httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from rezero_hf import ReZeroForCausalLM


REPO = "me/model"
WEIGHTS = bytes(range(256)) * 100
FILES = {"README.md": b"---\nlicense: mit\n---\nA model", "model.safetensors": WEIGHTS, "code/a.py": b"1", "empty": b""}


@pytest.fixture
def api(hub):
    """The real client, and an empty repository for it."""
    client = HfApi(endpoint=hub.url, token=hub.token)
    client.create_repo(REPO)
    return client


@pytest.fixture
def folder(tmp_path):
    """A folder with a card, an LFS file, a subfolder and an empty file."""
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def put(api, name, content=b"1", **kwargs):
    """One commit with one file."""
    return api.create_commit(REPO, [CommitOperationAdd(name, content)], commit_message=f"Add {name}", **kwargs)


def routes(hub, method):
    return [path for seen, path in hub.requests if seen == method]


def test_a_folder_comes_back_as_it_went(hub, api, folder):
    """Upload, then download: the same bytes, the large file as LFS and the others not, in one commit."""
    done = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="All of it")
    downloaded = Path(api.snapshot_download(REPO))
    assert {name: (downloaded / name).read_bytes() for name in FILES} == FILES
    first, second = hub.commits(REPO)
    assert first.files.keys() == {".gitattributes"}
    assert second.files == FILES | first.files
    assert (second.sha, second.message, second.lfs) == (done.oid, "All of it", {"model.safetensors"})
    assert set(api.list_repo_files(REPO)) == second.files.keys()
    assert [entry.path for entry in api.list_repo_tree(REPO, "code")] == ["code/a.py"]
    sizes = {file.rfilename: file.size for file in api.model_info(REPO, files_metadata=True).siblings}
    assert sizes == {name: len(content) for name, content in second.files.items()}


def test_a_revision_is_what_was_there_at_that_commit(hub, api):
    """By sha, by branch and by default; what was not there is missing in the way that the client knows."""
    old, new = put(api, "a.txt", b"old").oid, put(api, "a.txt", b"new").oid
    api.create_branch(REPO, branch="side", revision=old)
    for revision, content in {old: "old", new: "new", "main": "new", "side": "old", None: "new"}.items():
        assert Path(api.hf_hub_download(REPO, "a.txt", revision=revision)).read_text() == content
    assert api.model_info(REPO).sha == api.repo_info(REPO, revision=new).sha == new
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)] == [c.sha for c in reversed(hub.commits(REPO))]
    assert api.file_exists(REPO, "a.txt")
    assert not api.file_exists(REPO, "b.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "b.txt")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="0" * 40)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/other")


def test_every_commit_is_one(hub, api, folder):
    """Adding and deleting together is one commit; what changes nothing is none; a repository is created once."""
    api.upload_folder(repo_id=REPO, folder_path=folder)
    operations = [CommitOperationAdd("new.bin", b"\0"), CommitOperationDelete("empty"), CommitOperationDelete("code/")]
    api.create_commit(REPO, operations, commit_message="Both")
    api.upload_folder(repo_id=REPO, folder_path=folder, allow_patterns="model.safetensors")
    api.create_repo(REPO, exist_ok=True)
    assert len(hub.commits(REPO)) == 3
    assert hub.commits(REPO)[-1].files.keys() == {".gitattributes", "README.md", "model.safetensors", "new.bin"}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.create_commit(REPO, [CommitOperationDelete("empty")], commit_message="Again")


def test_a_commit_on_an_outdated_parent_is_refused(hub, api):
    """412, and nothing is changed."""
    parent = put(api, "a.txt").oid
    put(api, "b.txt", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        put(api, "c.txt", parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert "c.txt" not in hub.commits(REPO)[-1].files


def test_an_lfs_file_is_only_what_its_sha256_says(hub, api, folder):
    """Another content is refused, and so is a commit that names a file nobody uploaded."""
    hub.fail("lfs_upload", Refuse(400))
    with pytest.raises(RuntimeError, match=r"model\.safetensors"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    (address,) = routes(hub, "PUT")
    for content, reason in {WEIGHTS[::-1]: "another sha256", b"short": f"{len(WEIGHTS)} bytes"}.items():
        answer = get_session().put(hub.url + address, content=content)
        assert answer.status_code == 400
        assert reason in answer.text
    weights = {"path": "model.safetensors", "oid": Path(address).name, "size": len(WEIGHTS)}
    lines = [{"key": "header", "value": {"summary": "Too early"}}, {"key": "lfsFile", "value": weights}]
    answer = get_session().post(
        f"{hub.url}/api/models/{REPO}/commit/main",
        content="\n".join(json.dumps(line) for line in lines),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 400
    assert "was not uploaded" in answer.text
    assert len(hub.commits(REPO)) == 1


def test_only_the_token_writes_and_reads_what_is_private(hub, api):
    """401 for writing without it; a private repository does not exist for others."""
    stranger = HfApi(endpoint=hub.url, token="hf_stranger")
    for forbidden in (lambda: put(stranger, "a.txt"), lambda: stranger.create_repo("me/theirs"), stranger.whoami):
        with pytest.raises(HfHubHTTPError) as caught:
            forbidden()
        assert caught.value.response.status_code == 401
    assert api.create_repo("mine", private=True).repo_id == f"{api.whoami()['name']}/mine"
    assert api.model_info("tester/mine").private
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("tester/mine")
    assert stranger.model_info(REPO).sha == hub.commits(REPO)[0].sha


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_a_refused_request_is_seen_as_refused(hub, api, status):
    """The client raises with the asked status, nothing is done, and the next request is answered again."""
    hub.fail("commit", Refuse(status))
    with pytest.raises(HfHubHTTPError) as caught:
        put(api, "a.txt")
    assert caught.value.response.status_code == status
    assert len(hub.commits(REPO)) == 1
    put(api, "a.txt")
    assert len(hub.commits(REPO)) == 2


def test_faults_come_in_order_and_on_their_route_only(hub, api):
    """One to a request, and then no more; a route that does not exist is a mistake in the test."""
    hub.fail("info", Refuse(503), DROP)
    put(api, "a.txt")
    with pytest.raises(HfHubHTTPError):
        api.model_info(REPO)
    with pytest.raises(httpx.RemoteProtocolError):
        api.model_info(REPO)
    api.model_info(REPO)
    with pytest.raises(ValueError, match="No route 'comit'"):
        hub.fail("comit", DROP)


@pytest.mark.parametrize("headers", [{"Retry-After": "2"}, {"RateLimit": '"api";r=0;t=2'}])
def test_a_client_that_retries_by_itself_waits_as_it_is_told(hub, api, headers):
    """For as long as either header says, at least; without one, its first wait is one second."""
    hub.fail("preupload", Refuse(429, headers))
    start = time.monotonic()
    put(api, "a.txt")
    assert time.monotonic() - start >= 2
    assert [path.split("/")[-2] for path in routes(hub, "POST")[1:]] == ["preupload", "preupload", "commit"]


@pytest.mark.parametrize(("fault", "made"), [(DROP, 0), (DROP_AFTER, 1)])
def test_a_dropped_connection_tells_the_client_nothing(hub, api, fault, made):
    """The same error whether or not the commit was made; the same push again makes it once."""
    hub.fail("commit", fault)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        put(api, "a.txt")
    assert len(hub.commits(REPO)) == 1 + made
    put(api, "a.txt")
    assert len(hub.commits(REPO)) == 2


def test_a_slow_answer_is_slow_from_its_first_byte_to_its_last(hub, api):
    """A patient client waits five times the pause, one with a time limit gives up."""
    hub.fail("info", Slow(0.1), Slow(0.5))
    start = time.monotonic()
    assert api.model_info(REPO).sha == hub.commits(REPO)[0].sha
    assert time.monotonic() - start >= 0.5
    with pytest.raises(httpx.ReadTimeout):
        api.model_info(REPO, timeout=0.1)


def test_a_held_answer_leaves_what_is_done_visible(hub, api):
    """Held after the commit: it is there while its client still waits, and the client is answered in the end."""
    held = hub.hold("commit", after=True)
    done = []
    client = threading.Thread(target=lambda: done.append(put(api, "a.txt")))
    client.start()
    held.wait()
    assert "a.txt" in hub.commits(REPO)[-1].files
    assert not done
    held.release()
    client.join(10)
    assert done[0].oid == hub.commits(REPO)[-1].sha


def test_a_client_killed_before_its_commit_leaves_only_the_lfs_file(hub, api, folder, tmp_path):
    """Killed between upload and commit: no commit, also not later; the next push does not upload the file again."""
    held = hub.hold("commit")
    code = f"import huggingface_hub as h; h.upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **hub.environment(tmp_path / "home")},
        stderr=subprocess.DEVNULL,
    ) as client:
        held.wait()
        client.kill()
    held.release()
    assert len(routes(hub, "PUT")) == 1
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Second attempt")
    assert len(routes(hub, "PUT")) == 1
    assert [commit.message for commit in hub.commits(REPO)[1:]] == ["Second attempt"]


def test_a_save_that_pushes_takes_the_code_along(hub, tiny_model, tmp_path):
    """`save_pretrained(push_to_hub=True)`, which uploads what the save has changed: into a new folder, and once more."""
    for _ in range(2):
        tiny_model().save_pretrained(tmp_path / "run", push_to_hub=True, repo_id=REPO)
        assert {"modeling_rezero.py", "residual.py", "config.json"} <= hub.commits(REPO)[-1].files.keys()


def test_a_model_is_pushed_and_loaded_at_a_revision(hub, tiny_model, tmp_path, ids):
    """`push_to_hub` and `from_pretrained` with a revision; in a process without the package, from the repository's code."""
    model, changed = tiny_model(), tiny_model(seed=1)
    model.push_to_hub(REPO)
    sha = hub.commits(REPO)[-1].sha
    changed.push_to_hub(REPO)
    expected = model(ids).logits
    assert torch.equal(ReZeroForCausalLM.from_pretrained(REPO, revision=sha)(ids).logits, expected)
    assert torch.equal(ReZeroForCausalLM.from_pretrained(REPO)(ids).logits, changed(ids).logits)
    torch.save((ids, expected), tmp_path / "expected.pt")
    script = tmp_path / "load.py"
    script.write_text(f"""
import sys
sys.modules["rezero_hf"] = None
import torch
from transformers import AutoModelForCausalLM
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({REPO!r}, revision={sha!r}, trust_remote_code=True)
assert torch.equal(model(ids).logits, expected)
""")
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-I", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
