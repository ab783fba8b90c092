"""The configuration: documented, derived, checked, and the same after a round trip through JSON."""

import ast
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from rezero_hf import ReZeroConfig
from rezero_hf.recipe import load_recipe
from rezero_hf.study_plan import load_study


ROOT = Path(__file__).parents[1]
OWN_FIELDS = {name: getattr(ReZeroConfig, name) for name in ReZeroConfig.__annotations__}

# Another value for every field, for the round trip.
CHANGED = {
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 77,
    "residual": "rezero_pre_norm",
    "gate_init": 0.5,
    "gate_sharing": "sublayer",
    "norm": "rms",
    "norm_eps": 1e-6,
    "final_norm": True,
    "qk_norm": True,
    "embedding_std": 0.5,
    "embedding_multiplier": 3.0,
    "initializer_range": 0.02,
    "output_init_scale": 0.1,
    "hidden_act": "relu",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
    "position_embedding": "learned",
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
    "embedding_dropout": 0.3,
    "is_causal": False,
    "tie_word_embeddings": True,
    "use_cache": False,
    "bos_token_id": 256,
    "eos_token_id": [256, 257],
    "pad_token_id": 257,
}


def test_every_field_is_documented_with_its_default():
    """The docstring names every field with its default; one it calls derived is None until the config is made."""
    entry = r"\b{}\b(?:,\s+\w+)*\s+\((?:`\w+`, )?default\s+([^,:]+?)[,:)]"
    for name, default in OWN_FIELDS.items():
        documented = re.search(entry.format(name), ReZeroConfig.__doc__)
        assert documented, f"{name} is not documented"
        try:
            value = ast.literal_eval(documented[1].strip("`"))
        except (ValueError, SyntaxError):
            value = None
        assert value == default, name
    named = re.findall(r"(\w+)\s+\((?:`\w+`, )?default", ReZeroConfig.__doc__)
    assert set(named) <= OWN_FIELDS.keys()


def test_the_default_is_a_norm_free_byte_model():
    """Without arguments: ReZero, closed gates shared as in the paper, no norm anywhere, rotary positions."""
    config = ReZeroConfig()
    assert (config.residual, config.gate_init, config.gate_sharing) == ("rezero", 0.0, "layer")
    assert not config.final_norm and not config.qk_norm
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 512, 2048)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({"hidden_size": 96, "num_attention_heads": 6}, {"head_dim": 16, "num_key_value_heads": 6}),
        ({"hidden_size": 768}, {"intermediate_size": 3072, "embedding_multiplier": 768**0.5}),
        # 3 * 2048 = 2 * 3072: a gated net of this width has as many parameters as a plain one.
        ({"hidden_size": 768, "gated_mlp": True}, {"intermediate_size": 2048}),
        ({"hidden_size": 208, "gated_mlp": True}, {"intermediate_size": 576}),
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ({"hidden_size": 30, "num_attention_heads": 4, "head_dim": 8}, {"head_dim": 8}),
        ({"gate_init": 1, "hidden_dropout": 0}, {"gate_init": 1, "hidden_dropout": 0}),
    ],
)
def test_what_is_not_said_is_derived(given, derived):
    """Sizes left out follow from the others, and what is given is kept."""
    config = ReZeroConfig(**given)
    assert {name: getattr(config, name) for name in derived} == derived


@pytest.mark.parametrize(("layers", "sizes"), [(12, (512, 2048, 256)), (64, (256, 1024, 128)), (128, (256, 1024, 128))])
def test_the_papers_sizes(layers, sizes):
    """`paper()` has section 4.2's sizes at every depth of its tables, and any field can be said over them."""
    config = ReZeroConfig.paper(num_hidden_layers=layers)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == sizes
    assert (config.num_hidden_layers, config.num_attention_heads, config.max_position_embeddings) == (layers, 2, 512)
    assert (config.hidden_act, config.hidden_dropout, config.attention_dropout) == ("gelu", 0.2, 0.2)
    assert (config.residual, config.gate_init, config.gate_sharing, config.final_norm) == ("rezero", 0, "layer", False)
    other = ReZeroConfig.paper(layers, hidden_dropout=0.0, residual="post_norm")
    assert (other.hidden_dropout, other.residual, other.attention_dropout) == (0.0, "post_norm", 0.2)


@pytest.mark.parametrize("study", ["norm_free", "norm_free_deep", "norm_free_256"])
def test_the_bounded_form_is_the_one_that_was_measured(study):
    """`bounded()` says what the row of the study of its size says, and any field can be said over it."""
    recipe = ROOT / "scripts" / "recipes" / f"{study}.yaml"
    size, measured = load_recipe(recipe).model, load_study(recipe)
    words = measured.rows[measured.ours].set
    layers, width = size["num_hidden_layers"], size["hidden_size"]
    config = ReZeroConfig.bounded(layers, hidden_size=width, num_attention_heads=1)
    measured = {key.removeprefix("model."): value for key, value in words.items() if key.startswith("model.")}
    assert {name: getattr(config, name) for name in measured} == measured
    assert (config.num_hidden_layers, config.hidden_size) == (layers, width)
    assert ReZeroConfig.bounded(24, hidden_size=64).gate_init == 0.125 and ReZeroConfig.bounded(2).gate_init == 0.5
    assert ReZeroConfig.bounded(layers, gate_init=0.1, hidden_size=64).gate_init == 0.1


