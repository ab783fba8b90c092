"""The configuration of the residual networks: presets, derived words, refusals of one line, JSON and back."""

import ast
import re

import pytest
from huggingface_hub.errors import StrictDataclassError

from rezero_hf import ReZeroResNetConfig


OWN_FIELDS = {name: getattr(ReZeroResNetConfig, name) for name in ReZeroResNetConfig.__annotations__}
PLAIN = {"residual": "plain"}


def test_every_field_is_documented_with_its_default():
    """The docstring names every field of the class, and no other, each with its default."""
    documented = dict(re.findall(r"(\w+) \((?:`[^`]+`, )?default (`\S+`|\(.+?\)|\w+)", ReZeroResNetConfig.__doc__))
    assert {name: ast.literal_eval(default.strip("`")) for name, default in documented.items()} == OWN_FIELDS


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({}, {"activation_position": "branch", "stem_batch_norm": True}),
        ({"residual": "gated", "batch_norm": False}, {"activation_position": "branch", "stem_batch_norm": True}),
        (PLAIN, {"activation_position": "sum", "stem_batch_norm": True}),
        ({**PLAIN, "activation_position": "branch"}, {"activation_position": "branch"}),
        ({**PLAIN, "initialization": "fixup", "batch_norm": False}, {"stem_batch_norm": False}),
        ({"layer_type": "preact"}, {"activation_position": None, "stem_batch_norm": False}),
        ({"depths": (1, 2), "hidden_sizes": (16, 16)}, {"depths": [1, 2], "num_hidden_layers": 3}),
        ({"gate_init": 1}, {"gate_init": 1}),
    ],
)
def test_what_is_not_said_is_derived(given, derived, tmp_path):
    """Words left out follow from the others, what is given is kept, and both come back from a file."""
    config = ReZeroResNetConfig(**given)
    config.save_pretrained(tmp_path)
    for made in (config, ReZeroResNetConfig.from_pretrained(tmp_path)):
        assert {name: getattr(made, name) for name in derived} == derived
        assert made.to_dict() == config.to_dict()


@pytest.mark.parametrize("depth", [8, 20, 56, 110, 1202])
def test_a_cifar_preset_has_its_depth(depth):
    """Stem, classifier and two convolutions in each residual layer are `depth` layers with weights."""
    config = ReZeroResNetConfig.cifar(depth, residual="gated")
    assert 2 * config.num_hidden_layers + 2 == depth
    assert (config.hidden_sizes, config.residual, config.num_labels) == ([16, 32, 64], "gated", 10)


@pytest.mark.parametrize(("depth", "convolutions", "last"), [(18, 2, 512), (34, 2, 512), (50, 3, 2048)])
def test_a_preact_preset_has_its_depth(depth, convolutions, last):
    """The same, with two or three convolutions in each residual layer, and the stem of 64 channels."""
    config = ReZeroResNetConfig.preact(depth, id2label={0: "cat", 1: "dog", 2: "fox"})
    assert convolutions * config.num_hidden_layers + 2 == depth
    assert (config.embedding_size, config.hidden_sizes[-1], config.num_labels) == (64, last, 3)


REFUSED = {
    "num_channels=0: must be at least 1.": {"num_channels": 0},
    "depths=[3, 0, 3]: needs one number per stage, each at least 1.": {"depths": [3, 0, 3]},
    "hidden_sizes=[]: needs one number per stage, each at least 1.": {"hidden_sizes": [], "depths": []},
    "hidden_sizes=[16, 32, 64] and depths=[3, 3] must name the same number of stages.": {"depths": [3, 3]},
    "embedding_size=32 and hidden_sizes=[16, 32, 64] shrink": {"embedding_size": 32},
    "hidden_sizes=[16, 32, 63]: must be multiples of 4": {
        "layer_type": "preact_bottleneck",
        "hidden_sizes": [16, 32, 63],
    },
    "hidden_act='rleu' is unknown; one of ": {"hidden_act": "rleu"},
    "gate_init=nan: must be a finite number; 0 is ReZero.": {"gate_init": float("nan")},
    "activation_position='sum' is for layer_type='basic'": {"layer_type": "preact", "activation_position": "sum"},
    "stem_batch_norm=True is for layer_type='basic'": {"layer_type": "preact", "stem_batch_norm": True},
    "initialization='zero_gamma' with residual='rezero': a branch": {"initialization": "zero_gamma"},
    "initialization='fixup' with residual='gated': a branch": {
        "initialization": "fixup",
        "residual": "gated",
        "batch_norm": False,
    },
    "initialization='zero_gamma' with activation_position='branch': the branch": {
        **PLAIN,
        "initialization": "zero_gamma",
        "activation_position": "branch",
    },
    "initialization='zero_gamma' is about a BatchNorm's gamma": {
        **PLAIN,
        "initialization": "zero_gamma",
        "batch_norm": False,
    },
    "initialization='zero_gamma' with layer_type='preact'": {
        **PLAIN,
        "initialization": "zero_gamma",
        "layer_type": "preact",
    },
    "initialization='fixup' is for nets without BatchNorm: use batch_norm=False": {**PLAIN, "initialization": "fixup"},
    "initialization='fixup' is for nets without BatchNorm: use batch_norm=False and no stem_batch_norm.": {
        **PLAIN,
        "initialization": "fixup",
        "batch_norm": False,
        "stem_batch_norm": True,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_contradictions_are_refused_in_one_line(message):
    """The line names the fields, their values and the way out."""
    with pytest.raises(StrictDataclassError) as refusal:
        ReZeroResNetConfig(**REFUSED[message])
    assert str(refusal.value.__cause__).startswith(message)
    assert "\n" not in str(refusal.value.__cause__)


def test_its_number_of_layers_is_said_by_depths():
    with pytest.raises(ValueError, match="num_hidden_layers=3: is the sum of depths; give depths"):
        ReZeroResNetConfig(num_hidden_layers=3)


@pytest.mark.parametrize("wrong", [{"residual": "pre_norm"}, {"layer_type": "bottleneck"}, {"initialization": "zero"}])
def test_an_unknown_word_is_refused(wrong):
    """A form, a layer type or an initialisation that is not offered raises and names the field."""
    with pytest.raises(StrictDataclassError, match=next(iter(wrong))):
        ReZeroResNetConfig(**wrong)


def test_a_depth_without_a_preset_is_refused():
    """The line says which depths there are."""
    for depth in (2, 18, 55):
        with pytest.raises(ValueError, match=rf"^depth={depth}: a CIFAR ResNet has 6n \+ 2 layers: 8, 14, 20, "):
            ReZeroResNetConfig.cifar(depth)
    with pytest.raises(ValueError, match=r"^depth=20: a pre-activation ResNet has 18, 34, 50 layers\.$"):
        ReZeroResNetConfig.preact(20)
