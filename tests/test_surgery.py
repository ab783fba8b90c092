"""Folding, growing and pruning are exact where they say so, leave the given model alone, and refuse the rest in one line."""

import copy
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import switch_on
from safetensors.torch import load_file, save_file
from test_portable import finish, start
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter

from rezero_hf import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForQuestionAnswering,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroModel,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
    fold_gates,
    grow_depth,
    prune_layers,
    verify_folder,
)
from rezero_hf.errors import UserError
from rezero_hf.images import cifar_image_processor
from rezero_hf.pruning import LABELS


HEADS = [
    ReZeroModel,
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroForQuestionAnswering,
]
FORMS = [
    {"residual": "rezero"},
    {"residual": "rezero", "gate_sharing": "sublayer", "gated_mlp": True, "tie_word_embeddings": True},
    {"residual": "rezero_pre_norm", "norm": "rms", "position_embedding": "learned", "attention_bias": False},
    {"residual": "rezero_pre_norm", "gate_sharing": "sublayer", "final_norm": True, "qk_norm": True},
    {"residual": "rezero_tanh", "gate_init": 0.5},
]
every_form = pytest.mark.parametrize("changes", FORMS, ids=lambda changes: "-".join(map(str, changes.values())))
every_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
IMAGES = {"image_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "num_labels": 3}


def mlp(**changes):
    torch.manual_seed(0)
    model = ReZeroMLPForImageClassification(ReZeroMLPConfig(**{**IMAGES, **changes})).eval()
    switch_on(model)
    return model


def resnet(**changes):
    """Its BatchNorms have seen a batch."""
    torch.manual_seed(0)
    sizes = {"depths": (1, 2), "hidden_sizes": (16, 32), "num_labels": 3}
    model = ReZeroResNetForImageClassification(ReZeroResNetConfig(**{**sizes, **changes}))
    switch_on(model)
    model(pictures(8))
    return model.eval()


def pictures(size=4):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def close(first, second):
    for ours, theirs in zip(first.to_tuple(), second.to_tuple(), strict=True):
        if torch.is_tensor(ours):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@every_form
@every_head
def test_a_folded_model_gives_the_same_logits_without_gates(tiny_model, ids, head, changes):
    model = tiny_model(head, pad_token_id=257, **changes)
    before, numbers = snapshot(model), torch.get_rng_state()
    folded = fold_gates(model)
    assert torch.equal(torch.get_rng_state(), numbers) and unchanged(model, before)
    plain = {"rezero": "plain", "rezero_pre_norm": "pre_norm", "rezero_tanh": "pre_tanh"}[model.config.residual]
    assert type(folded) is head and folded.config.residual == plain
    assert not any(name.endswith("alpha") for name in folded.state_dict())
    assert model.config.residual == changes["residual"]
    close(folded(ids), model(ids))
    if changes.get("tie_word_embeddings") and hasattr(folded, "lm_head"):
        assert folded.lm_head.weight is folded.model.embed_tokens.weight


@pytest.mark.parametrize(
    "make",
    [
        mlp,
        lambda: mlp(residual="rezero_pre_norm", hidden_act="leaky_relu"),
        resnet,
        lambda: resnet(batch_norm=False),
        lambda: resnet(activation_position="sum"),
        lambda: resnet(layer_type="preact", hidden_act="gelu"),
        lambda: resnet(layer_type="preact_bottleneck", batch_norm=False),
    ],
)
def test_image_models_fold_in_evaluation_and_in_training(make):
    model = make()
    x = pictures(8 if hasattr(model.config, "depths") else 4)
    folded = fold_gates(model)
    assert folded.config.residual in ("plain", "pre_norm")
    close(folded(x), model(x))
    close(folded.train()(x), model.train()(x))


def test_a_negative_gate_folds_where_no_activation_is_after_it():
    """On the sum and before convolutions; not through the relu of a branch, and no gate at all through a gelu."""
    for changes in ({"activation_position": "sum"}, {"layer_type": "preact"}):
        model = resnet(**changes)
        model.model.layers[1].residual_norm.alpha.data.fill_(-0.5)
        close(fold_gates(model)(pictures(8)), model(pictures(8)))
    model = mlp()
    model.model.layers[1].residual_norm.alpha.data.fill_(-0.5)
    with pytest.raises(
        UserError, match=r"^1 of 4 layers \(1\) have a negative alpha, which does not go through the relu"
    ):
        fold_gates(model)
    with pytest.raises(UserError, match="hidden_act='gelu': the gate stands after it"):
        fold_gates(resnet(hidden_act="gelu"))


FOLDED_ALONE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, **remote)
assert model.config.residual == "pre_norm", model.config
torch.save(model(torch.load(out + "_ids.pt")).logits, out + ".pt")
"""


def test_a_folded_model_is_saved_and_loaded_where_the_package_is_not(tiny_model, ids, tmp_path):
    folded = fold_gates(tiny_model(residual="rezero_pre_norm", eos_token_id=256))
    folded.save_pretrained(tmp_path / "folded")
    torch.save(ids, tmp_path / "alone_ids.pt")
    finish(start(tmp_path, FOLDED_ALONE, tmp_path / "folded", tmp_path / "alone"))
    assert torch.equal(torch.load(tmp_path / "alone.pt"), folded(ids).logits)
    assert folded.generation_config.eos_token_id == 256


@pytest.mark.since("5.23")
@pytest.mark.filterwarnings("ignore")
def test_a_folded_model_is_exported(tiny_model, ids):
    """To ONNX, which goes by way of `torch.export`."""
    model = tiny_model()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = OnnxExporter().export(fold_gates(model), dict(inputs), config=OnnxConfig(dynamic=True))
    got = torch.as_tensor(program(**inputs)["logits"])
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-4)


@every_form
@every_head
def test_a_grown_model_is_the_same_function_bit_for_bit(tiny_model, ids, head, changes):
    """Logits and the gradients of all old parameters, also in bf16, whatever the place; gates are closed and fp32."""
    model = tiny_model(head, pad_token_id=257, **changes)
    for where, expected in ("end", {2, 3, 4}), ("interleaved", {1, 3, 4}), ([0, 3, 4], {0, 3, 4}):
        grown, names = grow_depth(model, 5, where)
        assert grown.config.num_hidden_layers == 5 and model.config.num_hidden_layers == 2
        outputs = model(ids).to_tuple(), grown(ids).to_tuple()
        for ours, theirs in zip(*outputs, strict=True):
            assert not torch.is_tensor(ours) or torch.equal(ours, theirs)
        for output in outputs:
            output[0].square().sum().backward()
        new = {name for name, _ in grown.named_parameters()} - set(names.values())
        assert {int(name.split("layers.")[1][0]) for name in new} == expected
        for name, parameter in model.named_parameters():
            copied = grown.get_parameter(names[name])
            assert torch.equal(copied, parameter) and torch.equal(copied.grad, parameter.grad), name
        gates = {name: grown.get_parameter(name) for name in new if name.endswith("alpha")}
        assert len(gates) == 3 and all(not gate.any() and gate.dtype == torch.float for gate in gates.values())
        assert all(gate.grad.abs().sum() > 0 for gate in gates.values())
        model.zero_grad()
    half = copy.deepcopy(model).bfloat16()
    assert torch.equal(grow_depth(half, 5).model(ids)[0], half(ids)[0])


def test_a_model_grows_in_the_precision_it_was_loaded_in(tiny_model, ids, tmp_path):
    """bf16 with fp32 gates, as `from_pretrained` makes it: the same bits, and the library's names are all in place."""
    tiny_model(residual="rezero_pre_norm", eos_token_id=256).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    grown, _ = grow_depth(model, 4, "interleaved")
    assert torch.equal(grown(ids).logits, model(ids).logits) and grown(ids).logits.dtype == torch.bfloat16
    kinds = {parameter.dtype for name, parameter in grown.named_parameters() if name.endswith("alpha")}
    assert kinds == {torch.float} and grown.dtype == torch.bfloat16 and not grown.training
    assert torch.equal(grown.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


def test_new_layers_are_drawn_as_at_a_models_start(tiny_model, tiny_config):
    """With the same random numbers, as the layers of a new model of that depth."""
    model = tiny_model()
    torch.manual_seed(7)
    grown, _ = grow_depth(model, 4)
    torch.manual_seed(7)
    fresh = ReZeroForCausalLM(tiny_config(num_hidden_layers=4))
    for number in (2, 3):
        expected = fresh.model.layers[number].state_dict()
        assert all(
            torch.equal(value, expected[name]) for name, value in grown.model.layers[number].state_dict().items()
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "plain"},
        {"residual": "pre_norm", "output_init_scale": 0},
        {"residual": "rezero", "output_init_scale": 0, "gate_init": 0.25},
    ],
)
def test_without_a_closed_gate_the_new_outputs_start_at_zero(tiny_model, ids, changes):
    """The same bits; and every new layer gets a gradient to begin with."""
    model = tiny_model(**changes)
    switch_on(model)
    grown = grow_depth(model, 4, "interleaved").model
    assert torch.equal(grown(ids).logits, model(ids).logits)
    if "gate_init" in changes:
        assert grown.model.layers[1].residual_norm.alpha.item() == 0.25
    grown(ids, labels=ids).loss.backward()
    for number in (1, 3):
        assert grown.model.layers[number].mlp.down_proj.weight.grad.abs().sum() > 0
        assert grown.model.layers[number].self_attn.o_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(residual="rezero_pre_norm"),
        lambda: mlp(gate_init=1.0),
        resnet,
        lambda: resnet(residual="gated"),
        lambda: resnet(activation_position="sum"),
        lambda: resnet(layer_type="preact"),
        lambda: resnet(residual="plain", initialization="zero_gamma"),
        lambda: resnet(residual="plain", initialization="fixup", batch_norm=False),
    ],
)
def test_image_models_grow(make):
    """Bit for bit, in training mode too; ResNets at the ends of their stages."""
    model = make()
    residual_network = hasattr(model.config, "depths")
    x, to = pictures(8 if residual_network else 4), [2, 4] if residual_network else 7
    grown, names = grow_depth(model, to)
    assert grown.config.num_hidden_layers == (6 if residual_network else 7)
    assert torch.equal(grown(x).logits, model(x).logits)
    for each in (model.train(), grown.train()):
        each(x).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(grown.get_parameter(names[name]).grad, parameter.grad), name


