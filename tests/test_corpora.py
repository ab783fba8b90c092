"""Corpora hand out all their text once, in three splits that do not overlap, and say what is wrong with input."""

import hashlib
import itertools
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rezero_hf import corpora, sources
from rezero_hf.corpora import Enwik8, Enwik8Facts, PythonStdlib, open_corpus
from rezero_hf.sources import SPLITS, DataError, Source, held_out_names, in_pieces, shares_window


def corpus_of(source, cache_dir, validation=0.05, test=0.05, **fields):
    return open_corpus(Source(str(source), **fields), validation, test, cache_dir)


def documents(corpus):
    """Split -> documents, put together again from their pieces."""
    found = {split: [b""] for split in SPLITS}
    for split, data, last in corpus.pieces():
        found[split][-1] += data
        if last:
            found[split].append(b"")
    assert all(docs.pop() == b"" for docs in found.values())
    return found


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    corpus = PythonStdlib(tmp_path_factory.mktemp("cache"))
    return corpus, documents(corpus)


def longest_shared_run(texts, others):
    """The longest run of bytes in both, if at least 256, found without hashing numbers.

    A run of 256 bytes contains a whole 128-byte chunk that starts at a multiple of 128 in `others`, so it is enough to
    look for those chunks at every offset of `texts` and to extend what is found in both directions.
    """
    chunks = defaultdict(list)
    for other in others:
        for start in range(0, len(other) - 127, 128):
            chunks[other[start : start + 128]].append((other, start))
    longest = 0
    for text in texts:
        for start in range(len(text) - 127):
            for other, place in chunks.get(text[start : start + 128], ()):
                left, right = 0, 128
                while min(start, place) > left and text[start - left - 1] == other[place - left - 1]:
                    left += 1
                while (
                    max(start - len(text), place - len(other)) + right < 0
                    and text[start + right] == other[place + right]
                ):
                    right += 1
                longest = max(longest, left + right)
    return longest


def test_stdlib_splits_share_no_run_of_256_bytes(stdlib):
    """On the real embedded corpus, no 256 consecutive bytes of one split occur in another, at any offset."""
    corpus, found = stdlib
    assert longest_shared_run(found["test"], found["validation"]) < 256
    assert longest_shared_run(found["test"], found["train"]) < 256
    assert longest_shared_run(found["validation"], found["train"]) < 256
    # The same search does find them in what was dropped.
    dropped = [corpus.files[name] for name in corpus.notes()["dropped_for_shared_text"]["train"]["files"]]
    assert all(longest_shared_run(found["test"] + found["validation"], [text]) >= 256 for text in dropped)


def test_stdlib_splits_share_no_file_and_no_module(stdlib):
    """No file content and no top-level module is in two splits."""
    corpus, found = stdlib
    names = corpus.split()
    for one, two in itertools.combinations(SPLITS, 2):
        assert not set(found[one]) & set(found[two])
        assert not {name.split("/")[0] for name in names[one]} & {name.split("/")[0] for name in names[two]}


def test_stdlib_held_out_is_varied_and_counted(stdlib):
    """Each held-out split has 3 to 8 % of the bytes from many modules, no file most of it; losses are recorded."""
    corpus, found = stdlib
    total = sum(map(len, corpus.files.values()))
    notes = corpus.notes()
    for split in ("validation", "test"):
        size = sum(map(len, found[split]))
        assert 0.03 < size / total < 0.08
        assert len(notes["modules"][split]) >= 10
        assert max(map(len, found[split])) < size / 2
    dropped = notes["dropped_for_shared_text"]
    assert sum(d["bytes"] for d in dropped.values()) < 0.1 * total
    assert sum(len(d) for docs in found.values() for d in docs) + sum(d["bytes"] for d in dropped.values()) == total


def test_stdlib_holds_no_tests_tables_or_installed_packages(stdlib):
    """What the docstring leaves out is left out."""
    names = set(stdlib[0].files)
    assert {"os.py", "json/decoder.py", "encodings/__init__.py"} <= names
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")) for name in names)
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert "encodings/cp437.py" not in names


