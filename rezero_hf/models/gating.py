"""What a gate costs: `alpha * F(x)`, with alpha's gradient read off the last matrix of F instead of off its output.

`alpha * (h W^T + b)` has `<G, W> + <g, b>` for alpha's gradient, with G and g those at W and b if alpha were 1. So the
output need not be kept: it is scaled where it lies, and h, which W's gradient takes anyway, is all that a step keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


RECORDERS = "transformers.utils.output_capturing"
# Device type -> values of x from which on fewer passes over them outweigh a step's further calls, of 0.2 ms a branch
# (model_cards/LOG.md, section 28). With fewer on a GPU it is calls that a step waits for.
LEAST_VALUES = {"cpu": 2**19, "cuda": 2**25}


class Branch:
    """A branch F as a layer hands it to its residual form: called, it is F(x), through its module and all of its hooks.

    Args:
        module: of the branch; called with the input, and with `project=False` for all but its last product.
        last: that product. After it the module has dropout alone, `module.dropout`.
        words: further arguments of the module.
    """

    def __init__(self, module: nn.Module, last: nn.Module, **words: Any):
        self.module, self.last, self.words = module, last, words

    def __call__(self, x: torch.Tensor, **words: Any) -> torch.Tensor:
        # Every product that takes x would make, and keep, a copy of its own.
        output = self.module(_as_products_take(x), **self.words, **words)
        return output[0] if isinstance(output, tuple) else output

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What the last product takes, of shape (..., last.in_features)."""
        # Some activations are in fp32 under autocast, and the backward pass is outside of it.
        return _as_products_take(self(x, project=False))

    def takes_gate(self, x: torch.Tensor) -> bool:
        """Whether `last` may take the gate for this input, which is large enough for that to pay (`LEAST_VALUES`).

        It has to be what it seems, a Linear whose own forward would be called with nothing around it: not sharded,
        quantised, adapted, offloaded or watched. Compilers fuse the plain form better.
        """
        module, last = self.module, self.last
        return (
            module.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            # Tangents, and a batch of gates, take the plain form, as a multiplication in place cannot.
            and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
            and _is_worth_it(x, getattr(last, "out_features", torch.inf))
            and module.dropout.p == 0
            and is_plain_linear(last)
            # Frozen, it has no gradient to read alpha's off.
            and last.weight.requires_grad
            and not _is_watched(module)
        )


class GatedLinear(torch.autograd.Function):
    """`alpha * (h W^T + b)`, of which only h is kept.

    Shapes: alpha (), h (..., in), W (out, in), b (out,) or None. W and b may have another dtype than h (autocast), in
    which the product is.
    """

    @staticmethod
    def forward(alpha, h, weight, bias):
        bias = None if bias is None else bias.to(h.dtype)
        return nn.functional.linear(h, weight.to(h.dtype), bias).mul_(alpha)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        alpha, h, weight, bias = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        at_weight = (rows.mT @ h.flatten(0, -2)).to(weight.dtype)
        at_bias = None if bias is None else rows.sum(0).to(bias.dtype)
        at_alpha = None
        if ctx.needs_input_grad[0]:
            at_alpha = _inner(at_weight, weight) + (0 if bias is None else _inner(at_bias, bias))
            at_alpha = at_alpha.to(alpha.dtype)
        at_bias = None if bias is None else alpha * at_bias
        # In place, unless this is to be differentiated once more.
        at_weight = alpha * at_weight if torch.is_grad_enabled() else at_weight.mul_(alpha)
        return at_alpha, (alpha * grad) @ weight.to(h.dtype), at_weight, at_bias


def gated(alpha: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`alpha * f(x)`; where `f` is a `Branch` that allows it, its last product takes the gate, with equal gradients.

    Args:
        alpha: the gate, 0-dimensional.
        f: the branch.
        x: its input, (..., features).
    """
    if isinstance(f, Branch) and f.takes_gate(x):
        return GatedLinear.apply(alpha, f.inner(x), f.last.weight, f.last.bias)
    return alpha * f(x)


def least_values(device_type: str) -> int:
    """Values of a branch's input from which on its last product takes the gate; other accelerators are as GPUs."""
    return LEAST_VALUES.get(device_type, LEAST_VALUES["cuda"])


def _is_worth_it(x: torch.Tensor, out_features: int) -> bool:
    # Fewer tokens than that, and <G, W> takes longer than the output's own sum (measured on a CPU).
    return x.numel() >= max(2 * x.shape[-1] * out_features, least_values(x.device.type))


def _inner(a, b):
    # Not `dot`, whose last bits depend on where its vectors lie in memory: a resumed run would drift from a whole one.
    return (a * b).sum()


def _as_products_take(x: torch.Tensor) -> torch.Tensor:
    # Tensors without data are not of a type that torch can ask for; fp64 it leaves as it is.
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a Linear, and its own forward what is called, with nothing around it.

    Sharded and quantised weights are wrapped; an offloaded module has a forward of its own.
    """
    return (
        type(module) is nn.Linear
        and not is_traceable_wrapper_subclass(module.weight)
        and "forward" not in vars(module)
        and not _is_watched(module)
    )


def _is_watched(module: nn.Module) -> bool:
    # The library's recorders, which stay for good once hidden states were asked for, look at what else a branch gives.
    hooks = [hook for hook in module._forward_hooks.values() if hook.__module__ != RECORDERS]
    own = hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _has_any_global_hook())


__all__ = ["LEAST_VALUES", "Branch", "GatedLinear", "gated", "is_plain_linear", "least_values"]
