"""ReZero for modules of your own: any `nn.Module` becomes a residual branch that starts switched off."""

import math
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .models.residual import RESIDUAL_FORMS


class ReZero(nn.Module):
    """`x + alpha * module(x)`, or `shortcut(x) + alpha * module(x)` where the branch changes the shape.

    alpha is `residual_norm.alpha`, of shape (1,), whatever it is inside of (`blocks.0.residual_norm.alpha`): by that
    name `parameter_groups` and `gates` find it, evaluations log it, and Transformers' Trainer never decays its weight.

    Args:
        module: the branch F, whose parameters are at `branch`. Draw it as for any net, but not with zeros: at
            alpha = 0 its output is all that alpha can learn from, so a branch of zeros stays switched off for ever.
            It must leave its input as it is: a leading `nn.ReLU(inplace=True)` would change x itself.
        shortcut: what to do with x, a strided convolution or a pooling for instance; None passes it on as it is.
        gate_init: initial alpha. 0 makes the whole exactly its shortcut (eq. 1 of arXiv 2003.04887).

    `.to(torch.bfloat16)` casts alpha with everything else. Then steps below its 8 bits are lost: train in fp32, under
    autocast if you like. An alpha kept in fp32 beside 16-bit weights is cast where it is used and keeps its gradient.
    """

    def __init__(self, module: nn.Module, shortcut: nn.Module | None = None, gate_init: float = 0.0):
        super().__init__()
        for name, value in (("module", module), ("shortcut", shortcut)):
            if not isinstance(value, nn.Module) and not (value is None and name == "shortcut"):
                raise UserError(f"{name}={value!r} is not an nn.Module: pass an instance, not its class or a function.")
        if not isinstance(gate_init, int | float) or not math.isfinite(gate_init):
            raise UserError(f"gate_init={gate_init!r}: must be a finite number; 0 is ReZero.")
        self.branch = module
        self.shortcut = shortcut
        self.residual_norm = RESIDUAL_FORMS["rezero"](("branch",), make_norm=nn.Identity, gate_init=gate_init)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple:
        """Join the branch to x.

        Args:
            x: what the shortcut and the branch take, of any shape.
            args, kwargs: passed on to the module after x. Self-attention is `ReZero(attention)(x, x, x)`.

        Returns:
            The sum; or, from a module that returns a tuple (attention, recurrent nets), the tuple with the sum in
            place of its first element.

        Raises:
            UserError: x is no tensor; or the module changed it in place, returned something else, or made another shape
                than the shortcut.
        """
        if not isinstance(x, torch.Tensor):
            raise UserError(f"{type(x).__name__} is no tensor that a branch's output could be added to: pass one.")
        version = self._version(x)
        output = self.branch(x, *args, **kwargs)
        if self._version(x) != version:
            raise UserError(f"{type(self.branch).__name__} changed its input in place; pass inplace=False inside it.")
        f, *rest = output if isinstance(output, tuple) else (output,)
        stream = x if self.shortcut is None else self.shortcut(x)
        self._check(f, stream)
        y = self.residual_norm(stream, lambda _: f, branch="branch")
        return (y, *rest) if isinstance(output, tuple) else y

    @staticmethod
    def _version(x: torch.Tensor) -> int:
        """How often x was written to, where torch counts that: a compiler and inference mode do not."""
        return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version

    def _check(self, f: Any, stream: Any) -> None:
        name = type(self.branch).__name__
        if not isinstance(f, torch.Tensor):
            raise UserError(
                f"{name} returned {type(f).__name__}; ReZero joins a tensor, or the first element of a tuple, to its "
                "input: wrap the module so that it returns one."
            )
        # They would broadcast, to a sum that nobody meant.
        if f.shape != stream.shape:
            raise UserError(
                f"{name} made {tuple(f.shape)} where the shortcut has {tuple(stream.shape)}; pass a shortcut that "
                "makes the same shape."
            )
