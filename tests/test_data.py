"""Tokens survive packing, blocks come in an order that is arithmetic, damage is found."""

import hashlib
import itertools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from rezero_hf import corpora, data, packing, shards
from rezero_hf.blocks import EvalBlocks, TrainBlocks
from rezero_hf.corpora import Enwik8, Enwik8Facts
from rezero_hf.data import DataConfig, prepare
from rezero_hf.mixture import mixture_pattern
from rezero_hf.sources import DataError, Source
from rezero_hf.tokenization import byte_tokenizer, token_byte_lengths, train_bpe


BYTES = byte_tokenizer()
BPE = train_bpe(["some words, some more words\n漢字 🙂\n"] * 9, 290)
END = BYTES.eos_token_id
UNSPLIT = {"validation_fraction": 0.0, "test_fraction": 0.0}
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


def config_for(folder, *sources, **fields):
    """A recipe's data section with everything below `folder`."""
    sources = [source if isinstance(source, Source) else Source(str(source)) for source in sources]
    return DataConfig(sources, **{"block_size": 16, "cache_dir": str(folder / "cache"), **fields})


def prepared_from(folder, *texts, tokenizer=BYTES, **fields):
    """Each text as one file, all in one source."""
    (folder / "in").mkdir()
    for number, text in enumerate(texts):
        (folder / "in" / f"{number}.txt").write_bytes(text.encode())
    return prepare(config_for(folder, folder / "in", **fields), tokenizer, progress=False)


def whole_stream(prepared, split="train", source=0):
    stream = prepared.stream(split, source)
    return stream.read(0, len(stream)).tolist()


@pytest.fixture
def prepared(tmp_path, text_file):
    return prepare(config_for(tmp_path, text_file), BYTES, progress=False)


@both
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True), shard_tokens=st.integers(1, 40))
def test_what_is_packed_is_what_the_tokenizer_says(tmp_path_factory, tokenizer, texts, shard_tokens):
    """The stream is each document's ids with one separator after it, also when shards and batches are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", shard_tokens)
        patch.setattr(packing, "_ENCODE_BYTES", 10)
        prepared = prepared_from(tmp_path_factory.mktemp("pack"), *texts, tokenizer=tokenizer, block_size=1, **UNSPLIT)
    stream = whole_stream(prepared)
    ends = [-1] + [i for i, token in enumerate(stream) if token == tokenizer.eos_token_id]
    documents = [stream[a + 1 : b] for a, b in itertools.pairwise(ends)]
    assert ends[-1] == len(stream) - 1
    assert sorted(documents) == sorted(tokenizer(text, split_special_tokens=True).input_ids for text in texts)
    assert prepared.totals("train") == {
        "documents": len(texts),
        "tokens": len(stream),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    prepared.verify()


@settings(max_examples=25, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(-1, 130), st.integers(0, 130))))
def test_any_span_reads_across_shards(tmp_path_factory, spans):
    """Reading a span equals slicing the whole stream, with the separator standing before its first token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 7)
        text = "".join(map(chr, range(32, 126)))
        prepared = prepared_from(tmp_path_factory.mktemp("read"), text, **UNSPLIT)
    expected = [END, *text.encode(), END]
    stream = pickle.loads(pickle.dumps(prepared.stream("train", 0)))
    for start, stop in spans:
        if start < stop:
            assert stream.read(start, stop).tolist() == expected[start + 1 : stop + 1]


def test_a_document_cannot_forge_its_end(tmp_path):
    """Text that spells the separator is packed as its characters."""
    prepared = prepared_from(tmp_path, "a<|endoftext|>b" * 9, **UNSPLIT)
    assert whole_stream(prepared).count(END) == 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "uint16"), (70_000, "uint32")])
