"""Every residual network is its papers' equations, written again in torch's functions; the two share no code."""

import math
from itertools import pairwise

import torch
from test_modeling_rezero_resnet import IMAGES, every_kind, switched_on
from torch.nn import functional as F


def batch_norm(x, w, name):
    """From its definition, with the running statistics; the identity where the net has none of that name."""
    if f"{name}.weight" not in w:
        return x
    mean, var, gamma, beta = (
        w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * gamma + beta


def conv(x, w, name, stride=1):
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def option_a(x, channels, stride):
    """Every `stride`-th pixel of the old channels, zeros in the new ones."""
    x = x[:, :, ::stride, ::stride]
    return torch.cat([x, x.new_zeros(len(x), channels - x.shape[1], *x.shape[2:])], dim=1)


# x the stream, z the branch before its last activation, a the gate.
JOINED = {
    ("rezero", "branch"): lambda x, z, a: x + a * z.relu(),
    ("rezero", "sum"): lambda x, z, a: (x + a * z).relu(),
    ("gated", "branch"): lambda x, z, a: a * z.relu() + (1 - a) * x,
    ("gated", "sum"): lambda x, z, a: (a * z + (1 - a) * x).relu(),
    ("plain", "branch"): lambda x, z, a: x + z.relu(),
    ("plain", "sum"): lambda x, z, a: (x + z).relu(),
    ("rezero", None): lambda x, z, a: x + a * z,
    ("gated", None): lambda x, z, a: a * z + (1 - a) * x,
    ("plain", None): lambda x, z, a: x + z,
}


def basic_layer(x, w, join, channels, stride):
    """He et al. 2015: conv, norm, relu, conv, norm; shortcut of option A."""
    z = batch_norm(conv(x, w, "branch.conv1", stride), w, "branch.act1.norm").relu()
    z = batch_norm(conv(z, w, "branch.conv2"), w, "branch.norm")
    return join(option_a(x, channels, stride), z, w.get("residual_norm.alpha"))


def preact_layer(x, w, join, channels, stride):
    """He et al. 2016: norm, relu, conv, twice; a changed shape takes a 1x1 convolution of the first relu."""
    first = batch_norm(x, w, "entry.norm").relu()
    z = conv(first, w, "branch.conv1", stride)
    z = conv(batch_norm(z, w, "branch.act1.norm").relu(), w, "branch.conv2")
    shortcut = conv(first, w, "shortcut", stride) if "shortcut.weight" in w else x
    return join(shortcut, z, w.get("residual_norm.alpha"))


def bottleneck_layer(x, w, join, channels, stride):
    """The same with 1x1, 3x3 and 1x1 convolutions, the stride in the second, a quarter as wide between them."""
    first = batch_norm(x, w, "entry.norm").relu()
    z = conv(first, w, "branch.conv1")
    assert z.shape[1] == channels // 4
    z = conv(batch_norm(z, w, "branch.act1.norm").relu(), w, "branch.conv2", stride)
    z = conv(batch_norm(z, w, "branch.act2.norm").relu(), w, "branch.conv3")
    shortcut = conv(first, w, "shortcut", stride) if "shortcut.weight" in w else x
    return join(shortcut, z, w.get("residual_norm.alpha"))


def fixup_basic_layer(x, w, join, channels, stride):
    """Zhang et al. 2019: a scalar bias before each convolution, relu and sum, and one scale; no norm."""
    biased = x + w["entry.shift.bias"]
    z = (conv(biased, w, "branch.conv1", stride) + w["branch.act1.norm.bias"]).relu()
    z = conv(z + w["branch.act1.shift.bias"], w, "branch.conv2") * w["branch.norm.scale"] + w["branch.norm.bias"]
    changes = stride > 1 or channels != x.shape[1]
    return (z + (option_a(biased, channels, stride) if changes else x)).relu()


def fixup_preact_layer(x, w, join, channels, stride):
    """The same scalars around the pre-activation layer's convolutions."""
    first = (x + w["entry.norm.bias"]).relu() + w["entry.shift.bias"]
    z = (conv(first, w, "branch.conv1", stride) + w["branch.act1.norm.bias"]).relu()
    z = conv(z + w["branch.act1.shift.bias"], w, "branch.conv2") * w["branch.norm.scale"] + w["branch.norm.bias"]
    return z + (conv(first, w, "shortcut", stride) if "shortcut.weight" in w else x)


def fixup_bottleneck_layer(x, w, join, channels, stride):
    """And around a bottleneck's three."""
    first = (x + w["entry.norm.bias"]).relu() + w["entry.shift.bias"]
    z = (conv(first, w, "branch.conv1") + w["branch.act1.norm.bias"]).relu()
    z = (conv(z + w["branch.act1.shift.bias"], w, "branch.conv2", stride) + w["branch.act2.norm.bias"]).relu()
    z = conv(z + w["branch.act2.shift.bias"], w, "branch.conv3") * w["branch.norm.scale"] + w["branch.norm.bias"]
    return z + (conv(first, w, "shortcut", stride) if "shortcut.weight" in w else x)


LAYERS = {
    ("basic", "batch norm"): basic_layer,
    ("preact", "batch norm"): preact_layer,
    ("preact_bottleneck", "batch norm"): bottleneck_layer,
    ("basic", "fixup"): fixup_basic_layer,
    ("preact", "fixup"): fixup_preact_layer,
    ("preact_bottleneck", "fixup"): fixup_bottleneck_layer,
}


def reference(model, x):
    """Logits of the whole net, from its state dict and the functions above."""
    config, w = model.config, model.state_dict()
    fixup = config.initialization == "fixup"
    layer = LAYERS[config.layer_type, "fixup" if fixup else "batch norm"]
    x = conv(x, w, "model.stem.conv")
    if config.layer_type == "basic":
        x = (x + w["model.stem.norm.bias"] if fixup else batch_norm(x, w, "model.stem.norm")).relu()
    channels = [c for c, depth in zip(config.hidden_sizes, config.depths, strict=True) for _ in range(depth)]
    for index, (before, after) in enumerate(pairwise([channels[0], *channels])):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        join = JOINED[config.residual, config.activation_position]
        x = layer(x, own, join, after, 1 if before == after else 2)
    pooled = x.sum((2, 3)) / math.prod(x.shape[2:]) + (w["shift.bias"] if fixup else 0)
    return pooled @ w["classifier.weight"].T + w["classifier.bias"]


@every_kind
def test_a_net_is_its_equations(kind):
    """Form, gate position, norms, scalars, shortcuts, strides, pooling and head: the reference's logits."""
    model = switched_on(kind)
    torch.testing.assert_close(model(IMAGES).logits, reference(model, IMAGES), rtol=1e-9, atol=1e-9)


def test_a_gated_layer_is_the_highway_equation():
    """alpha F(x) + (1 - alpha) x with one scalar alpha: at 0 the stream, at 1 the branch alone, in between both."""
    layer = switched_on("gated").model.layers[1]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    f = layer.branch(x)
    for alpha in (0.0, 0.3, 1.0):
        torch.nn.init.constant_(layer.residual_norm.alpha, alpha)
        torch.testing.assert_close(layer(x), alpha * f + (1 - alpha) * x)
