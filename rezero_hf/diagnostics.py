"""Signal propagation: what a network does to its stream and to the gradient, layer by layer (paper, sections 3 and 6).

The stream is x_0 after the embedding or the stem, x_i after layer i, and x_L after the last layer, before a final norm
and the head. Everything here works on any model of this package, fresh or trained, and on a frozen copy of it: no hook,
gradient, mode or statistic of the model itself changes. It costs the memory of one more model in `dtype`.

The copy runs as in evaluation, without dropout. A BatchNorm that has never seen a batch first takes its statistics from
the inputs, because the ones it is made with, mean 0 and variance 1, are those of no network; gradients take them as
constants.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from .assembly import check_plain
from .errors import UserError


# What the models of this package take beside their inputs to give a loss.
LABELS = frozenset({"labels", "shift_labels", "start_positions", "end_positions"})
# Far above what fp64 rounds to beside a singular value of order one, far below any signal that could be learned from.
ZERO = 1e-8
BINS_PER_DECADE, DECADES = 10, 16
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# Rows of the Jacobian that one vectorised backward pass makes; more only take more memory.
ROWS_AT_ONCE = 256


def signal_norms(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Root mean squares of the stream and of its gradient at every layer, and what each layer adds.

    Args:
        model: of this package, with any head or none.
        inputs: what the model is called with. With `labels`, the loss and its gradients are recorded too.
        dtype: of the computation. fp64 by default: an ungated stream some hundred layers deep leaves fp32's range.

    Returns:
        Numbers for a JSON file, None where one is not finite. RMS is over the batch and all features, padding included.

        - `activation`: RMS of x_0 ... x_L.
        - `gradient`: RMS of dloss/dx_0 ... dloss/dx_L, None without labels. The loss is a mean over tokens or images,
          so the level depends on how many there are: compare layers, not batches of different sizes.
        - `loss`: as the model returns it, None without labels.
        - `alpha`: the gates of each layer, a list of lists; None for forms without.
        - `update`: branch name -> one number a layer, RMS(y - x) / RMS(x) where the residual form makes y of x. For
          ReZero this is RMS(alpha F(x)) / RMS(x): near 0, the layer is hardly used.
        - `size`: entries of one input's x_L and x_0, rows and columns of its Jacobian.

    Raises:
        UserError: the model is not one of this package's.
    """
    copied, inputs = _frozen_copy(model, inputs, dtype)
    return _norms(copied, inputs)


def updates(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[dict[str, list]]:
    """`update` of `signal_norms` in fp32 for each of several batches without labels, by one copy of the model."""
    copied = None
    for batch in batches:
        if copied is None:
            copied, _ = _frozen_copy(model, batch, torch.float)
        yield _norms(copied, _placed(batch, copied))["update"]


def _norms(copied: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    layers = copied.base_model.layers
    streams: list[torch.Tensor] = []
    update: dict[str, list[float | None]] = {}

    def enter(_, args):
        streams.append(args[0].detach().requires_grad_())
        return (streams[0], *args[1:])

    def join(_, args, kwargs, y):
        update.setdefault(kwargs["branch"], []).append(_number(_rms(y - args[0]) / _rms(args[0])))

    with ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(enter))
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda _layer, _args, x: streams.append(x)))
            hooks.enter_context(layer.residual_norm.register_forward_hook(join, with_kwargs=True))
        # Without a loss there is nothing to keep activations for.
        with torch.set_grad_enabled(not LABELS.isdisjoint(inputs)), sdpa_kernel(SDPBackend.MATH):
            loss = getattr(copied(**inputs), "loss", None)
            gradients = None if loss is None else torch.autograd.grad(loss, streams)
    return {
        "activation": [_number(_rms(x)) for x in streams],
        "gradient": None if loss is None else [_number(_rms(gradient)) for gradient in gradients],
        "loss": None if loss is None else _number(loss.detach()),
        "alpha": [_gates(layer) for layer in layers] if layers[0].residual_norm.has_gate else None,
        "update": update,
        "size": [streams[-1][0].numel(), streams[0][0].numel()],
    }


