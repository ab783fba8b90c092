"""The paper's toy model of depth (section 3): L layers of one neuron that share one weight and one gate.

    x_L = (1 + alpha w)^L x_0

Its loss landscape over (alpha, w) shows in two dimensions why a gate should start at 0: around alpha = 1 the gradient
grows exponentially with L, and only a learning rate exponentially small in L survives there; along alpha = 0 it grows
linearly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UserError


@dataclass(frozen=True)
class ToyLandscape:
    """The cost on a grid, and the ways of gradient descent over it.

    Attributes:
        alpha: (columns,), the gate.
        w: (rows,), the weight.
        cost: (rows, columns).
        paths: one for each start: (at most steps + 1, 2), alpha and w. A path ends where its cost is no longer finite.
        depth, target, learning_rate: as passed.
    """

    alpha: np.ndarray
    w: np.ndarray
    cost: np.ndarray
    paths: list[np.ndarray]
    depth: int
    target: float
    learning_rate: float


def toy_cost(alpha, w, depth: int, target: float, inputs: Sequence[float]):
    """C = 1/2 <x_0^2> ((1 + alpha w)^L - T)^2: the squared distance of x_L from T x_0, halved, over all inputs x_0."""
    return 0.5 * np.mean(np.square(inputs)) * ((1 + alpha * w) ** depth - target) ** 2


def toy_gradient(alpha, w, depth: int, target: float, inputs: Sequence[float]):
    """(dC/dalpha, dC/dw) = (w, alpha) * L <x_0^2> (1 + alpha w)^(L - 1) ((1 + alpha w)^L - T).

    At alpha = 0 the weight gets no gradient and alpha one of -L w <x_0^2> (T - 1), linear in L. At alpha = 1 both grow
    as (1 + w)^(2 L - 1).
    """
    x = 1 + alpha * w
    common = depth * np.mean(np.square(inputs)) * x ** (depth - 1) * (x**depth - target)
    return w * common, alpha * common


def toy_landscape(
    starts: Sequence[tuple[float, float]],
    depth: int = 5,
    target: float = 50.0,
    inputs: Sequence[float] = tuple(1 + 0.1 * i for i in range(9)),
    learning_rate: float = 1e-5,
    steps: int = 2000,
    alpha_range: tuple[float, float] = (-0.5, 2.0),
    w_range: tuple[float, float] = (0.0, 3.0),
    points: int = 251,
) -> ToyLandscape:
    """Cost over (alpha, w), and gradient descent from each start at one common learning rate.

    Args:
        starts: (alpha, w) of each path.
        depth: L; 5 as in the paper's figure, like `target` and `inputs`.
        target: T, the factor by which the model is to multiply its input.
        inputs: x_0.
        learning_rate: of plain gradient descent. The default takes every start at alpha = 0 with w up to 2.7 or so to
            the valley.
        steps: of gradient descent.
        alpha_range, w_range: the window of the grid.
        points: of the grid, along each axis.

    Raises:
        UserError: a depth, learning rate, number of steps or number of points that makes no sense.
    """
    for name, value, least in (("depth", depth, 1), ("steps", steps, 1), ("points", points, 2)):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}.")
    if not learning_rate > 0:
        raise UserError(f"learning_rate={learning_rate}: must be positive.")
    alpha, w = np.linspace(*alpha_range, points), np.linspace(*w_range, points)
    cost = toy_cost(alpha[None, :], w[:, None], depth, target, inputs)
    paths = []
    for start in starts:
        path = [np.array(start, dtype=float)]
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(steps):
                following = path[-1] - learning_rate * np.array(toy_gradient(*path[-1], depth, target, inputs))
                if not np.isfinite(toy_cost(*following, depth, target, inputs)):
                    break
                path.append(following)
        paths.append(np.stack(path))
    return ToyLandscape(alpha, w, cost, paths, depth, target, learning_rate)
