"""Configuration of the ReZero decoder language model."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


PRESETS = {
    name: {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": context,
    }
    for name, (width, layers, context) in {
        "10m": (256, 12, 1024),
        "50m": (512, 16, 1024),
        "125m": (768, 18, 2048),
        "350m": (1024, 28, 2048),
    }.items()
}


@strict
class ReZeroConfig(PreTrainedConfig):
    """Everything that shapes a `ReZeroModel`. The default is a 12-layer, norm-free ReZero decoder over bytes.

    Size:
        vocab_size (`int`, default 320): rows of the embedding. 256 bytes and three specials, padded to a multiple of
            64, the tile size of matrix units.
        hidden_size (`int`, default 512): width d of the stream.
        intermediate_size (`int`, default 4 d, or 8/3 d rounded up to a multiple of 64 with `gated_mlp`): width of the
            feed-forward net; both give the same number of parameters. 4 d is the paper's.
        num_hidden_layers (`int`, default 12): layers, each attention + feed-forward. The paper's main comparison.
        num_attention_heads (`int`, default 8): heads, each with its own softmax over the tokens.
        num_key_value_heads (`int`, default equal): fewer than heads is grouped-query attention.
        head_dim (`int`, default d / heads): width of a head.
        max_position_embeddings (`int`, default 1024): longest sequence, in tokens. Only learned positions enforce it.

    Residual form (`residual.py` has the equations):
        residual (default `"rezero"`): `rezero`, `rezero_pre_norm`, `rezero_tanh`, `pre_norm`, `pre_tanh`,
            `post_norm`, `branch_norm` or `plain`; without a skip, `none` or `norm`.
        gate_init (`float`, default 0): initial alpha. 0 makes every layer the identity; 1 is the paper's ablation.
        gate_sharing (default `"layer"`): one alpha for attention and feed-forward of a layer, as in the paper
            (section 4 and the authors' code), or one for each (`"sublayer"`).
        norm (default `"layer"`): LayerNorm (the paper's baselines) or RMSNorm (`"rms"`), wherever a norm is used.
        norm_eps (`float`, default 1e-5): added to the variance; torch's and GPT-2's value.
        final_norm (`bool`, default False): a norm between the last layer and the head. The paper has none. GPT-2 and
            Llama do: switch it on for a pre-norm baseline.
        qk_norm (`bool`, default False): RMSNorm on each head's queries and keys. A 12-layer byte-level net without
            norms, with F from 0 and alpha held, gained 0.028 bits per byte by it (500 steps, one seed:
            model_cards/LOG.md, section 14).

    Scale. Nothing renormalises the stream, so these set the scale of everything:
        embedding_std (`float`, default 1): standard deviation of the token embeddings as they enter layer 0. Unit
            variance keeps every branch's input, and with it every gate's gradient, of order one.
        embedding_multiplier (`float`, default sqrt(d)): the stored embedding is drawn with `embedding_std` divided by
            this, and multiplied by it when it is looked up, as in the original Transformer. A tied head then starts
            with logits of order one (sqrt(d) on the input's own token) instead of d.
        initializer_range (`float`, default None): None draws matrices with Xavier's normal rule, which keeps
            variance. A number draws every Linear's matrix with that standard deviation: 0.02 together with
            `embedding_std=0.02` and `embedding_multiplier=1` is GPT-2's start, for baselines. ReZero starves on it
            (gradients of alpha near 1e-5).
        output_init_scale (`float`, default 1): factor on the initial matrices that write into the stream, `o_proj` and
            `down_proj`. 0 needs a `gate_init` other than 0: F is 0 instead of alpha, and every layer is the identity
            just the same. A gate that opens lets the noise of a random output in, and stays small to keep it out. On
            bytes (12 layers, width 96, Muon at 4e-3, 500 steps, one seed, bits per byte) 1 with alpha = 0 ended at
            2.257, 0.1 with gates at five times the rate at 2.153, 0 with alpha = 1 at 2.056; pre-norm at 2.182 with
            1 and 2.124 with 0. At better rates for each, pre-norm with 0 and norm-free with 0 and alpha held at 0.25
            ended within 0.012 of each other.

    Inside the branches:
        hidden_act (`str`, default `"gelu"`, the paper's): activation of the feed-forward net.
        gated_mlp (`bool`, default False): `down(act(gate) * up)` instead of the paper's `down(act(up))`.
        attention_bias (`bool`, default True): biases of q, k, v and o, on as in the authors' layers.
        mlp_bias (`bool`, default True): biases of the feed-forward net, likewise.
        position_embedding (default `"rope"`): rotary, or `"learned"` absolute vectors added to the embedding, drawn
            with a standard deviation of 0.02, GPT-2's.
        rope_parameters (`dict`, default theta 10000): as everywhere in Transformers.
        attention_dropout (`float`, default 0): on attention probabilities.
        hidden_dropout (`float`, default 0): inside the feed-forward net after the activation, and on every branch's
            output. With the one above, the places of the authors' layers.
        embedding_dropout (`float`, default 0): on the stream as it enters layer 0 (authors' notebook).
        is_causal (`bool`, default True): a token sees itself and what came before. False lets it see the whole
            sequence, without a cache: `ReZeroForMaskedLM` switches it off, and heads on such a checkpoint keep it off.

    Usual words of Transformers:
        tie_word_embeddings (`bool`, default False): use the embedding as head. Over bytes it would save nothing.
        use_cache (`bool`, default True): return keys and values for generation.
        bos_token_id, eos_token_id, pad_token_id (default None): training and export take them from the tokenizer.

    Raises:
        StrictDataclassFieldValidationError: a field has the wrong type or an unknown word.
        StrictDataclassClassValidationError: a value is out of range, or fields contradict each other.
    """

    model_type = "rezero"
    # `save_pretrained` of the configuration alone ships its own file, so AutoConfig works where the package is absent.
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        # Whole on every process, but each only sees the gradient of its own heads.
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # The module that owns alpha is sharded by itself, because alpha stays fp32; the norms in it do not.
    base_model_fsdp_plan = {
        **PreTrainedConfig.base_model_fsdp_plan,
        "layers.*.residual_norm.norms.attn": "free_full_weight",
        "layers.*.residual_norm.norms.mlp": "free_full_weight",
    }

    vocab_size: int = 320
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024

    residual: Literal[
        "rezero",
        "rezero_pre_norm",
        "rezero_tanh",
        "pre_norm",
        "pre_tanh",
        "post_norm",
        "branch_norm",
        "plain",
        "none",
        "norm",
    ] = "rezero"
    gate_init: float | int = 0.0
    gate_sharing: Literal["layer", "sublayer"] = "layer"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    final_norm: bool = False
    qk_norm: bool = False

    embedding_std: float | int = 1.0
    embedding_multiplier: float | int | None = None
    initializer_range: float | int | None = None
    output_init_scale: float | int = 1.0

    hidden_act: str = "gelu"
    gated_mlp: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    position_embedding: Literal["rope", "learned"] = "rope"
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    is_causal: bool = True

    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        divides = self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0
        if self.head_dim is None and divides:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            gated = -(-8 * self.hidden_size // (3 * 64)) * 64
            self.intermediate_size = gated if self.gated_mlp else 4 * self.hidden_size
        if self.embedding_multiplier is None and self.hidden_size > 0:
            self.embedding_multiplier = self.hidden_size**0.5
        # Plans name modules, and the library checks that each is there.
        missing = {"norm": not self.final_norm, "layers.*.mlp.gate_proj": not self.gated_mlp}
        missing |= {f"layers.*.self_attn.{norm}": not self.qk_norm for norm in ("q_norm", "k_norm")}
        gated_norms = self.residual == "rezero_pre_norm"
        missing |= {f"layers.*.residual_norm.norms.{branch}": not gated_norms for branch in ("attn", "mlp")}
        for plan in ("base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan"):
            kept = {name: how for name, how in getattr(self, plan).items() if not missing.get(name, False)}
            setattr(self, plan, kept)
        super().__post_init__(**kwargs)

    def validate_rope(self):
        """The library's check of what a type of rotary positions needs, as a `ValueError` like all others."""
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters: {error.args[0]}") from error

    def validate_architecture(self):
        """Checks beyond types; run by `@strict` when the config is made and when it is saved."""
        self._check_ranges()
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}; "
                "change one of them or set head_dim."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions turn pairs of features, so it must be even.")
        theta = self.rope_parameters["rope_theta"]
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
            raise ValueError(f"rope_parameters: rope_theta={theta!r}: must be a positive number (in YAML, 1.0e+6).")
        rope_type = self.rope_parameters["rope_type"]
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        if rope_type not in known:
            raise ValueError(f"rope_parameters: rope_type={rope_type!r} is unknown; one of {', '.join(known)}.")
        partial = self.rope_parameters.get("partial_rotary_factor")
        if rope_type != "proportional" and partial not in (None, 1.0):
            raise ValueError(
                f"rope_parameters: partial_rotary_factor={partial} only works with rope_type='proportional'; "
                "leave it out."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; one of {', '.join(sorted(ACT2FN))}.")

    def _check_ranges(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1.")
        for field in ("attention_dropout", "hidden_dropout", "embedding_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field}={getattr(self, field)}: a dropout probability must be in [0, 1).")
        for field in ("norm_eps", "embedding_std", "embedding_multiplier", "initializer_range"):
            if getattr(self, field) is not None and not 0.0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)}: must be positive.")
        if not 0.0 <= self.output_init_scale < math.inf:
            raise ValueError(f"output_init_scale={self.output_init_scale}: must be a finite number, at least 0.")
        gated = self.residual.startswith("rezero")
        if gated and self.gate_init == 0 and self.output_init_scale == 0:
            raise ValueError(
                "gate_init=0 with output_init_scale=0: alpha and F would both be 0 and hide each other's gradient for "
                "ever; give one of them another value."
            )
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init={self.gate_init}: must be a finite number; 0 is ReZero.")

    @classmethod
    def preset(cls, size: Literal["10m", "50m", "125m", "350m"], **kwargs) -> "ReZeroConfig":
        """A named size for real use, counted over bytes (another vocabulary adds its embedding and head).

        Heads of 64 features and widths in multiples of 64 suit attention kernels and matrix units; depth grows a little
        faster than in GPT-2's table, because identity at initialisation makes depth cheap to train.

        Args:
            size: `"10m"` (256 wide, 12 layers), `"50m"` (512, 16), `"125m"` (768, 18) or `"350m"` (1024, 28).
            kwargs: any field, over these values.

        Raises:
            ValueError: there is no preset of that name.
        """
        if size not in PRESETS:
            raise ValueError(f"preset {size!r} is unknown; one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[size], **kwargs})

    @classmethod
    def bounded(cls, num_hidden_layers: int = 12, **kwargs) -> "ReZeroConfig":
        """The norm-free form that held against tuned pre-norm: bounded branch inputs, F from 0, alpha held open.

        `x + alpha * F(2 tanh(x / 2))` with output matrices that start at 0, so a new network is the identity though
        alpha is not 0: 3 / layers, in proportion more above width 128, and never above 0.5. 12 and 48 layers of width
        96 and 12 of width 256 are what was measured. Train it with `training.gate_lr_multiplier: 0.0` (gates held) or
        0.1, Muon, and no warm-up.

        At 12 layers, width 96 and 500 steps on bytes it ends at 1.927 +- 0.003 bits per byte, pre-norm with RMSNorm at
        1.938 +- 0.004, with LayerNorm at 1.943 +- 0.006 (three seeds, every row at its own best rates), ahead in the
        mean at every evaluation and with every seed from step 100 on; pre-norm with the same constant on its branches
        ends at 1.971 +- 0.008 and is ahead before step 150. With alpha at 0.5 it begins behind and ends at 1.922 +-
        0.005, ahead of 0.25 with six of six seeds (model_cards/norm_free and its repeat). At 48 layers and 200 steps it
        ends, without a warm-up, at 2.206 +- 0.011, pre-norm at 2.447 +- 0.021 and 2.453 +- 0.017, ahead at every
        evaluation with every seed, and pre-norm with the same constant on its branches at 2.270 +- 0.006, ahead of that
        from step 75 on (model_cards/norm_free_deep). How it was found: model_cards/LOG.md.

        Those are of width 96. At width 256, 400 steps and no warm-up it ends with 0.5 at 1.744 +- 0.026, pre-norm with
        LayerNorm at 1.759 +- 0.040, with RMSNorm at 1.764 +- 0.039, behind both before step 100; 0.25 wants twice the
        rate, is behind from step 125 on and ends at 1.752 +- 0.017 (model_cards/norm_free_256). Over 800 steps, of
        another text and with a warm-up in every row, 0.25 ends at 1.631 +- 0.061 and pre-norm, ahead at every
        evaluation, at 1.561 +- 0.036 (model_cards/norm_free_wide). At 512 with AdamW, 500 steps and 0.25 it is ahead
        until the middle and ends at 1.592 +- 0.024, pre-norm at 1.552 +- 0.004 (model_cards/lm12_wide).

        Args:
            num_hidden_layers: depth.
            kwargs: any field, over these values.
        """
        width = kwargs.get("hidden_size", cls.hidden_size)
        words = {
            "num_hidden_layers": num_hidden_layers,
            "residual": "rezero_tanh",
            "gate_init": min(0.5, 3 / max(num_hidden_layers, 1) * max(1, width / 128)),
            "output_init_scale": 0.0,
        }
        return cls(**{**words, **kwargs})

    @classmethod
    def paper(cls, num_hidden_layers: int = 12, **kwargs) -> "ReZeroConfig":
        """The paper's enwik8 language model (section 4.2): context 512, GELU, dropout 0.2, 2 heads.

        Up to 12 layers d is 512 with a feed-forward width of 2048; deeper ones (Table 3: 64 and 128 layers) have d 256
        and 1024. The paper does not say how it encodes positions; this keeps our default, rotary.

        Args:
            num_hidden_layers: depth.
            kwargs: any field, over these values.
        """
        hidden_size = 512 if num_hidden_layers <= 12 else 256
        sizes = {
            "num_hidden_layers": num_hidden_layers,
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "hidden_act": "gelu",
            "attention_dropout": 0.2,
            "hidden_dropout": 0.2,
        }
        return cls(**{**sizes, **kwargs})


__all__ = ["ReZeroConfig"]
