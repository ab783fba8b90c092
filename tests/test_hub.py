"""The model card says what was recorded and what the configuration is, and nothing else."""

import re
from importlib.resources import files
from typing import get_args
from unittest.mock import patch

import jinja2
import jinja2.meta
import pytest
from huggingface_hub import ModelCard

from rezero_hf.errors import UserError
from rezero_hf.hub import USER_SECTION, render_card, user_section
from rezero_hf.models import ReZeroConfig, ReZeroMLPConfig, ReZeroResNetConfig
from rezero_hf.models.residual import RESIDUAL_FORMS


def recorded(**changes):
    return {
        "name": "bytes-12",
        "command": "accelerate launch scripts/pretrain.py recipe.yaml",
        "started": "2026-01-02T03:04:05+00:00",
        "wall_seconds": 552.3,
        "energy_kwh": 1.234,
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "git": {"sha": "0123abc", "dirty": True},
        "device": "cpu (2 cores)",
        "world_size": 1,
        "parameters": 1234567,
        "tokens": 8192000,
        "data": {"sources": ["python-stdlib"], "sha256": "c0ffee", "bytes": {"train": 9876543, "validation": 1000}},
        "results": {
            "validation": {"loss": 1.2345678, "bits_per_byte": 1.78109},
            "test": {"loss": 1.3, "bits_per_byte": 1.87549},
        },
    } | changes


def measured(card):
    """{(split, metric): value} of a card, read back from its text as the Hub reads it."""
    found = ModelCard(str(card)).data.eval_results or []
    return {(result.dataset_split, result.metric_type): result.metric_value for result in found}


def config(**changes):
    return ReZeroConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, **changes)


