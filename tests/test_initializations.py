"""How residual networks start: closed branches, and the weights of zero-gamma, Fixup and the default rule."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_modeling_rezero_resnet import GATED, IMAGES, LABELS, new, switched_on
from test_parity_resnet import conv, option_a

from rezero_hf import ReZeroResNetForImageClassification


CLOSED = [*GATED, "zero gamma", "fixup", "preact fixup", "bottleneck fixup"]


def std(tensor):
    return tensor.std().item()


@pytest.mark.parametrize("kind", CLOSED)
def test_a_new_layer_is_its_shortcut(kind):
    """ReZero, gated, zero-gamma and Fixup: bit for bit the identity, or the shortcut where the shape changes.

    With the activation on the sum, its relu, which is the identity on a stream that is one already.
    """
    model = new(kind).double()
    streams = model.model(IMAGES, output_hidden_states=True).hidden_states
    for layer, stream in zip(model.model.layers, streams[:-1], strict=True):
        # A stream that is its own relu, or any.
        x = stream.relu() if model.config.activation_position == "sum" else torch.randn_like(stream)
        if layer.shortcut is None:
            assert torch.equal(layer(x), x)
        elif model.config.layer_type == "basic":
            assert torch.equal(layer(x), option_a(x, layer(x).shape[1], layer.shortcut.stride))
        else:
            assert torch.equal(layer(x), conv(layer.entry(x), layer.state_dict(), "shortcut", stride=2))


@pytest.mark.parametrize("kind", ["plain", "preact plain", "rezero"])
def test_an_open_layer_is_not_its_shortcut(kind):
    """A plain net, and ReZero with alpha = 1 (the paper's ablation), start with their branches on."""
    model = new(kind, gate_init=1).double()
    streams = model.model(IMAGES, output_hidden_states=True).hidden_states
    for layer, x in zip(model.model.layers, streams[:-1], strict=True):
        stream = x if layer.shortcut is None else layer.shortcut(layer.entry(x))
        joined = stream + layer.branch(layer.entry(x))
        torch.testing.assert_close(layer(x), joined.relu() if kind == "plain" else joined)
        assert layer.branch(layer.entry(x)).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("kind", "m", "channels"), [("fixup", 2, 16), ("preact fixup", 2, 16), ("bottleneck fixup", 3, 64)]
)
def test_fixup_is_drawn_by_its_rules(kind, m, channels):
    """Last convolution and classifier 0, the others L^(-1/(2m-2)) of Kaiming's scale, scales 1, biases 0; the loss is ln 5."""
    model = new(kind, embedding_size=channels, hidden_sizes=[channels, 2 * channels], depths=[5, 5])
    for name, parameter in model.named_parameters():
        kaiming = (2 / (parameter[:, 0].numel())) ** 0.5 if parameter.ndim == 4 else None
        if name.startswith("classifier") or name.endswith((f"conv{m}.weight", ".bias")):
            assert not parameter.any(), name
        elif name.endswith(".scale"):
            assert torch.equal(parameter, torch.ones(1))
        elif ".branch." in name:
            assert std(parameter) == pytest.approx(10 ** (-1 / (2 * m - 2)) * kaiming, rel=0.15), name
        else:
            assert std(parameter) == pytest.approx(kaiming, rel=0.15), name
    assert model(IMAGES.float(), labels=LABELS).loss.item() == pytest.approx(math.log(5))


def test_zero_gamma_changes_only_the_last_gammas():
    """From the same seed every other parameter is that of the plain net, to the bit; the last gammas are 0."""
    plain, zeroed = new("plain").state_dict(), new("zero gamma").state_dict()
    assert plain.keys() == zeroed.keys()
    for name, value in plain.items():
        if name.endswith("branch.norm.weight"):
            assert value.all() and not zeroed[name].any()
        else:
            assert torch.equal(value, zeroed[name]), name


@pytest.mark.parametrize("kind", ["rezero", "preact rezero"])
def test_default_statistics(kind):
    """Convolutions by Kaiming's normal rule (fan out), or torch's own in a PreAct net; norms 1, the classifier in torch's
    own range, alpha `gate_init`."""
    model = new(kind, embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], gate_init=0.25)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            assert torch.equal(parameter, torch.full((1,), 0.25))
        elif parameter.ndim == 4:
            fan_in, fan_out = parameter[0].numel(), parameter[:, 0].numel()
            variance = 1 / (3 * fan_in) if kind.startswith("preact") else 2 / fan_out
            assert std(parameter) == pytest.approx(variance**0.5, rel=0.15), name
        elif name.startswith("classifier"):
            assert 0.5 / 8 < parameter.abs().max() <= 1 / 8
        else:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight"))), name


@pytest.mark.parametrize("kind", ["rezero", "zero gamma", "fixup"])
def test_what_a_checkpoint_lacks_is_drawn_by_the_same_rules(kind, tmp_path):
    """A missing convolution, norm or gate starts as in a new model; what is there keeps its value."""
    switched_on(kind, gate_init=0.5).float().save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1."
    missing = {name: kept.pop(name) for name in list(kept) if name.startswith(prefix)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = ReZeroResNetForImageClassification.from_pretrained(tmp_path).state_dict()
    started = new(kind, gate_init=0.5).state_dict()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    assert any("conv1" in name for name in missing)
    for name, value in missing.items():
        assert not torch.equal(loaded[name], value), name
        if started[name].ndim == 4 and started[name].any():
            assert std(loaded[name]) == pytest.approx(std(started[name]), rel=0.3), name
        else:
            assert torch.equal(loaded[name], started[name]), name
