"""Every line of the blocks of shell in the README and the guides works for a reader who types it.

It is run as printed but for the words below, which stand for what a reader puts in or make it small. Commands within a
sentence are looked up by `test_documents.py`.
"""

import json
import re
import shlex
import shutil

import pytest
from datasets import Dataset, Features, List, Value
from huggingface_hub import HfApi
from PIL import Image
from processes import run_script
from test_documents import ROOT, blocks
from test_image_data import pictures, write

from rezero_hf import ReZeroMLPConfig, ReZeroMLPForImageClassification
from rezero_hf.images import image_processor


# What is not run, by how it begins, and why.
NOT_RUN = {
    "git clone REPOSITORY": "the reader is there already",
    "make pretrain     #": "ten minutes; test_scripts.py runs the recipe small, and the commands that it prints",
    "make pretrain ARGS=": "ten minutes; other lines run the script with words after the recipe",
    "hf auth login": "asks a person for a token",
    "#!/bin/bash": "Slurm reads it",
    "#SBATCH": "Slurm reads it",
    "export MASTER=": "asks Slurm; test_launching.py launches on this machine",
    "srun bash": "needs Slurm; test_launching.py launches on this machine",
    "python -m rezero_hf serve": "needs a server's packages; `make integrations` serves, and runs the snippet below it",
    "python scripts/reproduce.py scripts/recipes/cifar_resnets.yaml --full": "hours of a GPU; test_studies.py loads it",
    "python scripts/reproduce.py scripts/recipes/norm_free.yaml --se": "hours; test_experiments.py does it small",
}
# What is replaced: names that the reader chooses, then what takes long.
STAND_INS = {
    "ORG/NAME@REVISION": "me/quickstart@main",
    "ORG/NAME@BRANCH": "me/quickstart@second",
    "hub:ORG/": "hub:",
    "ORG/NAME": "me/quickstart",
    "RECIPE": "scripts/recipes/quickstart.yaml",
    "runs/NAME/": "runs/quickstart/",
    "checkpoint-1200": "checkpoint-4",
    "--stride 64 ": "--stride 16 ",
    "stdlib-functions": "reviews.csv --text-column review --label-column stars",
    "model.num_hidden_layers=64": "model.num_hidden_layers=8",
    "training.max_steps=500": "training.max_steps=5",
    "training.num_train_epochs=20": "training.num_train_epochs=1",
}
# What is added to a command, by how it begins, so that it takes seconds (and `data.source`, which `smoke` has changed).
SMALL = {
    "scripts/pretrain.py RECIPE --dry-run": ["model.num_hidden_layers=2"],
    "scripts/pretrain.py notes.yaml --dry-run": ["model.num_hidden_layers=2"],
    "scripts/pretrain.py": ["--smoke"],
    "scripts/reproduce.py digits.yaml": ["training.max_steps=2", "training.eval_steps=1", "--jobs", "1"],
    "scripts/reproduce.py scripts/recipes/mlp_depth.yaml": ["--smoke", "data.source=cifar10", "--jobs", "1"],
    "scripts/reproduce.py scripts/recipes/signal_mlp.yaml": ["--jobs", "1"],
    "scripts/finetune.py": ["training.max_steps=2"],
}


def printed(code):
    """The lines of a block, those that go on put together."""
    return re.sub(r"\\\n *", "", code).splitlines()


