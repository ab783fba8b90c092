"""The loss of a large vocabulary without all of its logits: a few rows at a time, and again in the backward pass."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


# Logits at a time: 128 MB in fp32, of which a loss makes several copies. Fewer cost time, each piece a pass over the
# head's gradient.
LOGITS_AT_ONCE = 2**25


def piecewise_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    loss_function: Callable[..., torch.Tensor],
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "none"] = "mean",
    **kwargs,
) -> torch.Tensor:
    """The mean loss over tokens, as `loss_function` has it for all logits at once, to rounding; or that of each token.

    No more than `LOGITS_AT_ONCE` logits exist at any moment. Where that is fewer than there are, the head's product is
    done once more than for the usual loss (four times instead of three).

    Args:
        head: the map to logits.
        hidden_states: (batch, tokens, features).
        labels: (batch, tokens), not shifted; `ignore_index` does not count.
        vocab_size: logits of a token.
        loss_function: the model's, of the library.
        shift_labels: (batch, tokens), shifted; used instead of `labels`.
        num_items_in_batch: what the summed loss is divided by; None (default): the tokens that count.
        ignore_index: the label that does not count; default the library's.
        reduction: `"mean"` (default), or `"none"` for the cross entropy of each token, (batch, tokens), 0 where it does
            not count: what an evaluation sums over text.
        kwargs: further arguments of `loss_function`.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows, targets = hidden_states.flatten(0, -2), shift_labels.to(hidden_states.device).flatten()
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    words = {"vocab_size": vocab_size, "num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, **kwargs}

    def loss_of(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if reduction == "none":
            return nn.functional.cross_entropy(head(rows).float(), targets, reduction="none", ignore_index=ignore_index)
        return loss_function(logits=head(rows), labels=None, shift_labels=targets, **words)

    at_once = max(1, LOGITS_AT_ONCE // vocab_size)
    if len(rows) <= at_once:
        losses = [loss_of(rows, targets)]
    else:
        pieces = zip(rows.split(at_once), targets.split(at_once), strict=True)
        losses = [checkpoint(loss_of, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(losses).view_as(shift_labels) if reduction == "none" else torch.stack(losses).sum()


__all__ = ["piecewise_loss"]
