"""A plan says what a run will take: arithmetic, memory, time, and whether the recipe's words work together."""

import dataclasses
import os
import platform
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, ReZeroTrainingArguments, load_recipe
from rezero_hf.errors import UserError
from rezero_hf.flops import flops_per_token, peak_flops
from rezero_hf.markdown import duration
from rezero_hf.memory import language_model, plan_memory
from rezero_hf.models.gating import LEAST_VALUES
from rezero_hf.optim import make_optimizer
from rezero_hf.planning import describe, make_plan
from rezero_hf.rehearsal import rehearse


BATCH, TOKENS = 2, 24
SHAPES = {
    "plain mlp": {},
    "gated mlp": {"gated_mlp": True, "hidden_act": "silu"},
    "grouped heads": {"num_key_value_heads": 2, "head_dim": 16},
    "dropout": {"attention_dropout": 0.1, "hidden_dropout": 0.1, "embedding_dropout": 0.1},
    "norms": {"norm": "rms", "final_norm": True, "qk_norm": True},
    "no biases": {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
    "learned positions": {"position_embedding": "learned"},
    "looks both ways": {"is_causal": False},
}


@pytest.fixture
def arguments(tmp_path):
    """Makes training arguments of two sequences per device on a CPU; keyword arguments change fields."""
    base = {"per_device_train_batch_size": BATCH, "use_cpu": True}
    return lambda **changes: ReZeroTrainingArguments(str(tmp_path / "out"), **{**base, **changes})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flops_are_those_of_a_real_forward_and_backward(tiny_config, shape):
    """Equal to what torch's counter sees, but for the half of attention's square that a causal mask throws away."""
    config = tiny_config(**shape)
    model = language_model(config)
    model.set_attn_implementation("eager")
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    unseen = 3 * 4 * width * (TOKENS - 1) // 2 if config.is_causal else 0
    assert flops_per_token(config, TOKENS) == counter.get_total_flops() // (BATCH * TOKENS) - unseen


def saved_bytes(config, dtype):
    """What the backbone keeps for its backward pass, counted by storage on real tensors: all, and weights' copies."""
    model = language_model(config).train()
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        keep(model.model(input_ids=torch.zeros(BATCH, TOKENS, dtype=torch.long), use_cache=False).last_hidden_state)
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    copies = 2 * sum(linear.weight.numel() for linear in linears) if dtype is torch.bfloat16 else 0
    return sum(storage.nbytes() for storage in kept.values()) - copies


# Every residual form with the plain branches, and every branch with the paper's form and with pre-norm.
ACTIVATIONS = [(residual, "plain mlp") for residual in get_args(ReZeroConfig.__annotations__["residual"])]
ACTIVATIONS += [(residual, shape) for residual in ("rezero", "pre_norm") for shape in SHAPES if shape != "plain mlp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("residual", "shape"), ACTIVATIONS)
def test_activations_are_what_the_layers_really_save(tiny_config, arguments, residual, shape, dtype):
    """Within 2 %: without data, a norm's statistics count as 16 bit where the CPU's kernels keep 32."""
    config = tiny_config(residual=residual, use_cache=False, **SHAPES[shape])
    args = arguments(bf16=dtype is torch.bfloat16)
    planned = plan_memory(config, args, TOKENS, passes=1, distributed=False, shards=1, checkpointing=False)
    assert planned.activations == pytest.approx(saved_bytes(config, dtype), rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_optimiser_state_is_that_of_a_real_optimiser(tiny_config, arguments, optimizer):
    """Muon keeps one state for the matrices inside the layers, the others two for everything."""
    config = tiny_config()
    model = ReZeroForCausalLM(config)
    built = make_optimizer(model, optimizer, lr=1e-3)
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    built.step()
    real = sum(
        value.untyped_storage().nbytes()
        for state in built.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    plan = make_plan(config, arguments(optimizer=optimizer), TOKENS, 1)
    assert plan.plain.optimizer == real
    assert plan.parameters == model.num_parameters()
    assert plan.plain.weights == plan.plain.gradients == 4 * plan.parameters


@pytest.mark.parametrize("rope", ["dynamic", "linear", "yarn"])
def test_positions_for_longer_sequences_are_planned_as_any_others(tiny_config, arguments, rope):
    stretched = {"rope_type": rope, "factor": 2.0, "rope_theta": 10000.0}
    plans = [make_plan(tiny_config(**words), arguments(), TOKENS, 1) for words in ({"rope_parameters": stretched}, {})]
    assert plans[0].memory.activations == plans[1].memory.activations


def test_memory_goes_where_it_should(tiny_config, arguments):
    """Checkpointing shrinks activations, FSDP what it divides, DDP adds buckets, autocast adds 16-bit weights."""
    config = tiny_config(num_hidden_layers=6, hidden_size=64)
    plan = make_plan(config, arguments(activation_checkpointing=True), TOKENS, 1)
    assert plan.memory is plan.checkpointed
    assert plan.checkpointed.activations < plan.plain.activations / 4
    assert plan.checkpointed.peak < plan.plain.peak
    alone = make_plan(config, arguments(activation_checkpointing=True), TOKENS, 1, compare=False)
    assert alone.memory == plan.memory and alone.plain is None
    assert "--dry-run says how much without it" in describe(alone) and "--dry-run" not in describe(plan)
    ddp = make_plan(config, arguments(), TOKENS, 1, world_size=4)
    assert ddp.plain.peak == plan.plain.peak + ddp.plain.buckets and ddp.plain.buckets == plan.plain.gradients
    fsdp = make_plan(config, arguments(), TOKENS, 1, world_size=4, shards=4)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(fsdp.plain, name) == pytest.approx(getattr(plan.plain, name) / 4, rel=0.01)
    assert fsdp.plain.buckets == 0 < fsdp.plain.gathered and fsdp.plain.activations == plan.plain.activations
    half = make_plan(config, arguments(bf16=True), TOKENS, 1)
    assert half.plain.activations < plan.plain.activations and half.plain.copies > 0 == plan.plain.copies


def test_the_peak_holds_gradients_that_accumulate(arguments):
    """With a second pass the gradients of the first are there beside all activations."""
    config = ReZeroConfig(hidden_size=256, num_hidden_layers=4)
    one, two = (make_plan(config, arguments(gradient_accumulation_steps=n), 256, 1).plain for n in (1, 2))
    assert two.peak - one.peak == pytest.approx(one.gradients, rel=0.1)


def test_attention_dropout_costs_a_gpu_nothing(tiny_config, arguments):
    config = tiny_config(attention_dropout=0.1)
    cpu, gpu = (make_plan(config, arguments(), TOKENS, 1, device=device).plain for device in ("cpu", "cuda"))
    assert gpu == make_plan(tiny_config(), arguments(), TOKENS, 1, device="cuda").plain
    assert cpu.activations > gpu.activations


def test_a_gpu_keeps_the_outputs_that_a_gate_stands_on(tiny_config, arguments, monkeypatch):
    """Where the last product of a branch takes the gate, as here on a CPU, the branch's output is not kept."""
    monkeypatch.setitem(LEAST_VALUES, "cpu", 0)
    config = tiny_config()
    args = arguments(per_device_train_batch_size=4)
    cpu, gpu = (make_plan(config, args, 32, 1, device=device).plain for device in ("cpu", "cuda"))
    assert gpu.activations - cpu.activations == 2 * config.num_hidden_layers * 4 * 32 * config.hidden_size * 4


def test_a_global_batch_is_the_same_on_any_number_of_devices(tiny_config, arguments):
    plans = [make_plan(tiny_config(), arguments(global_batch_size=16), TOKENS, 10, world_size=n) for n in (1, 8)]
    assert [plan.tokens for plan in plans] == [10 * 16 * TOKENS] * 2
    with pytest.raises(UserError, match="global_batch_size=16 is not a multiple of the 6 sequences of one pass"):
        make_plan(tiny_config(), arguments(global_batch_size=16), TOKENS, 10, world_size=3)
    with pytest.raises(UserError, match="shards=3 does not divide the 8 devices"):
        make_plan(tiny_config(), arguments(), TOKENS, 10, world_size=8, shards=3)


def test_a_plan_leaves_random_numbers_and_the_configuration_alone(tiny_config, arguments):
    config = tiny_config(attention_dropout=0.1)
    before, random = config.to_dict(), torch.get_rng_state()
    make_plan(config, arguments(), TOKENS, 1, device="cuda")
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), random)


def test_the_description_says_what_a_renter_asks(tiny_config, arguments):
    """Size, tokens, arithmetic, memory and its parts, the other way to run it, whether it fits, hours."""
    plan = make_plan(tiny_config(), arguments(peak_flops=1e6), TOKENS, 1000, world_size=2)
    text = describe(dataclasses.replace(plan, capacity=10**9), mfu=0.5)
    for word in ("parameters", "FLOP per token", "1,000 steps x 96 tokens = 96 k tokens", "2 devices", "of 1 GB: fits",
                 "weights", "gradients", "buckets", "optimizer", "activations", "loss", "with it", "50%", "1 MFLOP/s"):  # fmt: skip
        assert word in text, f"{word} is not in\n{text}"
    assert f"time    {duration(3600 * plan.hours(0.5))}, " in text and plan.hours(0.5) > 1
    assert plan.hours(0.5) == pytest.approx(plan.tokens * plan.flops_per_token / 1e6 / 3600)
    assert "DOES NOT FIT" in describe(dataclasses.replace(plan, capacity=10**3))
    unknown = dataclasses.replace(plan, peak=None)
    assert "time" not in describe(unknown) and unknown.hours(0.5) is None


def test_a_process_on_a_cpu_holds_more_than_its_tensors(arguments, monkeypatch):
    """With glibc, and unless every tensor has pages of its own; of GPUs and several processes nothing is said."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    config = ReZeroConfig(hidden_size=256, num_hidden_layers=4)
    plan = make_plan(config, arguments(), 256, 1)
    assert plan.memory.resident > plan.memory.peak and "MALLOC_MMAP_THRESHOLD_" in describe(plan)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    apart = make_plan(config, arguments(), 256, 1).memory
    assert apart.peak == plan.memory.peak and apart.resident < plan.memory.resident
    for elsewhere in ({"device": "cuda"}, {"world_size": 2}):
        plan = make_plan(config, arguments(), 256, 1, **elsewhere)
        assert plan.memory.resident is None and "MALLOC_MMAP_THRESHOLD_" not in describe(plan)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA H200", torch.float32, 67e12),
        ("NVIDIA GB200", torch.bfloat16, 2500e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4e12),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA GH200 480GB", torch.bfloat16, None),
        ("Acme Accelerator", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == peak


def test_tf32_counts_where_torch_may_use_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops(torch.device("cuda"), torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), torch.float32) is None


@pytest.fixture
def rehearsal(tmp_path, tokenizer):
    """Rehearses a recipe of a 12-layer model with the given words of its training section."""

    def go(training, model=""):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"model: {{num_hidden_layers: 12, {model}}}\ntraining: {{max_steps: 1000, {training}}}\n")
        recipe = load_recipe(path)
        rehearse(recipe, recipe.model_config(tokenizer))

    return go


@pytest.mark.parametrize(
    ("training", "model"),
    [
        (
            "optimizer: muon, bf16: true, global_batch_size: 64, per_device_train_batch_size: 8, warmup_steps: 10, "
            "lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 100}, save_steps: 5",
            "num_attention_heads: 8, num_key_value_heads: 2, gated_mlp: true",
        ),
        (
            "optimizer: lamb, activation_checkpointing: true, fp16: true, eval_strategy: steps, eval_steps: 10",
            "residual: pre_norm, position_embedding: learned, tie_word_embeddings: true",
        ),
    ],
)
def test_a_good_recipe_rehearses_without_a_trace(rehearsal, training, model, tmp_path, capfd, monkeypatch):
    """Nothing is written or printed, random numbers go on as if nothing had been, and a launcher's words are not heard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    before, random = dict(os.environ), torch.get_rng_state()
    rehearsal(training, model)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert os.environ == before and torch.equal(torch.get_rng_state(), random)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("lr_scheduler_kwargs: {min_lr_rat: 0.1}, lr_scheduler_type: cosine_with_min_lr", "min_lr_rat"),
        ("activation_checkpointing: true, activation_checkpointing_kwargs: {use_rentrant: false}", "use_rentrant"),
        ("accelerator_config: {split_batch: true}", "split_batch"),
    ],
)
def test_a_word_that_fails_in_the_first_step_fails_in_the_rehearsal(rehearsal, training, message):
    """One line that names recipe and word, before anything is rented."""
    with pytest.raises(UserError, match=message) as caught:
        rehearsal(training)
    assert "recipe.yaml: a rehearsal of one step failed: " in str(caught.value)
    assert "\n" not in str(caught.value)
