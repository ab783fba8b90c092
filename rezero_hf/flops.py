"""Arithmetic: what a model needs for a token, and what a device can give in a second."""

import re

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from .arguments import compute_dtype
from .models import ReZeroConfig


# Device name (regular expression, the first that is found counts) -> dense peak in TFLOP/s of one torch device with
# 16-bit inputs, with TF32, with fp32. Where a data sheet gives the double rate of sparse matrices, half of it.
PEAKS: dict[str, tuple[float, float, float]] = {
    # NVIDIA H100 Tensor Core GPU data sheet, columns PCIe, NVL and SXM
    r"\bH100 PCIe\b": (756, 378, 51),
    r"\bH100 NVL\b": (835, 417.5, 60),
    r"\bH100\b": (989.4, 494.7, 67),
    # NVIDIA H200 Tensor Core GPU data sheet, columns NVL and SXM
    r"\bH200 NVL\b": (835.5, 417.5, 60),
    r"\bH200\b": (989.4, 494.7, 67),
    # NVIDIA GB200 NVL72 data sheet, the superchip's numbers over its two GPUs
    r"\bGB200\b": (2500, 1250, 80),
    # NVIDIA HGX B200 data sheet, the board's numbers over its eight GPUs
    r"\bB200\b": (2250, 1125, 75),
    # NVIDIA A100 Tensor Core GPU data sheet, all variants alike
    r"\bA100\b": (312, 156, 19.5),
    # NVIDIA L40S data sheet
    r"\bL40S\b": (362, 183, 91.6),
    # NVIDIA L4 data sheet
    r"\bL4\b": (121, 60, 30.3),
    # NVIDIA A10G data sheet, as published by AWS for its G5 instances
    r"\bA10G\b": (70, 35, 35),
    # NVIDIA Ada GPU architecture white paper, 16 bit with fp32 accumulation
    r"\bRTX 4090$": (165.2, 82.6, 82.6),
    # NVIDIA Ampere GA102 GPU architecture white paper, 16 bit with fp32 accumulation
    r"\bRTX 3090$": (71, 35.6, 35.6),
    # NVIDIA V100 data sheet, columns SXM2 and PCIe; Volta has no TF32
    r"\bV100-SXM": (125, 15.7, 15.7),
    r"\bV100-PCIE": (112, 14, 14),
    # AMD Instinct MI300X data sheet
    r"\bMI300X\b": (1307.4, 653.7, 163.4),
    # AMD Instinct MI250X data sheet; torch sees each of its two dies as a device; it has no TF32
    r"\bMI250X\b": (191.5, 47.9, 47.9),
}


def flops_per_token(config: ReZeroConfig, sequence_length: int) -> int:
    """Floating point operations of the model for one training token, forward and backward (3 times the forward).

    Counted: two for every weight of every Linear, the head included, and for attention's scores and values the keys
    that a token may see, (sequence_length + 1) / 2 on average, or all of them with `is_causal=False`. Not counted:
    embedding lookups, norms, activations, the gates, and what is computed again under activation checkpointing. It is
    what the model needs, so a share of a device's peak reckoned with it is MFU.
    """
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * width * (heads + config.num_key_value_heads * config.head_dim)
    mlp = (3 if config.gated_mlp else 2) * width * config.intermediate_size
    weights = config.num_hidden_layers * (attention + mlp) + width * config.vocab_size
    # Of every key a score and a share of a value, two operations a feature each: 4, halved for a triangle.
    keys = 2 * heads * config.num_hidden_layers * (sequence_length + 1 if config.is_causal else 2 * sequence_length)
    return 3 * (2 * weights + keys)


def flops_per_image(model: nn.Module, pixel_values: torch.Tensor) -> int:
    """Floating point operations of one image in training, 3 times those of the forward pass as torch counts them.

    Args:
        model: takes `pixel_values`.
        pixel_values: one image (channels, height, width).
    """
    training = model.training
    # In training it would move the statistics of BatchNorm.
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(pixel_values=pixel_values[None].to(model.device))
    finally:
        model.train(training)
    return 3 * counter.get_total_flops()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of one device in FLOP/s, from its vendor's data sheet; None where it is not known, as for CPUs.

    Args:
        device: a device that is present.
        dtype: of the matrix products: a 16-bit type, or float32, which torch computes exactly unless TF32 is allowed.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # A laptop's part and a slice of a card share their name with the whole.
    found = [] if re.search("Laptop|MIG", name) else [row for key, row in PEAKS.items() if re.search(key, name)]
    # Volta emulates bfloat16.
    if not found or ("V100" in name and dtype is torch.bfloat16):
        return None
    half, tf32, single = found[0]
    if dtype is torch.float32:
        return 1e12 * (tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else single)
    return 1e12 * half if dtype in (torch.bfloat16, torch.float16) else None


def peak_for(args: TrainingArguments) -> float | None:
    """The peak to reckon a run's MFU with: `args.peak_flops` where it is set, else that of its device and precision."""
    return getattr(args, "peak_flops", None) or peak_flops(args.device, compute_dtype(args))