def test_json_round_trip(tmp_path):
    """Every field, given another value, comes back from JSON, from a saved folder and from a saved folder saved again."""
    assert CHANGED.keys() == OWN_FIELDS.keys()
    assert all(CHANGED[name] != default for name, default in OWN_FIELDS.items())
    config = ReZeroConfig(**CHANGED)
    config.save_pretrained(tmp_path / "once")
    once = ReZeroConfig.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    config.to_json_file(tmp_path / "config.json")
    copies = [
        once,
        ReZeroConfig.from_pretrained(tmp_path / "twice"),
        ReZeroConfig.from_json_file(tmp_path / "config.json"),
    ]
    for copy in copies:
        assert {name: getattr(copy, name) for name in CHANGED} == CHANGED


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        *(
            (field, value, f"{field}={value}: must be at least 1.")
            for value in (0, -4)
            for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "max_position_embeddings")
        ),
        *(
            (field, value, f"{field}={value}: a dropout probability must be in [0, 1).")
            for value in (-0.1, 1.0, float("nan"))
            for field in ("attention_dropout", "hidden_dropout", "embedding_dropout")
        ),
        *(
            (field, value, f"{field}={value}: must be positive.")
            for value in (0.0, -1.0, float("nan"), float("inf"))
            for field in ("norm_eps", "embedding_std", "embedding_multiplier", "initializer_range")
        ),
        *(
            ("output_init_scale", value, f"output_init_scale={value}: must be a finite number, at least 0.")
            for value in (-0.1, float("nan"), float("inf"))
        ),
        ("output_init_scale", 0,
         "gate_init=0 with output_init_scale=0: alpha and F would both be 0 and hide each other's gradient for ever; "
         "give one of them another value."),
        ("gate_init", float("inf"), "gate_init=inf: must be a finite number; 0 is ReZero."),
        ("gate_init", float("nan"), "gate_init=nan: must be a finite number; 0 is ReZero."),
        ("num_key_value_heads", 3, "num_attention_heads=8 is not a multiple of num_key_value_heads=3."),
        ("head_dim", 5, "head_dim=5: rotary positions turn pairs of features, so it must be even."),
        ("num_attention_heads", 7,
         "hidden_size=512 is not a multiple of num_attention_heads=7; change one of them or set head_dim."),
        ("rope_parameters", {"rope_type": "roap"},
         "rope_parameters: rope_type='roap' is unknown; one of default, dynamic, linear, llama3, longrope, proportional, yarn."),
        ("rope_parameters", {"rope_type": [1]},
         "rope_parameters: rope_type=[1] is unknown; one of default, dynamic, linear, llama3, longrope, proportional, yarn."),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 500.0},
         "rope_parameters: Missing required keys in `rope_parameters` for 'rope_type'='linear': {'factor'}"),
        *(
            ("rope_parameters", {"rope_type": "default", "rope_theta": theta},
             f"rope_parameters: rope_theta={theta!r}: must be a positive number (in YAML, 1.0e+6).")
            for theta in ("1e6", -5.0, 0, True)
        ),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5},
         "rope_parameters: partial_rotary_factor=0.5 only works with rope_type='proportional'; leave it out."),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_one_line(field, value, says):
    """A number that cannot work is refused with one line that names field, value and way out."""
    with pytest.raises(StrictDataclassError) as caught:
        ReZeroConfig(**{field: value})
    assert str(caught.value).splitlines()[1:] == [f"    ValueError: {says}"]


def test_an_unknown_activation_lists_the_known_ones():
    """A typo in `hidden_act` is answered with the words there are."""
    with pytest.raises(StrictDataclassError, match=r"hidden_act='gleu' is unknown; one of gelu, .*relu.*silu"):
        ReZeroConfig(hidden_act="gleu")


@pytest.mark.parametrize("field", ["residual", "gate_sharing", "norm", "position_embedding"])
def test_an_unknown_word_lists_the_known_ones(field):
    """A typo in a word is answered with the words there are, the default among them."""
    with pytest.raises(StrictDataclassError) as caught:
        ReZeroConfig(**{field: "reszero"})
    last = str(caught.value).splitlines()[-1]
    assert re.fullmatch(rf"    TypeError: Field '{field}' expected one of \(.*\), got reszero", last)
    assert repr(OWN_FIELDS[field]) in last


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "512"), ("num_hidden_layers", 2.0), ("gate_init", "0"), ("final_norm", 1)]
)
def test_a_wrong_type_names_its_field(field, value):
    """A value of the wrong type is refused when the config is made and when it is set later."""
    says = rf"'{field}'.*\n.*{re.escape(repr(value)[:3])}"
    with pytest.raises(StrictDataclassError, match=says):
        ReZeroConfig(**{field: value})
    config = ReZeroConfig()
    with pytest.raises(StrictDataclassError, match=says):
        setattr(config, field, value)


def test_a_config_spoiled_later_is_not_saved(tmp_path):
    """The checks across fields run again at save, so a bad change does not reach a folder."""
    config = ReZeroConfig()
    config.num_key_value_heads = 3
    with pytest.raises(StrictDataclassError, match="is not a multiple of num_key_value_heads=3"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
