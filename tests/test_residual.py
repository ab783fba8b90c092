"""Every residual form is its equation, and nothing more: no hidden norm, no hidden gate, one call of the branch."""

import pytest
import torch
from torch import nn

from rezero_hf.models.residual import RESIDUAL_FORMS


WIDTH = 6
BRANCHES = ("attn", "mlp")

# The paper's Table 1, written again: x the stream, f the branch, norm the branch's own norm, a its gate.
EQUATIONS = {
    "rezero": lambda x, f, norm, a: x + a * f(x),
    "rezero_pre_norm": lambda x, f, norm, a: x + a * f(norm(x)),
    "rezero_tanh": lambda x, f, norm, a: x + a * f(2 * torch.tanh(x / 2)),
    "gated": lambda x, f, norm, a: a * f(x) + (1 - a) * x,
    "pre_tanh": lambda x, f, norm, a: x + f(2 * torch.tanh(x / 2)),
    "pre_norm": lambda x, f, norm, a: x + f(norm(x)),
    "post_norm": lambda x, f, norm, a: norm(x + f(x)),
    "branch_norm": lambda x, f, norm, a: x + norm(f(x)),
    "plain": lambda x, f, norm, a: x + f(x),
    "none": lambda x, f, norm, a: f(x),
    "norm": lambda x, f, norm, a: norm(f(x)),
}
GATED = {"rezero", "rezero_pre_norm", "rezero_tanh", "gated"}
NORMED = {"rezero_pre_norm", "pre_norm", "post_norm", "branch_norm", "norm"}

every_form = pytest.mark.parametrize("form", EQUATIONS)
both_sharings = pytest.mark.parametrize("share_gate", [True, False])
gated_forms = pytest.mark.parametrize("form", sorted(GATED))


def layer_norm(x, weight, bias):
    """LayerNorm from its definition."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


class Branch(nn.Module):
    """A nonlinear map that counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.linear(x)) + 0.3


def build(form, share_gate=True, gate_init=0.0, branches=BRANCHES):
    """A residual module with norms and gates of random values, and the norms it asked for."""
    torch.manual_seed(0)
    made = []

    def make_norm():
        made.append(nn.LayerNorm(WIDTH))
        return made[-1]

    module = RESIDUAL_FORMS[form](branches, make_norm, gate_init=gate_init, share_gate=share_gate).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module, made


def stream():
    return torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_table_has_every_form():
    """Every word of the configuration is held to an equation below."""
    assert EQUATIONS.keys() == RESIDUAL_FORMS.keys()


@both_sharings
@every_form
def test_a_form_is_its_equation(form, share_gate):
    """Both branches join by the form's equation, each with its own norm and gate, and each runs once."""
    module, norms = build(form, share_gate)
    x = stream()
    for index, name in enumerate(BRANCHES):
        branch = Branch()
        alpha = module.alpha[0 if share_gate else index] if form in GATED else None
        own = norms[index] if form in NORMED else None
        norm = (lambda y, own=own: layer_norm(y, own.weight, own.bias)) if own else None
        expected = EQUATIONS[form](x, branch, norm, alpha)
        branch.calls = 0
        torch.testing.assert_close(module(x, branch, branch=name), expected, rtol=1e-12, atol=1e-12)
        assert branch.calls == 1


@both_sharings
@every_form
def test_a_form_owns_only_what_its_equation_names(form, share_gate):
    """Gates only where an alpha stands, of shape (1,) or (branches,), never 0-d; one norm a branch only where an N stands."""
    module, norms = build(form, share_gate)
    gates = {name: tuple(p.shape) for name, p in module.named_parameters() if "alpha" in name}
    assert gates == ({"alpha": (1,) if share_gate else (2,)} if form in GATED else {})
    assert len(norms) == (2 if form in NORMED else 0)
    assert len(list(module.parameters())) == len(gates) + 2 * len(norms)


@gated_forms
def test_a_new_gate_is_gate_init(form):
    """Every gate starts at exactly `gate_init`, 0 when nothing is said."""
    norm = lambda: nn.LayerNorm(WIDTH)  # noqa: E731
    for share_gate in (True, False):
        new = RESIDUAL_FORMS[form](BRANCHES, norm, gate_init=0.25, share_gate=share_gate)
        assert torch.equal(new.alpha, torch.full_like(new.alpha, 0.25))
    assert torch.equal(RESIDUAL_FORMS[form](BRANCHES, norm).alpha, torch.zeros(1))


@both_sharings
@gated_forms
def test_a_closed_gate_is_the_identity_and_hears_its_branch(form, share_gate):
    """At alpha = 0 the stream passes bit for bit, the branch gets no gradient, and alpha's is <dL/dx, F> (<dL/dx, F - x> when gated)."""
    module, norms = build(form, share_gate)
    nn.init.zeros_(module.alpha)
    x, branches = stream(), [Branch(), Branch()]
    y = module(module(x, branches[0], "attn"), branches[1], "mlp")
    assert torch.equal(y, x)

    upstream = torch.randn_like(y)
    (y * upstream).sum().backward()
    seen = {"rezero_tanh": 2 * torch.tanh(x / 2)}.get(form, x)
    inputs = [norm(x) if form in NORMED else seen for norm in (norms or BRANCHES)]
    closed = x if form == "gated" else 0
    heard = torch.stack([(upstream * (f(x_in) - closed)).sum() for f, x_in in zip(branches, inputs, strict=True)])
    torch.testing.assert_close(module.alpha.grad, heard.sum(0, keepdim=True) if share_gate else heard)
    assert all(torch.count_nonzero(f.linear.weight.grad) == 0 for f in branches)


@gated_forms
def test_a_fp32_gate_leaves_a_bf16_stream_in_bf16(form):
    """An fp32 alpha is cast where it is used: the stream stays bf16, alpha and its gradient fp32."""
    module, _ = build(form)
    module = module.to(torch.bfloat16)
    module.alpha.data = module.alpha.data.float()
    y = module(stream().bfloat16(), lambda x: 2 * x, "attn")
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.alpha.grad.dtype == torch.float32
    assert module.alpha.grad != 0


@pytest.mark.parametrize("branches", [("conv",), ("attn", "cross", "mlp")])
@every_form
def test_any_number_of_branches(form, branches):
    """The same module serves blocks of one branch and of three."""
    module, norms = build(form, share_gate=False, branches=branches)
    x, branch = stream(), Branch()
    for index, name in enumerate(branches):
        alpha = module.alpha[index] if form in GATED else None
        expected = EQUATIONS[form](x, branch, norms[index] if norms else None, alpha)
        torch.testing.assert_close(module(x, branch, branch=name), expected)
