"""Text to ids without losing a byte.

Two tokenizers, both plain `PreTrainedTokenizerFast` objects, so a checkpoint that carries one needs no code of ours:
the 256 bytes themselves (the default, and the fair choice for small corpora), and byte-level BPE trained on any text.
Both share three named specials and both give back exactly the text that went in. Results are reported in bits per
byte, so the two compare; `token_byte_lengths` supplies the denominator.

Text that happens to contain a special's name, such as `<|endoftext|>`, is read as that special by a normal call, as
everywhere in Transformers, and still decodes to the same text. Pass `split_special_tokens=True` to get its characters
instead; the packer in `shards.py` always does, so a document can never forge its own end.
"""

import hashlib
import json
import os
from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .sources import DataError, explained


END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MASK = "<|mask|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, MASK)
_WAY_OUT = 'use "bytes", a folder written by scripts/train_tokenizer.py'
# What `check_tokenizer` has given back: no space in front, all one- and two-byte characters and thereby every byte that
# continues one, every byte that begins a longer one, spaces of all kinds, and what normalizers put together or take
# apart.
_PROBE = "".join(map(chr, range(1, 0x800))) + (
    "\0\u0800\u1000\u2000\u3000\u4000\u5000\u6000\u7000\u8000\u9000\ua000\ub000\uc000\ud000\ue000\uf000"
    "\U00010000\U00040000\U00080000\U000c0000\U00100000  a \r\n\n\t e\u0301 \u212b \ufb01 \uff21 `` '' n't . , \ufeff "
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The 256 bytes as ids 0 to 255 (id = byte value), then `<|endoftext|>`, `<|pad|>` and `<|mask|>`: 259 ids.

    `<|endoftext|>` is beginning, end and separator at once: a stream of documents needs only one mark between them.
    Padding goes to the left because the only place that pads is batched generation, where the prompt must end at the
    last position; packed training blocks have no padding. `model_max_length` is left to the caller, who knows the
    model.
    """
    alphabet = _byte_alphabet()
    backend = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finish(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the same three specials, which take the last three ids.

    Args:
        texts: documents or pieces of documents; read once, as a stream.
        vocab_size: number of ids including the 256 bytes and the 3 specials. Fewer come out when the text has too few
            different pairs to merge; `len(tokenizer)` tells.

    Raises:
        DataError: `vocab_size` leaves no room for the bytes and the specials.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size {vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} specials need {smallest}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finish(backend)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """`"bytes"` for the byte tokenizer, otherwise a folder (`~` is expanded) or a Hub id, as `AutoTokenizer` takes it.

    Raises:
        DataError: nothing loadable is there, or `check_tokenizer` refuses what is.
    """
    if name_or_path == "bytes":
        return byte_tokenizer()
    path = os.path.expanduser(name_or_path)
    where = "this folder" if os.path.isdir(path) else "a folder or a Hub id"
    with explained(
        f"tokenizer {name_or_path!r} cannot be loaded from {where}",
        f"{_WAY_OUT} or save_pretrained, or the id of a Hub repository with a tokenizer",
        # AutoTokenizer raises OSError, ValueError, KeyError and Hub errors for what is one thing to a user: it is not
        # there.
        kinds=Exception,
    ):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not give back exactly the text that went in.

    Bits per byte count the bytes behind each id. They are defined only where every byte of the text is behind one id,
    which takes a byte-level tokenizer that neither rewrites its text nor adds to it or leaves parts out.

    Raises:
        DataError: there is no fast (Rust) backend, or text is changed.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name!r} has no fast backend: convert it to a tokenizer.json first")
    if reason := _what_is_lost(tokenizer):
        raise DataError(
            f"tokenizer {name!r} {reason}, so bits per byte are not defined: {_WAY_OUT}, or another lossless "
            "byte-level tokenizer"
        )


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bytes of text that each id stands for, as int64 of shape (highest id + 1,); 0 for specials and unused ids.

    Exact for byte-level tokenizers, where every character of a token's name is one byte, including tokens that are
    only a part of a UTF-8 character.

    Raises:
        DataError: `check_tokenizer` refuses the tokenizer.
    """
    check_tokenizer(tokenizer)
    vocab = tokenizer.get_vocab()
    lengths = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    added = tokenizer.added_tokens_decoder
    for token, index in vocab.items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        else:
            lengths[index] = len(token)
    return lengths


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides which ids a text becomes; padding and truncation settings are left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    state["separator"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ids are byte values, so that encoding is a view of the bytes."""
    return tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(byte_tokenizer())


def _finish(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Decoder, specials and Transformers' wrapper, alike for both tokenizers."""
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=MASK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte: itself, or a stand-in above U+00FF."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def _what_is_lost(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What stands between this tokenizer and a lossless byte-level one."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not any(part["type"] == "ByteLevel" for part in _parts(state["decoder"], "decoders")):
        return "is not byte-level"
    # The byte-level normalizer only writes bytes as characters, as the pre-tokenizer of that name does.
    normalizers = {part["type"] for part in _parts(state["normalizer"], "normalizers")} - {"ByteLevel"}
    if normalizers:
        return f"changes text before reading it (normalizer {', '.join(sorted(normalizers))})"
    if any(part.get("add_prefix_space") for part in _parts(state["pre_tokenizer"], "pretokenizers")):
        return "puts a space before a text (add_prefix_space)"
    # Specials may: the packer reads their names as plain text.
    ordinary = [token for token in state["added_tokens"] if not token["special"]]
    if greedy := [token["content"] for token in ordinary if token["lstrip"] or token["rstrip"]]:
        return f"has added tokens that swallow the spaces beside them ({', '.join(greedy)})"
    ids = tokenizer.backend_tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) != _PROBE:
        return "does not give back every text"
    return None


def _parts(component: dict | None, members: str) -> list[dict]:
    """The parts of a normalizer, pre-tokenizer or decoder, which may be none, one or a nested sequence."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for member in component[members] for part in _parts(member, members)]
