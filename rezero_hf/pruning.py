"""Removes the layers that a network does not use, as measured on data: the third of the operations of `surgery.py`."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from .assembly import assemble, changed, check_whole, layer_of, moved, whole_number
from .diagnostics import LABELS, updates
from .errors import UserError
from .models.residual import RESIDUAL_FORMS


Measure = Literal["update", "loss"]
# The forms in which the stream goes on where a layer is taken away.
WITH_SKIP = tuple(name for name, form in RESIDUAL_FORMS.items() if form.adds_to_stream)


@dataclass(frozen=True)
class Pruning:
    """What was removed, and what it cost.

    Attributes:
        by: what the layers were judged by.
        scores: one for each layer of the old network. `update`: RMS(y - x) / RMS(x), for ReZero |alpha| RMS(F(x)) /
            RMS(x); of two branches the root of their squares' sum. `loss`: by how much the loss rises with that layer
            alone left out.
        removed: numbers of the removed layers in the old network.
        loss_before, loss_after: mean of the batches' losses, in nats, of the old network and of the new one.
    """

    by: Measure
    scores: list[float]
    removed: list[int]
    loss_before: float
    loss_after: float


def prune_layers(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    to: int | None = None,
    threshold: float | None = None,
    by: Measure = "update",
) -> tuple[PreTrainedModel, Pruning]:
    """A network without the layers that hardly do anything.

    Removing a layer whose branches are 0 is exact. Any other removal changes the function; the report says how much.

    Args:
        model: a language model or fully connected net of this package with a head that gives a loss, in a residual form
            with a skip. It is left as it is. It takes the memory of one more model in fp32 to measure updates.
        batches: what the model is called with, labels included. All are kept, and read once for every measurement.
        to: how many layers stay; those with the lowest scores go.
        threshold: remove every layer with a score up to this; give either this or `to`.
        by: how a layer is judged. `"update"` (default): by how much it changes the stream, of all layers at once, for
            the price of a forward pass. `"loss"`: by how much the loss rises without it, at a pass over all batches for
            each layer; layers that are only dispensable one at a time look so too.

    Returns:
        The smaller model, in the same precision and mode, and the report.

    Raises:
        UserError: it is not such a model or not whole (see `fold_gates`); there are no batches, or they give no loss;
            `to` or `threshold` would leave nothing, or remove nothing; every layer's score is 0 (a new network's).
    """
    check_whole(model)
    if isinstance(batches, Mapping):
        raise UserError("batches is one batch; give a list of such, [batch].")
    config, batches = model.config, list(batches)
    if config.model_type == "rezero_resnet" or config.residual not in WITH_SKIP:
        raise UserError(
            f"{type(model).__name__} with residual={config.residual!r} cannot be pruned: only language models and "
            f"fully connected nets, with residual one of {', '.join(WITH_SKIP)}."
        )
    if by not in get_args(Measure):
        raise UserError(f"by={by!r} is unknown; one of {', '.join(get_args(Measure))}.")
    depth = config.num_hidden_layers
    if (to is None) == (threshold is None):
        raise UserError("give either to, how many layers stay, or threshold, the score up to which a layer goes.")
    if threshold is not None and not isinstance(threshold, Real):
        raise UserError(f"threshold={threshold!r}: needs a number.")
    if to is not None and not 1 <= (whole_number(to) or 0) < depth:
        raise UserError(f"to={to!r}: the network has {depth} layers, so it can be pruned to 1 ... {depth - 1}.")
    if not batches:
        raise UserError("batches is empty: there is nothing to judge the layers by.")
    before = _loss(model, batches)
    scores = _updates(model, batches) if by == "update" else _rises(model, batches, before)
    if to is not None and not any(scores):
        raise UserError(
            f"to={to}: every layer's {by} is 0, so none is less used than another; train the network first."
        )
    ranked = sorted(range(depth), key=scores.__getitem__)
    removed = sorted(ranked[: depth - to] if to is not None else (i for i in ranked if scores[i] <= threshold))
    if len(removed) == depth:
        raise UserError(
            f"threshold={threshold:g}: no layer's {by} is above it (the largest is {max(scores):g}), so none would be "
            "left; lower it, or train the network first if its gates are all still 0."
        )
    if not removed:
        raise UserError(
            f"threshold={threshold:g}: every layer's {by} is above it (the smallest is {min(scores):g}), so none would "
            "go; raise it."
        )
    kept = [index for index in range(depth) if index not in removed]
    places = {old: new for new, old in enumerate(kept)}
    old = model.state_dict()
    names = {name: moved(name, places) for name in old if layer_of(name) in (None, *kept)}
    state = {new: old[name] for name, new in names.items()}
    smaller = assemble(model, changed(config, num_hidden_layers=len(kept)), state, names)
    return smaller, Pruning(by, scores, removed, before, _loss(smaller, batches))


def _updates(model: PreTrainedModel, batches: list[Mapping[str, torch.Tensor]]) -> list[float]:
    """Each layer's relative update, root mean square over the batches."""
    squares = [0.0] * model.config.num_hidden_layers
    inputs = ({name: value for name, value in batch.items() if name not in LABELS} for batch in batches)
    for update in updates(model, inputs):
        for branch in update.values():
            values = [math.inf if value is None else value for value in branch]
            squares = [square + value**2 for square, value in zip(squares, values, strict=True)]
    return [math.sqrt(square / len(batches)) for square in squares]


def _rises(model: PreTrainedModel, batches: list[Mapping[str, torch.Tensor]], before: float) -> list[float]:
    """By how much the loss rises with each layer alone left out."""
    rises = []
    for layer in model.base_model.layers:
        without = layer.register_forward_hook(lambda _layer, args, _output: args[0])
        try:
            rise = _loss(model, batches) - before
        finally:
            without.remove()
        rises.append(rise if math.isfinite(rise) else math.inf)
    return rises


@torch.no_grad()
def _loss(model: PreTrainedModel, batches: list[Mapping[str, torch.Tensor]]) -> float:
    with _evaluating(model):
        losses = [
            getattr(model(**{name: value.to(model.device) for name, value in batch.items()}), "loss", None)
            for batch in batches
        ]
    if None in losses:
        raise UserError("the batches give no loss: a model with a head needs their labels (labels=input_ids for text).")
    return sum(map(float, losses)) / len(losses)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


__all__ = ["Pruning", "prune_layers"]
