"""A model made faster at generating: the same function, the same saved state, whatever was found to be faster."""

import copy
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig, LlamaForCausalLM

import rezero_hf
from rezero_hf import layout
from rezero_hf.layout import JointAttention, OneRowLinear, one_row


def fastest(product, turned):
    """As on a machine that takes every matrix but square ones fastest by this product, and laid out so."""

    def seconds(how, x, weights, biases):
        if len(x) > 1:
            return 1.0
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
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_model_computes_writes_and_saves_what_it_did(tiny_model, ids, a_machine, changes, tmp_path):
    """Logits of a prompt and of one token, the text, the state's names and values; saved, it loads as ever."""
    model = tiny_model(gate_init=0.5, **changes).eval()
    words = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before = [model(ids).logits, model(ids[:1, :1]).logits, model.generate(ids[:1], **words)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert rezero_hf.pack_for_decoding(model, seconds=0) is model
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    for packed in (model, copy.deepcopy(model), type(model).from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            torch.testing.assert_close(packed(ids).logits, before[0])
            torch.testing.assert_close(packed(ids[:1, :1]).logits, before[1])
        assert torch.equal(packed.generate(ids[:1], **words), before[2])
        assert packed.state_dict().keys() == state.keys()
        for name, value in packed.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_what_is_faster_is_taken_and_nothing_else(tiny_model, a_machine):
    """Products that gain change, square ones stay, the joined ones lie together; packing twice changes nothing."""
    product, turned = a_machine
    model = rezero_hf.pack_for_decoding(tiny_model(), seconds=0)

    def found():
        return {name: (type(linear), linear.weight.is_contiguous()) for name, linear in linears(model).items()}

    before = found()
    for name, (kind, rows_together) in before.items():
        changes = name.endswith(("up_proj", "down_proj", "lm_head"))
        assert rows_together != (changes and turned), name
        assert (kind is OneRowLinear) == (changes and product is one_row), name
    for layer in model.model.layers:
        assert (type(layer.self_attn.joint[0]) is OneRowLinear) == (product is one_row and not turned)
    rezero_hf.pack_for_decoding(model, seconds=0)
    assert found() == before


def test_what_would_slow_batches_down_is_not_turned_over(tiny_model, monkeypatch):
    """However fast it is with one row."""
    seconds = fastest(nn.functional.linear, turned=True)
    slow = {True: 1.0, False: 2.0}
    monkeypatch.setattr(
        layout,
        "_seconds",
        lambda how, x, weights, biases: (
            slow[weights[0].is_contiguous()] if len(x) == 8 else seconds(how, x, weights, biases)
        ),
    )
    model = rezero_hf.pack_for_decoding(tiny_model(), seconds=0)
    assert all(linear.weight.is_contiguous() for linear in linears(model).values())


@contextmanager
def joint_products(model):
    """Counts the products that are one for queries, keys and values."""
    with ExitStack() as stack:
        attentions = [layer.self_attn for layer in model.model.layers if isinstance(layer.self_attn, JointAttention)]
        joints = [
            stack.enter_context(patch.object(each.joint[0], "forward", wraps=each.joint[0].forward))
            for each in attentions
        ]
        count = Counter()
        yield count
        count["products"] = sum(joint.call_count for joint in joints)


def adapted(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def watched(model):
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(model):
    state = {name: value + 1 for name, value in model.state_dict().items() if "q_proj" in name}
    model.load_state_dict(state, strict=False, assign=True)


CHANGES = [adapted, watched, replaced, nn.Module.double, accelerate.cpu_offload]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_after_packing_counts(tiny_model, ids, a_machine, change):
    """Adapters, hooks, other weights, another dtype and offloading do what they do to a model that is not packed."""
    plain, packed = tiny_model(gate_init=0.5).eval(), tiny_model(gate_init=0.5).eval()
    rezero_hf.pack_for_decoding(packed, seconds=0)
    with torch.no_grad(), joint_products(packed) as count:
        packed(ids)
    assert count["products"] == packed.config.num_hidden_layers
    for model in (plain, packed):
        torch.manual_seed(1)
        change(model)
    with torch.no_grad(), joint_products(packed) as count:
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits)
    assert count["products"] == 0


def test_part_of_a_state_is_loaded_into_a_packed_model(tiny_model, ids, a_machine):
    """As checkpoints in several files are; in place, where one product goes on being taken."""
    plain, packed = tiny_model(gate_init=0.5).eval(), tiny_model(gate_init=0.5).eval()
    rezero_hf.pack_for_decoding(packed, seconds=0)
    for model in (plain, packed):
        part = {name: value + 1 for name, value in model.state_dict().items() if "k_proj" in name}
        model.load_state_dict(part, strict=False)
    with torch.no_grad(), joint_products(packed) as count:
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits)
    assert count["products"] == packed.config.num_hidden_layers


def test_a_packed_model_trains(tiny_model, ids, a_machine):
    """Gradients are those of the model as it was, of what is not frozen; so is what it computes after a step."""
    models = [tiny_model(gate_init=0.5).train() for _ in range(2)]
    for model in models:
        model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    rezero_hf.pack_for_decoding(models[1], seconds=0)
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    for (name, plain), packed in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert plain.requires_grad == packed.requires_grad
        torch.testing.assert_close(packed.grad, plain.grad, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(*(model.eval()(ids).logits for model in models))


def test_gates_fold_away_and_layers_grow_from_a_packed_model(tiny_model, ids):
    """Surgery gives models that are not packed."""
    model = tiny_model(gate_init=0.5).eval()
    before = model(ids).logits
    rezero_hf.pack_for_decoding(model, seconds=0)
    torch.testing.assert_close(rezero_hf.fold_gates(model)(ids).logits, before)
    deeper = rezero_hf.grow_depth(model, model.config.num_hidden_layers + 1).model
    assert torch.equal(deeper(ids).logits, before) and "JointAttention" not in str(deeper)


def test_packing_draws_no_random_numbers(tiny_model):
    """What is sampled next is what would have been."""
    model = tiny_model()
    before = torch.get_rng_state()
    rezero_hf.pack_for_decoding(model, seconds=0)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_what_is_watched_stays(tiny_model, a_machine):
    """A hook on a projection is called as before; the other layers are packed."""
    model, seen = tiny_model().eval(), []
    watched = model.model.layers[0].self_attn.k_proj
    watched.register_forward_hook(lambda *_: seen.append(1))
    rezero_hf.pack_for_decoding(model, seconds=0)
    assert type(watched) is nn.Linear
    with torch.no_grad():
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


def test_tensors_without_data_are_taken_too(tiny_model, a_machine):
    """As whoever plans memory or infers a device map does it."""
    model = rezero_hf.pack_for_decoding(tiny_model().eval(), seconds=0).to("meta")
    with torch.no_grad():
        assert model(torch.zeros(1, 1, dtype=torch.long, device="meta")).logits.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_this_machine_it_is_measured(dtype):
    """Whatever is chosen, a Linear of any shape gives what it gave."""
    model = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 8, bias=False)).to(dtype)
    x = torch.randn(1, 1, 32, dtype=dtype)
    before = model(x)
    torch.testing.assert_close(rezero_hf.pack_for_decoding(model, seconds=0.01)(x), before)
