"""The publishable folder: whole or not there, loadable anywhere, and silent about the machine that made it."""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, pipeline

from rezero_hf import export
from rezero_hf.errors import UserError
from rezero_hf.export import describe_folder, export_folder, rescue
from rezero_hf.hub import USER_SECTION
from rezero_hf.images import cifar_image_processor, image_processor
from rezero_hf.models import (
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroForQuestionAnswering,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
)
from rezero_hf.traces import scrub
from rezero_hf.verification import CheckpointError, verify_folder


RUN = {
    "name": "tiny",
    "device": "cpu",
    "data": {"sources": ["python-stdlib"]},
    "results": {"test": {"bits_per_byte": 2.5}},
}
ROWS = [
    {
        "event": "eval",
        "step": step,
        "split": "validation",
        "loss": 2.0,
        "bits_per_byte": 3.0 - step / 100,
        "alpha": {f"model.layers.{layer}.residual_norm.alpha": [0.01 * layer * step] for layer in range(2)},
    }
    for step in (0, 10)
]
RECIPE = "model:\n  num_hidden_layers: 2\n"


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>", pad_token="<|pad|>")


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return ReZeroForCausalLM(ReZeroConfig(**{**sizes, "gate_init": 0.5, **changes})).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """One good folder; tests that damage it take a copy."""
    return export_folder(
        tiny(), tokenizer, tmp_path_factory.mktemp("good") / "model", run=RUN, metrics=ROWS, recipe_text=RECIPE
    )


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def problems(folder):
    """What `verify_folder` objects to, each one line."""
    with pytest.raises(CheckpointError) as caught:
        verify_folder(folder)
    assert isinstance(caught.value, ValueError)
    assert all("\n" not in problem and problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_export_holds_all_a_stranger_needs(exported):
    """Weights, configs, code, tokenizer, recipe, results, figures and card are there, and verify."""
    verify_folder(exported)
    needed = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    needed |= {
        "configuration_rezero.py",
        "modeling_rezero.py",
        "residual.py",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
    }
    needed |= {"figures/loss.png", "figures/gates.png", "README.md"}
    assert needed <= tree(exported).keys()
    assert "![Gates" in (exported / "README.md").read_text()
    assert (exported / "recipe.yaml").read_text() == RECIPE
    assert json.loads((exported / "run.json").read_text()) == RUN
    assert list(exported.parent.iterdir()) == [exported]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"residual": "pre_norm", "final_norm": True}])
def test_a_folder_loads_to_the_same_model(tmp_path, tokenizer, changes):
    """Any model exports without a run; loading gives its logits bit for bit, with no trust flag."""
    model = tiny(**changes)
    folder = export_folder(model, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("héllo", return_tensors="pt")
    assert torch.equal(loaded(inputs.input_ids).logits, model(inputs.input_ids).logits)


def test_sharded_weights_verify(tmp_path, tokenizer, monkeypatch):
    """Weights in several files count as one set; losing one of the files is noticed."""
    model = tiny()
    save = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder, **kwargs: save(folder, max_shard_size="10KB"))
    folder = export_folder(model, tokenizer, tmp_path / "model")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    assert any(problem.startswith("weights: missing") for problem in problems(folder))
    assert any("does not agree" in problem for problem in problems(folder))


def test_ids_and_cache_are_what_generation_needs(tmp_path, tokenizer):
    """End and padding ids are the tokenizer's; the cache, which Trainer turns off, is on; the model is untouched."""
    model = tiny()
    model.config.use_cache = False
    names = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
    before = [[getattr(settings, name) for name in names] for settings in (model.config, model.generation_config)]
    folder = export_folder(model, tokenizer, tmp_path / "model")
    after = [[getattr(settings, name) for name in names] for settings in (model.config, model.generation_config)]
    assert after == before
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for settings in (loaded.config, loaded.generation_config):
        assert settings.use_cache is True
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id