def test_positions_stretched_to_a_long_sequence_are_the_same_in_the_copy(tiny_model, ids):
    """Dynamic rotary frequencies depend on what a model has read before, and go back when a sequence is short again."""
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model(max_position_embeddings=16, rope_parameters=stretched, gate_init=0.5)
    for make in (fold_gates, lambda model: grow_depth(model, 3).model):
        model(ids.repeat(1, 3))
        copied = make(model)
        for tokens in (ids.repeat(1, 2), ids):
            close(copied(tokens), model(tokens))


def test_numbers_may_be_numpys(tiny_model, ids):
    """As `np.arange` gives them in a study of depth."""
    model = tiny_model(num_hidden_layers=3)
    deeper = grow_depth(model, np.int64(4), [np.int64(1)]).model
    assert deeper.config.to_dict()["num_hidden_layers"] == 4 and torch.equal(deeper(ids).logits, model(ids).logits)
    batch = {"input_ids": ids, "labels": ids}
    assert prune_layers(model, [batch], to=np.int64(2))[0].config.num_hidden_layers == 2


def test_what_was_frozen_stays_frozen(tiny_model):
    model = tiny_model()
    model.model.layers[1].requires_grad_(False)
    grown, _ = grow_depth(model, 3, [1])
    assert not any(parameter.requires_grad for parameter in grown.model.layers[2].parameters())
    assert all(parameter.requires_grad for parameter in grown.model.layers[1].parameters())
    assert not fold_gates(model).model.layers[1].mlp.down_proj.weight.requires_grad


