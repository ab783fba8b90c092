"""The script that lets a model write: its text alone on stdout, whole characters, and one line for a mistake."""

import io
import itertools
import json
import runpy
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TextStreamer

from rezero_hf import (
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
)


# No byte in it comes twice, so that each has one successor.
SONG = "é日 🙂\ną"


class Piped(io.TextIOWrapper):
    def __init__(self, data):
        super().__init__(io.BytesIO(data))


@pytest.fixture
def generate(monkeypatch, capsys):
    """Runs the script as the command line does, with that piped in; gives its exit status, output and errors."""

    def run(*arguments, piped=b""):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Piped(piped))
        with pytest.raises(SystemExit) as exit:
            runpy.run_path("scripts/generate.py", run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def singer(tokenizer, tmp_path):
    """A model that writes SONG: gates at 0, so that each byte alone decides the next."""
    eos = tokenizer.eos_token_id
    ids = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    words = {"hidden_size": 260, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": False}
    model = ReZeroForCausalLM(ReZeroConfig(vocab_size=259, **words, **ids))
    order = [eos, *SONG.encode(), eos]
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(259, 260))
        model.get_output_embeddings().weight.zero_()
        for one, after in itertools.pairwise(order):
            model.get_output_embeddings().weight[after, one] = 100
    model.save_pretrained(tmp_path / "singer")
    tokenizer.save_pretrained(tmp_path / "singer")
    return tmp_path / "singer"


def test_text_comes_whole_and_alone(singer, generate):
    """Characters of two, three and four bytes, from an argument, a pipe or no prompt, greedy or drawn with a seed."""
    assert len(set(SONG.encode())) == len(SONG.encode())
    assert generate(singer, "é", "--temperature", 0)[:2] == (0, SONG + "\n")
    assert generate(singer, piped="é".encode())[:2] == (0, SONG + "\n")
    assert generate(singer, "-", "--seed", 1, "--top-p", 0.9, piped="é日".encode())[:2] == (0, SONG + "\n")
    status, said, error = generate(singer, "")
    assert (status, said) == (0, SONG + "\n")
    assert "no prompt: it begins a text of its own, after <|endoftext|>" in error
    assert generate(singer, "é", "--max-new-tokens", 4)[1] == "é日 \n"


def test_text_arrives_while_it_is_made(singer, generate, monkeypatch, capsys):
    seen, end = [], TextStreamer.end

    def at_the_end(streamer):
        seen.append(capsys.readouterr().out)
        end(streamer)

    monkeypatch.setattr(TextStreamer, "end", at_the_end)
    assert generate(singer, "é")[0] == 0
    assert seen == ["é日 🙂\n"]


def test_what_is_drawn(tiny_model, tokenizer, tmp_path, generate):
    """A seed is a text, 0 degrees and the smallest share are the most likely tokens."""
    model = tiny_model(initializer_range=0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[97]])
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    words = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    likely = tokenizer.decode(ids[0], **words) + "\n"

    def text(*options):
        return generate(tmp_path, "a", "--max-new-tokens", 12, *options)[1]

    assert text("--temperature", 0) == text("--seed", 1, "--top-p", 1e-6) == likely
    assert text("--seed", 1) == text("--seed", 1) not in (likely, text("--seed", 2))


def test_a_prompt_is_text_and_one_text_comes(singer, generate):
    """The name of a special token is its characters; a beam search that the folder asks for could not be streamed."""
    (singer / "generation_config.json").write_text(json.dumps({"num_beams": 4, "eos_token_id": 256}))
    assert generate(singer, "<|endoftext|>é")[:2] == (0, f"<|endoftext|>{SONG}\n")


def test_ctrl_c_ends_it_with_what_there_is(singer, generate, monkeypatch):
    calls, put = [], TextStreamer.put

    def interrupted(streamer, value):
        calls.append(value)
        if len(calls) > 5:
            raise KeyboardInterrupt
        put(streamer, value)

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    status, said, error = generate(singer, "é")
    assert (status, said) == (130, "é日 \n")
    assert "Traceback" not in error


def test_learned_positions_are_the_limit(tmp_path, tokenizer, generate):
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1, n_positions=8)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    status, _, error = generate(tmp_path, "12345")
    assert status == 0 and "3 tokens at most: it has positions for 8, prompt included" in error
    status, _, error = generate(tmp_path, "12345678")
    assert status == 2 and "the prompt's 8 tokens fill its 8 positions; shorten the prompt" in error


def test_a_users_mistake_is_one_line(singer, tmp_path, tiny_model, tokenizer, generate):
    tiny_model(ReZeroForMaskedLM).save_pretrained(tmp_path / "masked")
    tiny_model(ReZeroForSequenceClassification).save_pretrained(tmp_path / "classes")
    tokenizer.save_pretrained(tmp_path / "classes")
    tiny_model().save_pretrained(tmp_path / "mute")
    ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=4, hidden_size=8)).save_pretrained(tmp_path / "mlp")
    for words, message in [
        ((tmp_path / "none", "a"), "none: there is no such folder"),
        ((tmp_path / "mute" / "config.json", "a"), "config.json is a file; name the folder"),
        ((tmp_path / "mute", "a"), "mute holds no tokenizer"),
        ((tmp_path / "masked", "a"), "masked holds ReZeroForMaskedLM, which is neither"),
        ((tmp_path / "mlp", "a"), "mlp holds ReZeroMLPForImageClassification, which reads images"),
        ((tmp_path / "classes", "a"), "classes holds ReZeroForSequenceClassification, which names classes"),
        ((singer, "a", "--temperature", -1), "--temperature -1.0: must be a finite number, 0 or more"),
        ((singer, "a", "--top-p", 0), "--top-p 0.0: must be above 0 and at most 1"),
    ]:
        status, said, error = generate(*words)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert (status, said) == (2, "") and len(lines) == 1 and message in lines[0], (words, error)
    for words, piped in (((singer,), b"\xff"), ((singer, "\udcff"), b"")):
        status, _, error = generate(*words, piped=piped)
        assert status == 2 and "the prompt is not UTF-8 text" in error


def test_logits_that_are_no_numbers(singer, tiny_model, tokenizer, tmp_path, generate):
    """Of a diverged model, drawn or not, and by a temperature that is almost 0: one line."""
    broken = tiny_model()
    torch.nn.init.constant_(broken.get_output_embeddings().weight, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    for model, temperature in ((tmp_path / "broken", 0), (tmp_path / "broken", 1), (singer, 1e-45)):
        status, _, error = generate(model, "é", "--temperature", temperature)
        assert status == 2 and "the model's logits are not finite" in error and "Traceback" not in error
