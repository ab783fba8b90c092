"""The decoder: its start, its forward pass, what it saves, how it generates.

At alpha = 0 most equivalences hold for any code, so only what is said about the start is tested there.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

from rezero_hf import ReZeroForCausalLM, ReZeroModel


CLOSE = {"rtol": 1e-5, "atol": 1e-5}

positions = pytest.mark.parametrize("position_embedding", ["rope", "learned"])
sharings = pytest.mark.parametrize("gate_sharing", ["layer", "sublayer"])
closed_forms = pytest.mark.parametrize("residual", ["rezero", "rezero_pre_norm", "rezero_tanh"])
# Everything that changes the path of a token through the net, in as few models as possible.
KINDS = {
    "rope": {},
    "learned": {"position_embedding": "learned"},
    "grouped": {"num_key_value_heads": 2, "qk_norm": True, "gate_sharing": "sublayer"},
    "learned grouped": {"position_embedding": "learned", "num_key_value_heads": 1, "residual": "rezero_pre_norm"},
    "gated tied": {
        "gated_mlp": True,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "norm": "rms",
        "final_norm": True,
    },
    "wide heads": {"head_dim": 12, "attention_bias": False, "mlp_bias": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def first_stream(model, ids):
    """The stream that enters layer 0, from its definition."""
    stream = model.embed_tokens.weight[ids] * model.config.embedding_multiplier
    if model.config.position_embedding == "learned":
        stream = stream + model.embed_positions.weight[: ids.shape[1]]
    return stream


def std(tensor):
    return tensor.std().item()


def padded_left(ids, tokenizer, lengths=(7, 12)):
    """Rows cut to their last `lengths` tokens, padded at the left: ids, mask and the positions of the real tokens."""
    mask = torch.stack([(torch.arange(ids.shape[1]) >= ids.shape[1] - length).long() for length in lengths])
    return ids.where(mask.bool(), tokenizer.pad_token_id), mask, (mask.cumsum(-1) - 1).clamp(min=0)


@sharings
@closed_forms
@positions
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("layers", [2, 12, 200])
def test_a_new_model_is_the_identity(
    tiny_model, ids, layers, tie_word_embeddings, position_embedding, residual, gate_sharing
):
    """At any depth `last_hidden_state` is the stream that enters layer 0, bit for bit, and training mode changes nothing."""
    model = tiny_model(
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=layers,
        tie_word_embeddings=tie_word_embeddings,
        position_embedding=position_embedding,
        residual=residual,
        gate_sharing=gate_sharing,
        gate_init=0,
    )
    for model.training in (False, True):
        assert torch.equal(model.model(ids).last_hidden_state, first_stream(model.model, ids))


@sharings
@closed_forms
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_what_learns_first(tiny_model, ids, tie_word_embeddings, residual, gate_sharing):
    """The first backward reaches every alpha, the embedding and the head, no branch; the second reaches the branches."""
    model = tiny_model(
        num_hidden_layers=12,
        tie_word_embeddings=tie_word_embeddings,
        residual=residual,
        gate_sharing=gate_sharing,
        gate_init=0,
    )
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        inside = ".self_attn." in name or ".mlp." in name or ".norms." in name
        assert bool(parameter.grad.any()) != inside, name
        if name.endswith("alpha"):
            assert parameter.grad.all(), name

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    # A constant added to every key changes no attention weight: rounding decides whether its gradient is exactly 0.
    unreached = [name for name, p in model.named_parameters() if not p.grad.any() and "k_proj.bias" not in name]
    assert not unreached


@sharings
def test_a_gates_gradient_is_what_its_branch_would_have_done(tiny_model, ids, gate_sharing):
    """At the start, d loss / d alpha = <d loss / d stream, F(stream)>, summed over the branches that share the gate."""
    model = tiny_model(num_hidden_layers=3, gate_sharing=gate_sharing, gate_init=0).double()
    stream = first_stream(model.model, ids).detach().requires_grad_()
    logits = stream @ model.lm_head.weight.T
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    angles = model.model.rotary_emb(stream, torch.arange(ids.shape[1])[None])

    logits = model(ids).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for layer in model.model.layers:
        heard = torch.stack(
            [
                (stream.grad * layer.self_attn(stream, position_embeddings=angles)[0]).sum(),
                (stream.grad * layer.mlp(stream)).sum(),
            ]
        )
        expected = heard.sum(0, keepdim=True) if gate_sharing == "layer" else heard
        torch.testing.assert_close(layer.residual_norm.alpha.grad, expected)


def test_layers_are_drawn_independently(tiny_model):
    """No two matrices of the same shape are equal, nor correlated beyond chance."""
    matrices = [p.detach().flatten() for p in tiny_model(num_hidden_layers=8).parameters() if p.ndim == 2]
    for shape in {m.numel() for m in matrices}:
        correlation = torch.corrcoef(torch.stack([m for m in matrices if m.numel() == shape] + [torch.randn(shape)]))
        assert correlation.fill_diagonal_(0).abs().max() < 6 / shape**0.5


@pytest.mark.parametrize("position_embedding", ["rope", "learned"])
def test_initial_statistics(tiny_model, position_embedding):
    """A unit-variance stream, Xavier matrices, biases 0, norms 1, positions of 0.02: what the docstring of the init says."""
    model = tiny_model(
        hidden_size=128, intermediate_size=512, position_embedding=position_embedding, residual="rezero_pre_norm",
        max_position_embeddings=512, gate_init=0.25,
    )  # fmt: skip
    every_byte = torch.arange(256)[None]
    tokens = model.model.embed_tokens.weight[every_byte] * model.config.embedding_multiplier
    assert std(tokens) == pytest.approx(1.0, rel=0.03)
    assert std(first_stream(model.model, every_byte)) == pytest.approx(1.0, rel=0.03)
    for name, p in model.named_parameters():
        if name.endswith("alpha"):
            assert torch.equal(p, torch.full((1,), 0.25))
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p) if ".norms." in name and "weight" in name else torch.zeros_like(p))
        elif "embed" not in name:
            assert std(p) == pytest.approx((2 / sum(p.shape)) ** 0.5, rel=0.03), name
        elif "positions" in name:
            assert std(p) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("scale", [0.5, 2])
def test_embedding_std_is_the_streams(tiny_model, scale):
    """`embedding_std` is the standard deviation of what enters layer 0, whatever the multiplier."""
    for multiplier in (None, 1, 7.0):
        model = tiny_model(
            ReZeroModel, hidden_size=128, embedding_std=scale, embedding_multiplier=multiplier, gate_init=0
        )
        assert std(model(torch.arange(256)[None]).last_hidden_state) == pytest.approx(scale, rel=0.03)


@pytest.mark.parametrize("width", [64, 1024])
def test_a_tied_head_starts_with_small_logits(tiny_model, width):
    """Tied logits are of order one at any width, sqrt(d) on the input's own token, so no loss of order d."""
    model = tiny_model(hidden_size=width, intermediate_size=8, tie_word_embeddings=True, gate_init=0)
    ids = torch.arange(256)[None]
    logits = model(ids).logits[0, :, :256]
    own = logits.diagonal().mean().item()
    others = logits[~torch.eye(256, dtype=torch.bool)]
    assert own == pytest.approx(width**0.5, rel=0.05)
    assert std(others) == pytest.approx(1.0, rel=0.05)