def test_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    """Ids are stored in the smallest unsigned type for the vocabulary with its specials."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(vocab_size - 259)])
    prepared = prepared_from(tmp_path, "some text\n" * 20, tokenizer=tokenizer)
    assert prepared.index["dtype"] == dtype
    assert sum(f.stat().st_size for f in prepared.folder.glob("*.bin")) == np.dtype(dtype).itemsize * sum(
        prepared.totals(split)["tokens"] for split in ("train", "validation", "test")
    )


def test_enwik8_with_a_text_tokenizer_leaves_out_only_cut_characters(tmp_path, monkeypatch):
    """Bytes see every byte of each split; BPE misses the parts of the two characters at the cuts, and counts so."""
    text = ("<page>é漢</page>\n" * 100).encode()
    facts = Enwik8Facts(len(text), hashlib.sha1(text).hexdigest(), train=80 * 19 + 7, validation=10 * 19 + 2)
    (tmp_path / "enwik8").write_bytes(text)
    monkeypatch.setattr(data, "open_corpus", lambda *args: Enwik8(tmp_path / "enwik8", tmp_path, facts))
    config = config_for(tmp_path, "enwik8")
    whole = prepare(config, BYTES, progress=False)
    assert bytes(whole_stream(whole)[:-1]) == text[: facts.train]
    assert [whole.totals(split)["bytes"] for split in ("train", "validation", "test")] == [1527, 192, 181]
    cut = prepare(config, BPE, progress=False)
    assert [cut.totals(split)["bytes"] for split in ("train", "validation", "test")] == [1526, 190, 179]
    assert BPE.decode(whole_stream(cut)[:-1]) == text[: facts.train - 1].decode()


def test_the_second_time_no_text_is_read(tmp_path, text_file, monkeypatch):
    """Prepared data is opened, not made again, and says the same about itself."""
    config = config_for(tmp_path, text_file)
    first = prepare(config, BYTES, progress=False).record()
    monkeypatch.setattr(corpora.TextFiles, "pieces", lambda self: pytest.fail("read again"))
    assert prepare(config, BYTES, progress=False).record() == first


def test_what_changes_the_tokens_changes_the_folder(tmp_path, text_file):
    """Another text, tokenizer or split is another folder; block size, weight and file name are not."""
    first = prepare(config_for(tmp_path, text_file), BYTES).folder
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    assert prepare(config_for(tmp_path, Source(str(copy), weight=2.0), block_size=8), BYTES).folder == first
    others = [
        prepare(config_for(tmp_path, text_file), BPE).folder,
        prepare(config_for(tmp_path, text_file, test_fraction=0.1), BYTES).folder,
        prepare(config_for(tmp_path, text_file, copy), BYTES).folder,
    ]
    text_file.write_text(text_file.read_text().replace("0", "1"))
    others.append(prepare(config_for(tmp_path, text_file), BYTES).folder)
    assert len({first, *others}) == 5


def test_record_is_json_without_absolute_paths(tmp_path, text_file):
    """The record names sources, hashes, versions and sizes, and nothing of this machine."""
    config = config_for(tmp_path, text_file, "python-stdlib", tokenizer=str(tmp_path / "bytes"))
    record = prepare(config, BYTES, progress=False).record()
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    files, stdlib = record["sources"]
    assert files["source"] == "text.txt"
    assert stdlib["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(len(source["sha256"]) == 64 for source in record["sources"])
    assert record["tokenizer"]["name"] == "bytes"
    for split, totals in record["splits"].items():
        assert totals == {key: files["splits"][split][key] + stdlib["splits"][split][key] for key in totals}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": []}, "data.sources is empty: name at least one"),
        ({"block_size": 0}, "data.block_size is 0: it must be at least 1"),
        ({"validation_fraction": 1.0}, "data.validation_fraction is 1.0: it must be at least 0 and below 1"),
        ({"test_fraction": -0.1}, "data.test_fraction is -0.1"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on: lower them"),
        ({"sources": [Source(weight=-1.0)]}, r"data.sources\[0\]: weight of 'python-stdlib' is -1.0"),
        ({"sources": [Source(), Source(weight=1e-4)]}, r"data.sources: weight 0.0001 is below 1/1000 of the sum"),
    ],
)
def test_values_that_make_no_sense(fields, message):
    """A data section that cannot work is refused by field before anything is read."""
    with pytest.raises(DataError, match=message):
        prepare(DataConfig(**fields), BYTES)


def test_text_shorter_than_a_block(tmp_path):
    """One line with the sizes and the way out."""
    with pytest.raises(DataError, match=r"in' gives 4 training tokens, less than one block of 16: add text or lower"):
        TrainBlocks(prepared_from(tmp_path, "abc", **UNSPLIT), 0, 1)


def test_undecodable_text_leaves_nothing_behind(tmp_path):
    """A bad file in a folder is named with its byte, and no shard is written."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("text\n" * 99)
    (tmp_path / "in" / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"bad.txt is not UTF-8 text at byte 3: convert it"):
        prepare(config_for(tmp_path, tmp_path / "in"), BYTES)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_damaged_shards(tmp_path, text_file):
    """A short or missing shard or a damaged index is seen on opening, a flipped bit by verify, with what to do."""
    config = config_for(tmp_path, text_file)
    prepared = prepare(config, BYTES, progress=False)
    shard = prepared.folder / "train-0-00000.bin"
    content = shard.read_bytes()
    way_out = f"delete {prepared.folder} and prepare again"

    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{shard} has {len(content) - 1} bytes instead of {len(content)}: {way_out}"):
        prepare(config, BYTES)
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=f"{shard} is damaged: its content has changed .*: {way_out}"):
        prepare(config, BYTES).verify()
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard} is missing: {way_out}"):
        prepare(config, BYTES)
    index = prepared.folder / "index.json"
    whole = json.loads(index.read_text())
    no_totals = [{"splits": {**whole["sources"][0]["splits"], "test": {}}}]
    changes = ({"sources": 1}, {"sources": []}, {"sources": no_totals}, {"dtype": "none"}, {"tokenizer": {}})
    for damaged in ([], {}, "", {"dtype": whole["dtype"]}, *({**whole, **change} for change in changes)):
        index.write_text(json.dumps(damaged))
        with pytest.raises(DataError, match=f"{index} is damaged: {way_out}"):
            prepare(config, BYTES)
    index.unlink()
    prepare(config, BYTES, progress=False).verify()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_id_that_was_never_written(tmp_path, text_file, split):
    """A damaged shard of the right size is named when such an id is read, before a model looks the id up."""
    config = config_for(tmp_path, text_file)
    shard = prepare(config, BYTES, progress=False).folder / f"{split}-0-00000.bin"
    ids = np.fromfile(shard, np.uint16)
    ids[20] = 60_000
    ids.tofile(shard)
    prepared = prepare(config, BYTES)
    message = f"shard {shard} is damaged: it holds token id 60000, but none above 256 was written: delete"
    with pytest.raises(DataError, match=message):
        list(TrainBlocks(prepared, 0, 600) if split == "train" else EvalBlocks(prepared, split))


