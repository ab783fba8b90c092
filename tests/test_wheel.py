"""The wheel is all that a user needs: built, installed in a fresh environment, and used there, far from this repository.

Third-party packages are those of the environment that runs the tests. `make test-wheel` runs this; the suite does not,
because building a wheel fetches setuptools.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest


pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[1]
WITH = """
import json, sys
from pathlib import Path
import rezero_hf, torch
from rezero_hf.publishing import Repository, push_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
assert Path(rezero_hf.__file__).is_relative_to(sys.prefix), rezero_hf.__file__

torch.manual_seed(0)
config = rezero_hf.ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, gate_init=0.5)
rezero_hf.export_folder(rezero_hf.ReZeroForCausalLM(config), rezero_hf.byte_tokenizer(), "published")

model = AutoModelForCausalLM.from_pretrained("published")
tokenizer = AutoTokenizer.from_pretrained("published")
rows = [{"input_ids": ids, "labels": ids} for ids in [tokenizer("def double(x):").input_ids] * 8]
trainer = Trainer(model, TrainingArguments("out", max_steps=2, save_strategy="no", use_cpu=True), train_dataset=rows)
before = model.lm_head.weight.clone()
trainer.train()
assert not torch.equal(model.lm_head.weight, before)
rezero_hf.export_folder(model, tokenizer, "tuned")
commit = push_folder(Path("tuned"), Repository("me/tuned"), "Publish").commit
again = AutoModelForCausalLM.from_pretrained("me/tuned", revision=commit)
assert type(again) is rezero_hf.ReZeroForCausalLM
ids = tokenizer("class Stack:", return_tensors="pt").input_ids
with torch.no_grad():
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)
    print(json.dumps([commit, again(ids).logits.tolist()]))
"""
WITHOUT = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("rezero_hf") is None

commit, expected = json.loads(sys.argv[1])
for name, words in (("tuned", {}), ("me/tuned", {"revision": commit})):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **words).eval()
    ids = AutoTokenizer.from_pretrained(name, **words)("class Stack:", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, torch.tensor(expected), rtol=0, atol=0)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools takes what an earlier build left in the tree for a part of it."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "rezero_hf", folder / "source" / "rezero_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder / "source"]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def environment(folder, wheel=None):
    """Python of a fresh virtual environment that sees the third-party packages of this one, and of ours the wheel alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    # A plain path: what makes this checkout importable is another `.pth` in there, which is not followed.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if wheel:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages]
        subprocess.run([*install, wheel], check=True)
    return python


def test_a_wheel_has_everything_that_the_package_reads_and_nothing_else(wheel):
    """The card's template, the code that goes into checkpoints, and the mark that types are declared."""
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"rezero_hf/card_template.md", "rezero_hf/models/modeling_rezero.py", "rezero_hf/py.typed"} <= files
    source = [path for path in (ROOT / "rezero_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert files == {path.relative_to(ROOT).as_posix() for path in source}


def test_a_model_is_published_tuned_pushed_and_loaded_with_the_wheel_and_without(wheel, hub, tmp_path):
    """Without any file of this repository; without the wheel, by the code in the folder and by that on the Hub."""
    tmp_path = tmp_path.resolve()
    ours = ("PYTHON", "HF_", "TRANSFORMERS_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    def run(python, code, *words):
        script = tmp_path / f"{python.parents[1].name}.py"
        script.write_text(textwrap.dedent(code))
        online = hub.environment(tmp_path / f"home_{script.stem}")
        command = [python, "-P", script, *words]
        done = subprocess.run(command, cwd=tmp_path, env=clean | online, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = run(environment(tmp_path / "with", wheel), WITH).splitlines()[-1]
    run(environment(tmp_path / "without"), WITHOUT, said)
    published = hub.commits("me/tuned")[-1]
    assert published.sha == json.loads(said)[0]
    assert {"README.md", "modeling_rezero.py", "model.safetensors", "tokenizer.json"} <= published.files.keys()