def test_initializer_range_is_gpt2s_start(tiny_model):
    """A number draws every matrix with that standard deviation and leaves the embedding to its own words."""
    model = tiny_model(hidden_size=128, initializer_range=0.02, embedding_std=0.02, embedding_multiplier=1, gate_init=0)
    assert std(model.model(torch.arange(256)[None]).last_hidden_state) == pytest.approx(0.02, rel=0.03)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert std(p) == pytest.approx(0.02, rel=0.03), name


@pytest.mark.parametrize("initializer_range", [None, 0.02])
def test_output_init_scale_is_a_factor_on_what_writes_into_the_stream(tiny_model, initializer_range):
    """`o_proj` and `down_proj` start multiplied by it; every other parameter is drawn as without it."""
    one, tenth = (tiny_model(initializer_range=initializer_range, output_init_scale=s) for s in (1.0, 0.1))
    parameters = dict(tenth.named_parameters())
    for name, p in one.named_parameters():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        torch.testing.assert_close(parameters[name], p * 0.1 if writes else p)


@pytest.mark.parametrize("residual", ["rezero", "rezero_pre_norm", "pre_norm", "plain"])
def test_without_outputs_a_new_model_is_the_identity_with_open_gates(tiny_model, ids, residual):
    """`output_init_scale=0` at an open gate: 12 layers are the identity bit for bit, the first backward reaches every matrix
    that writes into the stream and no gate, and after one step the second reaches every parameter."""
    model = tiny_model(num_hidden_layers=12, residual=residual, gate_init=0.5, output_init_scale=0)
    assert torch.equal(model.model(ids).last_hidden_state, first_stream(model.model, ids))
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert p.grad.any(), name
        elif name.endswith("alpha"):
            assert not p.grad.any(), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    # A constant added to every key changes no attention weight: rounding decides whether its gradient is exactly 0.
    assert not [name for name, p in model.named_parameters() if not p.grad.any() and "k_proj.bias" not in name]