def test_stdlib_identity_is_remembered_but_follows_the_files(stdlib, tmp_path, monkeypatch):
    """The second identity reads no file; a changed file gives another one."""
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    first = PythonStdlib(tmp_path / "cache").identity()
    with monkeypatch.context() as blind:
        blind.setattr(Path, "read_bytes", lambda self: pytest.fail("read again"))
        assert PythonStdlib(tmp_path / "cache").identity() == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert PythonStdlib(tmp_path / "cache").identity()["sha256"] != first["sha256"]


@settings(deadline=None)
@given(texts=st.lists(st.binary(max_size=40)), protected=st.lists(st.binary(max_size=40)), data=st.data())
def test_shares_window_is_exact(texts, protected, data):
    """The hashed comparison agrees with comparing every run, with copied runs planted."""
    for text in protected:
        start = data.draw(st.integers(0, len(text)))
        texts = [*texts, b"\1" + text[start : start + 9] + b"\2"]
    runs = {text[i : i + 8] for text in protected for i in range(len(text) - 7)}
    expected = [t in protected or any(t[i : i + 8] in runs for i in range(len(t) - 7)) for t in texts]
    assert shares_window(texts, protected, width=8) == expected


@settings(deadline=None)
@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(1, 100)),
    fractions=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)),
)
def test_held_out_names_respect_their_share(sizes, fractions):
    """A split gets at most its share and a third more, and no name larger than a third of the share."""
    shares = dict(zip(("validation", "test"), fractions, strict=True))
    chosen = held_out_names(sizes, shares)
    for split, share in shares.items():
        mine = [sizes[name] for name in chosen if chosen[name] == split]
        budget = share * sum(sizes.values())
        assert sum(mine) <= budget * 4 / 3 + 1e-6
        assert all(size <= budget / 3 for size in mine)


@settings(deadline=None)
@given(text=st.text(), piece_bytes=st.integers(4, 9))
def test_pieces_join_to_the_document_and_cut_no_character(text, piece_bytes):
    """Pieces of any document put together are the document; each is valid UTF-8; only the final one is last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece_bytes)
        pieces = list(in_pieces(text.encode()))
    assert b"".join(data for data, _ in pieces) == text.encode()
    assert all(data.decode() for data, _ in pieces)
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_one_file_is_split_by_its_tail(tmp_path):
    """A single text trains on its beginning; validation and test are what follows, cut at line starts."""
    text = "".join(f"line {i} ü\n" for i in range(1000)).encode()
    (tmp_path / "one.txt").write_bytes(text)
    found = documents(corpus_of(tmp_path / "one.txt", tmp_path / "cache", 0.1, 0.2))
    assert b"".join(found["train"] + found["validation"] + found["test"]) == text
    assert [len(found[split]) for split in SPLITS] == [1, 1, 1]
    for split, share in (("validation", 0.1), ("test", 0.2)):
        assert found[split][0].startswith(b"line")
        assert len(found[split][0]) == pytest.approx(share * len(text), abs=20)


@settings(deadline=None)
@given(text=st.text(min_size=1), fractions=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)))
def test_any_tail_split_is_valid_text_and_complete(tmp_path_factory, text, fractions):
    """Whatever the text and the fractions: nothing lost, nothing twice, no character cut, none held out for 0."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "t").write_bytes(text.encode())
    found = documents(corpus_of(folder / "t", folder / "cache", *fractions))
    assert b"".join(found["train"] + found["validation"] + found["test"]) == text.encode()
    assert all(doc.decode() for docs in found.values() for doc in docs)
    assert fractions[0] or not found["validation"]
    assert fractions[1] or not found["test"]


