"""The ReZero decoder language model (arXiv 2003.04887, section 4), as a Transformers model.

`residual.py` holds the paper's equations. Departures from the paper's Transformer, each a word of `ReZeroConfig`:
rotary positions by default; unit-variance embeddings, because no norm will repair their scale. Everything that is not
plain is in `ReZeroModel`; the head is one linear map, because serving engines bring their own.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices, packed_sequence_mask_function
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rezero import ReZeroConfig
from .embeddings import ReZeroPositionEmbedding, ReZeroRotaryEmbedding, ReZeroTokenEmbedding, rotate
from .gating import Branch
from .piecewise_loss import piecewise_loss
from .portable import PortablePreTrainedModel
from .residual import NORMS, RESIDUAL_FORMS, Residual


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T scaling) V in plain torch: the reference the other attention backends are held to."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def dropped(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`x` with the module's dropout, which is not called in evaluation: doing nothing takes time, too."""
    return module.dropout(x) if module.dropout.training else x


class ReZeroAttention(nn.Module):
    """The attention branch F: multi-head or grouped-query self-attention, then dropout (authors' layer: `dropout1`)."""

    def __init__(self, config: ReZeroConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.o_proj.init_scale = config.output_init_scale
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def heads(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of x, each (batch, heads, tokens, head_dim); the first two turned by position."""
        query, key, value = (
            project(x).view(*x.shape[:-1], -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        return query, key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        project: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`project=False` leaves `o_proj` to the caller (`gating.py`)."""
        input_shape = hidden_states.shape[:-1]
        query, key, value = self.heads(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*input_shape, -1).contiguous()
        return dropped(self, self.o_proj(output)) if project else output, weights


class ReZeroMLP(nn.Module):
    """The feed-forward branch F: `down(dropout(act(up(x))))`, then dropout (authors' layer: `dropout2`)."""

    def __init__(self, config: ReZeroConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.init_scale = config.output_init_scale
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, project: bool = True) -> torch.Tensor:
        """`project=False` leaves `down_proj` to the caller (`gating.py`)."""
        activated = dropped(self, self.activated(hidden_states))
        return dropped(self, self.down_proj(activated)) if project else activated

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        return self.act_fn(self.up_proj(x))


class ReZeroGatedMLP(ReZeroMLP):
    """The gated feed-forward branch F: `down(dropout(act(gate(x)) * up(x)))`, then dropout."""

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)


def residual_of(config: ReZeroConfig) -> Residual:
    """The residual module of one layer, which joins both of its branches to the stream."""
    return RESIDUAL_FORMS[config.residual](
        branches=("attn", "mlp"),
        make_norm=lambda: NORMS[config.norm](config.hidden_size, eps=config.norm_eps),
        gate_init=config.gate_init,
        share_gate=config.gate_sharing == "layer",
    )


class ReZeroDecoderLayer(GradientCheckpointingLayer):
    """Two branches, attention and feed-forward, each joined to the stream by the layer's residual form."""

    def __init__(self, config: ReZeroConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ReZeroAttention(config, layer_idx)
        self.mlp = ReZeroGatedMLP(config) if config.gated_mlp else ReZeroMLP(config)
        # Named as the norm whose place it takes: every trainer exempts `_norm.` from weight decay, and so alpha.
        # Registered last, because pipeline stages read their dtype off a layer's first parameter and alpha stays fp32.
        self.residual_norm = residual_of(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        # Not the modules themselves: offloading moves every module it finds among a call's arguments.
        attention = Branch(
            self.self_attn,
            self.self_attn.o_proj,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = self.residual_norm(hidden_states, attention, branch="attn")
        return self.residual_norm(hidden_states, Branch(self.mlp, self.mlp.down_proj), branch="mlp")


class ReZeroPreTrainedModel(PortablePreTrainedModel):
    """Initialisation, saving and the switches Transformers reads, for every ReZero language model."""

    config: ReZeroConfig
    config_class = ReZeroConfig
    base_model_prefix = "model"
    auto_classes = {
        "AutoModel": "ReZeroModel",
        "AutoModelForCausalLM": "ReZeroForCausalLM",
        "AutoModelForMaskedLM": "ReZeroForMaskedLM",
        "AutoModelForSequenceClassification": "ReZeroForSequenceClassification",
        "AutoModelForTokenClassification": "ReZeroForTokenClassification",
        "AutoModelForQuestionAnswering": "ReZeroForQuestionAnswering",
    }
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReZeroDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReZeroDecoderLayer, "attentions": ReZeroAttention}

    def __init__(self, config: ReZeroConfig):
        tp_size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
        if config.num_key_value_heads % tp_size:
            raise ValueError(
                f"tp_size={tp_size} processes cannot share num_key_value_heads={config.num_key_value_heads} evenly; "
                "choose a tp_size that divides it."
            )
        super().__init__(config)
        self._keep_in_fp32_modules_strict = ["alpha"] if RESIDUAL_FORMS[config.residual].has_gate else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Draws one module's own parameters, every layer independently.

        | module                | weight                                        | bias |
        | --------------------- | --------------------------------------------- | ---- |
        | every Linear          | N(0, 2 / (fan_in + fan_out)), Xavier          | 0    |
        | token embedding       | N(0, (embedding_std / embedding_multiplier)^2)|      |
        | learned positions     | N(0, 0.02^2)                                  |      |
        | norms                 | 1 (as the library does, rotary buffers too)    | 0    |
        | residual forms        | alpha = gate_init                             |      |

        `initializer_range`, when set, is the standard deviation of all Linears instead, and `output_init_scale`
        multiplies what is drawn for `o_proj` and `down_proj`. Transformers never calls this
        for modules of custom code that own no parameter themselves, so roles are tags on leaves.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            scale = getattr(module, "init_scale", 1.0)
            if std is None:
                init.xavier_normal_(module.weight, gain=scale)
            else:
                init.normal_(module.weight, std=scale * std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            std = self.config.embedding_std / self.config.embedding_multiplier
            init.normal_(module.weight, std=getattr(module, "init_std", std))
        elif isinstance(module, Residual):
            if module.has_gate:
                init.constant_(module.alpha, module.gate_init)
        else:
            super()._init_weights(module)


class ReZeroModel(ReZeroPreTrainedModel):
    """The decoder without a head: token ids in, the stream after the last layer out.

    While every alpha is 0 and `final_norm` is off, `last_hidden_state` is exactly the embedding.
    """

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        self.embed_tokens = ReZeroTokenEmbedding(config.vocab_size, config.hidden_size, config.embedding_multiplier)
        self.embed_positions = None
        self.rotary_emb = None
        if config.position_embedding == "learned":
            self.embed_positions = ReZeroPositionEmbedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = ReZeroRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(ReZeroDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (batch, tokens). Exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: (batch, tokens), 1 for real tokens and 0 for padding, or a full 4D mask. None lets
                `position_ids` that restart mark the documents of a packed row; FlashAttention, for all of the library's
                models, tells them apart in a batch of one row only.
            position_ids: (batch, tokens); counts on from the cache by default.
            past_key_values: cache of earlier tokens; made here when `use_cache` and None.
            inputs_embeds: (batch, tokens, hidden_size), what `embed_tokens` returns: scaled rows.
            use_cache: keep keys and values for the tokens to come.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; a cache with `is_causal=False`; more tokens
                than there are learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if not self.config.is_causal and past_key_values is not None:
            raise ValueError("past_key_values make no sense with is_causal=False: every token depends on later ones.")
        # Before the cache and the positions that are made here: the library looks for documents only without a cache,
        # and in positions that count on there are none to be found.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=self._same_document(attention_mask, position_ids, inputs_embeds.shape[0]),
        )
        if use_cache and past_key_values is None and self.config.is_causal:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # A later pipeline stage, where layer 0 is elsewhere, takes a stream that already holds its positions.
        elif next(self.layers[0].parameters(), None) is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _same_document(self, attention_mask, position_ids, batch_size: int) -> Callable | None:
        """Keeps documents of a packed row apart where the library does not: looking both ways it ignores positions."""
        if self.config.is_causal or attention_mask is not None or position_ids is None:
            return None
        documents = find_packed_sequence_indices(position_ids.expand(batch_size, -1))
        return None if documents is None else packed_sequence_mask_function(documents)


class ReZeroLanguageModel(ReZeroPreTrainedModel):
    """The network with a linear head over the vocabulary: what next-token and masked prediction share."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ReZeroConfig):
        super().__init__(config)
        self.model = ReZeroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ReZeroForCausalLM(ReZeroLanguageModel, GenerationMixin):
    """Predicts the next token, and generates."""

    def __init__(self, config: ReZeroConfig):
        if not config.is_causal:
            raise ValueError(
                "is_causal=False lets every token see the next one, which ReZeroForCausalLM is to predict; use "
                "ReZeroForMaskedLM, or pass is_causal=True to take over the weights alone."
            )
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Run the decoder and its head; the arguments of `ReZeroModel.forward`, and:

        Args:
            labels: (batch, tokens), aligned with `input_ids` (the model shifts them); -100 is ignored. Pass
                `shift_labels`, already shifted, beside them to use those instead.
            logits_to_keep: how many last positions get logits (0 is all), or their indices.
            skip_logits: with labels, return the loss alone and never hold all logits: of a large vocabulary they take
                more memory than all else (`piecewise_loss.py`). Default False: most trainers look at them.
            kwargs: `num_items_in_batch` divides the summed loss (gradient accumulation), `shift_labels` as above; with
                `skip_logits`, `reduction="none"` gives the loss of each token, (batch, tokens).

        Returns:
            loss in nats per token when labels are given, and logits (batch, tokens kept, vocab_size).
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states, vocab_size = outputs.last_hidden_state[:, kept, :], self.config.vocab_size
        logits = loss = None
        if skip_logits and labels is not None:
            loss = piecewise_loss(self.lm_head, hidden_states, labels, vocab_size, self.loss_function, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ReZeroForMaskedLM(ReZeroLanguageModel):
    """Looks both ways and restores masked tokens. It has no cache."""

    def __init__(self, config: ReZeroConfig):
        if config.is_causal:
            # Another model may be made from the caller's.
            config = copy.deepcopy(config)
            config.is_causal = False
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Run the network and its head; the arguments of `ReZeroModel.forward` but for the cache, and:

        Args:
            labels: (batch, tokens), the original token where one was masked, -100 elsewhere; not shifted. Loss in nats.
        """
        # Callers that take any language model say it; there is no cache to use.
        kwargs.pop("use_cache", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# The library's generic heads build their base through AutoModel, which refuses code that came with a checkpoint; so
# these build it themselves and take only `forward`.
class ReZeroForSequenceClassification(GenericForSequenceClassification, ReZeroPreTrainedModel):
    """The network with a linear head on each sequence's last token that is not padding."""

    # Its loss takes no `num_items_in_batch` of a whole step; so Trainer averages over passes and processes.
    accepts_loss_kwargs = False

    def __init__(self, config: ReZeroConfig):
        ReZeroPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ReZeroModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class ReZeroForTokenClassification(GenericForTokenClassification, ReZeroPreTrainedModel):
    """The network with a linear head on every token."""

    def __init__(self, config: ReZeroConfig):
        ReZeroPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ReZeroModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Run the network and its head; the arguments of `ReZeroModel.forward`, and:

        Args:
            labels: (batch, tokens), the class of each, -100 where there is none. Loss in nats per labelled token.
            num_items_in_batch: what the summed loss is divided by instead; the library's own head leaves that out, and
                sums over passes and processes were taken for means.
        """
        words = {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        output = super().forward(input_ids, attention_mask=attention_mask, return_dict=True, **words, **kwargs)
        if labels is None:
            return output
        loss = self.loss_function(output.logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        # A new one: where a tuple is asked for, the loss is its first element.
        return TokenClassifierOutput(**{**output, "loss": loss})


class ReZeroForQuestionAnswering(GenericForQuestionAnswering, ReZeroPreTrainedModel):
    """The network with a linear head that scores every token as start and as end of the answer."""

    def __init__(self, config: ReZeroConfig):
        ReZeroPreTrainedModel.__init__(self, config)
        self.model = ReZeroModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [*ReZeroPreTrainedModel.auto_classes.values(), "ReZeroPreTrainedModel"]  # noqa: PLE0604
