"""The toy model's formulas are those of L real layers, and its landscape shows what the paper says of it."""

import numpy as np
import pytest
import torch

from rezero_hf.errors import UserError
from rezero_hf.toy_model import toy_cost, toy_gradient, toy_landscape


INPUTS = (1.0, 1.4, 1.8)


@pytest.mark.parametrize(("alpha", "w", "depth"), [(0.0, 1.5, 5), (1.0, 0.7, 5), (-0.3, 2.0, 1), (0.2, -1.1, 12)])
def test_cost_and_gradient_are_those_of_the_layers(alpha, w, depth):
    """L layers x + alpha w x, one after the other, with autograd."""
    gate, weight = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (alpha, w))
    x_0 = torch.tensor(INPUTS, dtype=torch.float64)
    x = x_0
    for _ in range(depth):
        x = x + gate * weight * x
    cost = 0.5 * (x - 50 * x_0).square().mean()
    assert toy_cost(alpha, w, depth, 50, INPUTS) == pytest.approx(cost.item())
    gradient = [g.item() for g in torch.autograd.grad(cost, (gate, weight))]
    assert toy_gradient(alpha, w, depth, 50, INPUTS) == pytest.approx(gradient)


def test_depth_makes_the_first_step_grow_linearly_from_a_closed_gate_and_exponentially_from_an_open_one():
    """The gradient at (0, 1) is L times that of one layer; at (1, 1) ten more layers make it a million times larger."""
    one, many = (toy_gradient(0.0, 1.0, depth, 50, INPUTS) for depth in (1, 30))
    assert many[0] == pytest.approx(30 * one[0])
    assert one[1] == many[1] == 0
    shallow, deep = (toy_gradient(1.0, 1.0, depth, 50, INPUTS)[0] for depth in (20, 30))
    assert deep > 1e6 * shallow


def test_the_landscape_is_the_cost_on_its_grid():
    """Rows are w and columns alpha, from edge to edge."""
    landscape = toy_landscape([], points=5, alpha_range=(0, 2), w_range=(-1, 3), inputs=INPUTS)
    assert landscape.cost.shape == (5, 5)
    assert (landscape.alpha[[0, -1]].tolist(), landscape.w[[0, -1]].tolist()) == ([0, 2], [-1, 3])
    assert landscape.cost[3, 1] == toy_cost(landscape.alpha[1], landscape.w[3], 5, 50, INPUTS)


def test_descent_reaches_the_valley_from_closed_gates_and_is_thrown_out_from_open_ones():
    """With one learning rate for all, the paper's figure: every start at alpha = 0 arrives, not all at alpha = 1 do."""
    weights = (0.25, 1.0, 2.5)
    landscape = toy_landscape([(alpha, w) for alpha in (0.0, 1.0) for w in weights])
    costs = [toy_cost(*path[-1], 5, 50, INPUTS) for path in landscape.paths]
    assert max(costs[:3]) < 1e-6
    assert costs[5] > 1e6
    for path, w in zip(landscape.paths, weights, strict=False):
        assert path[0].tolist() == [0, w]
        assert len(path) == 2001
    assert all(np.isfinite(path).all() for path in landscape.paths)
    assert len(landscape.paths[5]) < 10


def test_one_step_of_descent():
    """It is the gradient times the learning rate."""
    landscape = toy_landscape([(0.5, 0.5)], steps=1, learning_rate=1e-3, inputs=INPUTS)
    step = landscape.paths[0][0] - landscape.paths[0][1]
    assert step == pytest.approx(1e-3 * np.array(toy_gradient(0.5, 0.5, 5, 50, INPUTS)))


@pytest.mark.parametrize("words", [{"depth": 0}, {"steps": 0}, {"points": 1}, {"learning_rate": 0.0}])
def test_senseless_words_are_refused(words):
    """By name and value."""
    ((name, value),) = words.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        toy_landscape([(0.0, 1.0)], **words)
