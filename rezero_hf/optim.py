"""Parameter groups that know what a gate is, and the optimisers built on them.

Three kinds of parameters want different treatment: matrices, which may be decayed; vectors (biases, norms, and
embedding rows, whose scale nothing downstream repairs), which may not; and gates, which may not and have their own
learning rate.
"""

import re
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from .errors import UserError


OptimizerName = Literal["adamw", "adagrad", "sgd", "lamb", "muon"]
# What pytorch-optimizer has and torch has not.
FROM_ELSEWHERE = ("lamb", "muon")
IN_A_LAYER = re.compile(r"(^|\.)layers\.\d+\.")


class NamedState(NamedTuple):
    """What an optimiser remembers, by names instead of positions, so that it fits a model with other layers too.

    Attributes:
        parameters: parameter name -> its state.
        steps: group name -> steps taken, of optimisers that count them once for a group (pytorch-optimizer's).
    """

    parameters: dict[str, dict[str, Any]]
    steps: dict[str, int]


def is_gate(name: str) -> bool:
    """Whether a parameter's qualified name is that of a residual gate, alpha, under any wrapper's prefix."""
    return name.rpartition(".")[2] == "alpha"


def gates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every gate of a model: parameter name -> tensor of shape (1,), or (branches,) with one gate per branch."""
    return {name: parameter for name, parameter in model.named_parameters() if is_gate(name)}


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, gate_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: every trainable parameter in exactly one of `matrices`, `vectors`,
    `gates`.

    Args:
        model: any model; embeddings are recognised as `nn.Embedding`, gates by the name `alpha`.
        lr: learning rate of matrices and vectors.
        weight_decay: decay of the matrices. Vectors and gates are never decayed: decay would pull gates towards 0,
            which is a layer switched off, and shrink the embedding, which sets the scale of a stream without norms.
        gate_lr_multiplier: the gates' learning rate is `lr` times this.

    Returns:
        Groups with the keys `name`, `params`, `lr` and `weight_decay`; empty ones are left out.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_gate(name):
            members["gates"].append(parameter)
        elif parameter.ndim >= 2 and id(parameter) not in embeddings:
            members["matrices"].append(parameter)
        else:
            members["vectors"].append(parameter)
    settings = {
        "matrices": {"lr": lr, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        "gates": {"lr": lr * gate_lr_multiplier, "weight_decay": 0.0},
    }
    return [{"name": name, "params": params, **settings[name]} for name, params in members.items() if params]


def check_optimizer(optimizer: str) -> None:
    """Raise a `UserError` unless `make_optimizer` could build an optimiser of that name here."""
    if optimizer not in get_args(OptimizerName):
        raise UserError(f"optimizer={optimizer!r} is unknown; one of {', '.join(get_args(OptimizerName))}.")
    if optimizer in FROM_ELSEWHERE and find_spec("pytorch_optimizer") is None:
        raise UserError(f"optimizer={optimizer!r} needs a package: pip install pytorch-optimizer")


def make_optimizer(
    model: nn.Module,
    optimizer: OptimizerName = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    gate_lr_multiplier: float = 1.0,
    matrix_lr_multiplier: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Build an optimiser over `parameter_groups(model, ...)`.

    Args:
        model: the model to train.
        optimizer: `adamw` (torch's fused one), `lamb` (the paper's for language models; from pytorch-optimizer),
            `adagrad` (the paper's for fully connected nets), `sgd` (the paper's for ResNets) or `muon` (orthogonalised
            updates for the matrices inside the layers, AdamW for everything else; from pytorch-optimizer, with the
            scaling that makes its updates as large as AdamW's, so both share one learning rate). A step of `lamb` is
            `lr` times the parameter's own norm: a gate that has left 0 hardly comes to change its sign.
        lr, weight_decay, gate_lr_multiplier: as in `parameter_groups`.
        matrix_lr_multiplier: with `muon`, the learning rate of the orthogonalised matrices is `lr` times this.
        betas, eps: of the Adam-like update.
        momentum: of `sgd`, default 0.9 (the paper, section 5).

    Raises:
        UserError: unknown `optimizer`; `lamb` and `muon` need the package pytorch-optimizer.
    """
    check_optimizer(optimizer)
    groups = parameter_groups(model, lr, weight_decay, gate_lr_multiplier)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if optimizer == "adagrad":
        return torch.optim.Adagrad(groups, lr=lr)
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)

    from pytorch_optimizer import Lamb, Muon

    if optimizer == "lamb":
        # Else the package divides by 1 - beta1^t what the trust ratio has sized already: a first step of ten times lr.
        return Lamb(groups, lr=lr, betas=betas, eps=eps, adam_debias=True)
    groups = _muon_groups(groups, _outside_layers(model), lr * matrix_lr_multiplier, betas, eps)
    return Muon(groups, lr=lr, use_adjusted_lr=True)


