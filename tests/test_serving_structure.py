"""What serving engines and device maps demand of a model's structure, checked on the structure itself.

vLLM builds the base model on the meta device, replaces the projections named in the tensor-parallel plan, fills parameters by
checkpoint name, hands its own arguments through to attention, and owns the head.
"""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AttentionInterface, AutoModel, DataCollatorWithFlattening

from rezero_hf import ReZeroForCausalLM, ReZeroModel


def test_the_base_class_is_named_in_the_checkpoint_and_built_on_meta(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_rezero.ReZeroModel"
    with torch.device("meta"):
        model = AutoModel.from_config(tiny_model().config)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert type(model)._supports_attention_backend


@pytest.mark.parametrize("changes", [{}, {"final_norm": True, "residual": "pre_norm", "qk_norm": True}])
def test_checkpoint_names_are_those_of_base_and_head_and_hold_every_parameter(tiny_model, tmp_path, changes):
    """`model.*` and `lm_head.weight`, with every alpha: an engine that fills parameters by name finds each one."""
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {f"model.{name}" for name, _ in model.model.named_parameters()} | {"lm_head.weight"}


def test_there_is_one_list_of_layers_and_the_plan_names_real_projections(tiny_model):
    model = tiny_model(ReZeroModel, gated_mlp=True)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    assert lists == ["layers"]
    linears = {name for name, module in model.layers[0].named_modules() if isinstance(module, nn.Linear)}
    planned = {name.removeprefix("layers.*.") for name in model.config.base_model_tp_plan}
    assert planned - {"self_attn.q_norm", "self_attn.k_norm"} == linears


def test_arguments_reach_attention_which_knows_its_layer(tiny_model, ids):
    """An engine's own attention is called once a layer with the module's index, its scaling and the engine's arguments."""
    seen = []

    def engine(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, module.is_causal, kwargs["scaling"], kwargs["engine_state"]))
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kwargs["scaling"]
        ).transpose(1, 2), None

    AttentionInterface.register("engine", engine)
    model = tiny_model()
    before = model(ids).logits
    model.set_attn_implementation("engine")
    after = model(ids, use_cache=False, engine_state="ours").logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert seen == [
        (layer, True, model.config.head_dim**-0.5, "ours") for layer in range(model.config.num_hidden_layers)
    ]


def test_flash_attentions_arguments_for_packed_rows_reach_attention(tiny_model, ids):
    """What the library's padding-free collator says of document bounds arrives at every layer's attention as it was."""
    seen = []

    def varlen(module, query, key, value, attention_mask, **kwargs):
        seen.append(
            {name: kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
        )
        return query.transpose(1, 2), None

    AttentionInterface.register("varlen", varlen)
    model = tiny_model()
    model.set_attn_implementation("varlen")
    documents = [{"input_ids": row[:length].tolist()} for row, length in zip(ids, (5, 7), strict=True)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    assert model(**batch, use_cache=False).loss.isfinite()
    assert len(seen) == model.config.num_hidden_layers
    for arguments in seen:
        assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 5, 12]
        assert arguments["max_length_q"] == arguments["max_length_k"] == 7


def test_the_head_is_one_linear_map_and_the_embeddings_factor_can_be_read(tiny_model, ids):
    """All that is not plain is in the base: an engine with its own head and embedding gets the same logits."""
    model = tiny_model(tie_word_embeddings=True)
    embedding = model.get_input_embeddings()
    plain = nn.functional.embedding(ids, embedding.weight) * embedding.embed_scale
    hidden = model.model(inputs_embeds=plain, return_dict=False)[0]
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_resizing_tying_and_untying_keep_the_function(tiny_model, ids):
    """More tokens: the old ones keep their logits, the embedding its factor. A tied head stays tied, an untied one free."""
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        before = model(ids).logits
        model.resize_token_embeddings(320)
        torch.testing.assert_close(model(ids).logits[..., :259], before, atol=1e-5, rtol=1e-5)
        assert model.config.vocab_size == 320 and model.get_input_embeddings().embed_scale > 1
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_model_split_over_devices_by_a_map_gives_the_same_logits(tiny_model, ids, tmp_path):
    """Every layer offloaded to disk and brought back as it runs: the smallest device map a CPU can try."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    layers = {f"model.layers.{n}": "disk" for n in range(model.config.num_hidden_layers)}
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        **layers,
    }
    offloaded = ReZeroForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(offloaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_other_shapes_is_refused_and_on_request_kept_where_it_fits(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        ReZeroForCausalLM.from_pretrained(tmp_path, vocab_size=300)
    model = ReZeroForCausalLM.from_pretrained(tmp_path, vocab_size=300, ignore_mismatched_sizes=True)
    alpha = tiny_model().model.layers[0].residual_norm.alpha
    assert torch.equal(model.model.layers[0].residual_norm.alpha, alpha)