def test_ids_beyond_the_vocabulary(prepared):
    """A model that is too small for the ids is told the highest id and the size it needs."""
    prepared.check_vocab(259)
    message = r"a model with vocab_size 256 cannot take this data's token ids up to 257 .* at least 259"
    with pytest.raises(DataError, match=message):
        prepared.check_vocab(256)


def test_tokenizers_that_cannot_be_used(tmp_path, text_file):
    """One that cannot end a document or loses text is refused before anything is read or written."""
    no_end = PreTrainedTokenizerFast(tokenizer_object=BYTES.backend_tokenizer)
    lossy = byte_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.NFC()
    for tokenizer, message in (
        (no_end, "tokenizer 'bytes' has no eos_token to put between documents"),
        (lossy, r"changes text before reading it \(normalizer NFC\)"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(config_for(tmp_path, text_file), tokenizer)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(tmp_path, text_file):
    """An unusable cache folder is named with the field that moves it."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot prepare data under .*cache .*set data.cache_dir"):
        prepare(config_for(tmp_path, text_file), BYTES)


def test_bad_evaluation_requests(tmp_path, text_file):
    """An unknown split, an empty one and no blocks at all are errors."""
    prepared = prepare(config_for(tmp_path, text_file, test_fraction=0.0), BYTES, progress=False)
    for split, blocks, message in (
        ("valid", None, "split 'valid' does not exist: use one of train, validation, test"),
        ("test", None, "the test split is empty: raise data.test_fraction"),
        ("validation", 0, "on 0 blocks: set training.eval_blocks and training.final_eval_blocks to at least 1"),
    ):
        with pytest.raises(DataError, match=message):
            EvalBlocks(prepared, split, blocks)


@settings(deadline=None)
@given(weights=st.lists(st.floats(0.1, 20), min_size=1, max_size=5), start=st.integers(0, 10_000))
def test_mixture_is_exact_and_even(weights, start):
    """Any run of 1000 slots has each source's share to the nearest thousandth or so, and no stretch is far from it."""
    slots, ranks, counts = mixture_pattern(weights)
    shares = np.array(weights) / sum(weights)
    assert counts.sum() == 1000
    assert np.abs(counts - 1000 * shares).max() < 1
    for source in range(len(weights)):
        mine = slots == source
        assert ranks[mine].tolist() == list(range(counts[source]))
        seen = np.cumsum(mine)
        assert np.abs(seen - np.arange(1, 1001) * counts[source] / 1000).max() <= len(weights)


def test_an_epoch_visits_every_block_once(prepared):
    """Each pass over the text is a new order of the same blocks, and blocks tile the text."""
    stream = whole_stream(prepared)
    n = len(stream) // 16
    blocks = TrainBlocks(prepared, seed=3, num_blocks=2 * n)
    passes = [[tuple(blocks[i]["shift_labels"].tolist()) for i in range(e * n, e * n + n)] for e in (0, 1)]
    tiles = sorted(tuple(stream[i * 16 : i * 16 + 16]) for i in range(n))
    assert sorted(passes[0]) == sorted(passes[1]) == tiles
    assert passes[0] != passes[1]


def test_order_is_a_function_of_seed_and_index(prepared):
    """Length of the run, earlier reads and worker processes do not change what stands at an index; the seed does."""
    whole = TrainBlocks(prepared, seed=0, num_blocks=600)
    straight = [whole[i]["input_ids"] for i in range(600)]
    longer = TrainBlocks(prepared, seed=0, num_blocks=10**9)
    assert all(torch.equal(longer[i]["input_ids"], straight[i]) for i in (599, 3, 250))
    assert len(longer) == 10**9
    assert longer[10**9 - 1]["input_ids"].shape == (16,)
    loaded = DataLoader(whole, batch_size=100, num_workers=2)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in loaded]), torch.stack(straight))
    other = TrainBlocks(prepared, seed=1, num_blocks=600)
    assert sum(torch.equal(other[i]["input_ids"], straight[i]) for i in range(600)) < 30
    with pytest.raises(IndexError):
        whole[600]


