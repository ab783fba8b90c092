"""Both tokenizers are lossless, plain Transformers objects, and their bytes can be counted."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rezero_hf.sources import DataError
from rezero_hf.tokenization import (
    SPECIAL_TOKENS,
    byte_tokenizer,
    is_byte_tokenizer,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_fingerprint,
    train_bpe,
)


BYTES = byte_tokenizer()
BPE = train_bpe(["def add(a, b):\n    return a + b\n", "naïve café 漢字 漢字 漢字 🙂🙂🙂\r\n"] * 4, 300)
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
awkward = [
    "",
    " ",
    "  a  ",
    "\r\n\r",
    "\0",
    "e\u0301",
    "👩‍👩‍👧",
    "\ufeff",
    "a <|endoftext|> b",
    "<|pad|><|mask|>",
    "Ġ▁\u0120",
]


def with_awkward(test):
    for text in awkward:
        test = example(text=text)(test)
    return test


@both
@with_awkward
@settings(deadline=None)
@given(text=st.text())
def test_round_trip(tokenizer, text):
    """decode(encode(x)) == x for any text, with specials read as specials and as plain characters."""
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True).input_ids) == text


@with_awkward
@settings(deadline=None)
@given(text=st.text())
def test_byte_ids_are_byte_values(text):
    """Without specials the ids of the byte tokenizer are the UTF-8 bytes, which is what the packer writes directly."""
    assert BYTES(text, split_special_tokens=True).input_ids == list(text.encode())


def test_literal_specials_become_the_special_unless_split():
    """`<|endoftext|>` in text is the special in a normal call, and its 13 characters with split_special_tokens."""
    assert BYTES("a<|endoftext|>").input_ids == [97, BYTES.eos_token_id]
    assert len(BYTES("<|endoftext|>", split_special_tokens=True).input_ids) == 13


@both
def test_specials(tokenizer):
    """End of text is beginning, end and separator; pad and mask have ids of their own; nothing is added to a text."""
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(tokenizer) - 3, len(tokenizer)))
    assert tokenizer.decode(tokenizer("a<|mask|>b").input_ids, skip_special_tokens=True) == "ab"
    assert len(BYTES) == 259


@both
def test_batches_pad_left_and_carry_only_what_a_causal_model_takes(tokenizer):
    """A padded batch ends every prompt at the last position and has no token types."""
    batch = tokenizer(["a", "abc"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id


@both
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    """AutoTokenizer gives back an equal tokenizer without any code of ours, and so does a second save."""
    tokenizer.save_pretrained(tmp_path / "one")
    once = AutoTokenizer.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    for loaded in (once, load_tokenizer(str(tmp_path / "two"))):
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert (loaded.padding_side, loaded.clean_up_tokenization_spaces) == ("left", False)
        assert all(loaded.decode(loaded(text).input_ids) == text for text in awkward)
        assert is_byte_tokenizer(loaded) == (tokenizer is BYTES)
    assert not list((tmp_path / "one").glob("*.py"))


@both
@with_awkward
@settings(deadline=None)
@given(text=st.text())
def test_byte_lengths_add_up(tokenizer, text):
    """The byte lengths of a text's ids sum to the text's bytes, whatever characters the tokens cut."""
    lengths = token_byte_lengths(tokenizer)
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert lengths[np.array(ids, dtype=int)].sum() == len(text.encode())
    assert len(lengths) == len(tokenizer)
    assert not lengths[tokenizer.all_special_ids].any()


def changed(part, value):
    tokenizer = byte_tokenizer()
    setattr(tokenizer.backend_tokenizer, part, value)
    return tokenizer


def with_added(**settings):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(AddedToken("word", special=False, **settings))
    return tokenizer


def without_the_byte(byte):
    state = json.loads(BYTES.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: index for token, index in state["model"]["vocab"].items() if index != byte}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def word_level():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (word_level(), "is not byte-level"),
        (changed("normalizer", normalizers.NFC()), "changes text before reading it (normalizer NFC)"),
        (
            changed("normalizer", normalizers.Sequence([normalizers.Lowercase(), normalizers.NFKC()])),
            "changes text before reading it (normalizer Lowercase, NFKC)",
        ),
        (changed("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "puts a space before a text"),
        (
            changed("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte_level])),
            "does not give back every text",
        ),
        (with_added(lstrip=True), "has added tokens that swallow the spaces beside them (word)"),
        (without_the_byte(0xF3), "does not give back every text"),
    ],
    ids=["word-level", "NFC", "normalizers", "prefix-space", "split", "added", "missing-byte"],
)
def test_tokenizers_that_lose_text_are_refused(tokenizer, message, tmp_path):
    """Where bytes of the text are behind no id, bits per byte would be wrong: one line, also when it is loaded."""
    for refuse in (lambda: token_byte_lengths(tokenizer), lambda: load_tokenizer(str(tmp_path))):
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(DataError, match=re.escape(message)) as error:
            refuse()
        assert 'bits per byte are not defined: use "bytes", a folder written by scripts/train_tok' in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_added(),
        changed("normalizer", normalizers.Sequence([])),
        changed("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level])),
    ],
    ids=["added", "no-normalizers", "split"],
)
def test_lossless_tokenizers_of_other_makes_are_taken(tokenizer):
    """What splits text or adds words without changing it has byte lengths that add up."""
    text = "3 words and a word"
    assert token_byte_lengths(tokenizer)[tokenizer(text).input_ids].sum() == len(text)


def test_a_tokenizer_in_the_home_folder(tmp_path, monkeypatch):
    """`~` in a path means what it means for sources."""
    monkeypatch.setenv("HOME", str(tmp_path))
    BPE.save_pretrained(tmp_path / "mine")
    assert tokenizer_fingerprint(load_tokenizer("~/mine")) == tokenizer_fingerprint(BPE)


def test_bpe_merges_and_keeps_to_the_size():
    """Training merges what is frequent, within the size asked for."""
    assert len(BPE) <= 300
    assert len(BPE("return").input_ids) < 6


def test_bpe_smaller_than_the_bytes_is_refused():
    """A vocabulary without room for the bytes and the specials is an error."""
    with pytest.raises(DataError, match="vocab_size 258 is too small: the 256 bytes and 3 specials need 259"):
        train_bpe(["a"], 258)


def test_fingerprint_ignores_padding_and_truncation():
    """Settings of a call do not change what a tokenizer is; other merges do."""
    tokenizer = byte_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(BYTES) != tokenizer_fingerprint(BPE)


def test_load_tokenizer(tmp_path):
    """`bytes` is built in; a folder without a tokenizer and a path that is not there say so."""
    assert is_byte_tokenizer(load_tokenizer("bytes"))
    (tmp_path / "empty").mkdir()
    for path, where in ((tmp_path / "empty", "this folder"), (tmp_path / "missing", "a folder or a Hub id")):
        with pytest.raises(
            DataError, match=f"^tokenizer '{path}' cannot be loaded from {where} .*: use \"bytes\""
        ) as e:
            load_tokenizer(str(path))
        assert "\n" not in str(e.value)
