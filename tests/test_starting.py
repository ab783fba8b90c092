"""A run that begins with another run's model, grown: the same function, an optimiser that remembers, and a new schedule."""

import json
import runpy
import shutil
import sys

import pytest
import torch
from huggingface_hub import constants
from test_scripts import launch
from test_training import prepared, trainer_for  # noqa: F401
from transformers import AutoTokenizer

from rezero_hf import ReZeroForCausalLM, ReZeroForMaskedLM, load_recipe, run_folder, starting
from rezero_hf.assembly import changed
from rezero_hf.checkpoints import checkpoints_in
from rezero_hf.errors import UserError
from rezero_hf.optim import NamedState, make_optimizer, put_state, state_by_name
from rezero_hf.recipe import RecipeError, changed_words
from rezero_hf.starting import InitFrom, begin
from rezero_hf.tokenization import load_tokenizer


OPTIMIZERS = ("adamw", "adagrad", "sgd", "lamb", "muon")


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):  # noqa: F811
    """A finished run of two layers, whose last checkpoint can be resumed from."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_for(prepared, folder, save_strategy="steps", save_steps=4)
    trainer.train()
    return trainer, checkpoints_in(folder / "out")[0]


@pytest.fixture
def checkpoint(run):
    return run[1]


@pytest.fixture
def config(run):
    """What a recipe of four layers would say."""
    return changed(run[0].model.config, num_hidden_layers=4, use_cache=True)


def grown_trainer(prepared, tmp_path, begins, **arguments):  # noqa: F811
    trainer = trainer_for(prepared, tmp_path, max_steps=2, warmup_steps=2, **arguments)
    trainer.model = trainer.model_wrapped = begins.model
    trainer.optimizer_state = begins.optimizer_state
    return trainer


def test_a_run_goes_on_with_the_grown_model_and_the_old_moments(run, config, prepared, tmp_path, ids):  # noqa: F811
    """The same logits; old parameters have their moments and counts, new ones none; the rate starts from 0 again.

    The optimiser alone holds them from then on.
    """
    old, checkpoint = run
    begins = begin(InitFrom(str(checkpoint), 4), config, "adamw")
    assert begins.said == f"begins from {checkpoint}: 2 layers, grown to 4 (end), with the optimiser's state"
    assert torch.equal(begins.model.eval()(ids).logits, old.model.eval()(ids).logits)
    trainer = grown_trainer(prepared, tmp_path, begins)
    optimizer = trainer.create_optimizer()
    assert trainer.optimizer_state is None
    remembered = {id(parameter): old.optimizer.state[parameter] for parameter in old.model.parameters()}
    for name, parameter in trainer.model.named_parameters():
        state = optimizer.state[parameter]
        if name.startswith(("model.layers.2", "model.layers.3")):
            assert not state
            continue
        expected = remembered[id(old.model.get_parameter(name))]
        assert state["step"] == 4 and torch.equal(state["exp_avg"], expected["exp_avg"]), name
        assert torch.equal(state["exp_avg_sq"], expected["exp_avg_sq"])
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.lr_scheduler.last_epoch == 2
    counts = {optimizer.state[parameter]["step"].item() for parameter in trainer.model.parameters()}
    assert counts == {2, 6}
    assert all(layer.residual_norm.alpha.item() != 0 for layer in trainer.model.model.layers)


def test_new_layers_may_stand_between_the_old_ones(run, config, ids):
    """The same logits, and each old layer's moments where the layer is now."""
    old, checkpoint = run
    begins = begin(InitFrom(str(checkpoint), 4, "interleaved"), config, "adamw")
    assert torch.equal(begins.model.eval()(ids).logits, old.model.eval()(ids).logits)
    name = "model.layers.{}.residual_norm.alpha"
    moment = old.optimizer.state[old.model.get_parameter(name.format(1))]["exp_avg"]
    assert torch.equal(begins.optimizer_state.parameters[name.format(2)]["exp_avg"], moment)
    assert name.format(1) not in begins.optimizer_state.parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_takes_its_next_step_as_if_nothing_had_happened(name, tiny_model, ids, tmp_path):
    """Remembered by names through a file, in a model of other layers: old parameters move as they would have."""
    model = tiny_model()

    def step(model, optimizer):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    optimizer = make_optimizer(model, name, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    begins = begin(InitFrom(str(tmp_path), 4), changed(model.config, num_hidden_layers=4), name)
    assert begins.optimizer_state is None and begins.said.endswith("weights alone")
    again = make_optimizer(begins.model, name, lr=1e-3, weight_decay=0.1)
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    put_state(again, begins.model, state_by_name(saved, model, name))
    step(model, optimizer)
    step(begins.model, again)
    for old, parameter in model.named_parameters():
        assert torch.equal(begins.model.get_parameter(old), parameter), old
    moved = begins.model.model.layers[3].residual_norm.alpha
    assert moved.item() != 0 and moved.isfinite()


def test_a_run_begins_from_a_revision_on_the_hub(run, config, tmp_path, monkeypatch, ids):
    """By its name and revision, as the library finds it in its cache; its model, and no optimiser's state."""
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("0" * 40)
    run[0].model.save_pretrained(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begins = begin(InitFrom("org/name@v1", 4), config, "adamw", load_tokenizer("bytes"))
    assert begins.said == "begins from org/name@v1: 2 layers, grown to 4 (end), weights alone"
    assert torch.equal(begins.model.eval()(ids).logits, run[0].model.eval()(ids).logits)
    with pytest.raises(UserError, match="org/name@v2: no language model of rezero_hf is there"):
        begin(InitFrom("org/name@v2", 4), config, "adamw")


def test_what_cannot_be_begun_from_is_one_line(run, config, tiny_model, tmp_path):
    checkpoint = run[1]
    damaged, headless = shutil.copytree(checkpoint, tmp_path / "checkpoint-4"), tmp_path / "headless"
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    begin(InitFrom(str(checkpoint)), run[0].model.config, "adamw").model.model.save_pretrained(headless)
    tiny_model(ReZeroForMaskedLM).save_pretrained(tmp_path / "masked")
    (tmp_path / "empty").mkdir()
    run[0].model.save_architecture(tmp_path / "shards")
    (tmp_path / "shards" / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "newer").mkdir()
    words = json.loads((checkpoint / "config.json").read_text()) | {"residual": "newer"}
    linear = {"residual": "rezero", "rope_parameters": {"rope_type": "linear"}}
    (tmp_path / "newer" / "config.json").write_text(json.dumps(words))
    for name, text in (("torn", "[1]"), ("rope", json.dumps({**words, **linear}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for path, to, changes, optimizer, message in [
        (tmp_path / "nowhere", 4, {}, "adamw", "no language model of rezero_hf is there"),
        (tmp_path / "empty", 4, {}, "adamw", "no language model of rezero_hf is there"),
        (damaged, 4, {}, "adamw", "model.safetensors has changed since it was written"),
        (headless, 4, {}, "adamw", "weights are not those of a ReZeroForCausalLM: lm_head.weight is missing"),
        (tmp_path / "shards", 4, {}, "adamw", r"in shards; name an export of it \(scripts/export.py\)"),
        (tmp_path / "newer", 4, {}, "adamw", "no language model .* error for field 'residual'"),
        (tmp_path / "newer" / "config.json", 4, {}, "adamw", "config.json is a file; name the folder of a model"),
        (tmp_path / "torn", 4, {}, "adamw", "no language model of rezero_hf is there"),
        (tmp_path / "rope", 4, {}, "adamw", "no language model .* 'rope_type'='linear'"),
        (tmp_path / "masked", 4, {}, "adamw", "is_causal False there, True here"),
        (
            checkpoint,
            4,
            {"hidden_act": "relu"},
            "adamw",
            "another model than the recipe's: hidden_act 'gelu' there, 'relu'",
        ),
        (checkpoint, None, {}, "adamw", r"num_hidden_layers 2 there, 4 here \(init_from.grow_to grows it\)"),
        (checkpoint, 1, {"num_hidden_layers": 1}, "adamw", "to=1: the network has 2 layers"),
        (checkpoint, 4, {}, "sgd", "the saved optimiser is not sgd over this model.* export .* weights alone"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            begin(InitFrom(str(path), to), changed(config, **changes), optimizer)
        assert "\n" not in str(caught.value)


def test_the_vocabulary_must_be_the_models(checkpoint, config, tmp_path):
    """Where the folder has a tokenizer; the same number of ids does not make it the same."""
    begin(InitFrom(str(checkpoint), 4), config, "adamw", load_tokenizer("bytes"))
    load_tokenizer("bytes").save_pretrained(tmp_path)
    for file in tmp_path.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<|mask|>", "<|other|>"))
    with pytest.raises(
        UserError, match=r"not that of data.tokenizer: 2 entries .* such as '<\|mask\|>' with the id 258"
    ):
        begin(InitFrom(str(checkpoint), 4), config, "adamw", AutoTokenizer.from_pretrained(tmp_path))


def test_what_cannot_go_over_is_refused_before_anything_is_loaded(checkpoint, config, monkeypatch):
    """An optimiser's state under FSDP; and a folder that the main process sees and this one does not."""
    with pytest.raises(UserError, match="under FSDP a whole optimiser's state cannot go over: name an export"):
        begin(InitFrom(str(checkpoint), 4), config, "adamw", sharded=True)
    monkeypatch.setattr(starting, "on_main", lambda act: (True, False))
    with pytest.raises(UserError, match="a folder on some processes only: every process has to see it"):
        begin(InitFrom("elsewhere/checkpoint-4", 4), config, "adamw")


def test_a_state_of_no_parameter_is_refused(tiny_model):
    """As under a wrapper's names: training would silently begin without it."""
    model = tiny_model()
    with pytest.raises(UserError, match="is of no parameter of this model"):
        put_state(make_optimizer(model, lr=1e-3), model, NamedState({"module.lm_head.weight": {}}, {}))


def test_the_script_checks_the_beginning_before_the_run(checkpoint, tmp_path, text_file, monkeypatch, capsys):
    """A rehearsal too; and no run that was to go on begins with random weights because it ended meanwhile."""
    recipe = tmp_path / "demo.yaml"
    recipe.write_text(
        f"model: {{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2}}\n"
        f"data: {{sources: {text_file}, block_size: 16, cache_dir: {tmp_path / 'cache'}}}\n"
        f"training: {{max_steps: 2, per_device_train_batch_size: 4}}\ninit_from: {{path: {checkpoint}}}\n"
    )

    def said(*words):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", str(recipe), *words, "--output", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path("scripts/pretrain.py", run_name="__main__")
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "error: init_from.path=nowhere/x: no language model" in said("--dry-run", "init_from.path=nowhere/x")
    assert "error: --mfu 0.0: must be above 0" in said("--dry-run", "--mfu", "0")
    assert "error: --device tpu: take cpu or cuda" in said("--dry-run", "--device", "tpu")
    monkeypatch.setattr(run_folder, "is_interrupted", lambda path: True)
    assert "run: the run there ended meanwhile; the same command again begins another" in said()


def test_the_recipe_says_where_a_run_begins(tmp_path):
    """The depth follows from `grow_to`; the resolved recipe says it, and a run of another beginning is another run."""
    recipe = tmp_path / "demo.yaml"
    recipe.write_text("model: {hidden_size: 64}\n")
    words = ["init_from.path=runs/demo/checkpoints/checkpoint-9", "init_from.grow_to=24"]
    loaded, before = load_recipe(recipe, words), load_recipe(recipe)
    assert loaded.init_from == InitFrom("runs/demo/checkpoints/checkpoint-9", 24)
    assert loaded.model["num_hidden_layers"] == 24
    tokenizer = load_tokenizer("bytes")
    text, plain = (plan.resolved(plan.model_config(tokenizer)) for plan in (loaded, before))
    (tmp_path / "resolved.yaml").write_text(text)
    assert load_recipe(tmp_path / "resolved.yaml").init_from == loaded.init_from and "init_from" not in plain
    assert changed_words(plain, text) == [
        "model.num_hidden_layers: 12 -> 24",
        "init_from.grow_to: None -> 24",
        "init_from.path: None -> runs/demo/checkpoints/checkpoint-9",
    ]
    assert changed_words(text, text) == [] and len(changed_words(text, plain)) == 4
    for wrong, message in [
        (["init_from.grow_to=3"], "init_from.grow_to=3 needs init_from.path"),
        (
            ["init_from.path=x", "init_from.grow_to=3", "training.gate_lr_multiplier=0.0"],
            "new layers start at alpha = 0, and held there never learn",
        ),
        (["init_from.from=x"], "init_from: key 'from' is unknown"),
        (
            ["init_from.path=x", "init_from.grow_to=3", "model.model_type=rezero_mlp"],
            "init_from.grow_to is for language models",
        ),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, wrong)


def test_a_grown_run_from_the_command_line(checkpoint, tmp_path, text_file):
    """Two layers grown to four and trained on; the model, its record and its card say so."""
    recipe, output = tmp_path / "deeper.yaml", tmp_path / "run" / "model"
    recipe.write_text(
        f"model: {{hidden_size: 16, num_attention_heads: 2}}\n"
        f"data: {{sources: {text_file}, block_size: 16, cache_dir: {tmp_path / 'cache'}}}\n"
        f"training: {{max_steps: 2, per_device_train_batch_size: 4, disable_tqdm: true, final_eval_blocks: 2}}\n"
        f"init_from: {{path: {checkpoint}, grow_to: 4}}\n"
    )
    done = launch(recipe, "--output", output.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 layers, grown to 4 (end), with the optimiser's state" in done.stdout
    assert ReZeroForCausalLM.from_pretrained(output).config.num_hidden_layers == 4
    record = json.loads((output / "run.json").read_text())
    assert record["init_from"] == {"path": checkpoint.name, "grow_to": 4, "where": "end"}
    assert record["license"] == "apache-2.0"
    assert f"trained from the weights of `{checkpoint.name}`" in (output / "README.md").read_text()
