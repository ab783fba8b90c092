"""The models that a benchmark compares, and how each is called.

All have the same width, depth, heads, vocabulary and untied head, parameters within 2 %, no dropout and SDPA wherever
their library has it. The rest is what a library gives who asks for nothing: initialisation, activation, norms, biases.
"""

import importlib.util
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from .layout import pack_for_decoding
from .models import ReZeroConfig, ReZeroForCausalLM
from .models.gating import Branch
from .surgery import fold_gates


@dataclass(frozen=True)
class Sizes:
    """What is built and fed. Sequences of training and prefill have `context` tokens; generation starts at `prompt`.

    `read` bytes are read to measure bandwidth: more than most caches hold.
    """

    hidden_size: int = 512
    heads: int = 8
    vocab_size: int = 320
    training_layers: int = 6
    generation_layers: int = 12
    context: int = 256
    batch: int = 4
    prompt: int = 32
    new_tokens: int = 64
    read: int = 256 * 2**20

    def decoded(self, sequences: int) -> int:
        """New tokens of each of so many sequences; of several half as many, which take long enough."""
        return self.new_tokens if sequences == 1 else self.new_tokens // 2


# Device type, or smoke -> sizes. Those of a GPU fill one; those of a CPU take two cores half an hour in all.
SIZES = {
    "cpu": Sizes(),
    "cuda": Sizes(hidden_size=1024, heads=16, training_layers=12, generation_layers=24, context=1024, batch=16),
    "smoke": Sizes(96, 4, 64, 1, 1, context=32, batch=2, prompt=4, new_tokens=8, read=2**20),
}
TRAINING, GENERATION = ("train", "memory"), ("prefill", "first_token", "decode_1", "decode_8")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model of the comparison, a causal language model of Transformers; subclasses are called otherwise.

    Args:
        name: in tables.
        words: what it is.
        build: (sizes, layers) -> model in fp32, initialised.
        imports: the statement that a user's program opens with.
        package: what must be installed; without it the arm is left out.
        measures: those of `benchmarks.MEASURES` it takes part in.
        compiled: those of them that it takes part in compiled.
        peer: what a user would take instead, not a relative of ours.
        during: entered around every step of it; what switches a faster implementation off, say.
        prepare: what is done to a loaded model before it generates.
    """

    name: str
    words: str
    build: Callable[[Sizes, int], nn.Module]
    imports: str
    package: str = "rezero_hf"
    measures: tuple[str, ...] = (*TRAINING, *GENERATION, "load", "import")
    compiled: tuple[str, ...] = (*TRAINING, "decode_1", "decode_8")
    peer: bool = False
    during: Callable[[], AbstractContextManager] = nullcontext
    prepare: Callable[[nn.Module], nn.Module] | None = None

    def logits(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Of every token of `ids` (batch, tokens): (batch, tokens, vocabulary)."""
        return model(ids, use_cache=False).logits

    def loss(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Mean nats of the next token, without a cache."""
        return model(ids, labels=ids, use_cache=False).loss

    def prefill(self, model: nn.Module, ids: torch.Tensor) -> Any:
        """Keys and values of a prompt, and the logits after its last token."""
        return model(ids, use_cache=True, logits_to_keep=1)

    def generate(self, model: nn.Module, ids: torch.Tensor, tokens: int, compiled: bool = False) -> torch.Tensor:
        """So many new tokens after each prompt, greedily, by the library's own loop and cache.

        Args:
            compiled: with a static cache, around which Transformers compiles on a GPU.
        """
        words = {"cache_implementation": "static"} if compiled else {}
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **words)


class ReZeroArm(Arm):
    """Ours, trained as `ReZeroTrainer` does it."""

    def loss(self, model, ids):
        return model(ids, labels=ids, use_cache=False, skip_logits=True).loss


class XTransformersArm(Arm):
    """x-transformers' decoder in its autoregressive wrapper."""

    def logits(self, model, ids):
        return model.net(ids)

    def loss(self, model, ids):
        return model(ids)

    def prefill(self, model, ids):
        return model.net(ids, return_intermediates=True)

    def generate(self, model, ids, tokens, compiled=False):
        return model.generate(ids, tokens, temperature=0.0, cache_kv=True)


class AuthorsArm(Arm):
    """A stack of the authors' layers, which have no cache and do not generate."""

    def logits(self, model, ids):
        return model(ids)

    def loss(self, model, ids):
        return cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class AuthorsModel(nn.Module):
    """Embedding, learned positions, layers of the package `rezero`, head: (batch, tokens) -> logits."""

    def __init__(self, sizes: Sizes, layers: int):
        from rezero.transformer import RZTXEncoderLayer

        super().__init__()
        width, words = sizes.hidden_size, {"dropout": 0.0, "activation": "gelu"}
        self.embed = nn.Embedding(sizes.vocab_size, width)
        self.positions = nn.Embedding(sizes.context, width)
        self.layers = nn.ModuleList(RZTXEncoderLayer(width, sizes.heads, 4 * width, **words) for _ in range(layers))
        self.head = nn.Linear(width, sizes.vocab_size, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(sizes.context), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        # Their layers take tokens first.
        x = (self.embed(ids) + self.positions.weight[:tokens]).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, src_mask=self.mask[:tokens, :tokens])
        return self.head(x.transpose(0, 1))


def _words(sizes: Sizes, layers: int) -> dict[str, Any]:
    """What all configurations of Transformers share."""
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _rezero(sizes: Sizes, layers: int, **words) -> nn.Module:
    return ReZeroForCausalLM(ReZeroConfig(**_words(sizes, layers), **words))


def _folded(sizes: Sizes, layers: int) -> nn.Module:
    # Alpha of 0 would fold to matrices of zeros.
    return fold_gates(_rezero(sizes, layers, gate_init=1))


def _gpt2(sizes: Sizes, layers: int) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**_words(sizes, layers), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def _llama(sizes: Sizes, layers: int) -> nn.Module:
    # Three matrices for two: as many parameters as 4 times the width, to a multiple of 32.
    return LlamaForCausalLM(LlamaConfig(**_words(sizes, layers), intermediate_size=32 * round(sizes.hidden_size / 12)))


def _gpt_neox(sizes: Sizes, layers: int) -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_words(sizes, layers), intermediate_size=4 * sizes.hidden_size))