@kinds
def test_the_stream_runs_through_the_layers(tiny_model, ids, kind):
    """`output_hidden_states` is the stream before each layer and the final one, each the layer's work on the one before."""
    model = tiny_model(num_hidden_layers=3, **KINDS[kind]).model
    output = model(ids, output_hidden_states=True)
    streams = output.hidden_states
    assert len(streams) == 4
    assert torch.equal(streams[0], first_stream(model, ids))
    where = torch.arange(ids.shape[1])[None]
    angles = model.rotary_emb(streams[0], where) if model.config.position_embedding == "rope" else None
    for layer, before, after in zip(model.layers[:-1], streams[:-2], streams[1:-1], strict=True):
        assert not torch.equal(before, after)
        torch.testing.assert_close(layer(before, position_embeddings=angles), after, **CLOSE)
    final = model.norm(model.layers[-1](streams[-2], position_embeddings=angles))
    torch.testing.assert_close(streams[-1], final, **CLOSE)
    assert torch.equal(streams[-1], output.last_hidden_state)


@kinds
def test_attention_backends_agree(tiny_model, tokenizer, ids, uncompiled, kind):
    """SDPA, eager and flex, switched at run time, give the same logits: full, padded, packed. Eager shows its probabilities.

    Flex has no backward pass on a CPU.
    """
    model = tiny_model(**KINDS[kind])
    rows, mask, where = padded_left(ids, tokenizer)
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    assert model.config._attn_implementation == "sdpa"
    found = {}
    for backend in ("sdpa", "eager", "flex_attention"):
        model.set_attn_implementation(backend)
        with torch.no_grad():
            found[backend] = [
                model(ids).logits,
                model(rows, attention_mask=mask, position_ids=where).logits[mask.bool()],
                model(ids, position_ids=packed).logits,
            ]
    for backend in ("eager", "flex_attention"):
        for slow, quick in zip(found[backend], found["sdpa"], strict=True):
            torch.testing.assert_close(slow, quick, **CLOSE)

    model.set_attn_implementation("eager")
    full = model(ids, output_attentions=True)
    padded = model(rows, attention_mask=mask, position_ids=where, output_attentions=True)
    assert len(full.attentions) == 2
    for weights in full.attentions:
        assert weights.shape == (2, 4, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
        assert torch.equal(weights > 0, torch.ones(12, 12, dtype=torch.bool).tril().expand_as(weights))
    assert not any(weights[0, :, 5:, :5].any() for weights in padded.attentions)


@kinds
def test_the_future_and_the_padding_are_unseen(tiny_model, tokenizer, ids, kind):
    """A later token changes no earlier logits, and left padding changes none of the real ones."""
    model = tiny_model(**KINDS[kind])
    logits = model(ids).logits
    other = ids.clone()
    other[:, 8] = (other[:, 8] + 1) % 256
    changed = model(other).logits
    torch.testing.assert_close(changed[:, :8], logits[:, :8], **CLOSE)
    assert ((changed[:, 8:] - logits[:, 8:]).abs().amax(-1) > 1e-4).all()

    rows, mask, where = padded_left(ids, tokenizer)
    padded = model(rows, attention_mask=mask, position_ids=where).logits
    torch.testing.assert_close(padded[0, 5:], model(ids[:1, 5:]).logits[0], **CLOSE)
    torch.testing.assert_close(padded[1], logits[1], **CLOSE)


@kinds
def test_packed_documents_do_not_see_each_other(tiny_model, ids, kind):
    """Positions that restart mark the documents of a packed row: each gets the logits it has alone."""
    model = tiny_model(**KINDS[kind])
    where = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(ids[:1], position_ids=where).logits
    alone = torch.cat([model(ids[:1, :5]).logits, model(ids[:1, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, **CLOSE)


def test_a_full_mask_is_used_as_given(tiny_model, ids):
    """A 4D mask replaces the causal one."""
    model = tiny_model()
    causal = torch.full((1, 1, 12, 12), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 12, 12)
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, model(ids).logits, **CLOSE)
    everything = model(ids, attention_mask=torch.zeros(2, 1, 12, 12)).logits
    assert (everything[:, 0] - model(ids).logits[:, 0]).abs().max() > 1e-3


def test_rotary_positions_are_relative_and_scale(tiny_model, ids):
    """Shifting every position changes nothing; stretching them does, and `linear` scaling undoes it."""
    where, words = torch.arange(12)[None], {"attention_mask": torch.ones_like(ids)}
    model = tiny_model()
    logits = model(ids, position_ids=where).logits
    torch.testing.assert_close(model(ids, position_ids=where + 9).logits, logits, rtol=1e-4, atol=1e-4)
    stretched = model(ids, position_ids=2 * where, **words).logits
    assert (stretched - logits).abs().max() > 1e-3
    scaled = tiny_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    torch.testing.assert_close(scaled(ids, position_ids=2 * where, **words).logits, logits, **CLOSE)


def test_qk_norm_forgets_the_scale_of_queries_and_keys(tiny_model, ids):
    """With `qk_norm` a larger query projection changes nothing; without it, it does."""
    for qk_norm in (True, False):
        model = tiny_model(qk_norm=qk_norm)
        before = model(ids).logits
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(3)
                layer.self_attn.q_proj.bias.mul_(3)
        assert torch.allclose(model(ids).logits, before, rtol=1e-3, atol=1e-3) == qk_norm


@kinds
def test_inputs_embeds_are_rows_of_the_embedding(tiny_model, ids, kind):
    """`inputs_embeds` taken from `embed_tokens` give the logits of the ids; exactly one of the two is wanted."""
    model = tiny_model(**KINDS[kind])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match=r"^Pass exactly one of input_ids and inputs_embeds\.$"):
            model(**wrong)


def test_logits_to_keep(tiny_model, ids):
    """Only the positions asked for get logits: the last few, or those of an index."""
    model = tiny_model()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], **CLOSE)
    index = torch.tensor([1, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=index).logits, logits[:, index], **CLOSE)


