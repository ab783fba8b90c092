"""Fully connected nets: every form is the notebook's net written out, at any depth, and ten thousand layers are no trouble.

At alpha = 0 most equivalences hold for any code, so only what is said about the start is tested there.
"""

import json
from fnmatch import fnmatch
from typing import get_args

import pytest
import torch
import transformers
from conftest import switch_on
from huggingface_hub.errors import StrictDataclassError
from test_portable import finish, start
from torch.nn.functional import cross_entropy, layer_norm
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, Trainer

from rezero_hf import (
    RESIDUAL_FORMS,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroMLPModel,
    gates,
    parameter_groups,
)


TINY = {"image_size": 4, "hidden_size": 8, "num_hidden_layers": 7, "num_labels": 5}

# The paper's Table 1, written again: x the stream, f the branch, n the layer's norm, a its gate.
EQUATIONS = {
    "rezero": lambda x, f, n, a: x + a * f(x),
    "rezero_pre_norm": lambda x, f, n, a: x + a * f(n(x)),
    "rezero_tanh": lambda x, f, n, a: x + a * f(2 * torch.tanh(x / 2)),
    "pre_tanh": lambda x, f, n, a: x + f(2 * torch.tanh(x / 2)),
    "pre_norm": lambda x, f, n, a: x + f(n(x)),
    "post_norm": lambda x, f, n, a: n(x + f(x)),
    "branch_norm": lambda x, f, n, a: x + n(f(x)),
    "plain": lambda x, f, n, a: x + f(x),
    "none": lambda x, f, n, a: f(x),
    "norm": lambda x, f, n, a: n(f(x)),
}
every_form = pytest.mark.parametrize("residual", EQUATIONS)
gated_forms = pytest.mark.parametrize("residual", ["rezero", "rezero_pre_norm", "rezero_tanh"])


def make(model_class=ReZeroMLPForImageClassification, **changes):
    """A small model in eval mode, every alpha, bias and norm at a value of its own unless `gate_init` is passed."""
    torch.manual_seed(0)
    model = model_class(ReZeroMLPConfig(**{**TINY, **changes})).eval()
    if "gate_init" not in changes:
        switch_on(model)
    return model


