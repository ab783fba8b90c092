"""A recipe is read strictly: every mistake is one line naming file, key and value, and defaults are written out."""

import re

import pytest
import yaml

from rezero_hf import ReZeroConfig, load_recipe
from rezero_hf.recipe import RecipeError
from rezero_hf.tokenization import byte_tokenizer


RECIPE = """
model: {hidden_size: 64, num_attention_heads: 2}
data: {sources: python-stdlib, block_size: 64}
training: {learning_rate: 1.0e-3, max_steps: 5}
smoke: {training.max_steps: 2, model.num_hidden_layers: 1}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_gives_config_data_and_training(recipe):
    """Fields reach the right objects, and what the recipe leaves open follows from the tokenizer and the block size."""
    loaded = load_recipe(recipe)
    config = loaded.model_config(byte_tokenizer())
    assert (loaded.name, config.hidden_size, config.num_hidden_layers) == ("demo", 64, 12)
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (320, 64, 256)
    assert (loaded.data.block_size, loaded.data.sources[0].source) == (64, "python-stdlib")
    assert (loaded.training["max_steps"], loaded.training["learning_rate"]) == (5, 1e-3)


def test_overrides_win_over_smoke_and_smoke_over_the_file(recipe):
    smoked = load_recipe(recipe, smoke=True)
    assert (smoked.training["max_steps"], smoked.model["num_hidden_layers"]) == (2, 1)
    assert load_recipe(recipe, ["training.max_steps=9"], smoke=True).training["max_steps"] == 9


def test_whole_numbers_are_fine_where_floats_are_due(recipe):
    assert load_recipe(recipe, ["training.learning_rate=1"]).training["learning_rate"] == 1.0


def test_an_unquoted_no_is_the_word_where_a_word_is_due(recipe):
    """YAML reads `no` as false; a user who types training.save_strategy=no means the library's word."""
    assert load_recipe(recipe, ["training.save_strategy=no"]).training["save_strategy"] == "no"
    assert load_recipe(recipe, ["training.bf16=no"]).training["bf16"] is False


def test_sources_may_be_a_name_a_list_or_mappings(recipe, tmp_path):
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text("data: {sources: [python-stdlib, {source: texts/, weight: 2}]}")
    assert [(s.source, s.weight) for s in load_recipe(mixed).data.sources] == [("python-stdlib", 1.0), ("texts/", 2.0)]