def test_loss_and_its_arguments(tiny_model, ids):
    """Nats per next token; -100 is ignored, `num_items_in_batch` divides the sum, `shift_labels` are taken as they are."""
    model = tiny_model()
    labels = ids.clone()
    labels[0, :6] = -100
    output = model(ids, labels=labels)
    logprobs = output.logits.log_softmax(-1)
    each = -logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, each[counted].mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=40).loss, each[counted].sum() / 40)

    unshifted = -logprobs.gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(model(ids, labels=labels, shift_labels=ids).loss, unshifted.mean())
    assert model(ids).loss is None
    as_tuple = model(ids, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


CHECKPOINTING = {
    "not reentrant": ({"use_reentrant": False}, {}, 6),
    "reentrant": ({"use_reentrant": True}, {}, 6),
    "every second layer": (None, {"every_n_layers": 2}, 5),
    "offloaded": (None, {"offload": True}, 6),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.gpu) if way == "offloaded" else way for way in CHECKPOINTING]
)
def test_activation_checkpointing_changes_no_gradient(tiny_model, ids, way):
    """Checkpointed layers, and only they, run again in the backward pass; every gradient is the same.

    Offloading copies to pinned memory, which only an accelerator has.
    """
    device = torch.accelerator.current_accelerator() if way == "offloaded" else "cpu"
    model, ids = tiny_model(num_hidden_layers=3, gate_sharing="sublayer").train().to(device), ids.to(device)
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    runs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: runs.append(1))
    how, settings, expected_runs = CHECKPOINTING[way]
    model.activation_checkpointing_enable(how, **settings)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(runs) == expected_runs
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


def test_dropout_is_where_the_authors_have_it(tiny_model, ids, monkeypatch):
    """In order: the entering stream; per layer attention probabilities, attention output, activation, feed-forward output."""
    seen = []
    dropout = torch.nn.functional.dropout

    def record(x, p=0.5, training=True, inplace=False):
        seen.append((tuple(x.shape), p, training))
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", record)
    model = tiny_model(embedding_dropout=0.1, attention_dropout=0.2, hidden_dropout=0.3)
    model.set_attn_implementation("eager")
    stream, probabilities, activation = (2, 12, 32), (2, 4, 12, 12), (2, 12, 64)
    layer = [(probabilities, 0.2), (stream, 0.3), (activation, 0.3), (stream, 0.3)]
    model.train()(ids)
    assert seen == [(*call, True) for call in [(stream, 0.1), *layer, *layer]]