def with_idle_layers(model, idle=(1, 3)):
    with torch.no_grad():
        for number in idle:
            model.base_model.layers[number].residual_norm.alpha.zero_()
    return model


def test_layers_that_do_nothing_are_removed_and_nothing_changes(tiny_model, ids):
    model = with_idle_layers(tiny_model(num_hidden_layers=5)).train()
    before, batches = snapshot(model), [{"input_ids": row[None], "labels": row[None]} for row in ids]
    smaller, report = prune_layers(model, iter(batches), threshold=0.0)
    assert report.removed == [1, 3] and report.scores[1] == 0 < min(
        report.scores[0], report.scores[2], report.scores[4]
    )
    assert (
        report.loss_after
        == report.loss_before
        == pytest.approx(sum(model.eval()(**batch).loss.item() for batch in batches) / 2)
    )
    assert unchanged(model, before) and smaller.training
    assert smaller.config.num_hidden_layers == 3 and torch.equal(smaller.eval()(ids).logits, model(ids).logits)
    assert smaller.generate(ids, max_new_tokens=3).shape == (2, 15)


def test_the_least_used_layers_go_first(ids, tiny_model):
    """By what they add to the stream, or by what the loss loses: that of a model fitted to the data, but for two layers."""
    model = tiny_model(num_hidden_layers=4, gate_init=0.0)
    optimizer = torch.optim.Adam(
        [p for n, p in model.named_parameters() if not n.startswith(("model.layers.1", "model.layers.2"))], lr=1e-2
    )
    for _ in range(8):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.model.layers[2].residual_norm.alpha.fill_(1e-3)
    batches = [{"input_ids": ids, "labels": ids}]
    for by in ("update", "loss"):
        smaller, report = prune_layers(model, batches, to=2, by=by)
        assert report.removed == [1, 2] and report.by == by
        assert report.loss_after == pytest.approx(smaller(**batches[0]).loss.item())
        assert report.loss_after == pytest.approx(report.loss_before, rel=0.01)
    worse, report = prune_layers(model, batches, to=1)
    assert report.loss_after > 1.1 * report.loss_before and worse.config.num_hidden_layers == 1


