"""A model as it generates fastest: each product with one token as this machine takes it best, and fewer of them.

With one row a product only reads its matrix, and how fast depends on the library behind it and on how the matrix lies
in memory. In fp32 MKL reads a matrix of 2048 to 512 features in 0.43 ms as torch keeps it, (out, in), and in 0.22 the
other way round; on another machine both ways take as long. In bf16 oneDNN, which torch calls for a Linear, takes up to
twice the time of the kernel behind `torch.addmv`. So nothing is assumed; the shapes of the model are measured.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .models.embeddings import rotate
from .models.gating import is_plain_linear
from .models.modeling_rezero import ReZeroAttention
from .turns import Spread, by_turns, ratios


# How much of its time a product must save, by the median of turns.
GAIN = 0.03
# What is joined, in the order of its rows.
PARTS = ("q_proj", "k_proj", "v_proj")
# Whose products a CPU has both ways.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class OneRowLinear(nn.Linear):
    """A Linear that takes one row as a product of a matrix and a vector, and anything else as ever."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = (
            # Compilers do better by themselves, and may not know how many rows there are.
            not torch.compiler.is_compiling()
            and x.numel() == self.in_features
            # A matrix quantised since is no plain one, and its library may know a Linear's product alone.
            and type(self.weight) is nn.Parameter
            # Autocast, which casts for a Linear, does not cast for these; tensors without data it does not know.
            and not (x.is_meta or torch.is_autocast_enabled(x.device.type))
        )
        return one_row(x, self.weight, self.bias) if plain else super().forward(x)


