"""The script that shows a network's signal: what it prints and writes, and one line for a mistake."""

import json
import runpy
import sys

import pytest

from rezero_hf import ReZeroMLPConfig, ReZeroMLPForImageClassification, byte_tokenizer


@pytest.fixture
def inspect_signal(monkeypatch, capsys):
    """Runs the script as the command line does; gives its exit status, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_signal.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path("scripts/inspect_signal.py", run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return run


def test_the_script_on_a_recipe(tmp_path, inspect_signal):
    """A recipe's model before training, with overrides: a line a layer, the whole record and a picture."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {hidden_size: 8, num_attention_heads: 2, num_hidden_layers: 3}\ntraining: {seed: 1}\n")
    output, figure = tmp_path / "record.json", tmp_path / "norms.png"
    words = ("--output", output, "--figure", figure, "--inputs", "2")
    status, said, _ = inspect_signal(recipe, *words)
    assert status == 0
    assert len(said.splitlines()) == 1 + 4 + 1
    assert "Jacobian: 1 (from 1 over 1 to 1; share below 1e-8: 0)" in said
    assert json.loads(output.read_text())["jacobian"]["chi"] == 1
    assert figure.exists()
    status, said, _ = inspect_signal(recipe, "model.residual=post_norm", "--inputs", "2")
    assert status == 0
    assert "to 1; share below 1e-8: 0)" not in said


def test_the_script_on_checkpoints(tmp_path, inspect_signal, tiny_model):
    """A language model with its tokenizer and an image model, and one line for what is neither."""
    tiny_model().save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=4, hidden_size=8)).save_pretrained(tmp_path / "mlp")
    for name in ("lm", "mlp"):
        status, said, _ = inspect_signal(tmp_path / name)
        assert status == 0, name
        assert "mean squared singular value" in said and "share below" in said
        _, said, _ = inspect_signal(tmp_path / name, "--max-size", "4")
        assert "(estimated)" in said and "share below" not in said
    for arguments in ((tmp_path / "nothing",), (tmp_path / "mlp", "model.hidden_size=3")):
        status, _, error = inspect_signal(*arguments)
        assert status == 2
        assert error.splitlines()[-1].startswith("error: ")


def test_what_cannot_be_read_or_written_is_one_line_before_anything_is_printed(tmp_path, inspect_signal, tiny_model):
    model = tmp_path / "lm"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for words in (
        ("--text", tmp_path / "none.txt"),
        ("--text", tmp_path / "bytes.txt"),
        ("--output", tmp_path),
        ("--output", tmp_path / "bytes.txt" / "x.json"),
        ("--figure", tmp_path / "figure.xyz"),
    ):
        status, said, error = inspect_signal(model, *words)
        assert (status, said) == (2, "") and error.splitlines()[-1].startswith("error: "), words
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    status, said, error = inspect_signal(model)
    assert (status, said) == (2, "") and "error: " in error.splitlines()[-1]
