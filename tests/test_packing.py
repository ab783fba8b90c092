"""Nothing half-written is taken for whole, and nothing is written twice: killed anywhere, preparation goes on."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_data import BPE, BYTES, both, config_for

from rezero_hf import corpora, packing, shards, sources
from rezero_hf.data import prepare
from rezero_hf.sources import DataError


# multiprocessing's fork: a process that has imported torch already, so that these tests take milliseconds.
fork = multiprocessing.get_context("fork")


def test_an_error_in_the_middle_leaves_nothing(tmp_path, text_file, monkeypatch):
    """A failure after a shard was written removes it, and the next run succeeds."""
    config = config_for(tmp_path, text_file)
    pieces = corpora.TextFiles.pieces

    def fails(self):
        yield from list(pieces(self))[:1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_ENCODE_BYTES", 1)
        patch.setattr(corpora.TextFiles, "pieces", fails)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, BYTES, progress=False)
    assert not list((tmp_path / "cache").rglob("*.bin"))
    prepare(config, BYTES, progress=False).verify()


@pytest.fixture
def small_steps(monkeypatch):
    """Pieces, batches, shards and durable points of a few lines, and two cores: a small text has every event there is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for module, name, value in (
        (sources, "PIECE_BYTES", 64),
        (packing, "_ENCODE_BYTES", 100),
        (packing, "_DURABLE_BYTES", 500),
        (shards, "SHARD_TOKENS", 700),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def two_sources(tmp_path, text_file):
    """Makes the data section for two texts, in a cache of its own, and says how many bytes they have."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i} 漢字 some words\n" for i in range(150)))
    size = text_file.stat().st_size + other.stat().st_size
    return lambda cache: config_for(tmp_path, text_file, other, cache_dir=str(tmp_path / cache)), size


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_at(call, config, tokenizer, *where):
    """Prepare in a process that gets SIGKILL when the function at `where` (owner, name) is called that many times.

    A generator counts its items instead. Returns False if there are not so many.
    """
    function, calls = getattr(*where), itertools.count(1)

    def die():
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def dies(*args, **kwargs):
        die()
        return function(*args, **kwargs)

    def dies_inside(self):
        for item in function(self):
            die()
            yield item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, dies_inside if where[1] == "pieces" else dies)
        victim = fork.Process(target=prepare, args=(config, tokenizer), kwargs={"progress": False})
        victim.start()
        victim.join()
    assert victim.exitcode in (0, -signal.SIGKILL)
    return victim.exitcode != 0


@both
@pytest.mark.parametrize("piece", [1, 9, 40, 90, 140, 170])
def test_killed_while_text_is_read(two_sources, small_steps, tokenizer, piece):
    """However far it came, the next call gives byte for byte what an uninterrupted one gives, and repeats little."""
    make, size = two_sources
    whole = prepare(make("one"), tokenizer, progress=False)
    assert whole.tokenized_bytes == size
    assert killed_at(piece, make("two"), tokenizer, corpora.TextFiles, "pieces")
    resumed = prepare(make("two"), tokenizer, progress=False)
    assert content(resumed.folder) == content(whole.folder)
    # Not yet durable were one durable step and what two cores had in hand, and pieces are up to two lines long.
    assert size - resumed.tokenized_bytes >= piece * 40 - 500 - 5 * 200
    assert size - resumed.tokenized_bytes <= piece * 64
    assert not list((resumed.folder.parent).glob(".*"))


def test_killed_again_and_again(two_sources, small_steps):
    """Preparation that is killed every fifty pieces still comes to its end, with the same result."""
    make, _ = two_sources
    whole = prepare(make("one"), BPE, progress=False)
    rounds = 0
    # Counted are the pieces that are read anew too, so each round may read more than the one before.
    while killed_at(50 + 20 * rounds, make("two"), BPE, corpora.TextFiles, "pieces"):
        rounds += 1
    assert rounds > 3
    assert content(prepare(make("two"), BPE, progress=False).folder) == content(whole.folder)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (os, "fsync", range(1, 90, 8)),
        (packing, "write_whole", (1, 2, 9)),
        (Path, "replace", (1, 2, 9)),
        (packing, "sync", (1,)),
        (Path, "rename", (1,)),
        (Path, "unlink", (1,)),
    ],
)
def test_killed_while_it_is_written_down(two_sources, small_steps, owner, name, calls):
    """A kill around any sync, rename or removal, of shards, progress, index or folder, changes nothing in the end."""
    make, _ = two_sources
    whole = content(prepare(make("one"), BYTES, progress=False).folder)
    for call in calls:
        config = make(f"killed-{call}")
        assert killed_at(call, config, BYTES, owner, name)
        for index in Path(config.cache_dir).glob("[!.]*/index.json"):
            assert content(index.parent) == whole
        assert content(prepare(config, BYTES, progress=False).folder) == whole
        assert not list(Path(config.cache_dir).glob(".*"))


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "no json", "foreign", "shard missing", "shard cut", "shard changed"]
)
def test_progress_that_cannot_be_trusted(two_sources, small_steps, capsys, damage):
    """A damaged or foreign progress file, or shards that are not as it says: one line, and everything is done again."""
    make, size = two_sources
    whole = content(prepare(make("one"), BYTES, progress=False).folder)
    config = make("two")
    assert killed_at(100, config, BYTES, corpora.TextFiles, "pieces")
    (progress,) = Path(config.cache_dir).glob(".*/progress.json")
    text, newest = progress.read_text(), max(progress.parent.glob("train-0-*.bin"))
    if damage == "cut":
        progress.write_text(text[:-9])
    elif damage == "changed":
        progress.write_text(text.replace('"pieces": ', '"pieces": 1'))
    elif damage == "no json":
        progress.write_bytes(b"\xff\0")
    elif damage == "foreign":
        other = make("three")
        assert killed_at(100, other, BPE, corpora.TextFiles, "pieces")
        progress.write_bytes(next(Path(other.cache_dir).glob(".*/progress.json")).read_bytes())
    elif damage == "shard missing":
        min(progress.parent.glob("*.bin")).unlink()
    elif damage == "shard cut":
        os.truncate(newest, 10)
    else:
        newest.write_bytes(b"?" + newest.read_bytes()[1:])
    capsys.readouterr()
    prepared = prepare(config, BYTES)
    said = capsys.readouterr().err
    assert said.count(f"{progress} cannot be used (") == said.count("preparing from the start\n") == 1
    assert prepared.tokenized_bytes == size
    assert content(prepared.folder) == whole


def test_going_on_after_an_error(two_sources, small_steps, monkeypatch):
    """Ctrl-C after a durable point keeps what was done, as a kill does."""
    make, size = two_sources
    pieces = corpora.TextFiles.pieces

    def interrupted(self):
        yield from itertools.islice(pieces(self), 100)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpora.TextFiles, "pieces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(make("one"), BYTES, progress=False)
    prepared = prepare(make("one"), BYTES, progress=False)
    assert 0 < prepared.tokenized_bytes < size * 2 / 3
    prepared.verify()


def test_neither_batches_nor_threads_change_the_tokens(tmp_path, two_sources, monkeypatch):
    """One core with large batches and five with tiny ones write the same folder."""
    make, _ = two_sources
    folders = []
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    for cores, batch in ((1, 1 << 20), (5, 1), (3, 1000)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setattr(packing, "_ENCODE_BYTES", batch)
        folders.append(content(prepare(make(f"{cores}"), BPE, progress=False).folder))
    assert folders[0] == folders[1] == folders[2]


def test_two_processes_at_once(tmp_path, text_file, monkeypatch):
    """Of processes that start together one writes, the others wait, and all read the same whole data."""
    config = config_for(tmp_path, text_file)
    pieces, done = corpora.TextFiles.pieces, fork.Queue()

    def slowly(self):
        time.sleep(0.1)
        yield from pieces(self)

    def work():
        prepared = prepare(config, BYTES, progress=False)
        prepared.verify()
        done.put(prepared.tokenized_bytes)

    monkeypatch.setattr(corpora.TextFiles, "pieces", slowly)
    workers = [fork.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    tokenized = sorted(done.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert tokenized == [0, 0, text_file.stat().st_size]
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 1


def test_taking_over_from_a_process_that_died(two_sources, small_steps, monkeypatch, capsys):
    """Who waits says so once, and when the writer dies goes on from where that was."""
    make, size = two_sources
    whole = prepare(make("one"), BYTES, progress=False)
    pieces, waiting = corpora.TextFiles.pieces, fork.Event()

    def stuck(self):
        yield from itertools.islice(pieces(self), 100)
        waiting.set()
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(corpora.TextFiles, "pieces", stuck)
        writer = fork.Process(target=prepare, args=(make("two"), BYTES), kwargs={"progress": False})
        writer.start()
        assert waiting.wait(timeout=60)
    killer = threading.Timer(2.2, writer.kill)
    killer.start()
    capsys.readouterr()
    prepared = prepare(make("two"), BYTES)
    said = capsys.readouterr().err
    assert writer.exitcode is None or writer.exitcode == -signal.SIGKILL
    assert said.count(f"waiting for another process to prepare {prepared.folder}\n") == 1
    assert "going on after" in said
    assert 0 < prepared.tokenized_bytes < size * 2 / 3
    assert content(prepared.folder) == content(whole.folder)
    writer.join()


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_verifying_in_parts(two_sources, small_steps, parts):
    """Each shard is read in exactly one part: damage to any of them is found by one part and no other."""
    prepared = prepare(two_sources[0]("one"), BYTES, progress=False)
    paths = list(prepared.folder.glob("*.bin"))
    assert len(paths) > 10
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        found = []
        for part in range(parts):
            try:
                prepared.verify(part, parts)
            except DataError as error:
                found.append(str(error))
        path.write_bytes(whole)
        assert len(found) == 1
        assert f"shard {path} is damaged" in found[0]
    for part in (-1, parts):
        with pytest.raises(ValueError, match=f"part {part} of {parts}"):
            prepared.verify(part, parts)


def test_no_shard_stays_open(two_sources, small_steps):
    """However many there are: a process may hold a thousand files or so."""
    prepared = prepare(two_sources[0]("one"), BYTES, progress=False)
    stream, before = prepared.stream("train", 0), psutil.Process().num_fds()
    assert len(stream.read(0, len(stream))) == len(stream)
    assert len(list(prepared.folder.glob("train-0-*.bin"))) > 3
    assert psutil.Process().num_fds() == before


def test_other_text_than_the_first_process_has_is_refused(two_sources):
    """Two machines, each with a cache of its own, whose files differ."""
    prepared = prepare(two_sources[0]("one"), BYTES, progress=False)
    prepared.verify(fingerprint=prepared.fingerprint)
    with pytest.raises(DataError, match="holds other text or tokens than the 0123 of the first process"):
        prepared.verify(fingerprint="0123")