def test_a_chat_models_other_ends_stay(tmp_path, tokenizer):
    """A list of end tokens is kept, with the tokenizer's in it."""
    for known, kept in (
        ([tokenizer.eos_token_id, 10], [tokenizer.eos_token_id, 10]),
        ([10], [tokenizer.eos_token_id, 10]),
    ):
        model = tiny()
        model.generation_config.eos_token_id = known
        folder = export_folder(model, tokenizer, tmp_path / "model")
        assert GenerationConfig.from_pretrained(folder).eos_token_id == kept
        assert model.generation_config.eos_token_id == known


def test_what_is_no_whole_model_is_one_line(tmp_path, tokenizer):
    adapted = tiny()
    adapted.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="wrapped by an adapter: merge it"):
        export_folder(adapted, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="processor=None: needs the model's tokenizer"):
        export_folder(tiny(), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_figures_that_cannot_be_drawn_stay(folder, monkeypatch):
    card = (folder / "README.md").read_text()
    assert "figures/loss.png" in card and "figures/gates.png" in card
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    describe_folder(folder)
    assert (folder / "README.md").read_text() == card


def test_a_model_of_anothers_weights_is_published_under_a_licence_that_somebody_said(tmp_path, tokenizer):
    """Its export is whole without one; only a check for the Hub asks."""
    run = RUN | {"init_from": {"path": "ORG/BASE"}}
    folder = export_folder(tiny(), tokenizer, tmp_path / "model", run=run)
    assert [line.partition(",")[0] for line in problems(folder)] == ["README.md: the metadata lack license"]
    verify_folder(export_folder(tiny(), tokenizer, folder, run=run, license="cc-by-nc-4.0"))
    assert json.loads((folder / "run.json").read_text())["license"] == "cc-by-nc-4.0"


def test_a_new_export_replaces_the_old(tmp_path, tokenizer):
    """Nothing of the old folder stays, except its licence and what its user wrote into the card."""
    told = {"metrics": ROWS, "recipe_text": RECIPE, "license": "mit"}
    folder = export_folder(tiny(), tokenizer, tmp_path / "model", run=RUN, **told)
    card = folder / "README.md"
    card.write_text(card.read_text().replace(USER_SECTION[0], USER_SECTION[0] + "\nwritten by me"))
    model = tiny(num_hidden_layers=3)
    assert export_folder(model, tokenizer, folder) == folder
    assert not (folder / "recipe.yaml").exists()
    assert "written by me" in card.read_text() and "\nlicense: mit\n" in card.read_text()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 3
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("step", ["_write_model", "_write_figures", "render_card", "verify_folder", "_swap"])
def test_an_exception_midway_leaves_the_old_folder(folder, tokenizer, monkeypatch, step):
    """Whatever fails during an export, the earlier one stays byte for byte and nothing stays beside it."""
    before = tree(folder)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(export, step, fail)
    with pytest.raises(OSError, match="no space left"):
        export_folder(tiny(num_hidden_layers=3), tokenizer, folder, run=RUN, metrics=ROWS)
    assert tree(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failing_rename_leaves_the_old_folder(folder, tokenizer, monkeypatch):
    """When the finished folder cannot take its name, the old one gets it back."""
    before = tree(folder)
    rename = Path.rename

    def fail(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no permission")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no permission"):
        export_folder(tiny(), tokenizer, folder)
    assert tree(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_an_export_after_a_killed_one_cleans_up(folder, tokenizer):
    """A kill between the two renames leaves the old folder under another name: the next export finds it."""
    before = tree(folder)
    card = folder / "README.md"
    card.write_text(card.read_text().replace(USER_SECTION[0], USER_SECTION[0] + "\nwritten by me"))
    folder.rename(folder.with_name(".model.previous"))
    folder.with_name(".model.partial").mkdir()
    export_folder(tiny(), tokenizer, folder, run=RUN, metrics=ROWS, recipe_text=RECIPE)
    assert tree(folder).keys() == before.keys()
    assert "written by me" in card.read_text()
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("strange", ["thesis.docx", "src/model.py", ".git/config"])
def test_a_folder_with_other_files_is_not_replaced(folder, tokenizer, strange):
    """Pointing an export at somebody's folder is an error that names what would have been lost."""
    (folder / strange).parent.mkdir(exist_ok=True)
    (folder / strange).write_text("work of years")
    with pytest.raises(UserError, match=f"files that no export writes \\({re.escape(strange)}\\)"):
        export_folder(tiny(), tokenizer, folder)
    assert (folder / strange).read_text() == "work of years"


@pytest.mark.parametrize("own", ["my_work.py", "other_model.safetensors"])
def test_code_and_weights_that_no_export_wrote_are_not_replaced(tmp_path, tokenizer, own):
    """They could be an export's by their names; an export has a card beside them."""
    (tmp_path / own).write_text("work of years")
    with pytest.raises(UserError, match=f"files that no export writes \\({own}\\)"):
        export_folder(tiny(), tokenizer, tmp_path)
    assert (tmp_path / own).read_text() == "work of years"


def test_an_export_through_a_link_goes_where_the_link_leads(tmp_path, tokenizer):
    """Also the second one, which replaces the first; the link stays."""
    link, target = tmp_path / "model", tmp_path / "large_disk"
    target.mkdir()
    link.symlink_to(target, target_is_directory=True)
    for _ in range(2):
        export_folder(tiny(), tokenizer, link)
    assert link.is_symlink() and (target / "README.md").is_file() and sorted(tmp_path.iterdir()) == [target, link]


def test_what_a_system_leaves_in_a_folder_is_no_reason_to_keep_it(folder, tokenizer):
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / ".DS_Store").write_bytes(b"")
    export_folder(tiny(), tokenizer, folder)
    assert not (folder / "figures" / ".DS_Store").exists()


def test_an_export_that_does_not_verify_never_appears(tmp_path, tokenizer):
    """A model with a NaN, or a tokenizer that does not fit, gives one line each under the folder's final name."""
    model = tiny(vocab_size=100)
    with torch.no_grad():
        model.model.layers[1].residual_norm.alpha.fill_(float("nan"))
    with pytest.raises(CheckpointError) as caught:
        export_folder(model, tokenizer, tmp_path / "model")
    assert str(caught.value).startswith(f"{tmp_path / 'model'} is not a publishable folder:")
    assert caught.value.problems == [
        "weights: not finite in model.layers.1.residual_norm.alpha",
        "tokenizer: has token id 257, beyond the model's vocab_size 100",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_safetensors_is_refused(folder):
    """Half a weights file is named as damaged."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert [p for p in problems(folder) if p.startswith("model.safetensors: cannot be read, truncated or damaged")]


def test_weights_are_held_to_the_configuration(folder):
    """A gate that is missing, a tensor too many, a wrong shape and an infinity are each named."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.stray"] = weights.pop("model.layers.0.residual_norm.alpha")
    weights["model.layers.1.residual_norm.alpha"] = torch.zeros(2)
    weights["lm_head.weight"][3, 3] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    assert problems(folder) == [
        "weights: not finite in lm_head.weight",
        "weights: missing model.layers.0.residual_norm.alpha",
        "weights: ReZeroForCausalLM has no model.stray",
        "weights: model.layers.1.residual_norm.alpha is (2,), the configuration says (1,)",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "data: /srv/corpora/text.txt\n"),
        ("recipe.yaml", "data: ~/text.txt\n"),
        ("run.json", '{"command": "python --data=/home/someone/x"}'),
        ("run.json", '{"log": "first\\n/scratch/run7/out"}'),
        ("notes.txt", "see file:///data/x"),
        ("modeling_rezero.py", "CACHE = '/root/.cache/thing'\n"),
    ],
)
def test_an_absolute_path_in_any_text_file_is_refused(folder, name, text):
    """Wherever it stands, the file, the line and the path are named."""
    with (folder / name).open("a") as file:
        file.write(text)
    assert any(re.match(rf"{name}:\d+: holds an absolute path, ", problem) for problem in problems(folder))


