"""The library's own exporters: what `torch.export` and ONNX Runtime run gives the model's logits, at other sizes too."""

import copy

import pytest
import torch
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
from transformers.exporters.utils import decompose_for_generation

from rezero_hf import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForQuestionAnswering,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
)


# Until then exporters gave what torch does, which is not saved by them.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.since("5.23")]

DYNAMO, ONNX = (DynamoExporter, DynamoConfig(dynamic=True)), (OnnxExporter, OnnxConfig(dynamic=True))
LEARNED = {"position_embedding": "learned", "residual": "rezero_pre_norm", "gate_sharing": "sublayer", "norm": "rms"}
GROUPED = {"num_key_value_heads": 2, "gated_mlp": True, "final_norm": True}


def sizes():
    """Inputs of two sizes, one row of each padded at the left."""
    generator = torch.Generator().manual_seed(3)
    for rows, tokens in ((2, 12), (3, 7)):
        ids = torch.randint(0, 256, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        yield {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("head", "changes", "exporter"),
    [
        (ReZeroForCausalLM, GROUPED, DYNAMO),
        (ReZeroForMaskedLM, LEARNED, DYNAMO),
        (ReZeroForSequenceClassification, {}, DYNAMO),
        (ReZeroForTokenClassification, {}, DYNAMO),
        (ReZeroForQuestionAnswering, {}, DYNAMO),
        (ReZeroForCausalLM, LEARNED, ONNX),
        (ReZeroForMaskedLM, GROUPED, ONNX),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_an_exported_head_gives_the_same_logits_at_any_size(tiny_model, tmp_path, head, changes, exporter):
    """As exported, and read back from disk."""
    kind, config = exporter
    model = tiny_model(head, pad_token_id=257, **changes)
    exported = kind().export(model, next(sizes()), config=config)
    exported.save_pretrained(tmp_path)
    for program in (exported, type(exported).from_pretrained(tmp_path)):
        for inputs in sizes():
            expected = model(**inputs)
            for name in expected.keys() & {"logits", "start_logits", "end_logits"}:
                got = torch.as_tensor(program(**inputs)[name])
                torch.testing.assert_close(got, expected[name], atol=1e-5, rtol=1e-4)


def test_exported_generation_steps_give_the_same_logits(tiny_model):
    """Prefill and one decoding step on its cache, as `generate` would call them."""
    kind, config = DYNAMO
    model = tiny_model(num_key_value_heads=2)
    inputs = next(sizes())
    exported = kind().export_for_generation(model, dict(inputs), config=config)
    steps = decompose_for_generation(model, dict(inputs))
    assert set(steps) == {"prefill", "decode"}
    for name, (step, arguments) in steps.items():
        expected = step(**copy.deepcopy(arguments)).logits
        flags = {"use_cache", "return_dict"}
        tensors = {key: value for key, value in copy.deepcopy(arguments).items() if key not in flags}
        got = torch.as_tensor(exported.runners[name](**tensors)["logits"])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
