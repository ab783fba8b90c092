"""The heads beside the causal one: what they compute, what they may see, and that each loads alone where no package is."""

import re

import pytest
import torch
from test_portable import finish, start
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from rezero_hf import (
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForQuestionAnswering,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroModel,
)


HEADS = {
    AutoModelForMaskedLM: ReZeroForMaskedLM,
    AutoModelForSequenceClassification: ReZeroForSequenceClassification,
    AutoModelForTokenClassification: ReZeroForTokenClassification,
    AutoModelForQuestionAnswering: ReZeroForQuestionAnswering,
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=lambda head: head.__name__)


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_a_head_comes_from_its_auto_class_and_is_saved_and_loaded(tiny_model, ids, tmp_path, auto):
    """By class and by Auto class the same tensors come back and give the same numbers; a base loads from a head."""
    model = tiny_model(HEADS[auto], pad_token_id=257, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for ours, theirs in zip(model(ids).to_tuple(), loaded(ids).to_tuple(), strict=True):
        if torch.is_tensor(ours):
            assert torch.equal(ours, theirs)
    base = ReZeroModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_sequence_classification_reads_the_last_token_that_is_not_padding(tiny_model, ids):
    model = tiny_model(ReZeroForSequenceClassification, pad_token_id=257, num_labels=3)
    scores = model.score(model.model(ids).last_hidden_state)[:, -1]
    padded = torch.cat((ids, torch.full((2, 4), 257)), dim=1)
    assert torch.allclose(model(padded, attention_mask=(padded != 257).long()).logits, scores, atol=1e-5)
    labels = torch.tensor([2, 0])
    expected = nn.functional.cross_entropy(scores, labels)
    assert model(ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_token_classification_scores_every_token(tiny_model, ids):
    model = tiny_model(ReZeroForTokenClassification, num_labels=5)
    labels = (ids % 5).clone()
    labels[:, :3] = -100
    output = model(ids, labels=labels)
    assert output.logits.shape == (2, 12, 5)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss, logits = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


def test_question_answering_scores_start_and_end(tiny_model, ids):
    model = tiny_model(ReZeroForQuestionAnswering)
    start_at, end_at = torch.tensor([1, 2]), torch.tensor([3, 5])
    output = model(ids, start_positions=start_at, end_positions=end_at)
    losses = [nn.functional.cross_entropy(output.start_logits, start_at)]
    losses.append(nn.functional.cross_entropy(output.end_logits, end_at))
    assert output.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)


def test_masked_prediction_is_not_shifted(tiny_model, ids):
    model = tiny_model(ReZeroForMaskedLM)
    labels = torch.full_like(ids, -100)
    labels[:, 4] = ids[:, 4]
    masked = ids.clone()
    masked[:, 4] = 258
    output = model(masked, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, 4], ids[:, 4])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(model(masked, use_cache=True).logits, output.logits)


