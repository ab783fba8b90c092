"""ReZero for Hugging Face: networks whose every residual branch starts switched off, `x + alpha * F(x)`, alpha = 0.

Importing it registers the configurations and their models with Transformers' Auto classes. Everything that trains is
imported when it is first used, so that loading a model costs no more than Transformers itself.
"""

import importlib

from .models import (
    ReZeroConfig,
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForQuestionAnswering,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroMLPModel,
    ReZeroModel,
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
    ReZeroResNetModel,
)
from .models.residual import RESIDUAL_FORMS
from .wrapping import ReZero


__version__ = "0.1.0"

_LAZY = {
    "ReZeroTrainer": "training",
    "ReZeroTrainingArguments": "arguments",
    "byte_tokenizer": "tokenization",
    "cifar_image_processor": "images",
    "estimate_chi": "diagnostics",
    "export_folder": "export",
    "fold_gates": "surgery",
    "gates": "optim",
    "grow_depth": "surgery",
    "input_output_jacobian": "diagnostics",
    "load_recipe": "recipe",
    "make_optimizer": "optim",
    "pack_for_decoding": "layout",
    "parameter_groups": "optim",
    "prune_layers": "pruning",
    "signal_norms": "diagnostics",
    "signal_record": "diagnostics",
    "toy_landscape": "toy_model",
    "verify_folder": "verification",
}

__all__ = [  # noqa: PLE0604
    "RESIDUAL_FORMS",
    "ReZero",
    "ReZeroConfig",
    "ReZeroForCausalLM",
    "ReZeroForMaskedLM",
    "ReZeroForQuestionAnswering",
    "ReZeroForSequenceClassification",
    "ReZeroForTokenClassification",
    "ReZeroMLPConfig",
    "ReZeroMLPForImageClassification",
    "ReZeroMLPModel",
    "ReZeroModel",
    "ReZeroResNetConfig",
    "ReZeroResNetForImageClassification",
    "ReZeroResNetModel",
    *_LAZY,
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