def test_many_files_are_split_by_file_and_duplicates_count_once(tmp_path):
    """Whole files are held out; a copy of a file is never on two sides; hidden files are not read."""
    for i in range(300):
        (tmp_path / "in" / str(i % 7)).mkdir(parents=True, exist_ok=True)
        for name in (f"{i % 7}/{i}.txt", f"copy-{i}.txt"):
            (tmp_path / "in" / name).write_text(f"text number {i}\n" * 3)
    (tmp_path / "in" / "empty.txt").touch()
    (tmp_path / "in" / ".hidden").write_bytes(b"\xff")
    corpus = corpus_of(tmp_path / "in", tmp_path / "cache")
    found = documents(corpus)
    everything = list(itertools.chain(*found.values()))
    assert len(everything) == len(set(everything)) == 300
    assert 10 <= len(found["validation"]) <= 20
    assert 10 <= len(found["test"]) <= 20
    identity = corpus.identity()
    assert (identity["files"], identity["duplicate_files"], identity["empty_files"]) == (300, 300, 1)


def test_split_does_not_depend_on_where_the_files_are(tmp_path):
    """The same files in another folder, or through a glob, give the same identity and the same splits."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(100):
            (tmp_path / folder / f"{i}{folder}.txt").write_text(f"{i}\n" * 10)
    one, two = (corpus_of(tmp_path / name, tmp_path / "cache") for name in ("a", "b/*.txt"))
    assert one.identity() == two.identity()
    assert list(one.pieces()) == list(two.pieces())


def test_a_changed_file_is_another_corpus(tmp_path):
    """Same name, same size, other content: another identity."""
    path = tmp_path / "t.txt"
    path.write_text("one\n")
    before = corpus_of(path, tmp_path / "cache").identity()
    assert corpus_of(path, tmp_path / "cache").identity() == before
    path.write_text("two\n")
    assert corpus_of(path, tmp_path / "cache").identity() != before


def test_bad_paths_and_files(tmp_path):
    """Missing path, empty file, empty folder and undecodable bytes: one line each with file, place and way out."""
    cache = tmp_path / "cache"
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    latin = tmp_path / "latin.txt"
    latin.write_bytes("ü".encode() * (1 << 20) + b"caf\xe9 ")
    cut = tmp_path / "cut.txt"
    cut.write_bytes(b"ok \xc3")
    for path, message in (
        (tmp_path / "missing.txt", "is no file, folder with files or glob that matches any.*correct the path"),
        (tmp_path / "*.nothing", "is no file, folder with files or glob that matches any"),
        (tmp_path / "folder", "is no file, folder with files or glob that matches any"),
        (tmp_path / "empty.txt", "empty.txt' holds no text, only empty files: put text into it"),
        (latin, f"latin.txt is not UTF-8 text at byte {(2 << 20) + 3}: convert it"),
        (cut, "cut.txt is not UTF-8 text at byte 3: convert it"),
        ("hub:", "names no data set: write hub:ORG/NAME"),
        (f"enwik8:{tmp_path}/enwik8", "enwik8 file .* does not exist: download enwik8.zip"),
    ):
        with pytest.raises(DataError, match=message) as error:
            corpus_of(path, cache)
        assert "\n" not in str(error.value)


def test_only_the_file_that_changed_is_read_again(tmp_path, monkeypatch):
    """Of several processes by one, and the others know what it found; a cache that cannot be written costs only time."""
    read, scan = [], corpora._scan
    monkeypatch.setattr(corpora, "_scan", lambda path: read.append(path.name) or scan(path))
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(name)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: corpus_of(tmp_path / "texts", tmp_path / "cache"), range(3)))
    assert read == ["a.txt", "b.txt", "c.txt"]
    (tmp_path / "texts" / "b.txt").write_text("other")
    (tmp_path / "texts" / "d.txt").write_text("new")
    corpus_of(tmp_path / "texts", tmp_path / "cache")
    assert read[3:] == ["b.txt", "d.txt"]
    (tmp_path / "no folder").touch()
    assert corpus_of(tmp_path / "texts", tmp_path / "no folder").identity()["files"] == 4


def test_damaged_memory_is_found_out_again(tmp_path, monkeypatch):
    """What is remembered about files may be empty, cut, unreadable or something else: the files are read again."""
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    for source in ("python-stdlib", tmp_path / "a.py"):
        cache = tmp_path / f"cache-{source == 'python-stdlib'}"
        first = corpus_of(source, cache).identity()
        (memory,) = (cache / "known").glob("*.json")
        whole = memory.read_bytes()
        for content in (b"", whole[:-1], b"[]", b"{}", b"\xff"):
            memory.write_bytes(content)
            assert corpus_of(source, cache).identity() == first
            assert memory.read_bytes() == whole


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read, as Linux has")
def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    """Every corpus of files names the file and the cause."""
    (tmp_path / "a.py").symlink_to("/proc/self/mem")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    for read in (
        lambda: corpus_of(tmp_path, tmp_path / "cache"),
        lambda: corpus_of("python-stdlib", tmp_path / "cache").identity(),
        lambda: list(corpus_of(f"enwik8:{tmp_path}/a.py", tmp_path / "cache").pieces()),
    ):
        with pytest.raises(
            DataError, match=r"^data.sources: .*a.py cannot be read \(\[Errno 5\] Input/output error\): "
        ):
            read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.0}, "weight of 'a.txt' is 0.0: it must be a number above 0"),
        ({"weight": float("nan")}, "weight of 'a.txt' is nan"),
        ({"max_documents": 0}, "max_documents of 'a.txt' is 0: at least 1"),
        ({"streaming": True}, "streaming is only for hub: sources, not for 'a.txt': remove it"),
        ({"text_column": "body"}, "text_column is only for hub: sources"),
    ],
)
def test_bad_source_fields(fields, message):
    """Values and combinations that no source can have are named with their field."""
    with pytest.raises(DataError, match=message):
        Source("a.txt", **fields).check()


@pytest.fixture
def small_enwik8(tmp_path):
    """A text of enwik8's shape whose cuts fall inside characters, and its facts."""
    data = ("<page>é漢</page>\n" * 500).encode()
    facts = Enwik8Facts(len(data), hashlib.sha1(data).hexdigest(), train=450 * 19 + 7, validation=25 * 19 + 2)
    return data, facts