@pytest.mark.parametrize(
    "text",
    ["https://example.org/a/b/c", "a/b/c and 1/2/3", "and/or", "./runs/x/y", "<b>x</b>", "user/name", "3 / 4 / 5"],
)
def test_ordinary_slashes_are_not_paths(folder, text):
    """URLs, relative paths, fractions, Hub ids and tags pass."""
    (folder / "notes.txt").write_text(text)
    verify_folder(folder)
    assert scrub(text) == text


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/home/mallory/*.txt", "<home>/*.txt"),
        ("/home/mallory", "<home>"),
        ("~/*.txt and ~/text.txt", "<home>/*.txt and text.txt"),
        ("/data/corpus/*.txt", "corpus/*.txt"),
        ("/net/home/mallory/corpus/**/*.txt", "corpus/**/*.txt"),
        ("file:///Users/mallory/", "<home>/"),
    ],
)
def test_paths_shrink_to_what_tells_nothing(text, published):
    """A home folder is called like its person; what a pattern matches in stays apart from it."""
    assert scrub(text) == published
    assert scrub(published) == published


def test_a_recipe_keeps_its_words_and_loses_names(tmp_path, tokenizer, monkeypatch):
    """The account is called like a key and like what somebody named after it: only that goes, and is found."""
    monkeypatch.setenv("LOGNAME", "source")
    recipe = "data:\n  sources:\n  - source: texts/source.txt\n  tokenizer: bytes\ntraining:\n  report_to: source\n"
    folder = export_folder(tiny(), tokenizer, tmp_path / "m", recipe_text=recipe)
    assert (folder / "recipe.yaml").read_text() == recipe.replace("source.txt", "<user>.txt")
    (folder / "recipe.yaml").write_text(recipe)
    assert problems(folder) == ["recipe.yaml: holds this machine's user name, source"]