def test_the_resolved_recipe_writes_out_every_default_and_loads_again(recipe, tmp_path):
    """Loading what a run saved gives the same model, data and training; it holds no folder of the machine."""
    loaded = load_recipe(recipe)
    config = loaded.model_config(byte_tokenizer())
    path = tmp_path / "resolved.yaml"
    path.write_text(loaded.resolved(config))
    written = yaml.safe_load(path.read_text())
    assert set(ReZeroConfig.__annotations__) == set(written["model"])
    assert written["training"]["adam_beta1"] == 0.9 and written["training"]["gate_lr_multiplier"] == 1.0
    assert "output_dir" not in written["training"] and "cache_dir" not in written["data"]
    again = load_recipe(path)
    assert again.name == "demo"
    assert again.model_config(byte_tokenizer()).to_dict() == config.to_dict()
    assert again.data == loaded.data
    assert yaml.safe_load(again.resolved(config)) == written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=64", r"demo.yaml: model: key 'hiden_size' is unknown; did you mean 'hidden_size'\?"),
        ("training.seeds=1", r"demo.yaml: training: key 'seeds' is unknown; did you mean 'seed'\?"),
        ("data.sources=[{source: a, wight: 3}]", r"data.sources\[0\]: key 'wight' is unknown; did you mean 'weight'\?"),
        ("modle.hidden_size=64", "'modle.hidden_size' is not section.key with a section of model, data, training"),
        ("training.learning_rate=3e-4", r"='3e-4': expected float \(YAML reads 3e-4 as text; write 3.0e-4\)"),
        ("training.max_steps=many", "training.max_steps='many': expected int"),
        ("training.bf16=1", "training.bf16=1: expected bool"),
        ("training.optimizer=adam", "training.optimizer='adam': expected one of adamw, adagrad, sgd, lamb, muon"),
        ("model.residual=zero", "model.residual='zero': expected one of rezero, rezero_pre_norm, rezero_tanh"),
        ("model.hidden_size=65", "hidden_size=65 is not a multiple of num_attention_heads=2"),
        ("model.vocab_size=64", "model.vocab_size=64 is smaller than the 259 ids of data.tokenizer='bytes'"),
        ("model.max_position_embeddings=32", "max_position_embeddings=32 is smaller than data.block_size=64"),
        ("training.save_strategy=epoch", "save_strategy=epoch would be once, at the end of the run; take save_strategy: steps"),
        ("training.metric_for_best_model=los", "metric_for_best_model 'los' is unknown; did you mean 'loss'"),
        ("training.max_steps", "override 'training.max_steps' is not of the form section.key=value"),
        ("training.max_steps=[", "override 'training.max_steps=.*the value is not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_way_out(recipe, override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe, [override]).model_config(byte_tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "section 'modle' is unknown; did you mean 'model'"),
        ("model: [1]", "section model is not a mapping"),
        (
            "- 1",
            "not a recipe: the file must be a mapping with the sections model, data, training, init_from, task, smoke",
        ),
        ("model: {", "not valid YAML"),
        ("model: {}\nmodel: {}", "not valid YAML: key 'model' is given twice"),
        ("training: {seed: 1, seed: 2}", "key 'seed' is given twice"),
        ("smoke: {model: 1}", "smoke: 'model' is not section.key"),
        ("full: {training.max_step: 3}", "full: training key 'max_step' is unknown; did you mean 'max_steps'"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"broken.yaml: .*{message}") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_one_line(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary.yaml: cannot be read as text"):
        load_recipe(tmp_path / "binary.yaml")


def test_training_arguments_report_what_they_refuse(recipe, tmp_path):
    """A value only the library checks, and a global batch that does not divide, are one line naming the recipe."""
    with pytest.raises(RecipeError, match=r"demo\.yaml: training: never_mind is not a valid SchedulerType"):
        load_recipe(recipe, ["training.lr_scheduler_type=never_mind"]).training_arguments(tmp_path)
    uneven = ["training.global_batch_size=10", "training.per_device_train_batch_size=4"]
    with pytest.raises(RecipeError, match=r"global_batch_size=10 is not a multiple of the 4 sequences of one pass"):
        load_recipe(recipe, uneven).training_arguments(tmp_path)
    for words, message in (
        (["log_level=loud"], "log_level='loud' is unknown; one of"),
        (["dataloader_num_workers=-1"], "dataloader_num_workers=-1: must be 0 or more"),
        (["lr_scheduler_kwargs={foo: 1}"], "lr_scheduler_kwargs={'foo': 1} does not go with lr_scheduler_type=linear"),
        (["activation_checkpointing_kwargs={every_layer: 2}"], "did you mean 'every_n_layers'"),
        (["activation_checkpointing_kwargs={determinism_check: so}"], "determinism_check should be one of"),
        (["activation_checkpointing_kwargs={every_n_layers: 0}"], "every_n_layers has to be at least 1"),
        (["load_best_model_at_end=true"], "requires the save and eval strategy to match"),
    ):
        with pytest.raises(RecipeError, match=rf"demo\.yaml: training: .*{re.escape(message)}") as caught:
            load_recipe(recipe, [f"training.{word}" for word in words]).training_arguments(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_best_checkpoint_has_the_fewest_bits_and_the_most_that_is_right(recipe, tmp_path):
    for metric, greater in (
        ("bits_per_byte", False),
        ("eval_bits_per_byte", False),
        ("loss", False),
        ("accuracy", True),
    ):
        words = [f"training.metric_for_best_model={metric}", "training.load_best_model_at_end=true"]
        words += [f"training.{when}_{what}" for when in ("eval", "save") for what in ("strategy=steps", "steps=5")]
        assert load_recipe(recipe, words).training_arguments(tmp_path).greater_is_better is greater


def test_accumulation_is_derived_from_the_global_batch(recipe, tmp_path):
    overrides = ["training.global_batch_size=12", "training.per_device_train_batch_size=4"]
    args = load_recipe(recipe, overrides).training_arguments(tmp_path)
    assert args.gradient_accumulation_steps == 3