def state_by_name(saved: dict[str, Any], model: nn.Module, optimizer: OptimizerName) -> NamedState:
    """Name what a saved `state_dict()` of an optimiser holds.

    Args:
        saved: of an optimiser that `make_optimizer` built.
        model: of the shape it was built for.
        optimizer: which one it is.

    Raises:
        UserError: it is of another optimiser or another model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, optimizer, lr=1.0).param_groups
    # Schedules and steps leave something in a group that a new one does not have.
    new, old = (
        [(group["name"], len(group["params"]), set(group) - {"initial_lr", "step"}) for group in side]
        for side in (groups, saved["param_groups"])
    )
    if new != old:
        raise UserError(f"the saved optimiser is not {optimizer} over this model: training.optimizer was another one.")
    parameters = {}
    for group, kept in zip(groups, saved["param_groups"], strict=True):
        for parameter, position in zip(group["params"], kept["params"], strict=True):
            state = saved["state"].get(position, {})
            if any(value.shape not in ((), parameter.shape) for value in state.values() if torch.is_tensor(value)):
                raise UserError(f"the saved optimiser is of another model: {names[id(parameter)]} has another shape.")
            parameters[names[id(parameter)]] = state
    return NamedState(parameters, {group["name"]: group["step"] for group in saved["param_groups"] if "step" in group})


def put_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: NamedState) -> None:
    """Give a new optimiser over `model` what is remembered of parameters of the same names; the rest starts fresh.

    Where steps are counted once for a group, the count goes over, and so the parameters without memory are updated
    without Adam's correction for it: their first update is (1 - beta1) / sqrt(1 - beta2) times the learning rate, 3.2
    times with the defaults. A warm-up covers that.

    Raises:
        UserError: nothing is remembered of any parameter of `model`, as where a wrapper has put a prefix before names.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if state.parameters.keys().isdisjoint(names.values()):
        theirs, ours = (next(iter(side), "nothing") for side in (state.parameters, names.values()))
        raise UserError(f"the optimiser's state is of no parameter of this model: of {theirs} there, {ours} here.")
    new = optimizer.state_dict()
    for group, kept in zip(optimizer.param_groups, new["param_groups"], strict=True):
        if group["name"] in state.steps:
            kept["step"] = state.steps[group["name"]]
        for parameter, position in zip(group["params"], kept["params"], strict=True):
            if known := state.parameters.get(names[id(parameter)]):
                new["state"][position] = known
    optimizer.load_state_dict(new)


def _outside_layers(model: nn.Module) -> set[int]:
    """Ids of the parameters of no layer `...layers.N`: heads and stems, matrices by shape, whose rows are a vector per
    word, class or pixel, which Muon does not suit. Of a model that has no layers by that name, nothing.
    """
    named = list(model.named_parameters())
    inside = {id(parameter) for name, parameter in named if IN_A_LAYER.search(name)}
    return {id(parameter) for _, parameter in named} - inside if inside else set()


def _muon_groups(groups, outside: set[int], matrix_lr: float, betas, eps) -> list[dict[str, Any]]:
    adam = {"use_muon": False, "betas": betas, "eps": eps}
    split = []
    for group in groups:
        if group["name"] == "matrices":
            inner = [parameter for parameter in group["params"] if id(parameter) not in outside]
            split.append({**group, "params": inner, "lr": matrix_lr, "use_muon": True})
            outer = [parameter for parameter in group["params"] if id(parameter) in outside]
            split.append({**group, "name": "head", "params": outer, **adam})
        else:
            split.append({**group, **adam})
    return [group for group in split if group["params"]]
