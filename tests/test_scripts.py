"""The commands as a user types them: every recipe runs small, and a mistake is one line, not a traceback."""

import json
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import transformers
import yaml
from processes import run_script

from rezero_hf import ReZeroForSequenceClassification, export_folder, load_recipe, verify_folder
from rezero_hf.runs import read_metrics


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
# One run each; those of studies are in `test_experiments.py`.
RUNS = [path for path in RECIPES if "\nstudy:" not in path.read_text()]


def launch(*arguments, cwd=ROOT):
    """One process without a launcher; `test_launching.py` has those."""
    return run_script(ROOT / "scripts" / "pretrain.py", *arguments, cwd=cwd)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} says {n * n}\n" for n in range(600)))
    return [f"data.sources={path}", f"data.cache_dir={tmp_path / 'cache'}"]


def test_there_are_recipes():
    assert "quickstart" in {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_opens_with_claim_command_cost_and_expected_number(recipe):
    head = recipe.read_text().partition("\nmodel:")[0]
    for word in ("Claim", "Command", "Cost", "Expected"):
        assert f"# {word}" in head, f"{recipe.name} does not say its {word}"


@pytest.mark.parametrize("recipe", RUNS, ids=lambda recipe: recipe.stem)
def test_a_recipe_runs_small_from_the_command_line(recipe, corpus, tmp_path):
    """One command gives a run folder with everything recorded, and a folder that verifies as publishable."""
    output = tmp_path / "run"
    done = launch(recipe, "--smoke", "--output", output, *corpus)
    assert done.returncode == 0, done.stderr[-3000:]
    verify_folder(output / "model")
    assert load_recipe(output / "recipe.yaml").name == load_recipe(recipe).name
    record = json.loads((output / "run.json").read_text())
    assert {"command", "started", "finished", "versions", "git", "device", "data", "parameters"} <= set(record)
    for split in ("validation", "test"):
        assert 0 < record["results"][split]["bits_per_byte"] < 20
        assert f"{split}: {record['results'][split]['bits_per_byte']:.3f} bits per byte" in done.stdout
    metrics = read_metrics(output / "metrics.jsonl")
    assert {row["event"] for row in metrics} == {"train", "eval", "save"}
    for figure in ("loss", "gates"):
        assert (output / "model" / "figures" / f"{figure}.png").stat().st_size > 5000
    assert "continued by the model" in done.stdout


def test_the_printed_next_commands_run(corpus, tmp_path):
    """What a finished run tells the user to type works as it stands, in a shell that knows nothing of the environment."""
    done = launch(ROOT / "scripts" / "recipes" / "quickstart.yaml", "--smoke", *corpus, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    promised = done.stdout.partition("Next:")[2]
    commands = [re.search(rf"  {name} +(.*)", promised).group(1) for name in ("write text", "train longer", "publish")]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}

    def shell(command):
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(command, shell=True, check=False, **options)

    text = shell(commands[0])
    assert text.returncode == 0 and text.stdout.startswith("class "), text.stderr[-3000:]
    longer = shell(commands[1])
    assert longer.returncode == 0 and "8 steps" in longer.stdout, longer.stderr[-3000:]
    # The last one needs the Hub; without its last word it says what it would upload.
    published = shell(commands[2].removesuffix(" --push"))
    assert published.returncode == 0 and "verified" in published.stdout, published.stderr[-3000:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.max_stps=1"], "key 'max_stps' is unknown; did you mean 'max_steps'?"),
        (["data.sources=no/such/place"], "no/such/place"),
        (["model.vocab_size=64"], "model.vocab_size=64 is smaller than the 259 ids"),
        (["data.test_fraction=0", "training.eval_blocks=0"], "eval_blocks=0: must be at least 1"),
        (["training.report_to=wandb"], "report_to='wandb': this tracker is not installed"),
        (["--devices", "4"], "--devices goes with --dry-run"),
        (
            ["--output", "runs/a", "--resume-from", "runs/a/checkpoints/checkpoint-4"],
            "--resume-from runs/a/checkpoints/checkpoint-4 lies in runs/a: an interrupted run there goes on without it",
        ),
        (["training.global_batch_size=3", "training.per_device_train_batch_size=2"], "is not a multiple of the 2"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(overrides, message, tmp_path, monkeypatch, capsys):
    recipe = ROOT / "scripts" / "recipes" / "quickstart.yaml"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(recipe), "--smoke", *overrides])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    assert exit.value.code == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], said
    assert not (tmp_path / "runs").exists()


def test_words_that_the_library_refuses_are_one_line(corpus, tmp_path, monkeypatch, capsys):
    recipe = ROOT / "scripts" / "recipes" / "quickstart.yaml"
    words = ["--smoke", "--output", str(tmp_path / "run"), *corpus, "training.save_strategy=best"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(recipe), *words])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    assert exit.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {recipe}: training: `args.metric_for_best_model` must be provided")


def test_help_shows_each_example_as_it_is_typed(monkeypatch, capsys):
    """Also on a narrow terminal, where the text around it is wrapped."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "argv", ["publish.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "publish.py"), run_name="__main__")
    assert "python scripts/publish.py runs/quickstart/model ORG/NAME --push" in map(
        str.strip, capsys.readouterr().out.splitlines()
    )


def test_a_server_without_its_packages_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    monkeypatch.setattr(transformers, "ReZeroForCausalLM", None, raising=False)
    monkeypatch.setattr(sys, "argv", ["rezero_hf", "serve", "runs/quickstart/model"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("rezero_hf", run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: the server needs packages: pip install 'transformers[serving]'\n"


def test_clients_are_tried_on_any_language_model(tiny_model, tokenizer, tmp_path, monkeypatch, capsys):
    """Also a fine-tuned one, of which no tokens were counted; not on a classifier."""
    monkeypatch.setattr(metadata, "version", lambda package, real=metadata.version: real(package.replace("trl", "no!")))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")
    status = {}
    for name, model in {"text": tiny_model(), "classes": tiny_model(ReZeroForSequenceClassification)}.items():
        folder = export_folder(model, tokenizer, tmp_path / name, run={"name": name, "parameters": 5})
        words = [str(folder), "--only", "TRL", "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["integrations.py", *words])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "scripts" / "integrations.py"), run_name="__main__")
        status[name] = exit.value.code
    said = capsys.readouterr()
    assert status == {"text": 0, "classes": 2}
    assert "not installed: trl" in said.out
    assert f"{tmp_path / 'classes'} holds no language model" in said.err


def test_a_second_run_keeps_the_first(corpus, tmp_path):
    """Also one so short that it logs, evaluates and saves nothing on its way; it ends like any other."""
    recipe = tmp_path / "tiny.yaml"
    document = yaml.safe_load((ROOT / "scripts" / "recipes" / "quickstart.yaml").read_text())
    document["model"]["num_hidden_layers"] = 1
    recipe.write_text(yaml.safe_dump(document))
    quiet = ["training.logging_steps=100", "training.eval_strategy=no", "training.save_strategy=no"]
    for words in ([], quiet):
        assert launch(recipe, "--smoke", *corpus, *words, cwd=tmp_path).returncode == 0
    assert {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()} == {"tiny", "tiny.1"}
    for name in ("tiny", "tiny.1"):
        assert (tmp_path / "runs" / name / "model" / "model.safetensors").exists()