def test_fully_connected_nets_and_other_heads_are_pruned(tiny_model, ids):
    model = with_idle_layers(mlp())
    batch = {"pixel_values": pictures(), "labels": torch.tensor([0, 1, 2, 0])}
    smaller, report = prune_layers(model, [batch], threshold=0.0)
    assert report.removed == [1, 3] and torch.equal(smaller(**batch).logits, model(**batch).logits)
    answers = with_idle_layers(tiny_model(ReZeroForQuestionAnswering), [1])
    places = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    _, report = prune_layers(answers, [{"input_ids": ids, **places}], to=1)
    assert report.removed == [1] and set(places) <= set(LABELS)


def lora(model):
    """As PEFT leaves a model it has wrapped in place."""
    linear = model.model.layers[0].self_attn.q_proj
    linear.adapter = nn.Linear(2, 2)
    return model


def test_what_cannot_be_done_is_one_line(tiny_model, ids, tmp_path):
    model, batch = tiny_model(), {"input_ids": ids, "labels": ids}
    quantized = copy.deepcopy(model)
    quantized.lm_head.weight = nn.Parameter(quantized.lm_head.weight.to(torch.int8), requires_grad=False)
    wrapped = nn.Sequential(model)
    wrapped.peft_config = {}
    remote = type("ReZeroForCausalLM", (nn.Linear,), {"__module__": "transformers_modules.org.modeling_rezero"})
    untrained = tiny_model(gate_init=0.0)
    cases = [
        (lambda: fold_gates(nn.Linear(2, 2)), "Linear is not a model of rezero_hf"),
        (lambda: fold_gates(remote(2, 2)), "it came with its own code; import rezero_hf first"),
        (lambda: fold_gates(untrained), "every alpha is 0"),
        (lambda: prune_layers(untrained, [batch], to=1), "to=1: every layer's update is 0"),
        (lambda: prune_layers(model, [batch], to=1.0), r"to=1.0: .* can be pruned to 1 ... 1"),
        (lambda: grow_depth(model, 4, 2), r"where=2: end, interleaved, or a list of the 2 new layers' numbers"),
        (lambda: grow_depth(model, 4, None), "where=None: end, interleaved"),
        (lambda: fold_gates(wrapped), "wrapped by an adapter: merge it"),
        (lambda: grow_depth(lora(copy.deepcopy(model)), 3), r"not what its configuration describes \(model.layers.0"),
        (
            lambda: fold_gates(quantized),
            r"lm_head.weight is a Tensor of torch.int8; this takes plain floating-point weights",
        ),
        (lambda: fold_gates(ReZeroForCausalLM(model.config).to("meta")), "is on no device"),
        (lambda: fold_gates(tiny_model(residual="post_norm")), "'post_norm' cannot be folded: it has no gates to fold"),
        (lambda: fold_gates(resnet(residual="gated")), "its gate scales the stream too"),
        (lambda: grow_depth(model, 2), "to=2: the network has 2 layers"),
        (lambda: grow_depth(model, [3]), "grows to a larger whole number"),
        (lambda: grow_depth(model, 4, [1]), r"a list of the 2 new layers' numbers, each in 0 ... 3"),
        (lambda: grow_depth(model, 3, "top"), "end, interleaved, or a list"),
        (lambda: grow_depth(resnet(), 4), r"depths=\[1, 2\] can grow to a list of as many numbers"),
        (lambda: grow_depth(tiny_model(residual="branch_norm"), 3), "is never the identity"),
        (lambda: grow_depth(mlp(residual="plain"), 5), "a new layer's F does not start at 0"),
        (lambda: grow_depth(resnet(residual="plain"), [2, 2]), "has no gate to switch a new layer off"),
        (lambda: grow_depth(resnet(activation_position="sum", hidden_act="gelu"), [2, 2]), "on the sum changes"),
        *(
            (lambda plain=plain: grow_depth(resnet(**plain, hidden_act="gelu"), [2, 2]), "on the sum changes")
            for plain in (
                {"residual": "plain", "initialization": "zero_gamma"},
                {"residual": "plain", "initialization": "fixup", "batch_norm": False},
            )
        ),
        (lambda: grow_depth(resnet(), ["2", 2]), r"to=\['2', 2\], .* can grow to a list of as many numbers"),
        (lambda: grow_depth(model, 4, [[1], 2]), "a list of the 2 new layers' numbers"),
        (lambda: prune_layers(model, batch, to=1), r"one batch; give a list of such, \[batch\]"),
        (lambda: prune_layers(model, [batch], threshold="0.1"), "threshold='0.1': needs a number"),
        (lambda: prune_layers(model, [batch]), "give either to, .* or threshold"),
        (lambda: prune_layers(model, [batch], to=2), r"can be pruned to 1 ... 1"),
        (lambda: prune_layers(model, [], to=1), "batches is empty"),
        (lambda: prune_layers(model, [{"input_ids": ids}], to=1), "give no loss"),
        (lambda: prune_layers(model, [batch], threshold=99.0), "so none would be left"),
        (lambda: prune_layers(model, [batch], threshold=0.0), "every layer's update is above it .* raise it"),
        (lambda: prune_layers(model, [batch], to=1, by="size"), "by='size' is unknown; one of update, loss"),
        (lambda: prune_layers(tiny_model(residual="post_norm"), [batch], to=1), "cannot be pruned"),
    ]
    for act, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)


