"""Data sets read by the real `datasets` library, from local folders so that no network is needed."""

import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from rezero_hf import hub_corpora
from rezero_hf.corpora import open_corpus
from rezero_hf.sources import SPLITS, DataError, Source


modes = pytest.mark.parametrize("streaming", [False, True], ids=["downloaded", "streaming"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The library's cache in the test's folder, and no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write_rows(path, texts, column="text"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


def corpus_of(folder, cache, **fields):
    return open_corpus(Source(f"hub:{folder}", **fields), 0.1, 0.1, cache)


def texts_of(corpus):
    found = {split: [] for split in SPLITS}
    for split, data, last in corpus.pieces():
        assert last
        found[split].append(data.decode())
    return found


@modes
def test_own_splits_are_used_and_shared_documents_dropped(tmp_path, streaming):
    """A data set's own splits stay as they are, except that a document in an earlier one is dropped from the later."""
    write_rows(tmp_path / "set" / "train.jsonl", ["t1", "held", "t2", "t2", "", "tested"])
    write_rows(tmp_path / "set" / "validation.jsonl", ["held", "tested", "v"])
    write_rows(tmp_path / "set" / "test.jsonl", ["tested", "naïve\n漢"])
    corpus = corpus_of(tmp_path / "set", tmp_path / "cache", streaming=streaming)
    assert texts_of(corpus) == {
        "train": ["t1", "t2", "t2"],
        "validation": ["held", "v"],
        "test": ["tested", "naïve\n漢"],
    }
    assert corpus.notes() == {"empty_documents": 1, "documents_also_held_out": 3}


@modes
def test_missing_splits_are_carved_by_document(tmp_path, streaming):
    """With only training text, about the asked share of documents is held out, equal ones together."""
    import pandas

    (tmp_path / "set").mkdir()
    texts = [f"document {i % 1000}" for i in range(2000)]
    pandas.DataFrame({"body": texts}).to_parquet(tmp_path / "set" / "train.parquet")
    found = texts_of(corpus_of(tmp_path / "set", tmp_path / "cache", streaming=streaming, text_column="body"))
    assert sorted(itertools.chain(*found.values())) == sorted(texts)
    assert not set(found["train"]) & set(found["validation"]) | set(found["validation"]) & set(found["test"])
    assert all(140 < len(found[split]) < 260 for split in ("validation", "test"))


def test_a_file_is_read_alone_wherever_it_lies(tmp_path, monkeypatch):
    """By its bare name too, and with characters that mean something in patterns."""
    for name in ("rows[1].jsonl", "rows1.jsonl"):
        write_rows(tmp_path / name, [f"{name} {n}" for n in range(20)])
    monkeypatch.chdir(tmp_path)
    corpus = corpus_of("rows[1].jsonl", tmp_path / "cache")
    assert corpus.label == corpus.identity()["name"] == "rows[1].jsonl"
    found = texts_of(corpus)
    assert sorted(itertools.chain(*found.values())) == sorted(f"rows[1].jsonl {n}" for n in range(20))


def test_a_folder_in_the_home_folder(tmp_path, monkeypatch):
    """Its text, whether there is a network or not, and its name without the path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "set" / "train.jsonl", map(str, range(20)))
    corpus = corpus_of("~/set", tmp_path / "cache")
    assert corpus.label == "set/"
    assert len(list(itertools.chain(*texts_of(corpus).values()))) == 20


@modes
def test_other_columns_are_not_decoded(tmp_path, streaming):
    """A picture that nothing can open does not stand in the text's way."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = {"text": ["a", "b"], "image": [{"bytes": b"no picture", "path": None}] * 2}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    corpus = open_corpus(Source(f"hub:{tmp_path / 'set'}", streaming=streaming), 0, 0, tmp_path / "cache")
    assert texts_of(corpus)["train"] == ["a", "b"]


def test_both_modes_give_the_same(tmp_path):
    """Streaming changes how text travels, not which text it is."""
    write_rows(tmp_path / "set" / "train.jsonl", [f"document {i}" for i in range(50)])
    one, two = (corpus_of(tmp_path / "set", tmp_path / "cache", streaming=mode) for mode in (False, True))
    assert one.identity() == two.identity()
    assert list(one.pieces()) == list(two.pieces())


@modes
def test_max_documents(tmp_path, streaming):
    """Only the first rows of each split are read."""
    write_rows(tmp_path / "set" / "train.jsonl", map(str, range(50)))
    write_rows(tmp_path / "set" / "test.jsonl", map(str, range(100, 150)))
    corpus = corpus_of(tmp_path / "set", tmp_path / "cache", streaming=streaming, max_documents=5)
    found = texts_of(corpus)
    assert found["test"] == ["100", "101", "102", "103", "104"]
    assert sorted(found["train"] + found["validation"]) == ["0", "1", "2", "3", "4"]


def test_identity_follows_the_data_and_the_fields(tmp_path):
    """Other files, columns or limits are another corpus."""
    write_rows(tmp_path / "set" / "train.jsonl", ["a"])
    first = corpus_of(tmp_path / "set", tmp_path / "cache").identity()
    assert corpus_of(tmp_path / "set", tmp_path / "cache").identity() == first
    assert corpus_of(tmp_path / "set", tmp_path / "cache", max_documents=1).identity() != first
    write_rows(tmp_path / "set" / "train.jsonl", ["b"])
    assert corpus_of(tmp_path / "set", tmp_path / "cache").identity() != first
    assert str(tmp_path) not in json.dumps(first)


@modes
def test_files_that_a_readme_names_are_followed(tmp_path, streaming):
    """Their pattern stays the same; what is in them is read anew, and a copy of the folder is the same data set."""
    (tmp_path / "set").mkdir()
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows/*.jsonl\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    found = []
    for text in ("a", "b"):
        write_rows(tmp_path / "set" / "rows" / "1.jsonl", [text])
        corpus = open_corpus(Source(f"hub:{tmp_path / 'set'}", streaming=streaming), 0, 0, tmp_path / "cache")
        found.append((corpus.identity(), texts_of(corpus)["train"]))
    assert [texts for _, texts in found] == [["a"], ["b"]]
    assert found[0][0] != found[1][0]
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere" / "set")
    copied = open_corpus(Source(f"hub:{tmp_path / 'elsewhere' / 'set'}", streaming=streaming), 0, 0, tmp_path / "cache")
    assert copied.identity() == found[1][0]


def test_without_a_network_the_last_known_version_counts(tmp_path, monkeypatch):
    """A Hub id that was resolved once is still known when the Hub is away; a pinned commit is not even asked."""

    class Builder:
        hash = "a" * 40

    source = Source("hub:org/name")
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args, **kwargs: Builder)
    known = open_corpus(source, 0, 0, tmp_path).identity()
    pinned = open_corpus(Source("hub:org/name", revision="a" * 40), 0, 0, tmp_path).identity()

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    assert known["version"] == Builder.hash
    assert open_corpus(source, 0, 0, tmp_path).identity() == known
    monkeypatch.setattr(hub_corpora, "load_dataset_builder_or_explain", lambda *args, **kwargs: pytest.fail("asked"))
    assert open_corpus(Source("hub:org/name", revision="a" * 40), 0, 0, tmp_path).identity() == pinned


class SmallHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as the libraries ask for: one data set with one file, whose text differs by commit."""

    commits = {"a" * 40: b'{"text": "old"}\n', "b" * 40: b'{"text": "new"}\n'}
    main = "a" * 40

    def do_GET(self):
        path = self.path.partition("?")[0]
        commit = next((commit for commit in self.commits if commit in path), SmallHub.main)
        status, answer = 404, b""
        if path.endswith("/train.jsonl"):
            status, answer = 200, self.commits[commit]
        elif path.startswith("/api/datasets/org/name"):
            file = {"type": "file", "path": "train.jsonl", "size": len(self.commits[commit]), "oid": commit}
            info = {"id": "org/name", "sha": commit, "siblings": [{"rfilename": "train.jsonl"}]}
            status, answer = 200, json.dumps([file] if "/tree/" in path else info).encode()
        self.send_response(status)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{commit}"', "Content-Length": str(len(answer))}
        headers |= {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answer)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


READ_TWICE = """
import sys
from pathlib import Path
from rezero_hf.corpora import open_corpus
from rezero_hf.sources import Source
for streaming in (False, True):
    corpus = open_corpus(Source("hub:org/name", streaming=streaming), 0, 0, Path("cache"))
    print(corpus.identity()["version"], flush=True)
    sys.stdin.readline()
    print([piece.data.decode() for piece in corpus.pieces()], flush=True)
"""


def test_the_resolved_commit_is_what_is_loaded(tmp_path):
    """The text is that of the commit in the identity, as the real libraries load it, also when `main` moves on."""
    old, new = SmallHub.commits
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {
        name: value for name, value in os.environ.items() if "OFFLINE" not in name and "PROXY" not in name.upper()
    }
    online |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    reader = subprocess.Popen(
        [sys.executable, "-c", READ_TWICE],
        env=online,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server, reader:
        for _ in ("downloaded", "streaming"):
            SmallHub.main = old
            assert reader.stdout.readline().strip() == old
            SmallHub.main = new
            print(file=reader.stdin, flush=True)
            assert reader.stdout.readline().strip() == "['old']"
        server.shutdown()


@modes
def test_bad_data_sets(tmp_path, streaming):
    """A wrong column, a row without text, a missing training split: one line each."""
    write_rows(tmp_path / "set" / "train.jsonl", ["a", None, "b"])
    write_rows(tmp_path / "other" / "test.jsonl", ["a"])
    cache = tmp_path / "cache"
    for folder, fields, message in (
        ("set", {"text_column": "body"}, "set/ has no column 'body', only text: set text_column"),
        ("set", {}, "set/: row 1 of train, column 'text', is NoneType, not text: set text_column"),
        ("other", {}, "other/ has no split named train, only test: use another data set"),
    ):
        with pytest.raises(DataError, match=message):
            list(corpus_of(tmp_path / folder, cache, streaming=streaming, **fields).pieces())


@modes
def test_text_that_breaks_while_it_is_read(tmp_path, streaming):
    """A malformed line far into a file is one line with the cause, in both modes."""
    write_rows(tmp_path / "set" / "train.jsonl", ["a", "b"])
    with (tmp_path / "set" / "train.jsonl").open("a") as file:
        file.write('{"text": "c"\n{broken\n')
    with pytest.raises(DataError, match=r"^set/ cannot be read .*JSON parse error.*check its name") as error:
        list(corpus_of(tmp_path / "set", tmp_path / "cache", streaming=streaming).pieces())
    assert "\n" not in str(error.value)


def test_a_network_that_drops_while_streaming(tmp_path, monkeypatch):
    """Rows come until the network is gone; then there is one line with the innermost cause."""
    import datasets

    def rows():
        yield {"text": "a"}
        try:
            raise TimeoutError("the read operation timed out\nmore")
        except TimeoutError as error:
            raise ConnectionError("Server Disconnected") from error

    write_rows(tmp_path / "set" / "train.jsonl", ["a"])
    dropping = datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(rows)})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: dropping)
    pieces = corpus_of(tmp_path / "set", tmp_path / "cache", streaming=True).pieces()
    assert next(pieces).data == b"a"
    with pytest.raises(DataError, match=r"^set/ cannot be read \(.*: the read operation timed out\): check its name"):
        next(pieces)


def test_a_data_set_that_cannot_be_reached(tmp_path):
    """A name that leads nowhere gives one line with what to check."""
    with pytest.raises(DataError, match=r"^hub:no-such-org/no-such-set cannot be read .*check its name") as error:
        corpus_of("no-such-org/no-such-set", tmp_path / "cache").identity()
    assert "\n" not in str(error.value)
