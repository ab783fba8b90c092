"""What a model card says of a model, read off its configuration: one function for each family that has a card."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from .errors import UserError
from .markdown import join
from .models import (
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPForImageClassification,
    ReZeroResNetForImageClassification,
)
from .models.residual import RESIDUAL_FORMS


# The models that there is a card for; the library's own card serves other heads.
DESCRIBED = (
    ReZeroForCausalLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroResNetForImageClassification,
    ReZeroMLPForImageClassification,
)
# A language model's head -> the Hub's word for its task.
TEXT_TASKS = {
    "ReZeroForCausalLM": "text-generation",
    "ReZeroForSequenceClassification": "text-classification",
    "ReZeroForTokenClassification": "token-classification",
}
PAPER = "https://arxiv.org/abs/2003.04887"
BRANCHES = {
    "basic": "two 3x3 convolutions",
    "preact": "two 3x3 convolutions",
    "preact_bottleneck": "1x1, 3x3 and 1x1 convolutions",
}
STARTS = {
    "default": "",
    "zero_gamma": "Its branches start at 0 by zero-gamma ([arXiv 1706.02677](https://arxiv.org/abs/1706.02677)): the "
    "gamma of the BatchNorm that ends each was 0 before training. ",
    "fixup": "Its branches start at 0 by Fixup ([arXiv 1901.09321](https://arxiv.org/abs/1901.09321)): the last "
    "convolution of each was 0 before training, and learned scalars stand where norms would. ",
}


class Description(NamedTuple):
    """A model in a card's words.

    Attributes:
        pipeline_tag: the Hub's word for its task.
        measure: the recorded number that its loss curve shows.
        name: what to call it when the run has no name.
        model: what it is, the beginning of a sentence.
        difference: how it differs from other networks of its kind.
        norms: where it has normalisation layers.
        architecture: part -> value.
    """

    pipeline_tag: Literal["text-generation", "text-classification", "token-classification", "image-classification"]
    measure: Literal["bits_per_byte", "loss"]
    name: str
    model: str
    difference: str
    norms: list[str]
    architecture: dict[str, str]

    @property
    def of_images(self) -> bool:
        return self.pipeline_tag == "image-classification"

    @property
    def writes(self) -> bool:
        return self.pipeline_tag == "text-generation"

    @property
    def item(self) -> str:
        """What its loss is a mean over."""
        return {"image-classification": "image", "text-classification": "text", "token-classification": "word"}.get(
            self.pipeline_tag, "token"
        )


def described_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model that a saved configuration belongs to.

    Raises:
        UserError: there is no card for it.
    """
    name = (config.architectures or [config.model_type])[0]
    classes = {model_class.__name__: model_class for model_class in DESCRIBED}
    if name not in classes:
        raise UserError(
            f"{name} has no model card; there is one for {', '.join(classes)}. Save another model by its own "
            "save_pretrained, and push it by its own push_to_hub."
        )
    return classes[name]


def description_of(config: PreTrainedConfig) -> Description:
    """What a card says of the model that a configuration describes.

    Args:
        config: of one of `DESCRIBED`, whether it names the class already or not.

    Raises:
        UserError: it is of another head, which has no card.
    """
    if config.architectures or config.model_type not in _BY_FAMILY:
        described_class(config)
    return _BY_FAMILY[config.model_type](config)


def _language_model(config: PreTrainedConfig) -> Description:
    form = RESIDUAL_FORMS[config.residual]
    kind = _norm_name(config)
    norms = _present({
        f"{kind} in every residual step": form.has_norm,
        f"{kind} after the last layer": config.final_norm,
        "RMSNorm on queries and keys": config.qk_norm,
    })  # fmt: skip
    sharing = {"layer": "each layer, shared by its two branches", "sublayer": "each branch of each layer"}
    difference = (
        f"Every layer joins its branches F (attention, then feed-forward) to the stream x by `{_equation(config)}`"
        + (f", where N is a {kind}. " if form.has_norm else ". ")
        + _gate(config, sharing[config.gate_sharing], "passes its input on unchanged")
        + _norms(norms)
    )
    heads = f"{config.num_attention_heads} heads of {config.head_dim}"
    if config.num_key_value_heads != config.num_attention_heads:
        heads += f", {config.num_key_value_heads} for keys and values"
    gated = f"{config.hidden_act}(gate) * up" if config.gated_mlp else config.hidden_act
    dropouts = {
        "attention": config.attention_dropout,
        "hidden": config.hidden_dropout,
        "embedding": config.embedding_dropout,
    }
    architecture = {
        "layers": str(config.num_hidden_layers),
        "width": str(config.hidden_size),
        "attention": heads,
        "feed-forward": f"{config.intermediate_size}, {gated}",
        "positions": {"rope": "rotary", "learned": "learned"}[config.position_embedding],
        "context": f"{config.max_position_embeddings} tokens",
        "vocabulary": str(config.vocab_size),
        "output layer": "tied to the embedding" if config.tie_word_embeddings else "its own",
        "dropout": join(f"{place} {value:g}" for place, value in dropouts.items() if value) or "none",
    }
    task = TEXT_TASKS[(config.architectures or ["ReZeroForCausalLM"])[0]]
    layers = f"with {config.num_hidden_layers} layers"
    if task == "text-generation":
        model, name, measure = f"A decoder-only language model {layers}", "ReZero language model", "bits_per_byte"
    else:
        model, name, measure = f"A text classifier, a decoder-only Transformer {layers}", "ReZero classifier", "loss"
        architecture["classes"] = _classes(config)
    return Description(task, measure, name, model, difference, norms, architecture)


