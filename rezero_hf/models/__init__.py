"""Registers the model families with Transformers' Auto classes, and nothing else."""

import transformers

from . import modeling_rezero
from .configuration_rezero import ReZeroConfig
from .modeling_rezero import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForQuestionAnswering,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroModel,
    ReZeroPreTrainedModel,
)


transformers.AutoConfig.register(ReZeroConfig.model_type, ReZeroConfig, exist_ok=True)
for auto, name in ReZeroPreTrainedModel.auto_classes.items():
    getattr(transformers, auto).register(ReZeroConfig, getattr(modeling_rezero, name), exist_ok=True)

__all__ = [
    "ReZeroConfig",
    "ReZeroForCausalLM",
    "ReZeroForMaskedLM",
    "ReZeroForQuestionAnswering",
    "ReZeroForSequenceClassification",
    "ReZeroForTokenClassification",
    "ReZeroModel",
]