def test_names_and_tokens_are_refused(folder, monkeypatch):
    """The host's name, the account's name and an access token are found; a Hub id or a signature is not a leak."""
    monkeypatch.setenv("LOGNAME", "mallory")
    monkeypatch.setattr("socket.gethostname", lambda: "gpubox7.lab")
    card = folder / "README.md"
    card.write_text(card.read_text().replace(USER_SECTION[0], USER_SECTION[0] + "\nTrained by mallory."))
    (folder / "notes.txt").write_text("huggingface.co/mallory/model")
    verify_folder(folder)
    token = "hf_" + "aB3" * 11
    (folder / "notes.txt").write_text(f"mallory@gpubox7 used {token}")
    found = problems(folder)
    assert found == [
        "notes.txt: holds an access token (hf_aB3...)",
        "notes.txt: holds this machine's host name, gpubox7",
        "notes.txt: holds this machine's user name, mallory",
    ]
    assert not any(token in problem for problem in found)


def test_an_export_scrubs_what_it_publishes(tmp_path, tokenizer, monkeypatch):
    """A record full of traces exports to a folder without them; the caller's record is not changed."""
    monkeypatch.setenv("LOGNAME", "mallory")
    monkeypatch.setattr("socket.gethostname", lambda: "gpubox7")
    run = copy.deepcopy(RUN) | {
        "command": "/opt/venv/bin/accelerate launch /home/mallory/scripts/pretrain.py",
        "hostname": "gpubox7",
        "device": "2 x H200 on gpubox7",
        "data": {"sources": [{"path": "/home/mallory/corpus.txt"}], "user": "mallory"},
    }
    before = copy.deepcopy(run)
    folder = export_folder(tiny(), tokenizer, tmp_path / "m", run=run, recipe_text="path: /data/mallory/c.txt\n")
    assert run == before
    assert b"mallory" not in b"".join(tree(folder).values())
    assert json.loads((folder / "run.json").read_text()) == RUN | {
        "command": "accelerate launch pretrain.py",
        "device": "2 x H200 on <host>",
        "data": {"sources": [{"path": "corpus.txt"}]},
    }
    assert (folder / "recipe.yaml").read_text() == "path: c.txt\n"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "optimizer.pt", "training_args.bin", "sub/rng_state_0.pth", "trainer_state.json"]
)
def test_pickles_and_training_states_are_refused(folder, name):
    """Files that run code when loaded, or belong to a resumable run, are named."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80")
    assert problems(folder) == [f"{name}: pickles, optimiser states and caches do not belong in a published folder"]


def test_code_that_would_not_load_elsewhere_is_refused(folder):
    """Missing files and classes, imports the loader does not follow, and packages others may lack are each named."""
    (folder / "residual.py").unlink()
    with (folder / "configuration_rezero.py").open("a") as file:
        file.write("\nfrom . import nothing\nimport rezero_hf\n")
    edit(
        folder / "config.json", lambda c: c["auto_map"].update(AutoModel="modeling_rezero.Gone", AutoModelX="absent.X")
    )
    assert problems(folder) == [
        "config.json: auto_map AutoModel is modeling_rezero.Gone, but modeling_rezero.py defines no class Gone",
        "config.json: auto_map AutoModelX is absent.X, but there is no absent.py",
        *[
            p
            for p in problems(folder)
            if p.startswith("configuration_rezero.py:") and "remote code can only import" in p
        ],
        "configuration_rezero.py: imports rezero_hf, which a user of Transformers may not have",
        "modeling_rezero.py: imports .residual, but there is no residual.py",
    ]
    assert len(problems(folder)) == 5


def test_a_config_without_auto_map_is_refused(folder):
    """Such a folder would load here and nowhere else."""
    edit(folder / "config.json", lambda c: c.pop("auto_map"))
    assert (
        "config.json: auto_map lacks AutoConfig; without it the folder loads only where rezero_hf is installed"
        in problems(folder)
    )
    edit(folder / "config.json", lambda c: c.update(auto_map=["AutoConfig"]))
    assert "config.json: auto_map is ['AutoConfig'], and not a mapping" in problems(folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", None, "config.json: is missing"),
        ("config.json", "{", "config.json: is not valid JSON"),
        ("config.json", '{"model_type": "unknown"}', "config.json: describes no model that this version can build"),
        ("tokenizer.json", "{", "tokenizer: cannot be loaded"),
        (
            "generation_config.json",
            '{"eos_token_id": 0}',
            "generation_config.json: eos_token_id is 0, the tokenizer's",
        ),
        ("model.safetensors", None, "weights: there is no safetensors file"),
        ("README.md", None, "README.md: there is no model card"),
        ("README.md", "---\na: [\n---\n", "README.md: the metadata do not parse"),
        ("README.md", "---\nlicense: mit\n---\n", "README.md: the metadata lack library_name"),
        ("figures/loss.png", None, "README.md: shows figures/loss.png, which is not in the folder"),
    ],
)
def test_missing_and_broken_files_are_named(folder, name, content, says):
    """Each part of the folder, taken away or damaged, is found."""
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert any(problem.startswith(says) for problem in problems(folder)), problems(folder)


def test_a_link_is_refused(folder):
    """A link works here and dangles after the upload."""
    (folder / "extra.txt").symlink_to(folder / "recipe.yaml")
    assert problems(folder) == ["extra.txt: is a link; what it points to would be missing elsewhere"]


def test_no_folder_is_one_clear_line(tmp_path):
    """Verifying nothing says so."""
    assert problems(tmp_path / "absent") == ["there is no such folder"]


@pytest.mark.parametrize("snippet", [0, 1], ids=["with the package", "without the package"])
def test_the_cards_snippets_run(exported, tmp_path, snippet):
    """The card's usage code prints text in a fresh process; the second also where the package cannot be imported."""
    card = (exported / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[snippet].replace("USER/NAME", str(exported))
    if snippet:
        code = "import sys; sys.modules['rezero_hf'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=offline(tmp_path),
        stdin=subprocess.DEVNULL,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"def main(")