@dataclass(frozen=True)
class JacobianSpectrum:
    """Singular values of the input-output Jacobian dx_L / dx_0.

    Attributes:
        singular_values: (inputs, min(rows, columns)), fp64, falling; NaN for an input whose Jacobian is not finite.
        size: rows (entries of x_L) and columns (entries of x_0) of one input's Jacobian. They differ where a residual
            network for images changes the stream's shape.
    """

    singular_values: torch.Tensor
    size: tuple[int, int]

    @property
    def chi(self) -> float:
        """The mean squared singular value, |J|_F^2 / columns: by how much a small change of x_0 grows, squared."""
        return (self.singular_values.square().sum(-1) / self.size[1]).mean().item()

    def share_below(self, threshold: float = ZERO) -> float:
        """The share of singular values under a threshold: directions of x_0 that do not reach x_L."""
        if self.singular_values.isnan().any():
            return math.nan
        return (self.singular_values < threshold).double().mean().item()

    def record(self) -> dict[str, Any]:
        """The spectrum in a few numbers for a JSON file, over all inputs; None where one is not finite.

        `share_zero` is the share below 1e-8. `resolution` is what fp64 tells from 0 beside the largest value: smaller
        values are rounding errors. `histogram` counts log10 of the values, rounded to a tenth, where everything from
        -16 down (0 included) and from 16 up counts as that.
        """
        values = self.singular_values.flatten()
        limit = DECADES * BINS_PER_DECADE
        bins = (values[~values.isnan()].log10() * BINS_PER_DECADE).round().clamp(-limit, limit)
        centres, counts = bins.unique(return_counts=True)
        return {
            "method": "exact",
            "inputs": len(self.singular_values),
            "chi": _number(self.chi),
            "share_zero": _number(self.share_below()),
            "resolution": _number(values.max() * max(self.size) * torch.finfo(values.dtype).eps),
            "quantiles": {f"{q:g}": _number(np.quantile(values.numpy(), q)) for q in QUANTILES},
            "histogram": {"log10": (centres / BINS_PER_DECADE).tolist(), "counts": counts.tolist()},
        }


def zeros_are_resolved(jacobian: Mapping[str, Any]) -> bool:
    """Whether the `share_zero` of a `JacobianSpectrum.record` counts zeros, and not rounding errors of the largest."""
    resolution = jacobian.get("resolution")
    return resolution is not None and resolution <= ZERO


def input_output_jacobian(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], max_size: int = 4096
) -> JacobianSpectrum:
    """All singular values of dx_L / dx_0, exact and in fp64, for each input by itself (paper, section 6).

    One input's Jacobian has tokens * hidden_size rows and columns in a language model, hidden_size in a fully connected
    net. N of them are N backward passes, vectorised, and 8 N^2 bytes; three times that while the singular values are
    computed. One input comes after the other.

    Args:
        model: of this package, with any head or none.
        inputs: what the model is called with; every tensor has the inputs along its first dimension.
        max_size: refuse a Jacobian with more rows or columns. 4096 is 128 MiB and about a minute an input on one core.

    Raises:
        UserError: the Jacobian is larger, or the model is not one of this package's.
    """
    copied, inputs = _frozen_copy(model, inputs, torch.float64)
    spectra = []
    for index in range(len(next(iter(inputs.values())))):
        x, after_last = _stream_map(copied, {name: value[index : index + 1] for name, value in inputs.items()})
        # The plain formula of attention is the one that can be vectorised.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                rows, columns = after_last(x).numel(), x.numel()
            if max(rows, columns) > max_size:
                raise UserError(
                    f"the Jacobian of one input is {rows} x {columns} and takes {8 * rows * columns / 2**30:.1f} GiB, "
                    f"beyond max_size={max_size}: shorten the inputs, raise max_size, or use estimate_chi."
                )
            jacobian = torch.func.jacrev(after_last, chunk_size=ROWS_AT_ONCE)(x).reshape(rows, columns)
        finite = bool(jacobian.isfinite().all())
        spectra.append(torch.linalg.svdvals(jacobian if finite else torch.zeros_like(jacobian)).cpu())
        if not finite:
            spectra[-1].fill_(math.nan)
    return JacobianSpectrum(torch.stack(spectra), (rows, columns))