def test_metadata_parse_back_to_the_runs_numbers():
    """Every measured number is in the metadata to the last digit, under its split and metric."""
    run = recorded()
    card = render_card(run, config())
    assert measured(card) == {
        (split, metric): value for split, values in run["results"].items() for metric, value in values.items()
    }
    data = ModelCard(str(card)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert {"rezero", "norm-free"} <= set(data.tags)
    assert data.language == ["code"]


def test_the_body_shows_what_was_recorded():
    """Data, hardware, time, versions, recipe and results stand in the text as they were recorded."""
    text = render_card(recorded(), config(), recipe_text="model:\n  depth: ```odd\n").text
    for shown in (
        *("1,234,567 parameters", "cpu (2 cores)", "9 min 12 s", "1.2 kWh", "8,192,000", "torch 2.13.0"),
        *("c0ffee", "9,876,543", "0123abc (with local changes)", "Python Software Foundation License"),
        *("| validation | 1.2346 | 1.7811 |", "| test | 1.3000 | 1.8755 |", "````yaml\nmodel:\n  depth: ```odd\n````"),
    ):
        assert shown in text, shown


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("missing", [{}, None, {"loss": None, "bits_per_byte": None}])
def test_a_missing_result_is_absent_not_zero(split, missing):
    """A split that was not measured has no row, no metadata and no zero."""
    run = recorded()
    run["results"][split] = missing
    card = render_card(run, config())
    assert {key[0] for key in measured(card)} == {"validation", "test"} - {split}
    assert f"| {split} |" not in card.text
    assert not re.search(r"\b0\.0", card.text)


def test_a_run_that_recorded_nothing_makes_a_card_without_numbers():
    """Without a record the card still describes the model, has no empty sections, and says nothing it cannot know."""
    card = render_card(None, config())
    for heading in ("Measured results", "Figures", "Data", "Training"):
        assert f"## {heading}" not in card.text
    assert measured(card) == {}
    assert "None" not in str(card)
    assert "licence of the training text was not recorded" in card.text


@pytest.mark.parametrize("field", sorted(recorded()))
def test_any_field_may_be_missing(field):
    """Leaving out any one field of the record still renders, and leaves no trace of it."""
    run = recorded()
    del run[field]
    assert "None" not in str(render_card(run, config()))


def test_a_diverged_result_is_said_and_kept_out_of_the_metadata():
    """A loss that is not finite is shown as such; the Hub's JSON metadata cannot hold it."""
    card = render_card(recorded(results={"validation": {"loss": float("nan"), "bits_per_byte": 2.0}}), config())
    assert measured(card) == {("validation", "bits_per_byte"): 2.0}
    assert "| validation | not finite (diverged) | 2.0000 |" in card.text


@pytest.mark.parametrize("residual", get_args(ReZeroConfig.__annotations__["residual"]))
def test_the_description_follows_the_configuration(residual):
    """The equation is that of the residual form; gates and norms are mentioned exactly when the model has them."""
    form = RESIDUAL_FORMS[residual]
    card = render_card(None, config(residual=residual))
    assert f"`{form.__doc__.split('`')[1]}`" in card.text
    assert ("## Fine-tuning" in card.text) == form.has_gate == ("The gate alpha" in card.text)
    assert ("no normalisation layer anywhere" in card.text) == (not form.has_norm) == ("norm-free" in card.data.tags)


def test_every_norm_is_named():
    """A final norm or a norm on queries and keys is stated, and the model is then not called norm-free."""
    card = render_card(None, config(final_norm=True, qk_norm=True, norm="rms"))
    assert "Norms: RMSNorm after the last layer; RMSNorm on queries and keys." in card.text
    assert "norm-free" not in card.data.tags


def test_the_gates_are_summed_up_from_the_last_evaluation():
    """Range, strongest and weakest layer are those of the last recorded gates."""
    gates = {1: (9.0, 9.0, 9.0), 10: (0.2, -0.3, 0.01)}
    rows = [
        {"event": "eval", "step": step, "alpha": {f"layers.{layer}.alpha": [a] for layer, a in enumerate(alpha)}}
        for step, alpha in gates.items()
    ]
    text = render_card(None, config(), metrics=rows).text
    assert "At step 10 the gates lie between -0.3 and 0.2; the strongest layer is 1, the weakest 2" in text


def test_where_training_began_is_said_if_it_was_recorded():
    """A record that a push or an evaluation has begun knows nothing of it; the weights of another model are named."""
    for run, says in (
        (None, "with 3 layers."),
        ({"repo_id": "me/model"}, "with 3 layers."),
        ({"data": {"sources": ["a.txt"]}}, "with 3 layers, trained on `a.txt`."),
        ({"started": "2026-01-02T03:04:05+00:00"}, "with 3 layers, trained from random weights."),
        ({"started": "2026", "init_from": {"path": "ORG/BASE"}}, "trained from the weights of `ORG/BASE`."),
    ):
        assert says in render_card(run, config()).text, run


@pytest.mark.parametrize(
    ("run", "previous", "license"),
    [
        (None, None, "apache-2.0"),
        ({"license": "mit"}, "cc0-1.0", "mit"),
        (None, "cc0-1.0", "cc0-1.0"),
        ({"init_from": {"path": "ORG/BASE"}}, "cc0-1.0", "cc0-1.0"),
        ({"init_from": {"path": "ORG/BASE"}, "license": None}, None, None),
    ],
)
def test_the_licence_is_what_was_said_or_the_card_said_before(run, previous, license):
    """In metadata and text; that of another's weights is not guessed."""
    if previous:
        previous = "---\nlicense: " + previous + "\n---\n" + "\n".join(USER_SECTION)
    card = render_card(run, config(), previous=previous)
    assert ModelCard(str(card)).data.license == license
    says = "The licence of the weights it began with is not known." if license is None else f"weights: {license}."
    assert says in card.text


def test_hub_data_sets_are_linked():
    """A corpus from the Hub is in the metadata, where the Hub makes a link of it; its licence is not guessed."""
    card = render_card(recorded(data={"sources": [{"source": "hub:org/corpus"}, "hub:./folder", "a.txt"]}), config())
    assert card.data.datasets == ["org/corpus"]
    assert "licence of the training text was not recorded" in card.text


def test_a_users_own_section_survives():
    """What stands between the markers is carried into the next card word for word, and only once."""
    begin, end = USER_SECTION
    first = str(render_card(recorded(), config()))
    assert user_section(first) == ""
    mine = "## My notes\n\n{{ not a template }} and `code` and a | table |"
    edited = first.replace(f"{begin}\n\n{end}", f"{begin}\n{mine}\n{end}")
    assert edited != first
    second = str(render_card(recorded(name="other"), config(), previous=edited))
    third = str(render_card(recorded(name="third"), config(), previous=second))
    assert user_section(second) == user_section(third) == mine
    assert third.count("My notes") == 1


@pytest.mark.parametrize("previous", ["# Written by hand", USER_SECTION[0], "\n".join(USER_SECTION * 2)])
def test_a_card_whose_text_would_be_lost_is_not_replaced(previous):
    """Without exactly one pair of markers nobody knows what to keep: one clear line instead of a lost text."""
    with pytest.raises(ValueError, match="would be lost") as caught:
        render_card(None, config(), previous=previous)
    assert "\n" not in str(caught.value)


def test_usage_shows_both_ways():
    """With the package no trust flag is needed; without it the code is trusted at a pinned commit."""
    own, remote = re.findall(r"```python\n(.*?)```", render_card({"repo_id": "me/model"}, config()).text, re.DOTALL)
    assert "import rezero_hf" in own
    assert "trust_remote_code" not in own
    assert "rezero_hf" not in remote
    assert remote.count('"me/model", revision="COMMIT", trust_remote_code=True') == 2
    for snippet in (own, remote):
        compile(snippet, "card", "exec")


def test_the_template_ships_and_is_given_all_it_asks_for():
    """The template lies beside the code, and names no variable that rendering does not fill."""
    source = files("rezero_hf").joinpath("card_template.md").read_text(encoding="utf-8")
    asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
    with patch.object(ModelCard, "from_template") as rendered:
        render_card(recorded(), config())
    assert asked == rendered.call_args.kwargs.keys() - {"template_str"} | {"card_data"}


NOTICE = "CIFAR-10 states no licence and is meant for research."


def recorded_of_images(**changes):
    data = {
        "source": "hub:uoft-cs/cifar10",
        "origin": {"kind": "hub", "version": "0b27149"},
        "notice": NOTICE,
        "shape": [3, 32, 32],
        "classes": ["airplane", "cat"],
        "splits": {"train": 45000, "validation": 5000, "test": 10000},
        "augmentation": "crop_flip",
    }
    results = {"validation": {"loss": 0.31234567, "accuracy": 0.9123}, "test": {"loss": 0.33, "accuracy": 0.9056}}
    return {**recorded(name="resnet-20", data=data, results=results, tokens=None), **changes}


def test_an_image_classifiers_card_is_about_images():
    """Task, data set, its notice and accuracy are in metadata and text; nothing in it is about text or generating."""
    run = recorded_of_images()
    card = render_card(
        run, ReZeroResNetConfig.cifar(20, id2label={0: "airplane", 1: "cat"}), figures=["figures/loss.png"]
    )
    assert measured(card) == {
        (split, metric): value for split, values in run["results"].items() for metric, value in values.items()
    }
    data = ModelCard(str(card)).data
    assert (data.pipeline_tag, data.datasets, data.language) == ("image-classification", ["uoft-cs/cifar10"], None)
    for shown in (
        "An image classifier, a convolutional network with 9 residual layers",
        *("on CIFAR-10", "It names the most likely of 2 classes."),
        *("| test | 0.3300 | 0.9056 |", "loss (nats per image)", "![Loss (nats per image) during training]"),
        *(f"\n{NOTICE}\n", "| splits train | 45,000 |", "| classes | 2: airplane, cat |", "0b27149"),
    ):
        assert shown in card.text, shown
    for foreign in ("text", "token", "bits per byte", "prejudices", "Transformers\n", "None"):
        assert foreign not in card.text, foreign


@pytest.mark.parametrize("config", [ReZeroResNetConfig.cifar(8), ReZeroMLPConfig.paper()])
@pytest.mark.parametrize("field", [*recorded(), "all"])
def test_any_field_of_a_run_on_images_may_be_missing(config, field):
    """Leaving out one field, or the record, leaves no trace; a licence that nobody recorded is said to be unknown."""
    run = recorded_of_images() if field != "all" else {}
    run.pop(field, None)
    card = render_card(run or None, config)
    assert "None" not in str(card)
    assert ("licence of the training images was not recorded" in card.text) == (field in ("data", "all"))


def test_a_resnets_description_follows_its_configuration():
    """Equation, place of the last activation, BatchNorm, and the baselines that are initialisations."""
    norm_free = {"batch_norm": False, "stem_batch_norm": False}
    plain = {"residual": "plain"}
    for changes, says, tagged in (
        (
            {},
            ["`x + alpha * F(x)`", "is in F", "BatchNorm in every layer; BatchNorm after the stem", "starts at 0:"],
            False,
        ),
        (norm_free, ["no normalisation layer anywhere", "is its shortcut alone"], True),
        ({"residual": "gated", "gate_init": 0.5}, ["`alpha * F(x) + (1 - alpha) * x`", "starts at 0.5 ("], False),
        (plain, ["`x + F(x)`", "is on the sum", "a baseline for"], False),
        ({**plain, "initialization": "zero_gamma"}, ["zero-gamma", "has no gates"], False),
        ({**plain, "initialization": "fixup", "batch_norm": False}, ["by Fixup", "no normalisation layer"], True),
    ):
        card = render_card(None, ReZeroResNetConfig.cifar(8, **changes))
        assert all(words in card.text for words in says), (changes, says)
        assert ("norm-free" in card.data.tags) == tagged
        assert ("## Fine-tuning" in card.text) == (changes.get("residual") != "plain")
    for depth, branch in ((18, "two 3x3"), (50, "1x1, 3x3 and 1x1")):
        text = render_card(None, ReZeroResNetConfig.preact(depth)).text
        assert f"F ({branch} convolutions)" in text
        assert "Each convolution of F has its relu before it" in text


@pytest.mark.parametrize("residual", get_args(ReZeroMLPConfig.__annotations__["residual"]))
def test_a_fully_connected_nets_description_follows_its_configuration(residual):
    """As for language models: its form's equation, and gates and norms exactly when it has them."""
    form = RESIDUAL_FORMS[residual]
    card = render_card(None, ReZeroMLPConfig.paper(residual=residual, norm="rms"))
    assert f"`{form.__doc__.split('`')[1]}`" in card.text
    assert "a fully connected network with 32 hidden layers" in card.text
    assert form.has_gate == ("The gate alpha" in card.text)
    assert (not form.has_norm) == ("norm-free" in card.data.tags) == ("RMSNorm" not in card.text)


def test_only_what_is_code_is_trusted():
    """An image processor is Transformers' own: only the model is loaded with trust, and from a pinned commit."""
    text = render_card({"repo_id": "me/model"}, ReZeroMLPConfig.paper(num_channels=1)).text
    own, remote = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "trust_remote_code" not in own
    assert remote.count('"me/model", revision="COMMIT"') == 2
    assert remote.count("trust_remote_code=True") == 1
    assert own.count('Image.open("image.png").convert("L")') == remote.count('.convert("L")') == 1


@pytest.mark.parametrize("architecture", ["ReZeroForQuestionAnswering", "ReZeroResNetModel", "BertModel"])
def test_a_model_without_a_card_is_one_line(architecture):
    """Other heads, and models of others, are named, with what to do instead."""
    with pytest.raises(
        UserError, match=f"{architecture} has no model card; there is one for ReZeroForCausalLM"
    ) as caught:
        render_card(None, config(architectures=[architecture]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "task", "item"),
    [
        ("ReZeroForSequenceClassification", "text-classification", "text"),
        ("ReZeroForTokenClassification", "token-classification", "word"),
    ],
)
def test_the_card_of_a_text_classifier(head, task, item):
    """It says what it tells apart and how it is called, is measured by accuracy, and promises no text."""
    run = {"data": {"source": "stdlib-functions"}, "results": {"test": {"loss": 0.5, "accuracy": 0.75}}}
    card = render_card(run, config(architectures=[head], id2label={0: "nothing", 1: "a value"}))
    assert card.data.pipeline_tag == task
    # Of words the loss is one of batches, and changes with their size.
    shown = {metric: value for metric, value in run["results"]["test"].items() if metric != "loss" or item == "text"}
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == shown
    assert ("loss (nats per" in card.text) == (item == "text")
    text = " ".join(card.text.split())
    assert "It names the most likely of 2 classes" in text and "| classes | 2: nothing, a value |" in text
    assert f"Accuracy is the share of {item}s" in text
    assert card.text.count(f'pipeline("{task}", "USER/NAME"') == 2
    assert "Python Software Foundation License" in text
    assert "generate" not in text and "It writes" not in text and "Bits per byte" not in text


def test_images_are_measured_in_one_way():
    """A column that would be empty is not there."""
    evaluation = {"source": ["digits"], "results": {"test": {"loss": 0.5, "accuracy": 0.75, "images": 8}}}
    text = render_card({"evaluations": [evaluation]}, ReZeroMLPConfig.paper(num_channels=1)).text
    assert "| data | split | loss (nats per image) | accuracy | images |" in text
    assert "| digits | test | 0.5000 | 0.7500 | 8 |" in text
