"""Held to other people's code: the authors' layer, Transformers' GPT-2 and Transformers' Llama, under copied weights.

Everything in fp64. Weights and gradients are translated by the same function, so a gradient lands beside the parameter it is
the gradient of.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rezero_hf import ReZeroModel


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.MultiheadAttention.*")

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def randomise(model):
    """Draw every parameter, so that no gate, bias or norm stands at a value that hides it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if parameter.ndim == 1 and name.endswith(("weight", "resweight")) else 0.0
            parameter.copy_(centre + 0.2 * noise)


def load(model, tensors):
    """Copy translated tensors into our model; every name must be ours and every one of ours must be there."""
    ours = dict(model.named_parameters())
    assert tensors.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            assert parameter.shape == tensors[name].shape, name
            parameter.copy_(tensors[name])


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_all_close(actual, expected, **tolerance):
    """Same names, close values, none of them all zero."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.count_nonzero(value), name
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def from_rztx(named, layers):
    """Names and shapes of the authors' layers -> ours."""
    tensors = {}
    for index in range(layers):
        theirs, ours = f"{index}.", f"layers.{index}."
        for kind in ("weight", "bias"):
            packed = named[f"{theirs}self_attn.in_proj_{kind}"].chunk(3)
            tensors |= {f"{ours}self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", packed, strict=True)}
            tensors[f"{ours}self_attn.o_proj.{kind}"] = named[f"{theirs}self_attn.out_proj.{kind}"]
            tensors[f"{ours}mlp.up_proj.{kind}"] = named[f"{theirs}linear1.{kind}"]
            tensors[f"{ours}mlp.down_proj.{kind}"] = named[f"{theirs}linear2.{kind}"]
        tensors[f"{ours}residual_norm.alpha"] = named[f"{theirs}resweight"]
    return tensors


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_authors_layers(tiny_config, layers, activation):
    """Same outputs and gradients as the authors' package at alpha != 0, one alpha serving attention and feed-forward."""
    from rezero.transformer import RZTXEncoderLayer

    theirs = torch.nn.ModuleList(RZTXEncoderLayer(32, 4, 64, dropout=0.0, activation=activation) for _ in range(layers))
    randomise(theirs.double())
    # Their layers know no positions: ours are learned and set to zero.
    config = tiny_config(num_hidden_layers=layers, hidden_act=activation, position_embedding="learned")
    model = ReZeroModel(config).double()
    with torch.no_grad():
        model.embed_positions.weight.zero_()
    of_the_embedding = {name: p for name, p in model.named_parameters() if name.startswith("embed_")}
    load(model, from_rztx(dict(theirs.named_parameters()), layers) | of_the_embedding)
    assert all(tuple(layer.residual_norm.alpha.shape) == (1,) for layer in model.layers)

    # (batch, tokens, features); theirs wants tokens first.
    stream = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    future = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    expected = stream.transpose(0, 1)
    for layer in theirs:
        expected = layer(expected, src_mask=future)
    expected = expected.transpose(0, 1)
    actual = model(inputs_embeds=stream).last_hidden_state
    torch.testing.assert_close(actual, expected, **CLOSE)

    upstream = torch.randn_like(stream)
    (expected * upstream).sum().backward()
    (actual * upstream).sum().backward()
    ours = {name: grad for name, grad in gradients(model).items() if name.startswith("layers.")}
    wanted = from_rztx(gradients(theirs), layers)
    # A constant added to every key changes no attention weight: that gradient is 0 up to rounding in both.
    for name in [name for name in wanted if name.endswith("k_proj.bias")]:
        torch.testing.assert_close(ours.pop(name), wanted.pop(name), rtol=0, atol=1e-9)
    assert_all_close(ours, wanted, **CLOSE)


def from_gpt2(named, layers):
    """GPT-2's names and shapes -> ours. Its `Conv1D` holds matrices as (in, out)."""
    tensors = {
        "model.embed_tokens.weight": named["transformer.wte.weight"],
        "model.embed_positions.weight": named["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        tensors[f"model.norm.{kind}"] = named[f"transformer.ln_f.{kind}"]
        for index in range(layers):
            theirs, ours = f"transformer.h.{index}.", f"model.layers.{index}."
            packed = named[f"{theirs}attn.c_attn.{kind}"].mT if kind == "weight" else named[f"{theirs}attn.c_attn.bias"]
            tensors |= {f"{ours}self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", packed.chunk(3), strict=True)}
            for their_name, our_name in (
                ("attn.c_proj", "self_attn.o_proj"),
                ("mlp.c_fc", "mlp.up_proj"),
                ("mlp.c_proj", "mlp.down_proj"),
            ):
                tensor = named[f"{theirs}{their_name}.{kind}"]
                tensors[f"{ours}{our_name}.{kind}"] = tensor.mT if kind == "weight" else tensor
            tensors[f"{ours}residual_norm.norms.attn.{kind}"] = named[f"{theirs}ln_1.{kind}"]
            tensors[f"{ours}residual_norm.norms.mlp.{kind}"] = named[f"{theirs}ln_2.{kind}"]
    return tensors


def fp64_loss(logits, labels):
    """Next-token loss from its definition: the library's own rounds the logits to fp32 first."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_gpt2(tiny_model, ids):
    """`pre_norm` with learned positions, `gelu_new` and a final norm is GPT-2: logits, loss and every gradient."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": None, "eos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=259, **sizes, **dropouts, **ends)).double()
    randomise(theirs)
    ours = tiny_model(
        residual="pre_norm",
        position_embedding="learned",
        hidden_act="gelu_new",
        intermediate_size=128,
        final_norm=True,
        embedding_multiplier=1,
        tie_word_embeddings=True,
    ).double()
    load(ours, from_gpt2(dict(theirs.named_parameters()), layers=2))

    labels = ids.clone()
    labels[0, :4] = -100
    expected, actual = theirs(ids, labels=labels), ours(ids, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(fp64_loss(actual.logits, labels), fp64_loss(expected.logits, labels), **CLOSE)
    torch.testing.assert_close(actual.loss.double(), fp64_loss(expected.logits, labels), rtol=1e-6, atol=0)

    fp64_loss(expected.logits, labels).backward()
    fp64_loss(actual.logits, labels).backward()
    assert_all_close(gradients(ours), from_gpt2(gradients(theirs), layers=2), **CLOSE)


def from_llama(named):
    """Llama's names -> ours: only the norms before the branches live elsewhere."""
    return {
        name.replace("input_layernorm", "residual_norm.norms.attn").replace(
            "post_attention_layernorm", "residual_norm.norms.mlp"
        ): tensor
        for name, tensor in named.items()
    }


def test_llama(tiny_model, ids):
    """`pre_norm` with RMSNorm, rotary positions, grouped queries and a gated feed-forward net without biases is Llama.

    Not to 1e-9: Llama computes its norms in fp32 whatever the model's type.
    """
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).double()
    randomise(theirs)
    ours = tiny_model(
        residual="pre_norm",
        norm="rms",
        final_norm=True,
        gated_mlp=True,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        num_key_value_heads=2,
        embedding_multiplier=1,
    ).double()
    load(ours, from_llama(dict(theirs.named_parameters())))

    expected, actual = theirs(ids, labels=ids), ours(ids, labels=ids)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual.logits, expected.logits, **tolerance)
    torch.testing.assert_close(actual.loss, expected.loss)
    fp64_loss(expected.logits, ids).backward()
    fp64_loss(actual.logits, ids).backward()
    assert_all_close(gradients(ours), from_llama(gradients(theirs)), **tolerance)