class JointAttention(ReZeroAttention):
    """Attention that generates with one product for queries, keys and values.

    The three projections stay what they are, but that their matrices lie one below the other in a larger one. It takes
    their place while that holds, they are plain Linears that nobody watches, and no gradient is wanted.
    """

    @classmethod
    def join(cls, attention: ReZeroAttention) -> nn.Linear:
        """Change the class of an attention in place; returns the Linear that is all three, which is no submodule."""
        linears = [getattr(attention, part) for part in PARTS]
        widths = [linear.out_features for linear in linears]
        joint = nn.Linear(linears[0].in_features, sum(widths), bias=linears[0].bias is not None, device="meta")
        for name, _ in linears[0].named_parameters():
            values = torch.cat([linear.get_parameter(name).detach() for linear in linears])
            joint.register_parameter(name, nn.Parameter(values, requires_grad=False))
            for linear, rows in zip(linears, values.split(widths), strict=True):
                linear.get_parameter(name).data = rows
        # In a tuple, where torch does not look for modules.
        attention.joint = joint, [(part, linear, _rows(linear, joint)) for part, linear in _named(attention)]
        attention.__class__ = cls
        return joint

    def heads(self, x, position_embeddings):
        joint, parts = self.joint
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._holds():
            return super().heads(x, position_embeddings)
        query, key, value = (linear.out_features // self.head_dim for _, linear, _ in parts)
        heads = joint(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
        turned, value = heads.split((query + key, value), dim=1)
        if position_embeddings is not None:
            turned = rotate(turned, *position_embeddings)
        return *turned.split((query, key), dim=1), value

    def _holds(self) -> bool:
        """Whether the joint matrix still is what the three are. Asked for every token: all by dictionaries."""
        joint, parts = self.joint
        for part, linear, rows in parts:
            if (
                self._modules[part] is not linear
                or linear._forward_hooks
                or linear._forward_pre_hooks
                # Offloaded.
                or "forward" in vars(linear)
            ):
                return False
            for name, parameter, distance in rows:
                whole = joint._parameters[name]
                if linear._parameters[name] is not parameter or parameter.data_ptr() - whole.data_ptr() != distance:
                    return False
        return not _has_any_global_hook()


@torch.no_grad()
def pack_for_decoding(model: nn.Module, seconds: float = 0.4) -> nn.Module:
    """Make a model generate faster on this machine. It computes what it did, to the last bits of its precision.

    Queries, keys and values of this package's attention become one product (without `qk_norm`): fewer and larger ones,
    on any device. On a CPU the matrices of each shape are then measured with one row: as they lie or turned over in
    memory, as torch takes a Linear or as a product of a matrix and a vector. What is fastest stays, turned over only if
    eight rows take no longer so. That takes a copy of the matrices for a moment.

    Names, shapes and values stay, and what is saved. Pack last: a model that is moved or cast afterwards, or given
    adapters, computes what it should but takes three products again, and one that trains does without the gate in
    weight space (`gating.py`).

    Args:
        model: of any library; changed in place. Linears that are not what they seem (quantised, sharded, offloaded,
            watched by hooks) stay.
        seconds: of measuring for each shape; default two fifths of a second.

    Returns:
        the model.
    """
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    shapes: dict[tuple, list[nn.Linear]] = defaultdict(list)
    joined = set()
    for module in model.modules():
        if type(module) is OneRowLinear:
            # Packed before: on another machine maybe, or in another dtype.
            module.__class__ = nn.Linear
    for module in model.modules():
        if type(module) in (ReZeroAttention, JointAttention) and _can_join(module):
            joint = JointAttention.join(module)
            shapes[_kind(joint, turns=False)].append(joint)
            joined |= {id(linear) for _, linear in _named(module)}
    for module in model.modules():
        if is_plain_linear(module) and id(module) not in joined:
            # What is shared, as with a tied embedding, could not be saved if it were turned over.
            shapes[_kind(module, turns=owners[id(module.weight)] == 1)].append(module)
    with torch.autocast("cpu", enabled=False):
        for (_, dtype, device, _, turns), linears in shapes.items():
            if device == "cpu" and dtype in DTYPES:
                _take_fastest(linears, turns, seconds)
    return model


def one_row(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` of one row, (..., 1, in) -> (..., 1, out), W being (out, in)."""
    x, shape = x.reshape(-1), (*x.shape[:-1], len(weight))
    return (torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)).view(shape)


def _named(attention: ReZeroAttention) -> list[tuple[str, nn.Linear]]:
    return [(part, getattr(attention, part)) for part in PARTS]


def _can_join(attention: ReZeroAttention) -> bool:
    linears = [linear for _, linear in _named(attention)]
    return (
        attention.q_norm is None
        and all(map(is_plain_linear, linears))
        and len({(linear.weight.dtype, linear.weight.device, linear.bias is None) for linear in linears}) == 1
    )


def _rows(linear: nn.Linear, joint: nn.Linear) -> list[tuple[str, nn.Parameter, int]]:
    """Its parameters, by name, and how far they lie in memory from those of the whole."""
    return [
        (name, parameter, parameter.data_ptr() - joint.get_parameter(name).data_ptr())
        for name, parameter in linear.named_parameters()
    ]


def _kind(linear: nn.Linear, turns: bool) -> tuple:
    """What Linears that are measured together have in common; whether they may be turned over, at the end."""
    weight = linear.weight
    return weight.shape, weight.dtype, weight.device.type, linear.bias is not None, turns


def _take_fastest(linears: list[nn.Linear], turns: bool, seconds: float) -> None:
    """Measure the ways to take Linears of one shape, and change them to the best."""
    now = [linear.weight.detach() for linear in linears]
    biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
    as_ever = nn.functional.linear
    # Product and matrices; the first is what is there.
    ways = [(as_ever, now), (one_row, now)]
    if turns:
        turned = [_turned(weight) for weight in now]
        if _measured([(as_ever, now), (as_ever, turned)], biases, 8, seconds)[1].median < 1 + GAIN:
            ways += [(as_ever, turned), (one_row, turned)]
    found = _measured(ways, biases, 1, seconds)
    best = min(range(len(ways)), key=lambda place: found[place].median)
    # Of several ways one is ahead by chance: most of its turns have to be.
    if found[best].median < 1 - GAIN and found[best].high < 1:
        product, weights = ways[best]
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.data = weight
            if product is one_row:
                linear.__class__ = OneRowLinear


def _measured(ways: list[tuple], biases: list[torch.Tensor | None], rows: int, seconds: float) -> list[Spread]:
    """How long each way takes with so many rows, beside the first."""
    weight = ways[0][1][0]
    x = weight.new_ones(rows, 1, weight.shape[1])
    steps = {str(place): partial(_seconds, how, x, weights, biases) for place, (how, weights) in enumerate(ways)}
    costs = by_turns(steps, seconds)
    return [Spread.of(ratios(cost, costs["0"])) for cost in costs.values()]


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