def images(batch=3, size=4, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def labels():
    return torch.tensor([0, 4, 2])


def written_out(model, pixel_values):
    """The authors' notebook, from the weights by name: the stream before each layer and after the last, and the logits."""
    w = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.relu(pixel_values.flatten(1) @ w["model.stem.weight"].T + w["model.stem.bias"])
    streams = [x]
    for i in range(model.config.num_hidden_layers):
        own = {name.removeprefix(f"model.layers.{i}."): p for name, p in w.items() if f".layers.{i}." in name}
        gain, shift = (own.get(f"residual_norm.norms.mlp.{kind}") for kind in ("weight", "bias"))
        x = EQUATIONS[model.config.residual](
            x,
            lambda y, own=own: torch.relu(y @ own["linear.weight"].T + own["linear.bias"]),
            lambda y, gain=gain, shift=shift: layer_norm(y, y.shape[-1:], gain, shift),
            own.get("residual_norm.alpha"),
        )
        streams.append(x)
    return streams, x @ w["classifier.weight"].T + w["classifier.bias"]


def gradients(model, **kwargs):
    model.zero_grad()
    model(images(), labels=labels(), **kwargs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def saved_bytes(model):
    """What a training step's forward keeps for its backward, without the weights."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        # Held, so that no address is used twice.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(images()).logits
    del output
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


def test_the_table_has_every_form():
    """Every word of the configuration is a form that `residual.py` knows, and held to an equation below."""
    assert set(get_args(ReZeroMLPConfig.__annotations__["residual"])) == EQUATIONS.keys() <= RESIDUAL_FORMS.keys()


@pytest.mark.parametrize("fresh", [True, False], ids=["new", "switched on"])
@every_form
def test_a_model_is_the_notebooks_net_written_out(residual, fresh):
    """Stream by stream and to the logits, with the weights it starts from and with every gate, bias and norm moved."""
    model = make(residual=residual, **({"gate_init": 0} if fresh else {})).double()
    x = images().double()
    streams, logits = written_out(model, x)
    output = model(x, output_hidden_states=True)
    torch.testing.assert_close(output.logits, logits, rtol=1e-10, atol=1e-10)
    assert len(output.hidden_states) == TINY["num_hidden_layers"] + 1
    for stream, expected in zip(output.hidden_states, streams, strict=True):
        torch.testing.assert_close(stream, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 32, 500])
@gated_forms
def test_a_new_net_is_its_stem(residual, layers):
    """At any depth `last_hidden_state` is what the stem makes of the image, bit for bit."""
    model = make(ReZeroMLPModel, residual=residual, num_hidden_layers=layers, gate_init=0)
    stem = torch.relu(torch.nn.functional.linear(images().flatten(1), model.stem.weight, model.stem.bias))
    assert torch.equal(model(images()).last_hidden_state, stem)


@pytest.mark.parametrize(
    ("residual", "least", "most"),
    [("none", 0.75, 1.25), ("norm", 0.99, 1.01), ("post_norm", 0.99, 1.01), ("pre_norm", 17, 17**2), ("plain", 1.3**16, 1.53**16)],
)  # fmt: skip
def test_the_scale_a_stream_starts_with(residual, least, most):
    """Second moment after 16 layers: 1 without skips and after norms; pre-norm adds 1 a layer, plain multiplies by 1.5.

    More than that where branches add up in step, as those of ReLU do: they are never negative.
    """
    model = make(ReZeroMLPModel, residual=residual, hidden_size=512, num_hidden_layers=16, image_size=16, gate_init=0)
    assert least < model(images(64, 16)).last_hidden_state.pow(2).mean().item() < most


@every_form
def test_initial_statistics(residual):
    """Kaiming's stem, hidden variance gain^2 / width, the head's a third of 1 / width; biases 0, norms 1, alpha gate_init."""
    model = make(residual=residual, hidden_size=256, image_size=8, num_hidden_layers=3, num_labels=50, gate_init=0.3)
    gain = 0.5 if residual == "plain" else 2**0.5
    assert model.config.initializer_gain == gain
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            assert torch.equal(parameter, torch.tensor([0.3]))
        elif name.endswith("bias"):
            assert not parameter.any()
        elif ".norms." in name:
            assert (parameter == 1).all()
        else:
            expected = {"model.stem.weight": (2 / 192) ** 0.5, "classifier.weight": (3 * 256) ** -0.5}
            assert parameter.std().item() == pytest.approx(expected.get(name, gain / 16), rel=0.03), name
    wider = make(ReZeroMLPModel, hidden_size=256, initializer_gain=3.0)
    assert wider.layers[0].linear.weight.std().item() == pytest.approx(3 / 16, rel=0.03)


def test_what_learns_first():
    """The first backward reaches stem, head and every alpha, but no hidden layer; the second reaches all."""
    model = make(gate_init=0)
    for name, gradient in gradients(model).items():
        assert bool(gradient.any()) != ("linear" in name), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(gradient.any() for gradient in gradients(model).values())


def test_gates_are_grouped_and_never_decayed():
    """One gate a layer, in its own group; by its name, with norms and biases, it is out of the stock Trainer's decay too."""
    model = make(residual="rezero_pre_norm", final_norm=True)
    names = {f"model.layers.{i}.residual_norm.alpha" for i in range(7)}
    matrices = {"model.stem.weight", "classifier.weight", *(f"model.layers.{i}.linear.weight" for i in range(7))}
    groups = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(model, lr=1.0)}
    assert set(gates(model)) == names and all(alpha.shape == (1,) for alpha in gates(model).values())
    assert groups["gates"] == {id(p) for name, p in model.named_parameters() if name in names}
    assert groups["matrices"] == {id(p) for name, p in model.named_parameters() if name in matrices}
    assert set(Trainer.get_decay_parameter_names(None, model)) == matrices


def test_loss():
    """Mean cross-entropy in nats per image; a count of the images in all accumulated batches divides the sum instead."""
    model = make()
    expected = cross_entropy(model(images()).logits, labels())
    torch.testing.assert_close(model(images(), labels=labels()).loss, expected)
    torch.testing.assert_close(model(images(), labels=labels(), num_items_in_batch=12).loss, expected / 4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layers", [1, 7, 9])
def test_checkpointing_changes_no_gradient(layers, use_reentrant):
    """Whether or not the depth divides into segments, loss and gradients are the same to the last bit."""
    model = make(num_hidden_layers=layers).train()
    plain = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    again = gradients(model)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert all(torch.equal(again[name], gradient) and gradient.any() for name, gradient in plain.items())


def test_checkpointing_keeps_hidden_states():
    """Each stream is returned once, though the backward pass makes them again."""
    model = make().train()
    plain = model(images(), output_hidden_states=True).hidden_states
    model.activation_checkpointing_enable()
    output = model(images(), labels=labels(), output_hidden_states=True)
    output.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, plain, strict=True))


