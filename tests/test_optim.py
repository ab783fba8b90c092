"""Every parameter is in one group, gates are never decayed, and each optimiser trains a model."""

from typing import get_args

import pytest
import torch

from rezero_hf import (
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    gates,
    make_optimizer,
    parameter_groups,
)
from rezero_hf.models import ReZeroConfig
from rezero_hf.optim import OptimizerName


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ReZeroConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        residual="rezero_pre_norm",
        gate_init=0.5,
    )
    return ReZeroForCausalLM(config)


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    """The groups partition the trainable parameters; frozen ones are in none."""
    model.lm_head.weight.requires_grad_(False)
    grouped = [id(parameter) for group in parameter_groups(model, lr=1.0) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_only_matrices_are_decayed_and_gates_have_their_own_rate(model):
    """Embeddings, biases, norms and gates get no decay; the gates' rate is lr times the multiplier."""
    groups = {g["name"]: g for g in parameter_groups(model, lr=0.1, weight_decay=0.3, gate_lr_multiplier=5.0)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {name: {names[id(parameter)] for parameter in group["params"]} for name, group in groups.items()}
    assert members["gates"] == set(gates(model)) == {f"model.layers.{n}.residual_norm.alpha" for n in range(2)}
    assert all(name.endswith("_proj.weight") or name == "lm_head.weight" for name in members["matrices"])
    assert "model.embed_tokens.weight" in members["vectors"]
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.3,
        "vectors": 0.0,
        "gates": 0.0,
    }
    assert groups["gates"]["lr"] == pytest.approx(0.5)
    assert groups["matrices"]["lr"] == groups["vectors"]["lr"] == pytest.approx(0.1)


def test_a_tied_head_counts_as_an_embedding():
    """A weight that is embedding and head at once is not decayed, and is there once."""
    config = ReZeroConfig(
        vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    groups = {g["name"]: g["params"] for g in parameter_groups(ReZeroForCausalLM(config), lr=1.0)}
    assert sum(parameter.shape == (80, 16) for parameter in groups["vectors"]) == 1
    assert all(parameter.shape != (80, 16) for parameter in groups["matrices"])


def test_groups_know_gates_under_a_wrapper(model):
    """DDP and compile put a prefix before the names; gates are still found."""
    wrapped = torch.nn.ModuleDict({"module": model})
    assert len(gates(wrapped)) == len(gates(model)) == 2


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_each_optimiser_lowers_the_loss_and_moves_gates_from_zero(optimizer):
    """Thirty steps on one batch: the loss falls, and every gate has left 0."""
    torch.manual_seed(0)
    model = ReZeroForCausalLM(ReZeroConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    optim = make_optimizer(model, optimizer, lr=0.3 if optimizer == "sgd" else 1e-2, weight_decay=0.1)
    ids = torch.randint(0, 64, (4, 16))
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(alpha.abs().item() > 1e-4 for alpha in gates(model).values())


def test_a_step_of_lamb_is_lr_times_the_norm_from_the_first_on():
    """arXiv 1904.00962, and a gate at 0, which has no norm, moves as far as uncorrected Adam."""
    torch.manual_seed(0)
    model = ReZeroForCausalLM(ReZeroConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    optim = make_optimizer(model, "lamb", lr=1e-2)
    head, alpha = model.lm_head.weight, model.model.layers[1].residual_norm.alpha
    for _ in range(3):
        before, gate = head.detach().clone(), alpha.item()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optim.step()
        torch.testing.assert_close((head - before).norm(), 1e-2 * before.norm(), rtol=1e-3, atol=0.0)
        moved = 1e-2 * (abs(gate) or 0.1 / 0.001**0.5)
        assert gate - alpha.item() == pytest.approx(moved, rel=1e-3)


def test_zero_gradients_and_strong_decay_leave_gates_alone():
    """Decay 10 with zero gradients moves the matrices and not one gate, with every optimiser."""
    for optimizer in get_args(OptimizerName):
        torch.manual_seed(0)
        config = ReZeroConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, gate_init=0.5)
        model = ReZeroForCausalLM(config)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optim = make_optimizer(model, optimizer, lr=1e-2, weight_decay=10.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optim.step()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert "model.layers.0.mlp.up_proj.weight" in moved, optimizer
        assert not moved & set(gates(model)), optimizer
        assert "model.embed_tokens.weight" not in moved, optimizer


def test_muon_takes_the_matrices_inside_the_layers_only(model):
    """The head's rows are one vector per word: AdamW updates them, and the embedding, and every vector and gate."""
    optim = make_optimizer(model, "muon", lr=1e-2, matrix_lr_multiplier=3.0)
    by_muon = [group for group in optim.param_groups if group["use_muon"]]
    assert [group["lr"] for group in by_muon] == [pytest.approx(3e-2)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(parameter)] for group in by_muon for parameter in group["params"]}
    assert taken == {name for name in names.values() if name.endswith("_proj.weight")}


def test_muon_leaves_heads_and_stems_alone():
    """Of classifiers too: a row for a class, and an image's stem, are AdamW's."""
    text = ReZeroConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    images = ReZeroMLPConfig(image_size=8, num_channels=1, hidden_size=8, num_hidden_layers=3)
    for model in (ReZeroForSequenceClassification(text), ReZeroMLPForImageClassification(images)):
        optim = make_optimizer(model, "muon", lr=1e-2)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        taken = {names[id(p)] for group in optim.param_groups if group["use_muon"] for p in group["params"]}
        assert taken and all(".layers." in name for name in taken), taken


def test_an_unknown_optimiser_is_one_clear_line(model):
    with pytest.raises(ValueError, match="optimizer='adam' is unknown; one of adamw, adagrad, sgd, lamb, muon"):
        make_optimizer(model, "adam", lr=1.0)
