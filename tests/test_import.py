"""Importing the package is cheap: it brings Transformers' model code and nothing that only training needs.

How long it takes is for a benchmark to say; what it loads is what makes it slow, and that can be tested.
"""

import json
import subprocess
import sys

import pytest

import rezero_hf


# Packages, and modules of Transformers, that only data, training, figures or evaluation need.
HEAVY = (
    "datasets",
    "evaluate",
    "matplotlib",
    "pandas",
    "tensorboard",
    "trackio",
    "kornia",
    "sklearn",
    "transformers.trainer",
)
OWN_HEAVY = (
    "training",
    "arguments",
    "data",
    "checkpoints",
    "export",
    "planning",
    "hub",
    "figures",
    "recipe",
    "callbacks",
    "tokenization",
    "optim",
    "images",
    "image_data",
    "augmentation",
)


SCRIPT = """
import json, sys
from transformers import PreTrainedModel
before = set(sys.modules)
import rezero_hf
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


# Until then the library itself brings scikit-learn, where it is installed.
@pytest.mark.since("5.21")
def test_an_import_brings_nothing_heavy():
    """Neither datasets, matplotlib nor evaluate nor a trainer is imported, nor any of our modules that use them."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    before, added = json.loads(done.stdout.splitlines()[-1])
    assert "rezero_hf.models.modeling_rezero" in added
    heavy = (*HEAVY, *(f"rezero_hf.{name}" for name in OWN_HEAVY))
    assert not [
        name for name in [*before, *added] if any(name == root or name.startswith(root + ".") for root in heavy)
    ]
    assert {name.partition(".")[0] for name in added} <= {"rezero_hf", "transformers", "tokenizers"}


def test_every_public_name_is_there():
    """Everything `__all__` promises can be had, also what is imported only when it is asked for; nothing else can."""
    for name in rezero_hf.__all__:
        assert getattr(rezero_hf, name) is not None
    assert set(rezero_hf.__all__) <= set(dir(rezero_hf))
    with pytest.raises(AttributeError, match=r"^module 'rezero_hf' has no attribute 'ReZeroTrianer'$"):
        rezero_hf.ReZeroTrianer  # noqa: B018
