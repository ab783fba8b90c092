"""The README tells the truth: its snippets run, its paths exist, and no module is missing from its tree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, byte_tokenizer


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TREE = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL).group(1)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that holds a small `runs/quickstart/model`, as after `make pretrain`."""
    folder = tmp_path_factory.mktemp("workplace")
    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, gate_init=0.5, **ids)
    ReZeroForCausalLM(config).save_pretrained(folder / "runs" / "quickstart" / "model")
    tokenizer.save_pretrained(folder / "runs" / "quickstart" / "model")
    return folder


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_as_printed(workplace, number):
    """Each in a process of its own; those that do not import the package run where it cannot be imported."""
    code = SNIPPETS[number]
    if "rezero_hf" not in code:
        code = "import sys; sys.modules['rezero_hf'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"


def test_every_module_and_script_is_in_the_tree_and_every_file_of_the_tree_exists():
    named = set(re.findall(r"[\w.-]+\.(?:py|md|yaml)\b", TREE))
    package = {path.name for path in (ROOT / "rezero_hf").rglob("*") if path.suffix in (".py", ".md")}
    scripts = {path.name for path in (ROOT / "scripts").rglob("*") if path.suffix in (".py", ".yaml")}
    assert package | scripts <= named
    guides = {path.name for path in (ROOT / "docs").iterdir()}
    assert named - package - scripts == guides | {"CONTRIBUTING.md"}


def test_every_path_and_make_target_it_names_exists():
    for path in re.findall(r"(?:scripts|rezero_hf|tests|docs|model_cards)/[\w./-]+\.\w+", README):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
