"""Two and four processes over gloo: tensor, pipeline, fully sharded and context parallelism give what one process gives.

Transformers' own engine does the work (`DistributedConfig`); what is held to account is the model: its plans, and where its
gates and its embedding scale stand.
"""

import textwrap

import pytest
import torch
from processes import run_in_group

from rezero_hf import ReZeroForCausalLM


PROLOGUE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from rezero_hf import ReZeroForCausalLM

torch.manual_seed(0)
dist.init_process_group("gloo")
ids = torch.randint(0, 256, (2, 40))

def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def both(folder, dtype=torch.float32, **sizes):
    sharded = ReZeroForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=DistributedConfig(**sizes))
    return ReZeroForCausalLM.from_pretrained(folder, dtype=dtype), sharded
"""

# Every alpha differs and none is 0 (conftest), so a gate in the wrong place would show.
KINDS = {
    "rezero": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2, "gated_mlp": True, "residual": "rezero_pre_norm", "qk_norm": True},
    "learned": {"position_embedding": "learned", "tie_word_embeddings": True, "gate_sharing": "sublayer"},
    "final norm": {"final_norm": True, "residual": "pre_norm"},
}


def run_on(processes, code, *folders, tmp_path):
    """Run `code` in processes that form one gloo group; all must succeed."""
    script = tmp_path / "script.py"
    script.write_text(PROLOGUE + textwrap.dedent(code) + "\ndist.destroy_process_group()\n")
    statuses, said = run_in_group(processes, script, *folders)
    assert set(statuses) == {0}, said[-6000:]


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """One saved model of each kind."""
    root = tmp_path_factory.mktemp("models")
    saved = []
    for name, changes in KINDS.items():
        saved.append(root / name.replace(" ", "_"))
        tiny_model(vocab_size=256, **changes).save_pretrained(saved[-1])
    return saved


def test_tensor_parallel_equals_one_process(folders, tmp_path):
    """Logits, loss, every gradient (alpha's included) and greedy generation; the projections really are sharded."""
    code = """
        for folder in sys.argv[1:]:
            one, two = both(folder, tp_size=2)
            sharded = {name for name, parameter in two.named_parameters() if isinstance(parameter, DTensor)}
            assert {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"} <= sharded, sharded
            assert {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= sharded, sharded
            assert not any(name.endswith("alpha") for name in sharded)
            # Nothing in them is random, and in training a gate may be on a matrix: not on a sharded one.
            first, second = one.train()(ids, labels=ids), two.train()(ids, labels=ids)
            torch.testing.assert_close(second.logits, first.logits, atol=1e-4, rtol=1e-4)
            first.loss.backward()
            second.loss.backward()
            reference = dict(one.named_parameters())
            for name, parameter in two.named_parameters():
                expected = reference[name].grad
                torch.testing.assert_close(whole(parameter.grad), expected, atol=1e-4, rtol=1e-3, msg=lambda m: f"{name}: {m}")
            options = {"max_new_tokens": 8, "do_sample": False}
            one.eval(), two.eval()
            assert torch.equal(one.generate(ids[:1], **options), two.generate(ids[:1], **options)), folder
    """
    run_on(2, code, *folders, tmp_path=tmp_path)


def test_heads_that_processes_cannot_share_are_one_line(tiny_model, tmp_path):
    tiny_model(num_key_value_heads=1).save_pretrained(tmp_path / "model")
    code = """
        try:
            both(sys.argv[1], tp_size=2)
        except ValueError as error:
            expected = "tp_size=2 processes cannot share num_key_value_heads=1 evenly; choose a tp_size that divides it."
            assert str(error) == expected, error
        else:
            raise SystemExit("not refused")
    """
    run_on(2, code, tmp_path / "model", tmp_path=tmp_path)


def test_pipeline_parallel_equals_one_process(folders, tmp_path):
    """Logits and greedy generation over two stages; each stage holds its own layers only."""
    code = """
        for folder in sys.argv[1:]:
            one, two = both(folder, pp_size=2)
            mine = [hasattr(layer, "residual_norm") for layer in two.model.layers]
            assert mine == [dist.get_rank() == 0, dist.get_rank() == 1], mine
            with torch.no_grad():
                torch.testing.assert_close(two(ids).logits, one(ids).logits, atol=1e-5, rtol=1e-5)
                options = {"max_new_tokens": 8, "do_sample": False}
                assert torch.equal(one.generate(ids[:1], **options), two.generate(ids[:1], **options)), folder
    """
    run_on(2, code, *folders, tmp_path=tmp_path)


def test_fully_sharded_training_equals_one_process(folders, tmp_path):
    """Four AdamW steps give the same losses; what is then saved loads, with our code beside it, and is what was trained."""
    code = """
        from pathlib import Path
        from rezero_hf.models import piecewise_loss
        # Several pieces, each a call of the head.
        piecewise_loss.LOGITS_AT_ONCE = 30 * 256
        out = Path(sys.argv[-1])
        for folder in sys.argv[1:-1]:
            one, two = both(folder, fsdp_size=2)
            assert all(isinstance(parameter, DTensor) for parameter in two.parameters())
            # SGD scales with the gradient, so a factor of the world size in a gate's gradient would show.
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (one, two)]
            for step in range(4):
                losses = []
                for model, optimizer in zip((one.train(), two.train()), optimizers):
                    loss = model(ids, labels=ids, skip_logits=model is two).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(loss.detach())
                torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
            # In bf16 every alpha stays fp32 in a shard of its own.
            first, second = both(folder, torch.bfloat16, fsdp_size=2)
            torch.testing.assert_close(second(ids, labels=ids).loss, first(ids, labels=ids).loss, atol=1e-2, rtol=1e-2)
            second(ids, labels=ids).loss.backward()
            gates = {p.dtype for n, p in second.named_parameters() if n.endswith("alpha") and p.grad is not None}
            assert gates <= {torch.float32}, gates
            saved = out / Path(folder).name
            two.save_pretrained(saved)
            dist.barrier()
            again = ReZeroForCausalLM.from_pretrained(saved)
            for (name, expected), value in zip(one.state_dict().items(), again.state_dict().values()):
                torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
    """
    run_on(2, code, *folders, tmp_path / "saved", tmp_path=tmp_path)
    for folder in folders:
        names = {path.name for path in (tmp_path / "saved" / folder.name).glob("*.py")}
        assert "modeling_rezero.py" in names and not any(name.startswith("_fsdp") for name in names)
    model = ReZeroForCausalLM.from_pretrained(tmp_path / "saved" / "rezero")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_sharding_in_two_dimensions_equals_one_process(folders, tmp_path):
    """Four processes: shards of shards (FSDP x tensor parallel) and replicas of shards (HSDP) give the loss and every gradient."""
    code = """
        folder = sys.argv[1]
        for sizes in ({"fsdp_size": 2, "tp_size": 2}, {"dp_replicate_size": 2, "fsdp_size": 2}):
            one, two = both(folder, **sizes)
            parameters = dict(two.named_parameters())
            sharded = parameters["model.layers.0.self_attn.q_proj.weight"]
            assert sharded.device_mesh.size() == 4 and len(sharded.placements) == 2, sharded.placements
            assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
            first, second = one(ids, labels=ids), two(ids, labels=ids)
            torch.testing.assert_close(second.loss, first.loss, atol=1e-5, rtol=1e-5)
            first.loss.backward()
            second.loss.backward()
            for name, expected in one.named_parameters():
                torch.testing.assert_close(
                    whole(parameters[name].grad), expected.grad, atol=1e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}"
                )
    """
    run_on(4, code, folders[2], tmp_path=tmp_path)


def test_context_parallel_equals_one_process(folders, tmp_path):
    """Each process has half of every sequence, in the two pieces torch's load balancing gives it: same loss, same gradients.

    Torch cuts the buffers and accelerate's hooks take the mask away, as in training. Torch's ring attention has no CPU kernel;
    here an attention that gathers keys and values from both processes stands in for it.
    """
    code = """
        from accelerate.big_modeling import _attach_context_parallel_hooks
        from torch.distributed._functional_collectives import all_gather_tensor_autograd
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel
        from transformers import AttentionInterface

        def gather(tensor, dim):
            return all_gather_tensor_autograd(tensor.contiguous(), dim, dist.group.WORLD)

        def ring(module, query, key, value, attention_mask, scaling, is_causal=False, position_ids=None, **kwargs):
            assert attention_mask is None and is_causal
            groups = module.num_key_value_groups
            key, value = (gather(t, 2).repeat_interleave(groups, 1) for t in (key, value))
            seen = gather(position_ids, 1)[:, None, None, :] <= position_ids[:, None, :, None]
            scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
            return (scores.softmax(-1) @ value).transpose(1, 2), None

        AttentionInterface.register("ring", ring)
        mesh = init_device_mesh("cpu", (2,))
        for folder in sys.argv[1:]:
            model = ReZeroForCausalLM.from_pretrained(folder)
            buffers = [ids.clone(), ids.roll(-1, 1), torch.arange(40).repeat(2, 1)]
            arguments = {"labels": ids, "shift_labels": buffers[1].clone(), "use_cache": False}
            expected = model(ids, **arguments).loss
            expected.backward()
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            model.zero_grad()
            _attach_context_parallel_hooks(model)
            model.set_attn_implementation("ring")
            with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)):
                mine, shifted, positions = buffers
                assert positions[0].tolist() == ([*range(10), *range(30, 40)] if dist.get_rank() == 0 else [*range(10, 30)])
                loss = model(
                    mine, position_ids=positions, labels=mine, shift_labels=shifted, num_items_in_batch=80, use_cache=False
                ).loss
                loss.backward()
            loss = loss.detach()
            dist.all_reduce(loss)
            torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
            for name, parameter in model.named_parameters():
                dist.all_reduce(parameter.grad)
                torch.testing.assert_close(
                    parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}"
                )
    """
    run_on(2, code, folders[2], folders[3], tmp_path=tmp_path)
