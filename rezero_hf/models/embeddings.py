"""What comes in: scaled token embeddings, and positions, learned vectors or angles that turn queries and keys."""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_rezero import ReZeroConfig


class ReZeroTokenEmbedding(nn.Embedding):
    """Rows of a small stored matrix, multiplied by `embed_scale` as they are looked up.

    The factor is here and not in the model because pipeline stages hand their stream on as `inputs_embeds`, which must
    not be scaled again; serving engines that bring their own embedding read `embed_scale` off this one.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class ReZeroPositionEmbedding(nn.Embedding):
    """Learned absolute positions. One past the last is a clear error, where seeing it costs nothing.

    Raises:
        ValueError: a position that was never learned (on a CPU).
    """

    # GPT-2's scale: well below the tokens', which have a standard deviation of 1.
    init_std = 0.02

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        # Reading a position would stall an accelerator and break a compiled graph: there the lookup itself fails.
        if position_ids.device.type == "cpu" and position_ids.numel() and not torch.compiler.is_compiling():
            last, limit = int(position_ids.max()), self.num_embeddings
            if last >= limit:
                raise ValueError(
                    f"position {last} is beyond the {limit} learned positions (max_position_embeddings): shorten the "
                    'input or the generation, or train with position_embedding="rope".'
                )
        return super().forward(position_ids)


class ReZeroRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions as `rotate` takes them, each (batch, 1, tokens, head_dim)."""

    def __init__(self, config: ReZeroConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ReZeroConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies theta^(-2i / head_dim) and the scaling of cosines and sines, 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + head_dim/2}) of `x` (batch, heads, tokens, head_dim) by its position's angle."""
    # Under autocast the angles follow the fp32 stream and x is bf16: without the cast the products would be fp32,
    # which attention throws away again at once (a tenth of a training step on a CPU).
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))
