"""Matrices laid out in memory for generation: the same values, in the way that was faster."""

import pytest
import torch
from torch import nn

import rezero_hf
from rezero_hf import layout


@pytest.fixture
def turned_is_faster(monkeypatch):
    """As on a machine that reads every matrix but square ones faster the other way round."""

    def seconds(x, weights):
        square = weights[0].shape[0] == weights[0].shape[1]
        return 2.0 if weights[0].is_contiguous() != square else 1.0

    monkeypatch.setattr(layout, "_seconds", seconds)


def strides(model):
    return {name: module.weight.is_contiguous() for name, module in model.named_modules() if type(module) is nn.Linear}


def test_what_is_faster_turned_is_turned_and_nothing_changes(tiny_model, ids, turned_is_faster, tmp_path):
    """Names, shapes and logits stay; square matrices, which gain nothing, too; and a saved model loads as ever."""
    model = tiny_model(gate_init=0.5).eval()
    before, state = model(input_ids=ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    assert rezero_hf.pack_for_decoding(model, seconds=0) is model
    assert {name for name, whole in strides(model).items() if whole} == {
        name for name in strides(model) if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
    }
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(strides(again).values()) and torch.equal(again(input_ids=ids).logits, before)
    # Once more turns nothing back.
    packed = strides(model)
    assert strides(rezero_hf.pack_for_decoding(model, seconds=0)) == packed


def test_a_packed_model_trains(tiny_model, ids, turned_is_faster):
    """Gradients are those of the model as it was."""
    models = [tiny_model(gate_init=0.5).train() for _ in range(2)]
    rezero_hf.pack_for_decoding(models[1], seconds=0)
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, plain), packed in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(packed.grad, plain.grad, msg=name)


def test_on_this_machine_it_is_measured():
    """Whatever is chosen, a Linear of any shape gives what it gave."""
    model, x = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 8)), torch.randn(1, 32)
    before = model(x)
    torch.testing.assert_close(rezero_hf.pack_for_decoding(model, seconds=0.01)(x), before)
