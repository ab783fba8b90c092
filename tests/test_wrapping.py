"""`ReZero(module)` gates any module of a user's own: its equation, its start, and everything that must find the gate."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from transformers import Trainer

from rezero_hf import ReZero, gates, parameter_groups
from rezero_hf.callbacks import gate_values


def block(gate_init=0.5):
    """Two wrapped layers inside a user's own network; the second changes the width."""
    torch.manual_seed(0)
    first = ReZero(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), gate_init=gate_init)
    return nn.Sequential(first, ReZero(nn.Linear(4, 6), shortcut=nn.Linear(4, 6, bias=False), gate_init=gate_init))


def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_it_is_its_equation():
    """`x + alpha * F(x)`, and `shortcut(x) + alpha * F(x)`."""
    first, second = net = block()
    y = x() + 0.5 * torch.relu(x() @ first.branch[0].weight.T + first.branch[0].bias)
    y = y @ second.shortcut.weight.T + 0.5 * (y @ second.branch.weight.T + second.branch.bias)
    torch.testing.assert_close(net(x()), y)


def test_a_new_one_is_its_shortcut_and_hears_its_branch():
    """At alpha = 0 the output is the shortcut's, bit for bit; alpha's gradient is <dL/dy, F(x)>, the branch's is 0."""
    layer = block(gate_init=0.0)[1]
    y = layer(x())
    assert torch.equal(y, layer.shortcut(x())) and torch.equal(layer.residual_norm.alpha, torch.zeros(1))
    y.square().sum().backward()
    torch.testing.assert_close(layer.residual_norm.alpha.grad, (2 * y * layer.branch(x())).sum().view(1))
    assert not layer.branch.weight.grad.any() and layer.shortcut.weight.grad.any()


def test_everything_finds_its_gate():
    """Optimiser groups, the log and, by exempting it from decay, the stock Trainer know it by the same name."""
    net = nn.ModuleDict({"blocks": block()})
    names = {"blocks.0.residual_norm.alpha", "blocks.1.residual_norm.alpha"}
    assert set(gates(net)) == names and all(alpha.shape == (1,) for alpha in gates(net).values())
    assert gate_values(net) == {name: [0.5] for name in names}
    groups = {g["name"]: g for g in parameter_groups(net, lr=1.0, weight_decay=0.1, gate_lr_multiplier=3.0)}
    assert {id(p) for p in groups["gates"]["params"]} == {id(p) for p in gates(net).values()}
    assert (groups["gates"]["lr"], groups["gates"]["weight_decay"]) == (3.0, 0.0)
    decayed = Trainer.get_decay_parameter_names(None, net)
    assert set(decayed) == {"blocks.0.branch.0.weight", "blocks.1.branch.weight", "blocks.1.shortcut.weight"}


def test_self_attention():
    """A tuple's first element joins the stream, the rest comes along; further arguments go to the module."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    layer, tokens = ReZero(attention, gate_init=0.5), torch.randn(2, 5, 4)
    mask = torch.zeros(2, 5, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
    y, weights = layer(tokens, tokens, tokens, key_padding_mask=mask)
    expected, expected_weights = attention(tokens, tokens, tokens, key_padding_mask=mask)
    torch.testing.assert_close(y, tokens + 0.5 * expected)
    assert torch.equal(weights, expected_weights) and not weights[..., 4].any()
    y, (hidden, cell) = ReZero(nn.LSTM(4, 4, batch_first=True), gate_init=0.5)(tokens)
    assert y.shape == tokens.shape and hidden.shape == cell.shape == (1, 2, 4)


def test_copies_and_states_are_whole():
    """A deep copy is independent, and a state dict carries the gate."""
    net, closed = block(), block(gate_init=0.0)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x()), net(x()))
    nn.init.zeros_(twin[0].residual_norm.alpha)
    assert not torch.equal(twin(x()), net(x()))
    closed.load_state_dict(net.state_dict())
    assert torch.equal(closed(x()), net(x()))


def test_16_bit():
    """Cast as a whole it stays in bf16; an fp32 gate beside bf16 weights keeps its gradient; autocast keeps the stream fp32."""
    net = block().to(torch.bfloat16)
    assert net(x().bfloat16()).dtype == torch.bfloat16
    alpha = net[0].residual_norm.alpha
    alpha.data = alpha.data.float()
    y = net(x().bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and alpha.grad.dtype == torch.float32 and alpha.grad
    with torch.autocast("cpu", torch.bfloat16):
        assert block()[0](x()).dtype == torch.float32


def test_compiled():
    """In one graph, with the same output and gate gradients."""
    torch._dynamo.reset()
    net = block()
    outputs, heard = [], []
    for forward in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        outputs.append(forward(x()))
        outputs[-1].square().sum().backward()
        heard.append([alpha.grad.clone() for alpha in gates(net).values()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*heard)
    with torch.inference_mode():
        assert torch.equal(net(x()), outputs[0])


class Wide(nn.Module):
    def forward(self, x):
        return {"hidden": x}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReZero(nn.ReLU), r"^module=<class .*ReLU'> is not an nn.Module: pass an instance, not its class or a function\.$"),
        (lambda: ReZero(nn.ReLU(), shortcut=torch.relu), r"^shortcut=<built-in .*> is not an nn.Module"),
        (lambda: ReZero(nn.Linear(4, 1))(x()), r"^Linear made \(3, 1\) where the shortcut has \(3, 4\); pass a shortcut"),
        (lambda: ReZero(Wide())(x()), r"^Wide returned dict; ReZero joins a tensor"),
        (lambda: ReZero(nn.Sequential(nn.ReLU(inplace=True)))(x()), r"^Sequential changed its input in place"),
        (lambda: ReZero(nn.LSTM(4, 4))(pack_sequence([x()])), r"^PackedSequence is no tensor"),
        (lambda: ReZero(nn.ReLU(), gate_init=float("nan")), r"^gate_init=nan: must be a finite number"),
    ],
    ids=["a class", "a function", "another shape", "no tensor", "in place", "packed", "nan"],
)  # fmt: skip
def test_what_it_cannot_wrap(make, message):
    """A class, a function, a shape that would broadcast, what is no tensor, a branch that overwrites x: one line each."""
    with pytest.raises(ValueError, match=message):
        make()
