"""Captured whole: no graph break in forward, training or decoding, no recompilation from token to token, and exportable."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

from rezero_hf import ReZeroForCausalLM, ReZeroForMaskedLM
from rezero_hf.models.gating import LEAST_VALUES, GatedLinear


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")),
]
KINDS = {
    "rezero": {},
    "sublayer gates": {"gate_sharing": "sublayer", "residual": "rezero_pre_norm", "num_key_value_heads": 2},
    "learned": {"position_embedding": "learned", "final_norm": True, "gated_mlp": True},
}


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_training_step_has_the_same_loss_and_gradients(tiny_model, ids, backend, monkeypatch):
    """In one graph, with every gate's gradient; eagerly the gate is in the weights (`gating.py`), compiled it is not."""
    calls = []
    monkeypatch.setitem(LEAST_VALUES, "cpu", 0)
    monkeypatch.setattr(GatedLinear, "apply", lambda *args, apply=GatedLinear.apply: calls.append(1) or apply(*args))
    model, ids = tiny_model(residual="rezero_pre_norm").train(), ids.repeat(4, 3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    losses, gradients = [], []
    for forward in (model, compiled):
        model.zero_grad()
        loss = forward(ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert len(calls) == 2 * model.config.num_hidden_layers
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_one_graph(tiny_model, ids, kind):
    model = tiny_model(**KINDS[kind])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_decoding_with_a_static_cache_compiles_once(tiny_model, ids):
    """One graph serves every later token: nothing in the model depends on the position or the layer as a Python number."""
    model = tiny_model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        expected = model(torch.cat((ids, ids[:, :6]), dim=1)).logits[:, -6:]
        logits = []
        for step in range(6):
            position = torch.full((2, 1), 12 + step)
            logits.append(compiled(ids[:, step : step + 1], position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


def test_generate_compiles_its_step_once_and_writes_the_same_text(tiny_model, ids):
    """`cache_implementation="static"`, the way users ask for compiled decoding, in one graph; no second one for more tokens."""
    model = tiny_model(initializer_range=0.2, embedding_std=0.2, embedding_multiplier=1)
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(ids, **greedy)
    graphs = []

    # A function, because the configuration is copied with everything in it, and a counter would count in its copy.
    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    # The library compiles by itself on accelerators only, unless asked like this.
    compiled._compile_all_devices = True
    for _ in range(2):
        got = model.generate(ids, cache_implementation="static", compile_config=compiled, **greedy)
        assert torch.equal(got, expected)
    assert len(expected[:, 12:].unique()) > 4 and len(graphs) == 1


@pytest.mark.parametrize("head", [ReZeroForCausalLM, ReZeroForMaskedLM])
def test_an_exported_program_gives_the_same_logits_for_any_length(tiny_model, ids, head):
    model = tiny_model(head)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(
            model, (), {"input_ids": ids, "use_cache": False} if head is ReZeroForCausalLM else {"input_ids": ids},
            dynamic_shapes={"input_ids": {1: tokens}, **({"use_cache": None} if head is ReZeroForCausalLM else {})},
            strict=False,
        )  # fmt: skip
        for length in (12, 7):
            inputs = {"input_ids": ids[:, :length]}
            if head is ReZeroForCausalLM:
                inputs["use_cache"] = False
            got = exported.module()(**inputs).logits
            torch.testing.assert_close(got, model(ids[:, :length]).logits, atol=1e-5, rtol=1e-5)