def offline(tmp_path):
    package = Path(export.__file__).parents[1]
    return os.environ | {
        "PYTHONPATH": str(package),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }


def test_a_trained_model_is_rescued_when_publishing_fails(tmp_path, tokenizer):
    """Whatever goes wrong between training and the finished folder, the weights are on disk and the message says where."""
    model = tiny()
    message = r"No space left on device\n.*its weights are safe in .*rescued"
    with pytest.raises(UserError, match=message), rescue(model, tokenizer, tmp_path / "rescued"):
        raise OSError("No space left on device")
    again = ReZeroForCausalLM.from_pretrained(tmp_path / "rescued")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_only_the_process_that_saved_speaks_of_a_folder(tmp_path, tokenizer, monkeypatch):
    """On another one there are no weights, and the reason is raised as it is."""
    monkeypatch.setattr(PartialState, "is_main_process", False)
    with pytest.raises(OSError, match="out of reach"), rescue(tiny(), tokenizer, tmp_path / "rescued"):
        raise OSError("out of reach")
    assert not (tmp_path / "rescued").exists()


IMAGE_RUN = {"name": "tiny", "data": {"source": "digits"}, "results": {"test": {"loss": 0.5, "accuracy": 0.9}}}
IMAGE_ROWS = [
    {**row, "event": event, "bits_per_byte": None, "accuracy": 0.5} for event in ("train", "eval") for row in ROWS
]


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "fox"}
    return ReZeroResNetForImageClassification(ReZeroResNetConfig.cifar(8, gate_init=0.5, id2label=names)).eval()