@pytest.mark.parametrize("field", ["embedding_dropout", "attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_dropout_works_in_training_only(tiny_model, ids, field, attention):
    """In training each makes two passes differ; in eval the logits are those without it, unless it is switched on alone."""
    model, without = tiny_model(**{field: 0.4}), tiny_model()
    model.set_attn_implementation(attention)
    without.set_attn_implementation(attention)
    assert torch.equal(model(ids).logits, without(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    alone = [module.train() for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert alone and torch.equal(model(ids).logits, model(ids).logits) == (field == "attention_dropout")


def test_a_missing_gate_is_closed_and_said_so(tiny_model, tmp_path):
    """A checkpoint without some alphas loads with `gate_init` there and lists them as missing; the others are bit-exact."""
    model = tiny_model(num_hidden_layers=3)
    model.config.gate_init = 0.25
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = {f"model.layers.{index}.residual_norm.alpha" for index in (0, 2)}
    save_file(
        {name: t for name, t in weights.items() if name not in gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    loaded, report = ReZeroForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == gone
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    for name, tensor in loaded.state_dict().items():
        expected = torch.full((1,), 0.25) if name in gone else model.state_dict()[name]
        assert torch.equal(tensor, expected), name


@kinds
def test_saved_is_loaded(tiny_model, ids, tmp_path, kind):
    """A saved model comes back bit for bit, as itself and as the bare decoder; a tied head is stored once."""
    model = tiny_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != model.config.tie_word_embeddings
    loaded = ReZeroForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    decoder, report = ReZeroModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


@closed_forms
def test_a_bf16_model_keeps_its_gates_in_fp32(tiny_model, ids, tmp_path, residual):
    """Loaded in bf16, alpha stays fp32 to the last bit, the stream is bf16, and alpha is saved in fp32 again."""
    model = tiny_model(residual=residual)
    model.save_pretrained(tmp_path / "fp32")
    loaded = ReZeroForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    gates = {name: p for name, p in model.named_parameters() if name.endswith("alpha")}
    assert all(gate != gate.bfloat16() for gate in gates.values())
    for name, p in loaded.named_parameters():
        assert p.dtype == (torch.float32 if name in gates else torch.bfloat16), name
        assert name not in gates or torch.equal(p, gates[name])
    output = loaded(ids, labels=ids, output_hidden_states=True)
    assert {stream.dtype for stream in output.hidden_states} == {torch.bfloat16} == {output.logits.dtype}
    torch.testing.assert_close(output.logits.float(), model(ids).logits, rtol=0.1, atol=0.1)
    output.loss.backward()
    assert all(p.grad.any() for name, p in loaded.named_parameters() if name in gates)

    loaded.save_pretrained(tmp_path / "bf16")
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(torch.equal(stored[name], gate) for name, gate in gates.items())

    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in made.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}


@pytest.mark.parametrize("kind", ["rope", "learned", "grouped", "learned grouped"])
def test_every_way_of_generating_agrees(tiny_model, tokenizer, ids, kind):
    """Greedy with a growing cache, a static one, none, and a plain loop over one unpadded row give the same tokens."""
    model = tiny_model(initializer_range=0.2, embedding_std=0.2, embedding_multiplier=1, **KINDS[kind])
    rows, mask, _ = padded_left(ids, tokenizer)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    ways = [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
    cached, *others = [model.generate(rows, attention_mask=mask, **settings, **way)[:, 12:] for way in ways]
    assert len(cached.unique()) > 4
    assert all(torch.equal(cached, other) for other in others)
    for row, length, generated in zip(ids, (7, 12), cached, strict=True):
        text = row[None, -length:]
        for _ in range(16):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(text[0, length:], generated)


@kinds
def test_a_cache_changes_no_logits(tiny_model, ids, kind):
    """Tokens given in three pieces, the cache carried on, get the logits of one pass; no cache is kept unless wanted."""
    model = tiny_model(**KINDS[kind])
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **CLOSE)
    assert cache.get_seq_length() == 12
    assert model(ids).past_key_values.get_seq_length() == 12
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_learned_positions_end(tiny_model, ids):
    """A token beyond the last learned position is one clear line, in a forward pass and in generation; rope goes on."""
    says = r"^position 12 is beyond the 12 learned positions \(max_position_embeddings\): .* position_embedding=\"rope\"\.$"
    model = tiny_model(position_embedding="learned", max_position_embeddings=12)
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    assert model(ids).logits.shape[1] == 12
    for too_long in (lambda: model(longer), lambda: model.generate(ids, max_new_tokens=2, do_sample=False)):
        with pytest.raises(ValueError, match=says):
            too_long()
    rotary = tiny_model(max_position_embeddings=12)
    assert rotary.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == 14