def _resnet(config: PreTrainedConfig) -> Description:
    norms = _present({
        "BatchNorm in every layer": config.batch_norm,
        "BatchNorm after the stem": config.stem_batch_norm,
    })  # fmt: skip
    activation = {
        "branch": f"The last {config.hidden_act} of a layer is in F, and none is on the sum. ",
        "sum": f"The last {config.hidden_act} of a layer is on the sum. ",
        None: f"Each convolution of F has its {config.hidden_act} before it, and none is on the sum. ",
    }[config.activation_position]
    branch = BRANCHES[config.layer_type]
    difference = (
        f"Every layer joins its branch F ({branch}) to the stream x, or to its shortcut where the shape changes, by "
        f"`{_equation(config)}`. "
        + activation
        + _gate(config, "each layer", "is its shortcut alone")
        + STARTS[config.initialization]
        + _norms(norms)
    )
    architecture = {
        "residual layers": f"{' + '.join(map(str, config.depths))}, of {branch} each",
        "channels": f"{', '.join(map(str, config.hidden_sizes))}; {config.embedding_size} in the stem",
        "activation": config.hidden_act,
        "images": f"any height and width, {_channels(config)}",
        "classes": _classes(config),
    }
    model = f"An image classifier, a convolutional network with {config.num_hidden_layers} residual layers"
    return Description("image-classification", "loss", "ReZero ResNet", model, difference, norms, architecture)


def _mlp(config: PreTrainedConfig) -> Description:
    form = RESIDUAL_FORMS[config.residual]
    kind = _norm_name(config)
    norms = _present({
        f"{kind} in every residual step": form.has_norm,
        f"{kind} after the last layer": config.final_norm,
    })  # fmt: skip
    difference = (
        f"Every hidden layer joins its branch F (a linear map, then {config.hidden_act}) to the stream x by "
        f"`{_equation(config)}`"
        + (f", where N is a {kind}. " if form.has_norm else ". ")
        + _gate(config, "each layer", "passes its input on unchanged")
        + _norms(norms)
    )
    architecture = {
        "hidden layers": str(config.num_hidden_layers),
        "width": str(config.hidden_size),
        "activation": config.hidden_act,
        "images": f"{config.image_size} x {config.image_size} pixels, {_channels(config)}",
        "classes": _classes(config),
    }
    model = f"An image classifier, a fully connected network with {config.num_hidden_layers} hidden layers"
    return Description("image-classification", "loss", "ReZero MLP", model, difference, norms, architecture)


_BY_FAMILY: dict[str, Callable[[PreTrainedConfig], Description]] = {
    "rezero": _language_model,
    "rezero_resnet": _resnet,
    "rezero_mlp": _mlp,
}


def _equation(config: PreTrainedConfig) -> str:
    # Every form's docstring opens with its equation.
    return RESIDUAL_FORMS[config.residual].__doc__.strip().split("`")[1]


def _gate(config: PreTrainedConfig, sharing: str, at_zero: str) -> str:
    """The sentence on the gate: whose it is, and what a layer does while it is 0."""
    if not RESIDUAL_FORMS[config.residual].has_gate:
        return f"It has no gates, as a baseline for [ReZero]({PAPER}) or because they were folded into its weights. "
    text = f"The gate alpha is one number for {sharing}, and starts at {config.gate_init:g}"
    if getattr(config, "output_init_scale", 1) == 0:
        text += f", F at 0: before training each layer {at_zero}"
    elif config.gate_init == 0:
        text += f": before training each layer {at_zero}, and training switches the layers on"
    return f"{text} ([ReZero is All You Need]({PAPER})). "


def _norm_name(config: PreTrainedConfig) -> str:
    return {"layer": "LayerNorm", "rms": "RMSNorm"}[config.norm]


def _present(places: dict[str, bool]) -> list[str]:
    return [place for place, present in places.items() if present]


def _norms(norms: Sequence[str]) -> str:
    return f"Norms: {join(norms)}." if norms else "There is no normalisation layer anywhere."


def _channels(config: PreTrainedConfig) -> str:
    return {1: "grey", 3: "RGB"}.get(config.num_channels, f"{config.num_channels} channels")


def _classes(config: PreTrainedConfig, shown: int = 20) -> str:
    """Their number, and their names if they were given any."""
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    if names == [f"LABEL_{number}" for number in range(len(names))]:
        return str(len(names))
    more = len(names) - shown
    return f"{len(names)}: {', '.join(names[:shown])}" + (f" and {more} more" if more > 0 else "")
