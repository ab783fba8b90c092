"""A model as it generates fastest: each product with one token as this machine takes it best, and fewer of them.

With one row a product only reads its matrix, and how fast depends on the library behind it and on how the matrix lies
in memory. In fp32 MKL reads a matrix of 2048 to 512 features in 0.43 ms as torch keeps it, (out, in), and in 0.22 the
other way round; on another machine both ways take as long. In bf16 oneDNN, which torch calls for a Linear, takes up to
twice the time of the kernel behind `torch.addmv`. So nothing is assumed; the shapes of the model are measured.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn

from .models.embeddings import rotate
from .models.modeling_rezero import ReZeroAttention
from .turns import by_turns, ratios


# How much of its time a product must save, by the median of turns.
GAIN = 0.03
# What is joined, in the order of its rows.
PARTS = ("q_proj", "k_proj", "v_proj")


class OneRowLinear(nn.Linear):
    """A Linear that takes one row as a product of a matrix and a vector, and anything else as ever."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Autocast, which casts for a Linear, does not cast for these, and a matrix quantised since is no plain one.
        weight, device = self.weight, x.device.type
        if x.numel() != self.in_features or type(weight) is not nn.Parameter or torch.is_autocast_enabled(device):
            return super().forward(x)
        return one_row(x, weight, self.bias)


class JointAttention(ReZeroAttention):
    """Attention whose queries, keys and values are one product, `qkv_proj`. Its state has the three, as ever."""

    @classmethod
    def join(cls, attention: ReZeroAttention) -> None:
        """Change the class of an attention in place, and its three projections into one."""
        linears = [getattr(attention, part) for part in PARTS]
        attention.widths = [linear.out_features for linear in linears]
        joint = nn.Linear(
            linears[0].in_features, sum(attention.widths), bias=linears[0].bias is not None, device="meta"
        )
        for name, first in linears[0].named_parameters():
            values = torch.cat([linear.get_parameter(name).detach() for linear in linears])
            joint.register_parameter(name, nn.Parameter(values, requires_grad=first.requires_grad))
        for part in PARTS:
            delattr(attention, part)
        attention.qkv_proj = joint.train(attention.training)
        attention.__class__ = cls
        attention.register_state_dict_post_hook(cls._part)
        attention.register_load_state_dict_pre_hook(cls._joined)

    def heads(self, x, position_embeddings):
        joint = self.qkv_proj(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
        query, key, value = (width // self.head_dim for width in self.widths)
        turned, value = joint.split((query + key, value), dim=1)
        if position_embeddings is not None:
            turned = rotate(turned, *position_embeddings)
        return *turned.split((query, key), dim=1), value

    @staticmethod
    def _part(attention, state, prefix, local_metadata):
        for name, _ in attention.qkv_proj.named_parameters():
            values = state.pop(f"{prefix}qkv_proj.{name}").split(attention.widths)
            # Copies: what is saved must not share memory.
            parts = {f"{prefix}{part}.{name}": value for part, value in zip(PARTS, values, strict=True)}
            state.update({part: value.clone(memory_format=torch.contiguous_format) for part, value in parts.items()})

    @staticmethod
    def _joined(attention, state, prefix, *_):
        for name, _ in attention.qkv_proj.named_parameters():
            parts = [f"{prefix}{part}.{name}" for part in PARTS]
            if all(part in state for part in parts):
                state[f"{prefix}qkv_proj.{name}"] = torch.cat([state.pop(part) for part in parts])


@torch.no_grad()
def pack_for_decoding(model: nn.Module, seconds: float = 0.4) -> nn.Module:
    """Make a model generate faster on this machine. It computes what it did, to the last bits of its precision.

    Queries, keys and values of this package's attention become one product (without `qk_norm`): fewer and larger ones,
    on any device. On a CPU the matrices of each shape are then measured with one row: as they lie or turned over in
    memory, as torch takes a Linear or as a product of a matrix and a vector; what is fastest stays. That takes a copy
    of the matrices for a moment. Saved, the model has the names, shapes and values that it had. Adapters look for
    projections by their names: merge them first.

    Args:
        model: of any library; changed in place. Linears that are not what they seem (quantised, sharded, adapted,
            watched by hooks) stay.
        seconds: of measuring for each shape; default two fifths of a second.

    Returns:
        the model.
    """
    for module in list(model.modules()):
        if (
            type(module) is ReZeroAttention
            and module.q_norm is None
            and all(_is_plain(getattr(module, part)) for part in PARTS)
        ):
            JointAttention.join(module)
    shapes = defaultdict(list)
    for module in model.modules():
        if _is_plain(module) and module.weight.device.type == "cpu":
            shapes[(module.weight.shape, module.weight.dtype, module.bias is not None)].append(module)
    for linears in shapes.values():
        _as_fastest(linears, seconds)
    return model


def one_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` of one row, (..., 1, in) -> (..., 1, out), W being (out, in)."""
    x, shape = x.reshape(-1), (*x.shape[:-1], len(weight))
    return (torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)).view(shape)


def _as_fastest(linears: list[nn.Linear], seconds: float) -> None:
    """Measure all ways to take Linears of one shape, and change them to the fastest."""
    now = [linear.weight.detach() for linear in linears]
    biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
    turned = [_turned(weight) for weight in now]
    # The first is what is there.
    ways = [(product, weights) for product in (nn.functional.linear, one_row) for weights in (now, turned)]
    x = torch.randn(1, 1, linears[0].in_features, dtype=now[0].dtype)
    costs = by_turns(
        {str(place): partial(_seconds, product, x, weights, biases) for place, (product, weights) in enumerate(ways)},
        seconds,
    )
    gains = [median(ratios(cost, costs["0"])) for cost in costs.values()]
    best = min(range(len(ways)), key=gains.__getitem__)
    if gains[best] > 1 - GAIN:
        return
    product, weights = ways[best]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data = weight
        if product is one_row:
            linear.__class__ = OneRowLinear


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a Linear and nothing else."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """The same matrix, whose columns lie together where its rows did, or the other way round."""
    return weight.contiguous() if weight.T.is_contiguous() else weight.T.contiguous().T


def _seconds(
    product: Callable, x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> float:
    start = time.perf_counter()
    for weight, bias in zip(weights, biases, strict=True):
        product(x, weight, bias)
    return time.perf_counter() - start
