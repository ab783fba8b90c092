"""Registers the model families with Transformers' Auto classes, and nothing else."""

import transformers

from . import modeling_rezero, modeling_rezero_mlp, modeling_rezero_resnet
from .configuration_rezero import ReZeroConfig
from .configuration_rezero_mlp import ReZeroMLPConfig
from .configuration_rezero_resnet import ReZeroResNetConfig
from .modeling_rezero import (
    ReZeroForCausalLM,
    ReZeroForMaskedLM,
    ReZeroForQuestionAnswering,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroModel,
    ReZeroPreTrainedModel,
)
from .modeling_rezero_mlp import ReZeroMLPForImageClassification, ReZeroMLPModel, ReZeroMLPPreTrainedModel
from .modeling_rezero_resnet import (
    ReZeroResNetForImageClassification,
    ReZeroResNetModel,
    ReZeroResNetPreTrainedModel,
)


FAMILIES = {
    ReZeroPreTrainedModel: modeling_rezero,
    ReZeroResNetPreTrainedModel: modeling_rezero_resnet,
    ReZeroMLPPreTrainedModel: modeling_rezero_mlp,
}

for base, module in FAMILIES.items():
    transformers.AutoConfig.register(base.config_class.model_type, base.config_class, exist_ok=True)
    for auto, name in base.auto_classes.items():
        getattr(transformers, auto).register(base.config_class, getattr(module, name), exist_ok=True)

__all__ = [
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
]