@pytest.fixture(scope="module")
def exported_images(tmp_path_factory, resnet):
    """A good folder of an image classifier; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("images") / "model"
    run = {"run": IMAGE_RUN, "metrics": IMAGE_ROWS, "recipe_text": RECIPE}
    return export_folder(resnet, cifar_image_processor(), folder, **run)


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """`image.png` in the working directory, which the cards' snippets open."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image.save("image.png")
    return image


def snippets(folder):
    """The card's two pieces of code: with the package, and without, for this folder instead of a repository."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return [text.replace("USER/NAME", str(folder)) for text in code]


def test_an_image_classifier_is_exported_with_its_processor(exported_images, resnet):
    """Processor, code, records, figures and card, and nothing that only a language model has, also not in its words."""
    files = tree(exported_images).keys()
    assert files == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "run.json"),
        *("metrics.jsonl", "figures/loss.png", "figures/gates.png", "configuration_rezero_resnet.py"),
        *("modeling_rezero_resnet.py", "gating.py", "initializations.py", "portable.py", "residual.py"),
    }
    assert "use_cache" not in (exported_images / "config.json").read_text()
    assert not hasattr(resnet.config, "use_cache")


def test_an_exported_image_classifier_is_used_as_its_card_says(exported_images, resnet, picture, tmp_path):
    """The card's code and `pipeline` name the net's most likely class; both also where the package cannot be imported."""
    logits = resnet(**cifar_image_processor()(picture, return_tensors="pt")).logits
    label = resnet.config.id2label[logits.argmax().item()]
    own, remote = snippets(exported_images)
    remote = "import sys; sys.modules['rezero_hf'] = None\n" + remote
    remote += f"""