def test_enwik8_is_cut_at_byte_positions(tmp_path, small_enwik8):
    """Raw or zipped, named or found in the cache folder, the three splits are the exact byte ranges."""
    data, facts = small_enwik8
    (tmp_path / "enwik8").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "my.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", data)
    a, b = facts.train, facts.train + facts.validation
    assert all(0x80 <= data[cut] < 0xC0 for cut in (a, b))
    for path in (tmp_path / "enwik8", tmp_path / "my.zip", None):
        found = documents(Enwik8(path, tmp_path, facts))
        assert found == {"train": [data[:a]], "validation": [data[a:b]], "test": [data[b:]]}


def test_enwik8_checks_what_it_reads(tmp_path, small_enwik8):
    """Another size or content, a zip without the member and a damaged zip are refused before any text comes out."""
    data, facts = small_enwik8
    (tmp_path / "short").write_bytes(data[:-1])
    (tmp_path / "other").write_bytes(b"!" + data[1:])
    with zipfile.ZipFile(tmp_path / "no-member.zip", "w") as archive:
        archive.writestr("readme", "")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("enwik8", data)
    bad = bytearray((tmp_path / "bad.zip").read_bytes())
    bad[100] ^= 1
    (tmp_path / "bad.zip").write_bytes(bad)
    for name, message in (
        (
            "short",
            f"short is not enwik8: {len(data) - 1:,} bytes with SHA-1 .*, expected {len(data):,} with {facts.sha1}",
        ),
        ("other", "other is not enwik8: .*: download enwik8.zip"),
        ("no-member.zip", "no-member.zip has no member named enwik8"),
        ("bad.zip", r"bad.zip cannot be read \(Bad CRC-32 for file 'enwik8'\): download enwik8.zip"),
    ):
        with pytest.raises(DataError, match=message):
            next(Enwik8(tmp_path / name, tmp_path, facts).pieces())


def test_enwik8_facts_are_the_published_ones():
    """10^8 bytes, split 90M/5M/5M."""
    facts = Enwik8Facts()
    assert facts.size - facts.train - facts.validation == 5_000_000
    assert (facts.train, facts.validation) == (90_000_000, 5_000_000)
