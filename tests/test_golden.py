"""Old checkpoints keep working: one written by version 0.1.0 gives the logits it gave then."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from rezero_hf import ReZeroForCausalLM


GOLDEN = Path(__file__).parent / "fixtures" / "golden"


def test_the_golden_checkpoint_gives_its_logits():
    """Every parameter is found under its old name, and every field of the configuration still means the same."""
    model, report = ReZeroForCausalLM.from_pretrained(GOLDEN, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    reference = load_file(GOLDEN / "reference.safetensors")
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    torch.testing.assert_close(logits, reference["logits"], atol=1e-6, rtol=1e-6)
    assert reference["logits"].std() > 0.1
