"""What the diagnostics say of a network is what autograd says of it, and looking changes nothing."""

import copy
import json

import pytest
import torch
from conftest import switch_on
from transformers import GPT2Config, GPT2LMHeadModel

from rezero_hf import (
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroModel,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
)
from rezero_hf.diagnostics import estimate_chi, input_output_jacobian, signal_norms, signal_record
from rezero_hf.errors import UserError


FORMS = [
    "rezero",
    "rezero_pre_norm",
    "rezero_tanh",
    "pre_tanh",
    "pre_norm",
    "post_norm",
    "branch_norm",
    "plain",
    "none",
    "norm",
]
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


def small_mlp(**changes):
    torch.manual_seed(0)
    fields = {"image_size": 4, "hidden_size": 8, "num_hidden_layers": 5, "num_labels": 3}
    model = ReZeroMLPForImageClassification(ReZeroMLPConfig(**{**fields, **changes}))
    return model if "gate_init" in changes else switched_on(model)


def small_resnet(**changes):
    torch.manual_seed(0)
    config = ReZeroResNetConfig.cifar(8, embedding_size=2, hidden_sizes=[2, 4, 4], **changes)
    model = ReZeroResNetForImageClassification(config)
    return model if "gate_init" in changes else switched_on(model)


def switched_on(model):
    switch_on(model)
    return model


def images(size, batch=3):
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator), "labels": torch.arange(batch)}


def text(ids):
    return {"input_ids": ids, "labels": ids}


def row_by_row(function, x):
    """The Jacobian of `function` at `x`, one backward pass of plain autograd for each output."""
    x = x.detach().requires_grad_()
    y = function(x).flatten()
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].flatten() for entry in y]
    return torch.stack(rows)


def check_spectrum(model, inputs, jacobians):
    spectrum = input_output_jacobian(model, inputs)
    expected = torch.stack([torch.linalg.svdvals(jacobian) for jacobian in jacobians])
    torch.testing.assert_close(spectrum.singular_values, expected, rtol=1e-9, atol=1e-10)
    norms = torch.stack([jacobian.square().sum() / jacobian.shape[1] for jacobian in jacobians])
    assert spectrum.chi == pytest.approx(norms.mean().item(), rel=1e-9)
    return spectrum


