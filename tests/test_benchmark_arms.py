"""The models of a benchmark are what they say: of equal size, causal, undropped, and called as their users call them."""

from dataclasses import replace

import pytest
import torch
from conftest import switch_on
from torch import nn

from rezero_hf.benchmark_arms import ARMS, GENERATION, REFERENCE, SIZES, installed, parameters
from rezero_hf.benchmark_cases import forward_flops
from rezero_hf.flops import flops_per_token


SMALL = SIZES["smoke"]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.MultiheadAttention.*")


def each(arms):
    return pytest.mark.parametrize("arm", arms, ids=lambda arm: arm.name)


@pytest.fixture
def ids():
    return torch.randint(SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))


def built(arm, layers=2):
    """The arm's small model in eval mode, no gate at 0."""
    torch.manual_seed(0)
    model = arm.build(SMALL, layers).eval()
    switch_on(model)
    return model


# Folding needs weights; what it leaves of ReZero's parameters is in the next test.
@each([arm for arm in ARMS if arm.name != "ReZero, folded"])
@pytest.mark.parametrize("size", ["cpu", "cuda"])
def test_parameters_are_equal_within_two_percent(arm, size):
    with torch.device("meta"):
        counts, expected = parameters(arm, SIZES[size]), parameters(REFERENCE, SIZES[size])
    for which, count in counts.items():
        assert count == pytest.approx(expected[which], rel=0.02)


def test_a_folded_model_lacks_the_gates_alone():
    folded = next(arm for arm in ARMS if arm.name == "ReZero, folded")
    both = parameters(folded, SMALL), parameters(REFERENCE, SMALL)
    assert both[0]["training"] == both[1]["training"] - SMALL.training_layers


@each(ARMS)
def test_width_vocabulary_and_depth_are_those_asked_for(arm):
    """The embedding is (vocabulary, width), the head another such matrix, and a layer more as large as ReZero's."""
    table = (SMALL.vocab_size, SMALL.hidden_size)
    weights = [tuple(weight.shape) for weight in built(arm).parameters()]
    assert weights.count(table) == 2
    more = [built(of, 3).state_dict() for of in (arm, REFERENCE)]
    less = [built(of, 2).state_dict() for of in (arm, REFERENCE)]
    layer = [sum(t.numel() for t in a.values()) - sum(t.numel() for t in b.values()) for a, b in zip(more, less)]  # noqa: B905
    assert layer[0] == pytest.approx(layer[1], rel=0.02)


@each(ARMS)
def test_logits_are_finite_causal_and_undropped(arm, ids):
    model = built(arm)
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % SMALL.vocab_size
    before, after = arm.logits(model, ids), arm.logits(model, changed)
    assert before.shape == (2, 12, SMALL.vocab_size) and before.isfinite().all()
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[:, 7:], before[:, 7:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(arm.logits(model.train(), ids), before)
    if hasattr(model, "config"):
        assert model.config._attn_implementation == "sdpa"


@each(ARMS)
def test_the_loss_is_that_of_the_next_token_and_reaches_every_matrix(arm, ids):
    """Computed from as many tokens as everybody else's: one more or less would be other work."""
    model, seen = built(arm).train(), []
    inner = getattr(model, "net", model)
    inner.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    loss = arm.loss(model, ids)
    assert seen == [ids.shape]
    expected = nn.functional.cross_entropy(arm.logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(weight.grad.count_nonzero() for weight in model.parameters() if weight.ndim == 2)


@each([arm for arm in ARMS if "decode_1" in arm.measures])
@torch.inference_mode()
def test_generation_takes_the_likeliest_token(arm, ids):
    """With its cache as without one, and with the static cache that is compiled around."""
    model = built(arm)
    whole = ids
    for _ in range(3):
        whole = torch.cat([whole, arm.logits(model, whole)[:, -1:].argmax(-1)], dim=1)
    for compiled in (False, True):
        assert torch.equal(arm.generate(model, ids, 3, compiled=compiled)[:, -3:], whole[:, -3:])
    assert arm.prefill(model, ids) is not None


def test_an_arm_without_its_package_is_left_out_and_named():
    arms = [REFERENCE, replace(REFERENCE, name="other", package="no_such_package")]
    assert installed(arms) == ([REFERENCE], {"other": "no_such_package"})
    assert {arm.name for arm in ARMS if arm.peer} >= {"GPT-2", "Llama", "GPT-NeoX", "x-transformers"}
    assert all(set(GENERATION) <= set(arm.measures) for arm in ARMS if arm.peer and "rezero" not in arm.package)


def test_operations_are_counted_as_everywhere_else():
    model = built(REFERENCE)
    expected = flops_per_token(model.config, SMALL.context) * SMALL.context * 3
    assert 3 * forward_flops(model, SMALL, 2, sequences=3) == expected
