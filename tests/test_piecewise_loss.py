"""A loss in pieces is the loss, and never holds all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rezero_hf.models import piecewise_loss


VOCAB = 1000


@pytest.fixture
def pieces(monkeypatch):
    """Logits of seven tokens at a time."""
    monkeypatch.setattr(piecewise_loss, "LOGITS_AT_ONCE", 7 * VOCAB)


@pytest.fixture
def model(tiny_model):
    return tiny_model(vocab_size=VOCAB).train()


@pytest.fixture
def batch():
    """Three rows of sixteen tokens, the end of one without labels."""
    ids = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 9:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, **words):
    model.zero_grad()
    output = model(**words)
    output.loss.backward()
    return output, {"loss": output.loss, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("words", ["labels", "shifted", "divided"])
def test_the_loss_in_pieces_has_the_same_gradients(model, batch, pieces, words):
    """With labels that are not counted, already shifted, and divided by another number of tokens."""
    if words != "labels":
        batch["shift_labels"] = batch["labels"].roll(-1, dims=-1)
    if words == "divided":
        batch["num_items_in_batch"] = torch.tensor(97)
    whole, expected = gradients(model, **batch)
    output, found = gradients(model, **batch, skip_logits=True)
    assert whole.logits is not None and output.logits is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_loss_of_each_token_comes_in_pieces_too(model, batch, pieces):
    """Shaped like the labels, the last of which has nothing to predict, and 0 where there is no label."""
    logits = model.eval()(input_ids=batch["input_ids"]).logits
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.mT, shifted, reduction="none")
    with torch.no_grad():
        found = model(**batch, skip_logits=True, reduction="none").loss
    torch.testing.assert_close(found, expected)
    assert found[1, 9:].eq(0).all()


def test_without_labels_there_is_nothing_to_skip(model, batch):
    assert model(input_ids=batch["input_ids"], skip_logits=True).logits.shape == (3, 16, VOCAB)


def test_few_logits_are_computed_at_once(model, batch):
    """Bit for bit the usual loss: what a small vocabulary had before."""
    assert torch.equal(model(**batch, skip_logits=True).loss, model(**batch).loss)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("skip", [True, False])
def test_no_tensor_holds_all_logits(tiny_model, batch, pieces, skip):
    """In the forward pass and in the backward pass. (Without `skip_logits` some do.)"""
    model = tiny_model(vocab_size=VOCAB, hidden_size=8, num_attention_heads=2, num_key_value_heads=2).train()
    with Largest() as seen:
        gradients(model, **batch, skip_logits=skip)
    assert (seen.elements >= 3 * 16 * VOCAB) is not skip