def estimate_chi(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    probes: int = 100,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[float, float]:
    """The mean squared singular value of dx_L / dx_0 for networks of any size, by Hutchinson's estimator.

    E |J^T u|^2 = |J|_F^2 for u of random signs: one backward pass a probe, for all inputs at once. Where J J^T is
    diagonal, as for the identity, there is no error.

    Args:
        model, inputs: as for `input_output_jacobian`.
        probes: how many u; the error falls with their square root.
        dtype: of the computation.
        seed: of the probes, which come from a generator of their own.

    Returns:
        chi and its standard error over the probes; the inputs are taken as given.

    Raises:
        UserError: fewer than two probes, or the model is not one of this package's.
    """
    if probes < 2:
        raise UserError(f"probes={probes}: a standard error needs at least 2.")
    copied, inputs = _frozen_copy(model, inputs, dtype)
    x, after_last = _stream_map(copied, inputs)
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        y = after_last(x.requires_grad_())
        for _ in range(probes):
            signs = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
            (pulled,) = torch.autograd.grad(y, x, signs, retain_graph=True)
            estimates.append(pulled.double().square().sum().item() / x.numel())
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / math.sqrt(probes))


def signal_record(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], max_size: int = 4096) -> dict[str, Any]:
    """Everything about a network's signal that the figures draw, for a JSON file of some kilobytes.

    Args:
        model, inputs: as for `signal_norms`.
        max_size: of networks with a larger Jacobian, only the mean squared singular value is estimated.

    Returns:
        `norms` as from `signal_norms`, and `jacobian` as from `JacobianSpectrum.record`; or, with `"method":
        "hutchinson"`, only `inputs`, `chi` and its `standard_error`.

    Raises:
        UserError: the model is not one of this package's.
    """
    norms = signal_norms(model, inputs)
    if max(norms["size"]) <= max_size:
        return {"norms": norms, "jacobian": input_output_jacobian(model, inputs, max_size).record()}
    chi, error = estimate_chi(model, inputs)
    jacobian = {"method": "hutchinson", "inputs": len(next(iter(inputs.values()))), "chi": _number(chi)}
    return {"norms": norms, "jacobian": {**jacobian, "standard_error": _number(error)}}


def _frozen_copy(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    check_plain(model)
    copied = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    copied.config.use_cache = False
    if copied._supports_sdpa:
        # Flash and flex kernels know no fp64, and the eager formula takes its softmax in fp32.
        copied.set_attn_implementation("sdpa")
    inputs = _placed(inputs, copied)
    fresh = [m for m in copied.modules() if isinstance(m, nn.BatchNorm2d) and not m.num_batches_tracked]
    if fresh:
        for norm in fresh:
            # Forget what was there: the running statistics become those of this one batch.
            norm.train().momentum = 1.0
        with torch.no_grad():
            copied(**inputs)
        copied.eval()
    return copied, inputs


def _placed(inputs: Mapping[str, torch.Tensor], copied: PreTrainedModel) -> dict[str, torch.Tensor]:
    """On the copy's device, and of its type where they are not whole numbers."""
    return {
        name: value.to(copied.device, copied.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _stream_map(
    copied: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """x_0, and the function that makes x_L of it: all layers, called as the model calls them for these inputs."""
    layers, calls = copied.base_model.layers, []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        copied(**inputs)
    for hook in hooks:
        hook.remove()
    ((x_0, *_), _), *_ = calls
    others = [(args[1:], kwargs) for args, kwargs in calls]
    # Each holds a layer's input, of no use any more.
    calls.clear()

    def after_last(x: torch.Tensor) -> torch.Tensor:
        for layer, (args, kwargs) in zip(layers, others, strict=True):
            x = layer(x, *args, **kwargs)
        return x

    return x_0.detach(), after_last


def _gates(layer: nn.Module) -> list[float]:
    return layer.residual_norm.alpha.tolist()


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().square().mean().sqrt()


def _number(value: float | torch.Tensor) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