def test_item_layout(prepared):
    """labels are the inputs, shift_labels the next tokens; the first block of a text follows a separator."""
    blocks = TrainBlocks(prepared, 0, 600)
    for item in (blocks[0], blocks[1], EvalBlocks(prepared, "validation")[0]):
        assert set(item) == {"input_ids", "labels", "shift_labels"}
        assert all(value.dtype == torch.int64 and value.shape == (16,) for value in item.values())
        assert torch.equal(item["labels"], item["input_ids"])
        assert torch.equal(item["shift_labels"][:-1], item["input_ids"][1:])
    first = next(item for item in blocks if item["shift_labels"][:6].tolist() == list(b"line 0"))
    assert first["input_ids"][0] == END


def test_mixture_takes_blocks_by_weight(tmp_path):
    """Two sources alternate by weight, each running through its own epochs."""
    for name, size in (("a", 300), ("b", 3000)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    sources = [Source(str(tmp_path / "a.txt"), weight=3.0), Source(str(tmp_path / "b.txt"))]
    prepared = prepare(config_for(tmp_path, *sources, **UNSPLIT), BYTES, progress=False)
    blocks = TrainBlocks(prepared, 0, 4000)
    places = [blocks.locate(i) for i in range(4000)]
    assert [sum(source == number for source, _ in places) for number in (0, 1)] == [3000, 1000]
    for number, n in ((0, 301 // 16), (1, 3001 // 16)):
        mine = [block for source, block in places if source == number]
        assert sorted(mine[:n]) == sorted(mine[n : 2 * n]) == list(range(n))
    texts = [blocks[i]["shift_labels"].tolist() for i in range(8)]
    assert all(set(text) <= {ord("ab"[source]), END} for text, (source, _) in zip(texts, places, strict=False))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3), block_size=st.integers(1, 20))
def test_evaluation_predicts_every_token_once(tmp_path_factory, sizes, block_size):
    """Over all blocks, shift_labels are the whole stream in order, each seen after the token before it."""
    folder = tmp_path_factory.mktemp("eval")
    lengths = [max(size, block_size) for size in sizes]
    texts = ["".join(chr(33 + (7 * i + n) % 90) for i in range(length)) for n, length in enumerate(lengths)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    paths = [folder / f"{number}.txt" for number in range(len(texts))]
    prepared = prepare(config_for(folder, *paths, block_size=block_size, **UNSPLIT), BYTES, progress=False)
    targets, previous = [], []
    for item in EvalBlocks(prepared, "train"):
        real = item["shift_labels"] != -100
        assert (real.int().diff() <= 0).all()
        assert (item["input_ids"][~real] == BYTES.pad_token_id).all()
        targets += item["shift_labels"][real].tolist()
        previous += item["input_ids"][real].tolist()
    expected = [[*text.encode(), END] for text in texts]
    assert targets == [token for ids in expected for token in ids]
    assert previous == [token for ids in expected for token in [END, *ids[:-1]]]


@both
def test_evaluation_bytes_are_the_recorded_bytes(tmp_path, text_file, tokenizer):
    """Byte lengths summed over all targets are the split's bytes, so bits per byte has an exact denominator."""
    prepared = prepare(config_for(tmp_path, text_file), tokenizer, progress=False)
    lengths = torch.from_numpy(token_byte_lengths(tokenizer))
    targets = torch.cat([item["shift_labels"] for item in EvalBlocks(prepared, "validation")])
    assert lengths[targets[targets != -100]].sum() == prepared.totals("validation")["bytes"]


def test_max_blocks_are_spread_and_fixed(prepared):
    """A smaller evaluation takes evenly spaced blocks of the whole, always the same ones, and never more than all."""
    everything = [item["input_ids"].tolist() for item in EvalBlocks(prepared, "validation")]
    some = [everything.index(item["input_ids"].tolist()) for item in EvalBlocks(prepared, "validation", 5)]
    assert some == [i * len(everything) // 5 for i in range(5)]
    assert len(EvalBlocks(prepared, "validation", 10**6)) == len(everything)
