"""The metrics of `evaluate`'s kind: their numbers, in batches or at once, and nothing fetched."""

import math

import numpy as np
import pytest
import torch

from rezero_hf.metrics import Accuracy, BitsPerByte, Perplexity


CASES = [
    (BitsPerByte, [math.log(2), 3 * math.log(2), 0.0], [1, 2, 0], {"bits_per_byte": 4 / 3}),
    (BitsPerByte, [1.0], [0], {"bits_per_byte": math.nan}),
    (Perplexity, [1.0, 3.0, 5.0], [1, 1, 1], {"loss": 3.0, "perplexity": math.exp(3)}),
    (Perplexity, [1.0, 8.0], [1, 2], {"loss": 3.0, "perplexity": math.exp(3)}),
    (Perplexity, [1e4], [1], {"loss": 1e4, "perplexity": math.inf}),
    (Perplexity, [math.nan], [1], {"loss": math.nan, "perplexity": math.nan}),
    (Accuracy, [1, 2, 3, 7], [1, 0, 3, -100], {"accuracy": 2 / 3}),
    (Accuracy, [1], [-100], {"accuracy": math.nan}),
]


@pytest.mark.parametrize(("metric", "predictions", "references", "expected"), CASES)
def test_a_metric_is_its_formula_at_once_and_in_batches(metric, predictions, references, expected, tmp_path):
    """From lists, arrays and tensors, in memory and through files; and it starts anew after `compute`."""
    once = metric(cache_dir=str(tmp_path))
    for _ in range(2):
        found = once.compute(predictions=predictions, references=references)
        assert found == pytest.approx(expected, nan_ok=True)
    batches = metric(keep_in_memory=True, cache_dir=str(tmp_path))
    for make in (np.asarray, torch.tensor):
        for prediction, reference in zip(predictions, references, strict=True):
            batches.add_batch(predictions=make([prediction]), references=make([reference]))
        assert batches.compute() == pytest.approx(expected, nan_ok=True)


def test_nothing_is_lost_in_a_long_text():
    """Sums are exact to the last digit of a double, which bits per byte of whole corpora need."""
    nats = [1e8 + 1, 1e-3] * 1000
    found = Perplexity(keep_in_memory=True).compute(predictions=nats, references=[1] * len(nats))
    assert found["loss"] == math.fsum(nats) / len(nats)


def test_a_metric_says_what_it_takes():
    assert "bits_per_byte" in BitsPerByte().description
    assert "references: tokens that it is summed over" in Perplexity().inputs_description
    assert Accuracy().name == "accuracy"
