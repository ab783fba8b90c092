"""A gate on the last matrix of its branch gives what a gate on the branch's output gives, and is there only where it may be."""

from contextlib import contextmanager
from unittest import mock

import peft
import pytest
import torch
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from rezero_hf import ReZeroForCausalLM
from rezero_hf.models.gating import LEAST_VALUES, Branch, GatedLinear


@contextmanager
def products_with_gates(allowed=True):
    """Counts the products that take a gate, with however little work; where that is not allowed, none may."""
    takes_gate = Branch.takes_gate if allowed else lambda *_: False
    with (
        mock.patch.object(GatedLinear, "apply", mock.Mock(side_effect=GatedLinear.apply)) as taken,
        mock.patch.object(Branch, "takes_gate", takes_gate),
        mock.patch.dict(LEAST_VALUES, cpu=0),
    ):
        yield taken


@pytest.fixture
def rows():
    """Enough tokens that reading alpha's gradient off the matrix is the cheaper."""
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))


def gradients(model, rows, **autocast):
    """Of every parameter, after one training step's forward and backward pass, and the loss."""
    model.zero_grad()
    with torch.autocast("cpu", **{"enabled": False, **autocast}):
        loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gated_product_has_the_gradients_of_its_formula(bias):
    """Its value is the formula's, bit for bit, and its first and second derivatives agree with finite differences, in
    double precision, at alpha 0 too."""
    torch.manual_seed(0)
    draw = {"dtype": torch.float64, "requires_grad": True}
    h, weight = torch.randn(2, 3, 4, **draw), torch.randn(5, 4, **draw)
    b = torch.randn(5, **draw) if bias else None
    for value in (0.0, 0.7):
        alpha = torch.tensor(value, **draw)
        assert torch.equal(
            GatedLinear.apply(alpha, h, weight, b),
            alpha * torch.nn.functional.linear(h, weight, b),
        )
        assert torch.autograd.gradcheck(GatedLinear.apply, (alpha, h, weight, b))
        assert torch.autograd.gradgradcheck(GatedLinear.apply, (alpha, h, weight, b))


def test_tangents_and_batches_of_gates_are_those_of_the_plain_form(tiny_model, rows):
    """In training mode, where a product could take the gate: `torch.func`'s `jvp` and `vmap`, and `forward_ad`."""
    model = tiny_model(ReZeroForCausalLM).train()
    # Fused attention has no tangents.
    model.set_attn_implementation("eager")
    gates = {name: value.detach() for name, value in model.named_parameters() if name.endswith("alpha")}

    def loss(gates):
        return torch.func.functional_call(model, gates, kwargs={"input_ids": rows, "labels": rows}).loss

    one = {name: torch.ones_like(value) for name, value in gates.items()}
    grads = torch.func.grad(loss)(gates)
    expected = sum(grad.sum() for grad in grads.values())
    torch.testing.assert_close(torch.func.jvp(loss, (gates,), (one,))[1], expected)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, one[name]) for name, value in gates.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, expected)
    both = {name: torch.stack([value, value + 0.1]) for name, value in gates.items()}
    found = torch.func.vmap(loss)(both)
    for place in (0, 1):
        torch.testing.assert_close(found[place], loss({name: value[place] for name, value in both.items()}))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False, "mlp_bias": False, "gate_sharing": "sublayer"},
        {"residual": "rezero_tanh", "gated_mlp": True},
        {"residual": "rezero_pre_norm"},
        {"gate_init": 0.0},
    ],
    ids=["biases", "two gates", "bounded, gated feed-forward net", "normed", "at the start"],
)
def test_training_does_not_depend_on_where_the_gate_is(tiny_model, rows, changes, checkpointed):
    """Loss and the gradient of every parameter, alpha's included, in double precision."""
    model = tiny_model(**changes).double().train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    with products_with_gates() as taken:
        on_matrix = gradients(model, rows)
    assert taken.call_count == 2 * model.config.num_hidden_layers * (2 if checkpointed else 1)
    with products_with_gates(False) as taken:
        on_output = gradients(model, rows)
    assert taken.call_count == 0
    torch.testing.assert_close(on_matrix, on_output, rtol=1e-10, atol=1e-12)


def test_under_autocast_both_are_as_far_from_fp32(tiny_model, rows):
    """The error of bf16 products that take the gate is that of products that do not."""
    model = tiny_model().train()
    exact = gradients(model, rows)

    def error(found):
        return {name: (found[name] - exact[name]).norm() / exact[name].norm() for name in exact}

    with products_with_gates() as taken:
        on_matrix = error(gradients(model, rows, enabled=True, dtype=torch.bfloat16))
    assert taken.call_count == 2 * model.config.num_hidden_layers
    with products_with_gates(False):
        on_output = error(gradients(model, rows, enabled=True, dtype=torch.bfloat16))
    for name in exact:
        assert on_matrix[name] < 2 * on_output[name] + 0.02, name


