"""A model made faster at generating: the same function, the same saved state, whatever was found to be faster."""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig, LlamaForCausalLM

import rezero_hf
from rezero_hf import layout
from rezero_hf.layout import OneRowLinear, one_row


def fastest(product, turned):
    """As on a machine that takes every matrix but square ones fastest by this product, and laid out so."""

    def seconds(how, x, weights, biases):
        square = weights[0].shape[0] == weights[0].shape[1]
        here = how is nn.functional.linear and weights[0].is_contiguous()
        return float(2 - (here if square else how is product and weights[0].is_contiguous() != turned))

    return seconds


@pytest.fixture(params=[(one_row, False), (one_row, True), (nn.functional.linear, True)])
def a_machine(request, monkeypatch):
    monkeypatch.setattr(layout, "_seconds", fastest(*request.param))
    return request.param


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


VARIANTS = {
    "as shipped": {},
    "grouped queries, no biases": {"num_key_value_heads": 1, "attention_bias": False, "mlp_bias": False},
    "learned positions, norms": {"position_embedding": "learned", "residual": "pre_norm", "final_norm": True},
    "qk_norm": {"qk_norm": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_model_computes_writes_and_saves_what_it_did(tiny_model, ids, a_machine, changes, tmp_path):
    """Logits of a prompt and of one token, the text, the state's names and values; saved, it loads as ever."""
    model = tiny_model(gate_init=0.5, **changes).eval()
    words = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before = [model(ids).logits, model(ids[:1, :1]).logits, model.generate(ids[:1], **words)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert rezero_hf.pack_for_decoding(model, seconds=0) is model
    again = model.load_state_dict(model.state_dict())
    assert not again.missing_keys and not again.unexpected_keys
    model.save_pretrained(tmp_path)
    for packed in (model, copy.deepcopy(model), type(model).from_pretrained(tmp_path).eval()):
        for now, then in zip((packed(ids).logits, packed(ids[:1, :1]).logits), before, strict=False):
            torch.testing.assert_close(now, then)
        assert torch.equal(packed.generate(ids[:1], **words), before[2])
        assert packed.state_dict().keys() == state.keys()
        for name, value in packed.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_what_is_faster_is_taken_and_nothing_else(tiny_model, a_machine):
    """Products that gain change, square ones stay, queries, keys and values are one; packing twice changes nothing."""
    product, turned = a_machine
    model = rezero_hf.pack_for_decoding(tiny_model(), seconds=0)
    found = linears(model)
    assert {name.split(".")[-1] for name in found} == {"qkv_proj", "o_proj", "up_proj", "down_proj", "lm_head"}
    for name, linear in found.items():
        changed = not name.endswith("o_proj")
        assert linear.weight.is_contiguous() != (changed and turned), name
        assert isinstance(linear, OneRowLinear) == (changed and product is one_row), name
    kinds = {name: (type(linear), linear.weight.stride()) for name, linear in found.items()}
    rezero_hf.pack_for_decoding(model, seconds=0)
    assert {name: (type(linear), linear.weight.stride()) for name, linear in linears(model).items()} == kinds


def test_a_packed_model_trains(tiny_model, ids, a_machine):
    """Gradients are those of the model as it was; of queries, keys and values, one after the other."""
    plain, packed = tiny_model(gate_init=0.5).train(), tiny_model(gate_init=0.5).train()
    rezero_hf.pack_for_decoding(packed, seconds=0)
    for model in (plain, packed):
        model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: weight.grad for name, weight in plain.named_parameters()}
    for name, weight in packed.named_parameters():
        parts = [name.replace("qkv_proj", part) for part in layout.PARTS] if "qkv_proj" in name else [name]
        torch.testing.assert_close(weight.grad, torch.cat([expected[part] for part in parts]), msg=name)


def test_gates_fold_away_and_layers_grow_from_a_packed_model(tiny_model, ids):
    """Surgery takes the state, and gives models that are not packed."""
    model = tiny_model(gate_init=0.5).eval()
    before = model(ids).logits
    rezero_hf.pack_for_decoding(model, seconds=0)
    torch.testing.assert_close(rezero_hf.fold_gates(model)(ids).logits, before)
    deeper = rezero_hf.grow_depth(model, model.config.num_hidden_layers + 1).model
    assert torch.equal(deeper(ids).logits, before) and "q_proj" in str(deeper)


def test_a_packed_model_compiles_without_a_break_and_runs_in_autocast(tiny_model, ids, a_machine):
    model = tiny_model(gate_init=0.5).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(ids[:1, :1]).logits
        rezero_hf.pack_for_decoding(model, seconds=0)
        now = model(ids[:1, :1]).logits
    assert now.dtype == before.dtype
    torch.testing.assert_close(now, before)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids[:1, :1]).logits, model(ids[:1, :1]).logits)


def test_what_is_watched_or_adapted_stays(tiny_model, a_machine):
    """A hook on a projection is called as before; the other layers are packed."""
    model, seen = tiny_model().eval(), []
    watched = model.model.layers[0].self_attn.k_proj
    watched.register_forward_hook(lambda *_: seen.append(1))
    rezero_hf.pack_for_decoding(model, seconds=0)
    assert type(watched) is nn.Linear
    model(torch.zeros(1, 1, dtype=torch.long))
    assert seen == [1]
    kinds = [type(layer.self_attn).__name__ for layer in model.model.layers]
    assert kinds == ["ReZeroAttention"] + ["JointAttention"] * (len(kinds) - 1)


def test_other_libraries_models_are_measured_too(ids, a_machine):
    """Llama keeps its modules' names and gives what it gave."""
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).eval()
    names, before = list(linears(model)), model(ids[:1, :1]).logits
    rezero_hf.pack_for_decoding(model, seconds=0)
    assert list(linears(model)) == names
    torch.testing.assert_close(model(ids[:1, :1]).logits, before)


def test_a_matrix_of_another_type_is_taken_as_a_linear(a_machine, monkeypatch):
    """Quantised after it was packed, say: its library knows a Linear's product, maybe no other."""
    model, x = nn.Sequential(nn.Linear(8, 16)), torch.randn(1, 8)
    before = model(x)
    rezero_hf.pack_for_decoding(model, seconds=0)
    model[0].weight = nn.Parameter(TwoTensor(model[0].weight.detach(), model[0].weight.detach().clone()))
    monkeypatch.setattr(layout, "one_row", None)
    torch.testing.assert_close(model(x).a, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_this_machine_it_is_measured(dtype):
    """Whatever is chosen, a Linear of any shape gives what it gave."""
    model = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 8, bias=False)).to(dtype)
    x = torch.randn(1, 1, 32, dtype=dtype)
    before = model(x)
    torch.testing.assert_close(rezero_hf.pack_for_decoding(model, seconds=0.01)(x), before)