@pytest.mark.parametrize("head", [ReZeroForSequenceClassification, ReZeroForTokenClassification])
def test_the_stock_trainer_accumulates_gradients(tiny_model, tmp_path, head):
    """Four rows in one pass or in four, with labels of different lengths: the same logged loss and the same parameters."""
    rows = [{"input_ids": [*range(5, 13)], "labels": number % 2} for number in range(4)]
    if head is ReZeroForTokenClassification:
        rows = [{**row, "labels": [1] * (n + 1) + [-100] * (7 - n)} for n, row in enumerate(rows)]
    ends = []
    for passes in (1, 4):
        words = {"per_device_train_batch_size": 4 // passes, "gradient_accumulation_steps": passes, "max_steps": 2}
        words |= {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "optim": "sgd"}
        model = tiny_model(head, pad_token_id=257)
        trainer = Trainer(model, TrainingArguments(tmp_path, learning_rate=0.1, **words), train_dataset=rows)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        ends.append((torch.tensor(losses), [*model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_a_masked_model_sees_both_ways_but_no_padding(tiny_model, ids, uncompiled, attention):
    """Changing a later token changes earlier outputs; padding changes none; the causal model is the contrast."""
    model = tiny_model(ReZeroForMaskedLM)
    model.set_attn_implementation(attention)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    with torch.no_grad():
        logits, other = model(ids).logits, model(changed).logits
        assert (logits[:, 0] - other[:, 0]).abs().max() > 1e-4
        padded = torch.cat((torch.full((2, 3), 257), ids), dim=1)
        positions = torch.arange(-3, 12).clamp(min=0).expand(2, -1)
        alone = model(padded, attention_mask=(padded != 257).long(), position_ids=positions).logits
    assert torch.allclose(alone[:, 3:], logits, atol=2e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_documents_do_not_see_each_other_looking_both_ways(tiny_model, ids, uncompiled, attention):
    """A row of two documents, told apart by positions that restart, gives what each gives alone."""
    model = tiny_model(ReZeroForMaskedLM)
    model.set_attn_implementation(attention)
    positions = torch.cat((torch.arange(5), torch.arange(7))).expand(2, -1)
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        apart = torch.cat((model(ids[:, :5]).logits, model(ids[:, 5:]).logits), dim=1)
        together = model(ids).logits
    assert torch.allclose(packed, apart, atol=2e-5)
    assert not torch.allclose(packed, together, atol=1e-2)


def test_a_masked_model_has_no_cache(tiny_model, ids):
    """It makes none, and refuses one with the reason; a head put on its checkpoint goes on looking both ways."""
    from transformers import DynamicCache

    model = tiny_model(ReZeroForMaskedLM)
    assert "past_key_values" not in model(ids)
    assert model.model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values make no sense with is_causal=False"):
        model.model(ids, past_key_values=DynamicCache())


def test_looking_both_ways_does_not_leak_into_a_causal_model(tiny_config, tiny_model, tmp_path):
    """One configuration serves both heads; a masked checkpoint is refused as causal, unless it is told to look back only."""
    config = tiny_config()
    assert ReZeroForMaskedLM(config).config.is_causal is False
    assert config.is_causal and ReZeroForCausalLM(config).config.is_causal
    tiny_model(ReZeroForMaskedLM).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use ReZeroForMaskedLM, or pass is_causal=True"):
        ReZeroForCausalLM.from_pretrained(tmp_path)
    assert ReZeroForCausalLM.from_pretrained(tmp_path, is_causal=True).config.is_causal


def test_a_head_on_a_masked_checkpoint_keeps_looking_both_ways(tiny_model, ids, tmp_path):
    tiny_model(ReZeroForMaskedLM).save_pretrained(tmp_path)
    tagger = ReZeroForTokenClassification.from_pretrained(tmp_path).eval()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    assert (tagger(ids).logits[:, 0] - tagger(changed).logits[:, 0]).abs().max() > 1e-5


@every_head
def test_a_new_head_trains_every_gate(tiny_model, ids, head):
    """From alpha = 0, one backward through any head reaches every gate, the embedding and the head."""
    model = tiny_model(head, gate_init=0.0, pad_token_id=257, num_labels=3)
    output = model(ids)
    logits = output.start_logits + output.end_logits if head is ReZeroForQuestionAnswering else output.logits
    (logits**2).sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("alpha") or "layers" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


EACH_HEAD = """
    from pathlib import Path
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

    def of(head):
        return str(Path(folder) / head)

    found = pipeline("fill-mask", of("ReZeroForMaskedLM"), **remote)("def <|mask|>ain():")
    assert len(found) == 5 and all(0 <= item["score"] <= 1 for item in found)
    found = pipeline("text-classification", of("ReZeroForSequenceClassification"), **remote)("def main():")
    assert found[0]["label"] in {"LABEL_0", "LABEL_1", "LABEL_2"}
    found = pipeline("token-classification", of("ReZeroForTokenClassification"), **remote)("def")
    assert len(found) == 3
    model = AutoModelForQuestionAnswering.from_pretrained(of("ReZeroForQuestionAnswering"), **remote)
    tokenizer = AutoTokenizer.from_pretrained(of("ReZeroForQuestionAnswering"))
    output = model(**tokenizer("what is it? it is this", return_tensors="pt"))
    assert torch.equal(output.start_logits, torch.load(out, weights_only=True))
"""


def test_each_head_loads_where_the_package_is_not_with_its_pipeline(tiny_model, tokenizer, tmp_path):
    """From folders that hold their own code, in a fresh process."""
    heads = [
        ReZeroForMaskedLM,
        ReZeroForSequenceClassification,
        ReZeroForTokenClassification,
        ReZeroForQuestionAnswering,
    ]
    for head in heads:
        model = tiny_model(head, pad_token_id=257, num_labels=3)
        model.save_pretrained(tmp_path / head.__name__)
        tokenizer.save_pretrained(tmp_path / head.__name__)
    inputs = tokenizer("what is it? it is this", return_tensors="pt")
    torch.save(model(**inputs).start_logits.detach(), tmp_path / "expected.pt")
    finish(start(tmp_path, EACH_HEAD, tmp_path, tmp_path / "expected.pt"))


@pytest.mark.parametrize(("size", "millions"), [("10m", 10), ("50m", 50), ("125m", 125), ("350m", 350)])
def test_a_preset_has_the_size_it_is_named_after(size, millions):
    """Within 5 %, with heads of 64 and every width a multiple of 64; fields can be changed on the way."""
    config = ReZeroConfig.preset(size)
    with torch.device("meta"):
        parameters = ReZeroModel(config).num_parameters()
    assert parameters == pytest.approx(millions * 1e6, rel=0.05)
    assert config.head_dim == 64
    assert config.hidden_size % 64 == config.vocab_size % 64 == config.intermediate_size % 64 == 0
    assert ReZeroConfig.preset(size, final_norm=True).final_norm


def test_an_unknown_preset_is_one_line():
    with pytest.raises(ValueError, match="preset '1b' is unknown; one of 10m, 50m, 125m, 350m"):
        ReZeroConfig.preset("1b")


@pytest.mark.parametrize(
    "changes",
    [{}, {"final_norm": True}, {"gated_mlp": True}, {"qk_norm": True}, {"residual": "rezero_pre_norm"}],
    ids=lambda changes: "".join(changes) or "default",
)
def test_plans_name_only_modules_that_are_there(tiny_config, changes):
    """Every entry of the tensor-parallel, pipeline and FSDP plans is a module that holds parameters; none is saved."""
    config = tiny_config(**changes)
    model = ReZeroModel(config)
    holders = {
        re.sub(r"\.\d+", ".*", name)
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None
    }
    plans = {**config.base_model_tp_plan, **config.base_model_pp_plan, **config.base_model_fsdp_plan}
    assert set(plans) <= holders
    assert ("norm" in plans) is config.final_norm and ("layers.*.mlp.gate_proj" in plans) is config.gated_mlp
    assert not [name for name in config.to_dict() if name.endswith("_plan")]