def reason(line):
    """Why it is not run, or None."""
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def typed(line):
    """What is run in a line's place: its words after `python`."""
    small = next((words for start, words in SMALL.items() if line.startswith(f"python {start}")), [])
    for name, stand_in in STAND_INS.items():
        line = line.replace(name, stand_in)
    python, *words = shlex.split(line, comments=True)
    # No shell reads it here.
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line.partition(" #")[0])
    assert python == "python" and not re.search(r"[|&;<>$*?~]", bare), line
    return words + small


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as the guides leave it: recipes copied from them, data of the reader's own, and small finished runs."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "reproducing.md", folder / "docs")
    shutil.copytree(ROOT / "model_cards", folder / "model_cards")
    (folder / "runs" / "mlp_depth").mkdir(parents=True)
    shutil.copy(ROOT / "model_cards" / "results" / "mlp_depth.json", folder / "runs" / "mlp_depth" / "result.json")
    shutil.copytree(ROOT / "model_cards" / "mlp_depth" / "figures", folder / "runs" / "mlp_depth" / "figures")
    (folder / "runs" / "lm_depth-chosen").mkdir()
    repeat = folder / "model_cards" / "repeats" / "lm_depth.json"
    shutil.copy(repeat, folder / "runs" / "lm_depth-chosen" / "result.json")
    for guide, name in (("recipes", "notes"), ("images", "digits")):
        code = next(code for where, code in blocks("yaml").items() if where.startswith(f"docs/{guide}.md"))
        (folder / f"{name}.yaml").write_text(code)
    texts = ["".join(f"file {number}, line {line} of this text\n" for line in range(200)) for number in range(4)]
    (folder / "notes").mkdir()
    for number, text in enumerate(texts):
        (folder / "notes" / f"{number}.txt").write_text(text)
    (folder / "notes.txt").write_text(texts[0])
    write_rows(folder, texts)
    for split, label in ((split, label) for split in ("train", "test") for label in ("cat", "dog")):
        (folder / "pictures" / split / label).mkdir(parents=True)
        for number, pixels in enumerate(pictures(20, seed=len(label + split))[0]):
            Image.fromarray(pixels).save(folder / "pictures" / split / label / f"{number}.png")
    write(folder / "cifar10" / "train.parquet", *pictures(200))
    write(folder / "cifar10" / "test.parquet", *pictures(40, seed=1))
    for name, channels, size in (("pictures", 3, 32), ("digits", 1, 8)):
        model = folder / "runs" / name / "model"
        words = {"hidden_size": 8, "num_hidden_layers": 2, "num_labels": 10}
        config = ReZeroMLPConfig(num_channels=channels, image_size=size, **words)
        ReZeroMLPForImageClassification(config).save_pretrained(model)
        image_processor((size, size), [0.3] * channels, [0.4] * channels).save_pretrained(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        words = ("--smoke", "data.sources=notes/", "--output", "runs/quickstart")
        done = run_script(ROOT / "scripts" / "pretrain.py", "scripts/recipes/quickstart.yaml", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def write_rows(folder, texts):
    """Rows with a label, rows with tags, and rows of text alone, as data sets of the Hub are."""
    reviews = [{"review": f"{('good', 'bad')[number % 2]} {number}", "stars": number % 2} for number in range(40)]
    Dataset.from_list(reviews).to_csv(folder / "reviews.csv")
    tags = [{"tokens": ["def", f"f{number}", "("], "tags": ["key", "name", "sign"]} for number in range(20)]
    types = Features({"tokens": List(Value("string")), "tags": List(Value("string"))})
    for name, rows in (("TAGS", Dataset.from_list(tags, types)), ("NAME", Dataset.from_dict({"text": texts}))):
        (folder / name).mkdir()
        rows.to_parquet(folder / name / "train.parquet")


@pytest.mark.parametrize(
    "where", [where for where, code in blocks("bash").items() if not all(map(reason, printed(code)))]
)
def test_commands_run_as_printed(where, workplace, hub, tmp_path, monkeypatch):
    """Those of a block one after the other; the Hub has the model."""
    HfApi().create_repo("me/quickstart")
    HfApi().upload_folder(repo_id="me/quickstart", folder_path=workplace / "runs" / "quickstart" / "model")
    monkeypatch.setenv("HOME", str(workplace))
    for line in printed(blocks("bash")[where]):
        if reason(line) or not line.strip():
            continue
        script, *words = typed(line)
        done = run_script(workplace / script, *words, cwd=workplace, hub=(hub, tmp_path))
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_a_committed_study_is_committed_as_it_is(workplace):
    """`report.py` of a study's result and of one that was run again changes nothing where that is what is committed: no number in README, guides, pages
    or headers of recipes was typed by hand.
    """
    done = run_script(workplace / "scripts" / "report.py", "runs/mlp_depth", "runs/lm_depth-chosen", cwd=workplace)
    assert done.returncode == 0, done.stderr
    kept = [
        "README.md",
        "docs/reproducing.md",
        *(f"scripts/recipes/{path.name}" for path in (ROOT / "scripts" / "recipes").iterdir()),
    ]
    cards, there = (
        sorted(str(path.relative_to(root)) for path in (root / "model_cards").rglob("*.*"))
        for root in (ROOT, workplace)
    )
    assert cards == there
    kept += cards
    assert [name for name in kept if (workplace / name).read_bytes() != (ROOT / name).read_bytes()] == []


def test_a_repeat_goes_with_the_table_that_it_repeats(workplace, tmp_path):
    """Once that is another, neither the guide nor the recipe's header shows the repeat beside it."""
    for name in ("README.md", "docs", "scripts", "model_cards"):
        copy = shutil.copytree if (workplace / name).is_dir() else shutil.copy
        copy(workplace / name, tmp_path / name)
    path = tmp_path / "model_cards" / "results" / "lm_depth.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": "2100-01-01T00:00:00+00:00"}))
    done = run_script(tmp_path / "scripts" / "report.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lm_depth.json is gone: this repeat of lm_depth is not of the result that is committed" in done.stdout
    assert not (tmp_path / "model_cards" / "repeats" / "lm_depth.json").exists()
    assert "# Repeated" not in (tmp_path / "scripts" / "recipes" / "lm_depth.yaml").read_text()
    assert "| [lm_depth]" not in (tmp_path / "docs" / "reproducing.md").read_text()


def test_what_is_said_about_commands_is_about_one_that_is_printed():
    """No reason, stand-in or addition is left of a line that was taken away or written anew."""
    lines = [line for code in blocks("bash").values() for line in printed(code)]
    run = [line for line in lines if not reason(line)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    assert [name for name in STAND_INS if not any(name in line for line in run)] == []
    assert [start for start in SMALL if not any(line.startswith(f"python {start}") for line in run)] == []
