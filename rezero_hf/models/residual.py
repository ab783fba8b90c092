"""The residual forms: every way a branch `F` may join the stream `x`, one class and one line of forward each.

Table 1 and section 3 of "ReZero is All You Need" (arXiv 2003.04887), in its symbols: `x` is the stream, `f` the branch
(attention, feed-forward, convolutions), `N` a norm, `alpha` the gate. A model picks its class from `RESIDUAL_FORMS`
with one config word; no block has an `if` on the form.

One residual module serves all branches of a layer (a Transformer layer has two), because the paper shares one alpha
between attention and feed-forward, and two modules holding the same parameter would be a shared tensor that refuses to
be saved.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn

from .gating import gated


class Residual(nn.Module):
    """Base of the residual forms: owns the gates and the norms, subclasses say how they are used.

    Args:
        branches: names of the branches this module joins to the stream, in the order they are called.
        make_norm: builds one norm over the stream's features. Called once per branch by the forms that use norms,
            never by the others.
        gate_init: initial value of every gate. 0 is ReZero; 1 is the paper's ablation (a plain residual net at start).
        share_gate: one gate for all branches (the paper, section 4) or one for each.

    `alpha` has shape (1,) when shared, else (number of branches,); never 0-d, which FSDP refuses. It stays fp32 when
    the model is loaded in a 16-bit type (`_keep_in_fp32_modules_strict`) and is cast where it is used: a (1,)-shaped
    fp32 tensor would otherwise turn a bf16 stream into fp32.
    """

    has_gate: ClassVar[bool] = False
    has_norm: ClassVar[bool] = False
    # `x + ...`: taken away, a layer leaves the stream as it is.
    adds_to_stream: ClassVar[bool] = False

    def __init__(
        self,
        branches: Sequence[str],
        make_norm: Callable[[], nn.Module],
        gate_init: float = 0.0,
        share_gate: bool = True,
    ):
        super().__init__()
        self.branches = tuple(branches)
        self.gate_init = float(gate_init)
        if self.has_gate:
            # Branch -> place of its gate in alpha.
            self.places = {branch: 0 if share_gate else place for place, branch in enumerate(self.branches)}
            # A step of a bf16 gate would be rounded away, so a model that is built in bf16 has fp32 gates, too.
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.alpha = nn.Parameter(torch.full((1 + max(self.places.values()),), self.gate_init, dtype=dtype))
        if self.has_norm:
            self.norms = nn.ModuleDict({branch: make_norm() for branch in self.branches})

    def gate(self, branch: str, dtype: torch.dtype) -> torch.Tensor:
        """The gate of one branch as a scalar tensor in the stream's dtype."""
        return self.alpha.to(dtype)[self.places[branch]]

    def forward(self, x: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor], branch: str) -> torch.Tensor:
        """Join branch `f`, called `branch`, to the stream `x` of shape (..., features); the shape is kept."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"branches={self.branches}" + (f", gates={self.alpha.numel()}" if self.has_gate else "")


class ReZero(Residual):
    """`x + alpha * F(x)`, eq. 1 of the paper: no norm anywhere, the identity while alpha is 0."""

    has_gate = True
    adds_to_stream = True

    def forward(self, x, f, branch):
        return x + gated(self.gate(branch, x.dtype), f, x)


class ReZeroPreNorm(Residual):
    """`x + alpha * F(N(x))`: the gate on a pre-norm branch; still the identity while alpha is 0."""

    has_gate = True
    has_norm = True
    adds_to_stream = True

    def forward(self, x, f, branch):
        return x + gated(self.gate(branch, x.dtype), f, self.norms[branch](x))


class ReZeroTanh(Residual):
    """`x + alpha * F(2 tanh(x / 2))`: what a branch sees is bounded, value by value; no norm anywhere.

    Without it a branch's output is the next one's input, so a deep stream multiplies where a normalised one adds, and
    alpha has to stay small. It is Dynamic Tanh (arXiv 2503.10622) without the slope and the gains that it trains: a
    trained slope fell to 0 here and switched its branch off (model_cards/LOG.md, sections 6 and 14).
    """

    has_gate = True
    adds_to_stream = True

    def forward(self, x, f, branch):
        return x + gated(self.gate(branch, x.dtype), f, bounded(x))


class Gated(Residual):
    """`alpha * F(x) + (1 - alpha) * x`: the gated (highway) baseline of the paper's ResNets, with a scalar gate."""

    has_gate = True

    def forward(self, x, f, branch):
        return self.gate(branch, x.dtype) * f(x) + (1 - self.gate(branch, x.dtype)) * x


class PreNorm(Residual):
    """`x + F(N(x))`, row 4 of Table 1: GPT-2, Llama."""

    has_norm = True
    adds_to_stream = True

    def forward(self, x, f, branch):
        return x + f(self.norms[branch](x))


class PreTanh(Residual):
    """`x + F(2 tanh(x / 2))`: `ReZeroTanh` once alpha is a part of F."""

    adds_to_stream = True

    def forward(self, x, f, branch):
        return x + f(bounded(x))


class PostNorm(Residual):
    """`N(x + F(x))`, row 5 of Table 1: the original Transformer."""

    has_norm = True

    def forward(self, x, f, branch):
        return self.norms[branch](x + f(x))


class BranchNorm(Residual):
    """`x + N(F(x))`: what the paper calls GPT2-Norm, a norm on the branch's output."""

    has_norm = True
    adds_to_stream = True

    def forward(self, x, f, branch):
        return x + self.norms[branch](f(x))


class Plain(Residual):
    """`x + F(x)`, row 2 of Table 1: neither gate nor norm."""

    adds_to_stream = True

    def forward(self, x, f, branch):
        return x + f(x)


class NoSkip(Residual):
    """`F(x)`, row 1 of Table 1: a deep net without skips."""

    def forward(self, x, f, branch):
        return f(x)


class NoSkipNorm(Residual):
    """`N(F(x))`, row 3 of Table 1: a deep net without skips, normalised."""

    has_norm = True

    def forward(self, x, f, branch):
        return self.norms[branch](f(x))


def bounded(x: torch.Tensor) -> torch.Tensor:
    """`2 tanh(x / 2)`: x where it is small, never beyond 2. Of bounds 1, 2 and 4 the best (model_cards/LOG.md)."""
    if x.dtype.itemsize < 4:
        # What follows would lose the digits of a small x.
        return 2 * torch.tanh(x / 2)
    # The same, `4 sigmoid(x) - 2`, in less time on a CPU (model_cards/LOG.md, section 16).
    return torch.sigmoid(x).mul(4).sub_(2)


NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}

RESIDUAL_FORMS: dict[str, type[Residual]] = {
    "rezero": ReZero,
    "rezero_pre_norm": ReZeroPreNorm,
    "rezero_tanh": ReZeroTanh,
    "gated": Gated,
    "pre_norm": PreNorm,
    "pre_tanh": PreTanh,
    "post_norm": PostNorm,
    "branch_norm": BranchNorm,
    "plain": Plain,
    "none": NoSkip,
    "norm": NoSkipNorm,
}
