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

from .sources import DataError


END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MASK = "<|mask|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, MASK)


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
    """`"bytes"` for the byte tokenizer, otherwise a folder or a Hub id, as `AutoTokenizer` takes it.

    Raises:
        DataError: nothing loadable is there, or what is there has no fast (Rust) backend.
    """
    if name_or_path == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    # AutoTokenizer raises OSError, ValueError, KeyError and Hub errors for what is one thing to a user: it is not
    # there.
    except Exception as error:
        where = "this folder" if os.path.isdir(name_or_path) else "a folder or a Hub id"
        raise DataError(
            f'tokenizer {name_or_path!r} cannot be loaded from {where} ({_first_line(error)}): use "bytes", a folder '
            "written by scripts/train_tokenizer.py or save_pretrained, or the id of a Hub repository with a tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name_or_path!r} has no fast backend: convert it to a tokenizer.json first")
    return tokenizer


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bytes of text that each id stands for, as int64 of shape (highest id + 1,); 0 for specials and unused ids.

    Exact for byte-level tokenizers, where every character of a token's name is one byte, including tokens that are
    only a part of a UTF-8 character.

    Raises:
        DataError: the tokenizer is not byte-level, so a token's text depends on its neighbours.
    """
    if not _is_byte_level(tokenizer):
        raise DataError(
            f"{type(tokenizer).__name__} is not a byte-level tokenizer, so the bytes of one id are not defined: use "
            "the byte counts that the prepared data records per split"
        )
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


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if part)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