@pytest.fixture
def surgery(monkeypatch, capsys):
    """Runs the script as the command line does; gives its exit status, output and the last line of its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["surgery.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path("scripts/surgery.py", run_name="__main__")
        said, error = capsys.readouterr()
        return exit.value.code, said, (error.splitlines() or [""])[-1]

    return run


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    """A saved model with what is known of its run."""
    model = with_idle_layers(tiny_model(num_hidden_layers=3), [1])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    record = {"name": "tiny", "results": {"test": {"bits_per_byte": 2.5}}, "device": "cpu"}
    (tmp_path / "model" / "run.json").write_text(json.dumps(record))
    return tmp_path / "model"


def test_the_script_writes_whole_folders(folder, surgery, tmp_path, text_file, ids):
    """Each verifies, loads, gives the old logits, and says on its card and in its record what was done, and before; the
    licence stays that of the old card."""
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    prune = ("--text", text_file, "--threshold", "0", "--tokens", "16")
    for verb, words, layers in (("fold", (), 3), ("grow", ("--to", "5", "--where", "1,3"), 5), ("prune", prune, 2)):
        output = tmp_path / verb
        status, said, error = surgery(verb, folder, output, *words)
        assert status == 0 and "verified" in said, error
        verify_folder(output)
        model = AutoModelForCausalLM.from_pretrained(output)
        assert model.config.num_hidden_layers == layers
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)
        record = json.loads((output / "run.json").read_text())
        assert record["name"] == "tiny" and record["parameters"] == model.num_parameters()
        card = (output / "README.md").read_text()
        assert record["surgery"][0]["what"] in card and "\nlicense: cc-by-4.0\n" in card
        assert ("results" in record) is (verb != "prune")
    assert record["surgery"][0]["pruning"]["removed"] == [1] and "layer    1  update 0  removed" in said
    assert surgery("fold", output, tmp_path / "both")[0] == 0
    again = json.loads((tmp_path / "both" / "run.json").read_text())["surgery"]
    assert again == [*record["surgery"], {"what": "its gates were multiplied into its weights"}]
    said = "1 of its 3 layers were removed; its gates were multiplied into its weights."
    assert said in (tmp_path / "both" / "README.md").read_text()


def test_the_script_on_images(surgery, tmp_path):
    resnet().save_pretrained(tmp_path / "model")
    cifar_image_processor().save_pretrained(tmp_path / "model")
    assert surgery("grow", tmp_path / "model", tmp_path / "grown", "--to", "2,3")[0] == 0
    grown = ReZeroResNetForImageClassification.from_pretrained(tmp_path / "grown")
    assert torch.equal(grown(pictures(8)).logits, resnet()(pictures(8)).logits)


def test_only_a_whole_model_is_changed(folder, surgery, tmp_path):
    """A missing, foreign, cut or misshapen weight ends in one line: the library would draw it at random, or raise."""
    output, file = tmp_path / "output", folder / "model.safetensors"
    state, whole = load_file(file), file.read_bytes()
    name = "model.layers.1.mlp.down_proj.weight"
    for damage, message in [
        ({key: value for key, value in state.items() if key != name}, f"{name} is missing"),
        (
            {**state, "model.layers.9.mlp.down_proj.weight": state[name].clone()},
            "9.mlp.down_proj.weight belongs to another",
        ),
        ({**state, name: state[name][:-1].contiguous()}, "its weights cannot be loaded"),
        (whole[:-100], "its weights cannot be loaded"),
    ]:
        if isinstance(damage, bytes):
            file.write_bytes(damage)
        else:
            save_file(damage, file, metadata={"format": "pt"})
        status, _, error = surgery("fold", folder, output)
        assert status == 2 and error.startswith(f"error: {folder}: ") and message in error, error
        assert not output.exists()


def test_a_mistake_in_the_script_is_one_line_and_leaves_nothing(
    folder, surgery, tiny_model, tokenizer, tmp_path, text_file
):
    for name, model in (
        ("baseline", tiny_model(residual="post_norm")),
        ("head", tiny_model(ReZeroForQuestionAnswering)),
        ("untrained", tiny_model(gate_init=0.0)),
        ("classifier", tiny_model(ReZeroForSequenceClassification, pad_token_id=257)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 99)
    shutil.copytree(folder, tmp_path / "torn")
    (tmp_path / "torn" / "run.json").write_text('{"name":')
    shutil.copytree(folder, tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text()) | {"residual": "newer"}
    (tmp_path / "newer" / "config.json").write_text(json.dumps(config))
    output, text = tmp_path / "output", ("--text", text_file, "--tokens", "16")
    for arguments, message in [
        (("fold", tmp_path / "nowhere", output), "there is no such folder"),
        (("fold", tmp_path / "empty", output), "holds no model"),
        (("fold", tmp_path / "other", output), "GPT2LMHeadModel has no model card"),
        (("fold", tmp_path / "head", output), "ReZeroForQuestionAnswering has no model card"),
        (("fold", folder, tmp_path / "head"), "is not empty; choose another folder"),
        (("fold", tmp_path / "torn", output), "run.json is damaged (Expecting value"),
        (("fold", tmp_path / "newer", output), "newer holds no model (Validation error for field 'residual'"),
        (("fold", folder, text_file / "output"), "cannot be made (Not a directory); choose another folder"),
        (("prune", folder, output, "--text", tmp_path / "latin.txt", "--to", "1"), "latin.txt cannot be read as UTF-8"),
        (("fold", tmp_path / "baseline", output), "residual='post_norm' cannot be folded"),
        (("prune", tmp_path / "classifier", output, *text, "--to", "1"), "holds a ReZeroForSequenceClassification"),
        (("grow", folder, output, "--to", "3"), "to=3: the network has 3 layers"),
        (("grow", folder, output, "--to", "many"), "--to many: must be whole numbers"),
        (("grow", folder, output, "--to", "4", "--where", "9"), "the 1 new layers' numbers"),
        (("prune", folder, output, *text, "--to", "3"), "can be pruned to 1 ... 2"),
        (
            ("prune", folder, output, "--text", tmp_path / "no.txt", "--to", "1"),
            "no.txt cannot be read as UTF-8 text ([Errno 2] No such file",
        ),
        (
            ("prune", tmp_path / "untrained", output, *text, "--threshold", "0"),
            "none would be left; lower it, or train",
        ),
    ]:
        status, _, error = surgery(*arguments)
        assert status == 2 and error.startswith("error: ") and message in error, (arguments, error)
        assert not output.exists()
