"""Pictures of signals: drawn from records alone, and honest about what is lost, infinite or missing."""

import copy

import numpy as np
import pytest
import torch
from test_figures import drawn, size

from rezero_hf.diagnostics import signal_record
from rezero_hf.errors import UserError
from rezero_hf.signal_figures import norm_curves, singular_value_histograms, toy_contours
from rezero_hf.toy_model import toy_landscape


@pytest.fixture(scope="module")
def records(tiny_model):
    """Form -> depth -> the record of a small language model at initialisation."""
    ids = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids}
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "gate_init": 0.0}
    return {
        form: {
            depth: signal_record(tiny_model(residual=form, num_hidden_layers=depth, **small), inputs)
            for depth in (1, 4)
        }
        for form in ("rezero", "post_norm", "none")
    }


def test_every_picture_is_as_wide_as_a_card_asks_and_a_function_of_its_records(tmp_path, records):
    """Twice the width a card shows; the same bytes for the same records, other pixels for others."""
    deep, shallow = ({form: rows[depth] for form, rows in records.items()} for depth in (4, 1))
    landscapes = [toy_landscape([(0, 1.0), (1, w)], steps=50, points=21) for w in (1.0, 2.5)]
    swapped = {"rezero": records["none"], "post_norm": records["post_norm"], "none": records["rezero"]}
    for draw, content, other in (
        (norm_curves, deep, shallow),
        (singular_value_histograms, records, swapped),
        (toy_contours, *landscapes),
    ):
        first = draw(content, tmp_path / "pictures" / f"{draw.__name__}.png")
        assert size(first)[0] == 1600
        assert draw(content, tmp_path / "again.png").read_bytes() == first.read_bytes()
        assert not np.array_equal(drawn(first), drawn(draw(other, tmp_path / "other.png")))


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_any_number_of_networks_can_be_compared(tmp_path, records, count):
    """Up to four panels a row, and no empty axes."""
    several = {f"network {number}": records["post_norm"][4] for number in range(count)}
    path = norm_curves(several, tmp_path / "norms.png")
    assert size(path) == (1600, 640 if count <= 4 else 1040)


def test_what_is_not_finite_or_missing_is_left_out(tmp_path, records):
    """A network that overflows, one without any gradient and a depth that was not measured still give a picture."""
    broken = copy.deepcopy(records["none"][4])
    broken["norms"]["activation"][-2:] = [None, None]
    broken["norms"]["gradient"] = [0.0] * 5
    broken["jacobian"]["chi"] = None
    norm_curves({"broken": broken}, tmp_path / "norms.png")
    singular_value_histograms({"broken": {4: broken}, "rezero": {1: records["rezero"][1]}}, tmp_path / "spectra.png")
    broken["jacobian"]["histogram"] = {"log10": [], "counts": []}
    singular_value_histograms({"broken": {4: broken}}, tmp_path / "empty.png")


def test_records_that_lack_what_a_picture_shows_are_refused(tmp_path, records):
    """By name, and nothing is written."""
    record = copy.deepcopy(records["rezero"][1])
    record["norms"]["gradient"] = None
    record["jacobian"] = {"method": "hutchinson", "inputs": 2, "chi": 1.0, "standard_error": 0.0}
    with pytest.raises(UserError, match="'mine' has no gradients"):
        norm_curves({"mine": record}, tmp_path / "never.png")
    with pytest.raises(UserError, match="mine, 1 layers has no spectrum"):
        singular_value_histograms({"mine": {1: record}}, tmp_path / "never.png")
    for draw in (norm_curves, singular_value_histograms):
        with pytest.raises(UserError, match="nothing to draw"):
            draw({}, tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()