@pytest.mark.parametrize("residual", FORMS)
def test_the_jacobian_of_a_language_model(tiny_model, ids, residual):
    """Its singular values are those of the explicit Jacobian, padding included, for every residual form."""
    model = tiny_model(residual=residual, **SMALL)
    inputs = {"input_ids": ids[:, :5], "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    exact = copy.deepcopy(model).double()

    def stream(row):
        mask = inputs["attention_mask"][row : row + 1]
        return lambda x: exact.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state

    embedded = exact.model.embed_tokens(inputs["input_ids"])
    check_spectrum(model, inputs, [row_by_row(stream(row), embedded[row : row + 1]) for row in range(2)])


@pytest.mark.parametrize("residual", FORMS)
def test_the_jacobian_of_a_fully_connected_net(residual):
    """Its singular values are those of the explicit Jacobian, for every residual form."""
    model, inputs = small_mlp(residual=residual), images(4)
    exact = copy.deepcopy(model).double()
    entered = exact.model.act_fn(exact.model.stem(inputs["pixel_values"].double().flatten(1)))

    def stream(x):
        for layer in exact.model.layers:
            x = layer(x)
        return x

    check_spectrum(model, inputs, [row_by_row(stream, row[None]) for row in entered])


def test_the_jacobian_of_a_residual_net():
    """It has fewer rows than columns, and the statistics of its norms are the trained ones."""
    model, inputs = small_resnet(), images(8, batch=2)
    model.train()(**inputs)
    exact = copy.deepcopy(model).double().eval()
    entered = exact.model.stem(inputs["pixel_values"].double())

    def stream(x):
        for layer in exact.model.layers:
            x = layer(x)
        return x

    spectrum = check_spectrum(model, inputs, [row_by_row(stream, row[None]) for row in entered])
    assert spectrum.size == (4 * 2 * 2, 2 * 8 * 8)


def test_rezero_starts_with_singular_values_of_exactly_one(tiny_model, ids):
    """Not nearly, at any depth, in Transformers and fully connected nets; and chi is estimated without error."""
    model = tiny_model(gate_init=0.0, num_hidden_layers=48, **SMALL)
    mlp = small_mlp(gate_init=0.0, num_hidden_layers=300)
    for network, inputs in ((model, text(ids)), (mlp, images(4))):
        spectrum = input_output_jacobian(network, inputs)
        assert (spectrum.singular_values == 1).all()
        assert spectrum.chi == 1
        assert spectrum.share_below() == 0
        assert estimate_chi(network, inputs, probes=3) == (1, 0)


@pytest.mark.parametrize(("norm", "lost"), [("layer", 2), ("rms", 1)])
def test_a_norm_loses_directions(tiny_model, ids, norm, lost):
    """LayerNorm loses two directions of each vector, its mean and its scale, and RMSNorm one; before a branch, none."""
    words = {"norm": norm, "norm_eps": 1e-12, "gate_init": 0.0}
    for residual, expected in (("post_norm", lost), ("pre_norm", 0)):
        mlp = small_mlp(residual=residual, num_hidden_layers=1, hidden_act="gelu", **words)
        spectrum = input_output_jacobian(mlp, images(4))
        assert (spectrum.singular_values < 1e-8).sum(-1).tolist() == [expected] * 3
        model = tiny_model(residual=residual, num_hidden_layers=1, **SMALL, **words)
        spectrum = input_output_jacobian(model, text(ids))
        assert (spectrum.singular_values < 1e-8).sum(-1).tolist() == [expected * ids.shape[1]] * 2
        assert spectrum.share_below() == expected / SMALL["hidden_size"]


def test_the_estimate_agrees_with_the_exact_value(tiny_model, ids):
    """Within four standard errors, which are small; the same seed gives the same number."""
    model = tiny_model(residual="pre_norm", **SMALL)
    exact = input_output_jacobian(model, text(ids)).chi
    chi, error = estimate_chi(model, text(ids), probes=100)
    assert abs(chi - exact) < 4 * error < 0.4 * exact
    assert estimate_chi(model, text(ids), probes=100) == (chi, error)
    assert estimate_chi(model, text(ids), probes=100, seed=1)[0] != chi


@pytest.mark.parametrize("residual", FORMS)
def test_norms_are_those_of_the_stream_and_its_gradient(tiny_model, ids, residual):
    """At every layer, as the model itself returns the stream and autograd its gradient."""
    model = tiny_model(residual=residual, num_hidden_layers=3)
    norms = signal_norms(model, text(ids), dtype=torch.float32)
    outputs = model(**text(ids), output_hidden_states=True)
    gradients = torch.autograd.grad(outputs.loss, outputs.hidden_states)
    rms = [x.square().mean().sqrt().item() for x in outputs.hidden_states]
    assert norms["activation"] == pytest.approx(rms, rel=1e-5)
    assert norms["gradient"] == pytest.approx([g.square().mean().sqrt().item() for g in gradients], rel=1e-4)
    assert norms["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert norms["size"] == [12 * 32, 12 * 32]
    gated = residual.startswith("rezero")
    alpha = [layer.residual_norm.alpha.tolist() for layer in model.model.layers] if gated else None
    assert norms["alpha"] == alpha


@pytest.mark.parametrize("labelled", [False, True])
def test_activations_are_kept_for_a_gradient_alone(tiny_model, ids, labelled):
    """Without labels the forward pass records nothing, so a long batch takes no training step's memory."""
    model, kept = tiny_model(), []
    model.model.layers[1].register_forward_hook(lambda _module, _args, x: kept.append(x.requires_grad))
    signal_norms(model, {"input_ids": ids, **({"labels": ids} if labelled else {})})
    assert kept == [labelled]


def test_an_update_is_the_gated_branch_beside_the_stream():
    """RMS(alpha F(x)) / RMS(x) at every layer of a ReZero net."""
    model, inputs = small_mlp(), images(4)
    streams = model(**inputs, output_hidden_states=True).hidden_states
    expected = []
    for layer, x in zip(model.model.layers, streams[:-1], strict=True):
        f = layer.residual_norm.alpha * torch.relu(layer.linear(x))
        expected.append((f.square().mean().sqrt() / x.square().mean().sqrt()).item())
    assert signal_norms(model, inputs)["update"] == {"mlp": pytest.approx(expected, rel=1e-4)}


def test_heads_and_bodies(tiny_model, ids):
    """Every head is looked at through its own loss; without a head, or labels, there are no gradients to record."""
    for model_class, labels in ((ReZeroForMaskedLM, ids), (ReZeroForSequenceClassification, torch.tensor([0, 1]))):
        model = tiny_model(model_class, pad_token_id=258)
        norms = signal_norms(model, {"input_ids": ids, "labels": labels})
        assert norms["loss"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
        assert set(norms["update"]) == {"attn", "mlp"}
    for model in (tiny_model(ReZeroModel), tiny_model()):
        norms = signal_norms(model, {"input_ids": ids})
        assert norms["gradient"] is None
        assert norms["loss"] is None
        assert len(norms["activation"]) == 3


def test_a_fresh_batch_norm_sees_the_inputs():
    """The stream of a net that was never trained is what a first training step would see."""
    model, inputs = small_resnet(), images(16, batch=8)
    norms = signal_norms(model, {**inputs, "labels": inputs["labels"] % 3})
    streams = model.train()(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert norms["activation"] == pytest.approx([x.square().mean().sqrt().item() for x in streams], rel=0.02)
    trained = signal_norms(model, inputs)
    streams = model.eval()(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert trained["activation"] == pytest.approx([x.square().mean().sqrt().item() for x in streams], rel=1e-5)


@pytest.mark.parametrize("make", ["language model", small_mlp, small_resnet])
def test_looking_changes_nothing(tiny_model, ids, make):
    """Weights, statistics, gradients, hooks, mode, attention and random numbers are as before, also under no_grad."""
    model, inputs = (tiny_model(attn_implementation="eager", hidden_dropout=0.5), text(ids))
    if make != "language model":
        model, inputs = make(), images(4 if make is small_mlp else 8)
    model.train()
    before = copy.deepcopy(model.state_dict())
    config, attention, state = model.config.to_dict(), model.config._attn_implementation, torch.get_rng_state()
    with torch.no_grad():
        first = signal_record(model, inputs)
    estimate_chi(model, inputs, probes=2)
    assert signal_record(model, inputs) == first
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)


def test_a_record_is_plain_json(tiny_model, ids):
    """Strictly, even of a network that overflows, which is None where it does; and it is small."""
    record = signal_record(tiny_model(residual="post_norm", **SMALL), text(ids))
    assert len(json.dumps(record, allow_nan=False)) < 5000
    jacobian = record["jacobian"]
    assert sum(jacobian["histogram"]["counts"]) == 2 * 12 * 8
    quantiles = list(jacobian["quantiles"].values())
    assert quantiles == sorted(quantiles)
    assert jacobian["inputs"] == 2

    broken = signal_record(small_mlp(gate_init=1e30, num_hidden_layers=12), images(4))
    assert json.loads(json.dumps(broken, allow_nan=False)) == broken
    assert broken["norms"]["activation"][0] is not None
    assert broken["norms"]["activation"][-1] is None
    assert broken["jacobian"]["chi"] is None
    assert broken["jacobian"]["share_zero"] is None
    assert broken["jacobian"]["histogram"]["counts"] == []


def test_a_large_network_is_estimated_and_refused_where_it_cannot_be(tiny_model, ids):
    """Beyond `max_size` a record has the estimate and its error, and the exact spectrum says what it would take."""
    model = tiny_model(**SMALL)
    record = signal_record(model, text(ids), max_size=50)
    chi, error = estimate_chi(model, text(ids))
    assert record["jacobian"] == {"method": "hutchinson", "inputs": 2, "chi": chi, "standard_error": error}
    with pytest.raises(UserError, match=r"96 x 96 and .* max_size=50: .* estimate_chi") as refused:
        input_output_jacobian(model, text(ids), max_size=50)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="probes=1"):
        estimate_chi(model, text(ids), probes=1)


def test_other_models_are_refused():
    """In one line that names the class."""
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8))
    with pytest.raises(UserError, match="GPT2LMHeadModel is not a model of rezero_hf"):
        signal_norms(other, {"input_ids": torch.tensor([[1, 2]])})


def test_a_model_that_is_not_all_there_is_refused(tiny_model, ids):
    """As one that was offloaded to disk."""
    model = tiny_model()
    model.lm_head.to("meta")
    with pytest.raises(UserError, match=r"lm_head.weight is on no device; .* not offloaded"):
        signal_norms(model, {"input_ids": ids})
