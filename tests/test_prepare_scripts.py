"""The commands that come before training: what they print, what they write, and one line for a mistake."""

import re
import runpy
import signal
import sys
from pathlib import Path

import pytest

from rezero_hf.tokenization import load_tokenizer


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script as the command line does; gives its exit status, output and errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(f"scripts/{name}", run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return run


def is_one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1


def test_data_from_a_source_or_a_recipe(tmp_path, text_file, script):
    """Both print the same sizes and folder, the one that does the work its speed, and --verify says all is well."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data:\n  sources: [{text_file}]\n  cache_dir: {tmp_path / 'cache'}\n")
    status, said, progress = script("prepare_data.py", "--source", text_file, "--cache-dir", tmp_path / "cache")
    assert status == 0
    from_source, speed = said.split("tokenized ")
    assert re.fullmatch(r"0\.0 MB of text in \d+\.\d s, \d+\.\d MB/s\n", speed)
    assert progress.startswith(f"tokenizing text.txt into {tmp_path / 'cache'}")
    assert "train " in from_source
    assert f"shards in {tmp_path / 'cache'}" in from_source
    assert script("prepare_data.py", recipe, "data.block_size=32") == (0, from_source, "")
    assert script("prepare_data.py", recipe, "--verify")[:2] == (0, from_source + "every shard is as it was written\n")


def test_data_interrupted(tmp_path, text_file, script, monkeypatch):
    """Ctrl-C ends with one line and the shell's status for it, and the same command does the work."""
    command = ("prepare_data.py", "--source", text_file, "--cache-dir", tmp_path / "cache")

    def interrupted(*args):
        # As Python does it on Ctrl-C, also where this suite itself runs in the background, which Ctrl-C does not reach.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    with monkeypatch.context() as patch:
        patch.setattr("rezero_hf.corpora.read_pieces", interrupted)
        status, said, error = script(*command)
    assert (status, said) == (130, "")
    assert error.splitlines()[1:] == [
        "interrupted: the same command goes on; it reads text again, but tokenizes half a minute of it at most"
    ]
    assert script(*command)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a recipe or at least one --source, and not both"),
        (("recipe.yaml", "--source", "a.txt"), "name a recipe or at least one --source, and not both"),
        (
            ("recipe.yaml", "--tokenizer", "bytes"),
            "--tokenizer goes with --source; beside a recipe write data.tokenizer=b",
        ),
        (
            ("recipe.yaml", "--block-size", "8"),
            "--block-size goes with --source; beside a recipe write data.block_size=8",
        ),
        (("recipe.yaml", "--cache-dir", "x"), "--cache-dir goes with --source; beside a recipe write data.cache_dir=x"),
        (("--source", "no/such.txt"), "data.sources: 'no/such.txt' is no file"),
    ],
)
def test_data_arguments_that_do_not_go_together(tmp_path, script, arguments, message):
    """Nothing that was typed is ignored: it works or it is one line and status 2."""
    if "--source" in arguments:
        arguments += ("--cache-dir", tmp_path / "cache")
    status, _, error = script("prepare_data.py", *arguments)
    assert status == 2
    assert is_one_line(error)
    assert message in error


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read, as Linux has")
def test_data_from_a_file_that_cannot_be_read(tmp_path, script):
    """The file is named with the cause, not the cache folder."""
    status, _, error = script("prepare_data.py", "--source", "/proc/self/mem", "--cache-dir", tmp_path / "cache")
    assert status == 2
    assert is_one_line(error)
    assert error.startswith("error: data.sources: /proc/self/mem cannot be read ([Errno 5] Input/output error): check")


def test_tokenizer(tmp_path, script):
    """The script writes a folder that load_tokenizer takes, trained on the training part only."""
    text = tmp_path / "text.txt"
    text.write_text("common words here\n" * 2000 + "zyzzyva " * 100)
    output = tmp_path / "out"
    arguments = ("--source", text, "--vocab-size", 280, "--output", output, "--cache-dir", tmp_path / "cache")
    status, said, _ = script("train_tokenizer.py", *arguments)
    tokenizer = load_tokenizer(str(output))
    assert status == 0
    assert f"{len(tokenizer)} ids in {output}" in said
    assert len(tokenizer("common").input_ids) < 6
    assert len(tokenizer("zyzzyva").input_ids) == 7


@pytest.mark.parametrize("place", ["a file", "/proc/x", "/proc"])
def test_tokenizer_that_has_no_place(tmp_path, text_file, script, monkeypatch, place):
    """An output that cannot be written is one line, before anything is trained."""
    output = text_file if place == "a file" else place
    monkeypatch.setattr("rezero_hf.tokenization.train_bpe", lambda *args: pytest.fail("trained for nothing"))
    arguments = ("--source", text_file, "--output", output, "--cache-dir", tmp_path / "cache")
    status, said, error = script("train_tokenizer.py", *arguments)
    assert (status, said) == (2, "")
    assert is_one_line(error)
    assert error.startswith(f"error: cannot write into {output} (")
    assert error.endswith("name another folder with --output\n")


def test_tokenizer_with_a_cache_that_cannot_be_written(tmp_path, text_file, script):
    """Remembering hashes only saves time, so a place where that fails does not stop the training."""
    arguments = ("--source", text_file, "--vocab-size", 260, "--output", tmp_path / "out", "--cache-dir", text_file)
    assert script("train_tokenizer.py", *arguments)[0] == 0