def test_an_activation_in_fp32_under_autocast_trains(tiny_model, rows):
    """As `gelu_new` is on CUDA, where autocast takes powers in fp32; the backward pass is outside of autocast."""
    model = tiny_model().train()
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _module, _args, output: output.float())
    with products_with_gates() as taken:
        found = gradients(model, rows, enabled=True, dtype=torch.bfloat16)
    assert taken.call_count == 2 * model.config.num_hidden_layers
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in found.values())


def test_what_is_frozen_gets_no_gradient(tiny_model, rows):
    """A frozen matrix is multiplied as it is; a held gate takes no part of the backward pass; the rest is as before."""
    model = tiny_model().train()
    expected = gradients(model, rows)
    for layer in model.model.layers:
        layer.residual_norm.alpha.requires_grad_(False)
    with products_with_gates() as taken:
        held = gradients(model, rows)
    assert taken.call_count == 2 * model.config.num_hidden_layers
    assert all(held[name] is None for name in held if name.endswith("alpha"))
    for name in held:
        if held[name] is not None:
            torch.testing.assert_close(held[name], expected[name])
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.requires_grad_(False)
        layer.mlp.down_proj.weight.requires_grad_(False)
    with products_with_gates() as taken:
        model(input_ids=rows)
    assert taken.call_count == 0


def test_hidden_states_asked_for_once_change_no_later_step(tiny_model, rows):
    """The library's recorders stay on the modules for good; they look at nothing that the gate's place changes."""
    model = tiny_model().train()
    model(input_ids=rows, output_hidden_states=True)
    with products_with_gates() as taken:
        model(input_ids=rows)
    assert taken.call_count == 2 * model.config.num_hidden_layers


def adapted(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj", "down_proj"]))


def wrapped(model):
    """As sharding and torchao's quantisation do: the weight is another tensor type, made of plain ones."""
    for layer in model.model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight = torch.nn.Parameter(TwoTensor(last.weight.detach(), last.weight.detach().clone()))
    return model


def watched(model):
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: None)
        layer.mlp.down_proj.register_full_backward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "change", [adapted, wrapped, watched, torch.nn.Module.eval], ids=lambda change: change.__name__
)
def test_a_last_product_that_is_more_than_itself_is_called_as_it_is(tiny_model, rows, change):
    """Beside adapters, weights of another type, hooks and evaluation the gate stays outside the product."""
    model = tiny_model().train()
    with products_with_gates() as taken:
        change(model)(input_ids=rows, labels=rows)
    assert taken.call_count == 0


def test_a_hook_on_all_modules_sees_the_last_product_too(tiny_model, rows):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        tiny_model(num_hidden_layers=1).train()(input_ids=rows)
    finally:
        handle.remove()
    assert sum(isinstance(module, torch.nn.Linear) for module in seen) == 7


def test_autocast_leaves_double_precision_alone(tiny_model, rows):
    """As it does everywhere in torch."""
    model = tiny_model(gate_init=0.5).double().train()
    alone = model(input_ids=rows).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=rows).logits, alone)


@pytest.mark.parametrize("words", [{"hidden_dropout": 0.1}, {"residual": "pre_norm"}], ids=["dropout", "no gate"])
def test_dropout_after_the_product_leaves_the_gate_on_the_output(tiny_model, rows, words):
    with products_with_gates() as taken:
        tiny_model(**words).train()(input_ids=rows)
    assert taken.call_count == 0


def test_few_tokens_leave_the_gate_on_the_output(tiny_model, rows):
    """A matrix is longer to go through than fewer rows than it has."""
    with products_with_gates() as taken:
        tiny_model().train()(input_ids=rows[:1, :16])
    assert taken.call_count == 0


def test_little_work_leaves_the_gate_on_the_output(tiny_model, rows):
    """A step of few values waits for its calls, not for its passes over them."""
    with products_with_gates() as taken:
        LEAST_VALUES["cpu"] = rows.numel() * tiny_model().config.hidden_size + 1
        tiny_model().train()(input_ids=rows)
        assert taken.call_count == 0
        LEAST_VALUES["cpu"] -= 1
        tiny_model().train()(input_ids=rows)
    assert taken.call_count == 2 * tiny_model().config.num_hidden_layers


def test_less_is_kept_for_the_backward_pass(tiny_model, rows):
    """No output of a branch is: two of them for every token of a layer."""

    def kept(model):
        storages = {}

        parameters = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # Alive until the end, so that no address is used twice.
            output = model(input_ids=rows)
        assert output is not None
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    model = tiny_model().train()
    with products_with_gates():
        on_matrix = kept(model)
    with products_with_gates(False):
        on_output = kept(model)
    config = model.config
    assert on_output - on_matrix == 2 * config.num_hidden_layers * rows.numel() * config.hidden_size * 4


def test_a_model_without_data_runs(tiny_config):
    """On the meta device, where tools count operations and shapes."""
    with torch.device("meta"):
        model = ReZeroForCausalLM(tiny_config()).train()
        output = model(input_ids=torch.zeros(4, 32, dtype=torch.long), labels=torch.zeros(4, 32, dtype=torch.long))
    output.loss.backward()
    assert output.logits.shape == (4, 32, model.config.vocab_size)