def _x_transformers(sizes: Sizes, layers: int) -> nn.Module:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    width = sizes.hidden_size
    words = {"attn_dim_head": width // sizes.heads, "rotary_pos_emb": True, "attn_flash": True}
    decoder = Decoder(dim=width, depth=layers, heads=sizes.heads, **words)
    net = TransformerWrapper(num_tokens=sizes.vocab_size, max_seq_len=sizes.context, attn_layers=decoder)
    return AutoregressiveWrapper(net)


OURS = "from rezero_hf import ReZeroForCausalLM"
REFERENCE = ReZeroArm(name="ReZero", words="as shipped: `ReZeroConfig`'s defaults", build=_rezero, imports=OURS)
ARMS = (
    REFERENCE,
    ReZeroArm(
        name="ReZero, naive gate",
        words="trained with `x + alpha * F(x)` as it is written",
        build=_rezero,
        imports=OURS,
        measures=TRAINING,
        compiled=(),
        during=partial(patch.object, Branch, "takes_gate", lambda *_: False),
    ),
    ReZeroArm(
        name="ReZero, folded",
        words="for generation, after `fold_gates` and `pack_for_decoding`",
        build=_folded,
        prepare=pack_for_decoding,
        imports=OURS,
        measures=(*GENERATION, "load"),
    ),
    ReZeroArm(
        name="pre-norm",
        words="our code with `residual: pre_norm` and a final LayerNorm",
        build=partial(_rezero, residual="pre_norm", final_norm=True),
        imports=OURS,
        measures=(*TRAINING, *GENERATION, "load"),
    ),
    Arm(
        name="GPT-2",
        words="Transformers'; LayerNorm, learned positions",
        build=_gpt2,
        imports="from transformers import GPT2LMHeadModel",
        package="transformers",
        peer=True,
    ),
    Arm(
        name="Llama",
        words="Transformers'; RMSNorm, rotary positions, gated feed-forward net, no biases",
        build=_llama,
        imports="from transformers import LlamaForCausalLM",
        package="transformers",
        peer=True,
    ),
    # Tells how much of what packing gains is its products and not ReZero.
    Arm(
        name="Llama, packed",
        words="for generation, after `pack_for_decoding`, which leaves its attention as it is",
        build=_llama,
        prepare=pack_for_decoding,
        imports="from transformers import LlamaForCausalLM",
        package="transformers",
        measures=("decode_1", "decode_8"),
        compiled=("decode_1", "decode_8"),
    ),
    Arm(
        name="GPT-NeoX",
        words="Transformers'; LayerNorm, rotary positions, attention beside the feed-forward net",
        build=_gpt_neox,
        imports="from transformers import GPTNeoXForCausalLM",
        package="transformers",
        peer=True,
    ),
    XTransformersArm(
        name="x-transformers",
        words="its decoder with rotary positions; its own generation, not compiled; prefill computes all logits",
        build=_x_transformers,
        imports="from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper",
        package="x_transformers",
        measures=(*TRAINING, *GENERATION, "import"),
        compiled=TRAINING,
        peer=True,
    ),
    AuthorsArm(
        name="authors' ReZero",
        words="the layers of the package `rezero`, without SDPA and without generation; learned positions",
        build=AuthorsModel,
        imports="from rezero.transformer import RZTXEncoderLayer",
        package="rezero",
        measures=(*TRAINING, "import"),
        peer=True,
    ),
)


def installed(arms: Iterable[Arm] = ARMS) -> tuple[list[Arm], dict[str, str]]:
    """The arms whose packages are there, and of the others name -> package."""
    found, missing = [], {}
    for arm in arms:
        if importlib.util.find_spec(arm.package):
            found.append(arm)
        else:
            missing[arm.name] = arm.package
    return found, missing


def parameters(arm: Arm, sizes: Sizes) -> dict[str, int]:
    """Of its two models, the one that trains and the one that generates."""
    layers = {"training": sizes.training_layers, "generation": sizes.generation_layers}
    models = {which: arm.build(sizes, depth) for which, depth in layers.items()}
    return {which: sum(weight.numel() for weight in model.parameters()) for which, model in models.items()}
