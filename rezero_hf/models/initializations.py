"""Baselines that are initialisations of a plain residual net, not residual forms: zero-gamma and Fixup.

Like ReZero they start every branch at 0, so a new net is shallow however deep it is. They do it with the parameters of
the branch's own last layer instead of a gate: the equation of a layer stays `x + F(x)`.

What each asks for is a tag, `init_scale`, on the layers it concerns: the factor on their usual initial weight.
Transformers initialises one module at a time, also those missing from a checkpoint, so no rule can be a loop over
finished weights.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class FixupScalars(nn.Module):
    """What a Fixup net has where norms stood and before each convolution: `scale * x + bias`, each one number.

    Args:
        has_scale: with the multiplier (initially 1), of which each branch has one, at its end; else only the bias
            (initially 0).
    """

    def __init__(self, has_scale: bool = False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1)) if has_scale else None
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias if self.scale is None else self.scale * x + self.bias


def zero_gamma(branches: Sequence[nn.Module]) -> None:
    """Goyal et al. 2017 (arXiv 1706.02677, section 5.1): the BatchNorm that ends a branch starts with gamma = 0."""
    for branch in branches:
        [*_, last] = (module for module in branch.modules() if isinstance(module, nn.BatchNorm2d))
        last.init_scale = 0.0


def fixup(branches: Sequence[nn.Module]) -> None:
    """Zhang et al. 2019 (arXiv 1901.09321, section 3): L branches of m convolutions each start at 0, and grow as one.

    The last convolution of a branch starts at 0, the others at L^(-1 / (2m - 2)) of their usual scale. The rest of
    Fixup: `FixupScalars` where norms stood, and a classifier that starts at 0. Not here: the tenth of the learning rate
    that the authors of both papers give these scalars; in an optimiser's groups they are vectors like any other.
    """
    for branch in branches:
        *inner, last = (module for module in branch.modules() if isinstance(module, nn.Conv2d))
        for convolution in inner:
            convolution.init_scale = len(branches) ** (-1 / (2 * len(inner)))
        last.init_scale = 0.0


INITIALIZATIONS: dict[str, Callable[[Sequence[nn.Module]], None]] = {
    "default": lambda branches: None,
    "zero_gamma": zero_gamma,
    "fixup": fixup,
}