def test_memory_is_the_same_for_every_layer():
    """A layer keeps its input and its branch's output, at depth 100 as at 400; checkpointed, memory grows as the root."""
    depths = (100, 200, 400)
    shallow, middle, deep = (saved_bytes(make(num_hidden_layers=depth)) for depth in depths)
    assert middle - shallow == 100 * 2 * 3 * TINY["hidden_size"] * 4
    assert deep - middle == 2 * (middle - shallow)
    checkpointed = []
    for depth in depths:
        model = make(num_hidden_layers=depth)
        model.activation_checkpointing_enable()
        checkpointed.append(saved_bytes(model))
    assert checkpointed[2] - checkpointed[0] == 10 * 3 * TINY["hidden_size"] * 4


def test_ten_thousand_layers(tmp_path):
    """They build, learn in every layer, are saved and loaded, and then give the same logits to the last bit."""
    model = make(num_hidden_layers=10_000, gate_init=0).train()
    model(images(), labels=labels()).loss.backward()
    torch.optim.Adagrad(parameter_groups(model, lr=1e-4)).step()
    assert all(alpha.item() for alpha in gates(model).values())
    model.eval().save_pretrained(tmp_path)
    loaded = ReZeroMLPForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_a_compiled_step_is_one_graph_with_the_same_gradients():
    """Forward and loss without a graph break."""
    torch._dynamo.reset()
    model = make(residual="rezero_pre_norm")
    plain = gradients(model)
    compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(list(compiled.values()), list(plain.values()), rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_gates_whole(tmp_path):
    """Loaded in bf16 it takes fp32 images and computes in bf16, with every alpha still fp32."""
    model = make()
    model.save_pretrained(tmp_path)
    half = ReZeroMLPForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(alpha, gates(model)[name]) for name, alpha in gates(half).items())
    logits = half(images()).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(images()).logits, rtol=0.1, atol=0.1)


@every_form
def test_the_sharding_plan_names_modules_that_are_there(residual):
    """Each layer is a shard, and so are norms beside a gate, which stays fp32."""
    model = make(ReZeroMLPModel, residual=residual)
    names = [name for name, _ in model.named_modules()]
    matched = {rule: sum(fnmatch(name, rule) for name in names) for rule in model.config.base_model_fsdp_plan}
    assert all(matched.values()) and ("layers.*.residual_norm.norms.mlp" in matched) == (residual == "rezero_pre_norm")


