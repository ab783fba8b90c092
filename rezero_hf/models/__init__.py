"""Registers the model families with Transformers' Auto classes, and nothing else."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_rezero import ReZeroConfig
from .modeling_rezero import ReZeroForCausalLM, ReZeroModel


AutoConfig.register(ReZeroConfig.model_type, ReZeroConfig, exist_ok=True)
AutoModel.register(ReZeroConfig, ReZeroModel, exist_ok=True)
AutoModelForCausalLM.register(ReZeroConfig, ReZeroForCausalLM, exist_ok=True)