from transformers import pipeline
classifier = pipeline("image-classification", {str(exported_images)!r}, trust_remote_code=True)
assert type(classifier.model).__module__.startswith("transformers_modules.")
print(classifier("image.png")[0])
"""
    alone = subprocess.run(
        [sys.executable, "-c", remote], env=offline(tmp_path), check=False, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert printed(own) == f"{label}\n"
    best = pipeline("image-classification", str(exported_images))(picture)[0]
    assert best["label"] == label
    assert alone.stdout == f"{label}\n{best}\n"


@pytest.mark.parametrize("head", [ReZeroForSequenceClassification, ReZeroForTokenClassification])
def test_a_text_classifier_is_used_as_its_card_says(tmp_path, tokenizer, head):
    """The card's code names a class for the text, or one for each word. Class names that look like paths are published
    as they are; a path elsewhere is still refused."""
    names = {0: "/r/python", 1: "/home/mallory/café"}
    model = head(tiny(id2label=names, pad_token_id=257).config).eval()
    run = {"data": {"source": "stdlib-functions", "classes": list(names.values())}}
    folder = export_folder(model, tokenizer, tmp_path / "model", run=run)
    assert json.loads((folder / "run.json").read_text()) == run
    assert "| classes | 2: /r/python, /home/mallory/café |" in (folder / "README.md").read_text()
    said = printed(snippets(folder)[0])
    if head is ReZeroForTokenClassification:
        assert [line.rsplit(" ", 1)[0] for line in said.splitlines()] == ["def", "close(self):"]
    assert any(name in said for name in names.values())
    (folder / "notes.txt").write_text("/r/python and /home/mallory/thesis")
    assert problems(folder) == ["notes.txt:1: holds an absolute path, /home/mallory/thesis"]


def printed(code):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def test_grey_pictures_and_fixed_sizes_are_served(picture, tmp_path):
    """A fully connected net of grey 8 x 8 images: the card's code makes of any picture what it takes."""
    torch.manual_seed(0)
    config = ReZeroMLPConfig(image_size=8, num_channels=1, hidden_size=16, num_hidden_layers=2, gate_init=0.5)
    folder = export_folder(
        ReZeroMLPForImageClassification(config), image_processor((8, 8), [0.5], [0.3]), tmp_path / "mlp"
    )
    assert printed(snippets(folder)[0]) in ("LABEL_0\n", "LABEL_1\n")


def test_an_image_processor_that_does_not_fit_is_refused(exported_images, resnet, tokenizer, tmp_path):
    """Missing, damaged, a tokenizer's place, of another size or of other colours than the model's: one line each."""
    folder = shutil.copytree(exported_images, tmp_path / "model")
    processor = folder / "preprocessor_config.json"
    for damage in (lambda: processor.write_text("{"), processor.unlink):
        damage()
        assert [line[:34] for line in problems(folder)] == ["image processor: cannot be loaded "]
    for model, wrong, missing in (
        (tiny(), cifar_image_processor(), "tokenizer"),
        (resnet, tokenizer, "image processor"),
    ):
        with pytest.raises(CheckpointError, match=f"{missing}: cannot be loaded"):
            export_folder(model, wrong, tmp_path / "never")
    config = ReZeroMLPConfig(image_size=8, num_channels=1, hidden_size=16, num_hidden_layers=1)
    for wrong in (image_processor((9, 8), [0.5], [0.3]), image_processor((8, 8), [0.5] * 3, [0.3] * 3)):
        with pytest.raises(
            CheckpointError, match=r"image processor: makes .*, the model takes \(1, 1, 8, 8\)"
        ) as caught:
            export_folder(ReZeroMLPForImageClassification(config), wrong, tmp_path / "never")
        assert len(caught.value.problems) == 1


def test_another_head_is_refused_before_anything_is_left(tmp_path, tokenizer):
    """There is no card for it: one line says so, and no folder."""
    model = ReZeroForQuestionAnswering(tiny().config)
    with pytest.raises(UserError, match="ReZeroForQuestionAnswering has no model card"):
        export_folder(model, tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