REMOTE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
assert AutoConfig.from_pretrained(folder, **remote).model_type == "rezero_mlp"
images = torch.load(folder + "/images.pt")
model = AutoModelForImageClassification.from_pretrained(folder, **remote)
assert type(model).__module__.startswith("transformers_modules."), type(model)
stream = AutoModel.from_pretrained(folder, **remote)(images).last_hidden_state
torch.save((model(images).logits, stream), out)
"""


def test_a_saved_folder_loads_with_and_without_the_package(tmp_path):
    """By its Auto classes where the package is imported, by its own code where there is none: the same numbers."""
    model, folder = make(residual="norm"), tmp_path / "model"
    model.save_pretrained(folder)
    torch.save(images(), folder / "images.pt")
    finish(start(tmp_path, REMOTE, folder, tmp_path / "out.pt"))
    logits, stream = torch.load(tmp_path / "out.pt")
    assert torch.equal(logits, model(images()).logits)
    assert torch.equal(stream, model.model(images()).last_hidden_state)

    assert type(AutoConfig.from_pretrained(folder)) is ReZeroMLPConfig
    assert type(AutoModel.from_pretrained(folder)) is ReZeroMLPModel
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is ReZeroMLPForImageClassification
    assert torch.equal(loaded(images()).logits, logits)
    sources = {"configuration_rezero_mlp.py", "modeling_rezero_mlp.py", "gating.py", "portable.py", "residual.py"}
    assert {file.name for file in folder.glob("*.py")} == sources
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_rezero_mlp.ReZeroMLPConfig",
        "AutoModel": "modeling_rezero_mlp.ReZeroMLPModel",
        "AutoModelForImageClassification": "modeling_rezero_mlp.ReZeroMLPForImageClassification",
    }


def test_the_configuration_survives_a_save(tmp_path):
    """Also a gain that is another form's default."""
    for changes in ({}, {"residual": "plain"}, {"residual": "plain", "initializer_gain": 2**0.5}, {"num_labels": 10}):
        config = ReZeroMLPConfig(**changes)
        config.save_pretrained(tmp_path)
        again = ReZeroMLPConfig.from_pretrained(tmp_path)
        assert (again.initializer_gain, again.num_labels) == (config.initializer_gain, config.num_labels)


def test_the_papers_nets():
    """Ten classes, 32 layers of width 256; ten thousand of width 150; any field over that."""
    config = ReZeroMLPConfig.paper()
    assert (config.num_labels, config.num_hidden_layers, config.hidden_size) == (10, 32, 256)
    assert ReZeroMLPConfig.paper(10_000).hidden_size == 150
    config = ReZeroMLPConfig.paper(64, hidden_size=64, residual="none", id2label={0: "cat", 1: "dog", 2: "ship"})
    assert (config.num_labels, config.hidden_size, config.residual) == (3, 64, "none")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 0), ("image_size", 0), ("initializer_gain", 0.0), ("norm_eps", -1.0), ("gate_init", float("nan")),
     ("hidden_act", "rleu"), ("residual", "rezreo"), ("norm", "batch")],
)  # fmt: skip
def test_a_bad_word_names_its_field(field, value):
    """The error says which field it is and what it was."""
    with pytest.raises(StrictDataclassError, match=field) as error:
        ReZeroMLPConfig(**{field: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (images(3, 6), r"shape \(3, 3, 6, 6\), but image_size=4 and num_channels=3 ask for \(batch, 3, 4, 4\)"),
        (images()[0], r"shape \(3, 4, 4\), but"),
        (images(3, 4, 1), r"shape \(3, 1, 4, 4\), but"),
        ((images() * 9).byte(), r"dtype torch\.uint8, so these are raw pixels"),
    ],
)
def test_images_it_cannot_take(pixel_values, message):
    """Wrong size, no batch, wrong channels, raw pixels: one line with what came and what is asked for."""
    with pytest.raises(ValueError, match=message):
        make()(pixel_values)


def test_the_library_knows_the_task():
    """Pipelines check a model's name against their task, and this one is there."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    assert names["rezero_mlp"] == "ReZeroMLPForImageClassification"
