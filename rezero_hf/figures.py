"""Every plot of a training run, drawn from recorded rows and from nothing else.

The pictures end up in model cards, which show them about 800 pixels wide, often on a small screen: few words, large
type, colours that survive colour blindness and a grey printer. Matplotlib is imported where it is used and without its
global state, so that drawing at the end of a run touches no backend, no display and no other figure.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np


# Okabe and Ito's colour-blind-safe set.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#555555"
TICK_STEPS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
# What a loss curve can show, and what it is called on the axis.
MEASURES = {"bits_per_byte": "bits per byte", "loss": "loss (nats)"}

STYLE = {
    "font.size": 11,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "axes.edgecolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
}


def gate_history(metrics: Sequence[dict]) -> tuple[np.ndarray, np.ndarray] | None:
    """Collect every recorded gate: what the gate figure shows and the model card sums up.

    Args:
        metrics: Rows as `read_metrics` returns them.

    Returns:
        `(steps, alpha)`, `steps` of shape (evaluations,) and `alpha` of shape (layers, evaluations, gates per layer),
        layers counted from the input; NaN where an evaluation did not record a layer. None when no row has gates.
    """
    rows = [row for row in _rows(metrics, "eval") if row.get("alpha")]
    if not rows:
        return None
    names = sorted({name for row in rows for name in row["alpha"]}, key=natural)
    width = max(len(values) for row in rows for values in row["alpha"].values())
    alpha = np.full((len(names), len(rows), width), np.nan)
    for column, row in enumerate(rows):
        for layer, name in enumerate(names):
            values = row["alpha"].get(name, [])
            alpha[layer, column, : len(values)] = values
    return np.array([row["step"] for row in rows]), alpha


def loss_curve(metrics: Sequence[dict], path: str | Path, measure: str = "bits_per_byte") -> Path:
    """Draw training and validation loss against the step, with the tokens seen, if any, along the top.

    Values that are not finite are left out of the curves and the first such step is marked as the divergence it is.

    Args:
        metrics: Rows as `read_metrics` returns them. Of a step recorded twice (a resumed run) the last
            record counts.
        path: The PNG to write; its folder is made if needed.
        measure: One of `MEASURES`: bits per byte (default) compares texts, `loss` is what image classifiers have.

    Returns:
        The path written.

    Raises:
        ValueError: No row has a finite value of the measure.
    """
    training, validation = (
        [row for row in _rows(metrics, event) if row.get(measure) is not None] for event in ("train", "eval")
    )
    validation = [row for row in validation if row.get("split", "validation") == "validation"]
    finite = [row for row in training + validation if math.isfinite(row[measure])]
    if not finite:
        raise ValueError(f"metrics hold no finite {measure} in any train or validation row: no loss curve to draw")

    figure, axes = new_figure(4.6)
    steps, values = _series(training, measure)
    if len(steps):
        # A handful of rows needs no smoothing, and a line through their mean would hide them.
        reach = len(steps) // 50
        if reach:
            axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(values, reach), color=BLUE, linewidth=1.8, label="training, smoothed")
        else:
            axes.plot(steps, values, color=BLUE, linewidth=1.8, label="training")
    steps, values = _series(validation, measure)
    if len(steps):
        # Points, because nothing was measured between them.
        axes.plot(steps, values, color=VERMILION, linestyle="none", marker="o", markersize=5, label="validation")
        axes.annotate(
            f"{values[-1]:.3f}",
            (steps[-1], values[-1]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=VERMILION,
            fontweight="bold",
            annotation_clip=False,
        )
    broken = [row["step"] for row in training + validation if not math.isfinite(row[measure])]
    if broken:
        axes.axvline(min(broken), color="black", linewidth=1, linestyle=":")
        label = f"not finite from step {min(broken)}"
        axes.text(min(broken), 0.5, label, transform=axes.get_xaxis_transform(), rotation=90, ha="right", va="center")

    log_ticks(axes, [row[measure] for row in finite])
    axes.set_xlabel("step")
    axes.set_ylabel(MEASURES[measure])
    axes.xaxis.set_major_locator(whole_ticks(8))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", frameon=False)
    _tokens_axis(axes, training)
    return save(figure, path)


def gate_map(metrics: Sequence[dict], path: str | Path) -> Path:
    """Draw every gate alpha as a heat map, layer against step, the input at the bottom.

    Models with two gates a layer (`gate_sharing="sublayer"`) get two panels on one colour scale, attention and FFN.

    Args:
        metrics: Rows as `read_metrics` returns them.
        path: The PNG to write; its folder is made if needed.

    Returns:
        The path written.

    Raises:
        ValueError: No evaluation row has gates: the model has none (see `gate_history` to ask first).
    """
    history = gate_history(metrics)
    if history is None:
        raise ValueError("metrics hold no gate values (alpha) in any eval row: a model without gates has no gate map")
    steps, alpha = history
    layers, _, panels = alpha.shape
    titles = ("attention", "FFN") if panels == 2 else ("",) * panels

    figure, axes = new_figure(min(6.4, 3.6 + layers / 24), panels)
    # One symmetric scale, so that white is a branch switched off and the two signs compare.
    limit = np.abs(alpha).max(initial=0.0, where=np.isfinite(alpha)) or 1.0
    edges = _edges(steps)
    for panel, (ax, title) in enumerate(zip(axes if panels > 1 else [axes], titles, strict=True)):
        shown = np.ma.masked_invalid(alpha[:, :, panel])
        image = ax.pcolormesh(
            edges, np.arange(layers + 1) - 0.5, shown, cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True
        )
        ax.set_facecolor("#BBBBBB")
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(whole_ticks(5 if panels > 1 else 8, within=steps))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_locator(whole_ticks(12, [1, 2, 4, 5, 8, 10], within=np.arange(layers)))
        ax.tick_params(length=3)
    first = axes[0] if panels > 1 else axes
    first.set_ylabel("layer (0 is nearest the input)")
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=28)
    bar.set_label("gate alpha")
    bar.outline.set_edgecolor(GREY)
    # The scale stays symmetric; the bar shows the part of it that the gates use.
    used = alpha[np.isfinite(alpha)]
    if used.any():
        bar.ax.set_ylim(min(used.min(), 0.0), max(used.max(), 0.0))
    return save(figure, path)


def _rows(metrics: Sequence[dict], event: str) -> list[dict]:
    """The rows of one event in step order, the last written of each (step, split)."""
    chosen = {
        (row["step"], row.get("split", "")): row for row in metrics if row.get("event") == event and "step" in row
    }
    return [chosen[key] for key in sorted(chosen)]


def natural(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _series(rows: list[dict], measure: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[measure]) for row in rows if math.isfinite(row[measure])]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over up to `reach` rows to each side: centred, so that a falling curve is not drawn late."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    # Never further ahead than back: the first rows, which fall fastest, would be drawn too low.
    reach = np.minimum(index, reach)
    last = np.minimum(index + reach + 1, len(values))
    return (total[last] - total[index - reach]) / (last - index + reach)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Cell borders half-way between evaluations, which need not be equally spaced."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def new_figure(height: float, columns: int = 1, rows: int = 1, sharex: bool = True):
    """A figure 8 inches wide without pyplot, and its axes (an array of them for several panels) on common scales.

    Panels whose horizontal axes are of different kinds say `sharex=False`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, sharex=sharex, sharey=True)


def save(figure, path: str | Path) -> Path:
    """Write a figure as PNG, in a folder made if needed; the same figure gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Twice the size at which a card shows it, for screens with small pixels.
    figure.savefig(path, format="png", dpi=200, metadata={"Software": None})
    return path


def whole_ticks(count: int, multiples: Sequence[int] = (1, 2, 5, 10), within: np.ndarray | None = None):
    """About `count` ticks at whole numbers; `within` is what was recorded, when that may be one single value."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    if within is not None and len(within) == 1:
        return FixedLocator(within)
    return MaxNLocator(count, steps=multiples, integer=True)


def _short(value: float, _position: int | None = None) -> str:
    """12000 -> 12k, 3500000 -> 3.5M: short enough for an axis."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{suffix}"
    return f"{value:g}"


def log_ticks(axes, values: list[float]) -> None:
    """A logarithmic axis, on which the long tail of training stays visible, with plain numbers on it."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if low <= 0:
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.06, max(high * 1.04, low * 1.2))
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    # Over several powers of ten the fine steps would run into each other.
    steps = TICK_STEPS if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    if sum(low <= tick <= high for tick in ticks) < 3:
        # Within so small a range round numbers are evenly spaced.
        ticks = MaxNLocator(6).tick_values(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _tokens_axis(axes, training: list[dict]) -> None:
    """Tokens seen along the top, when a step has always cost about the same number of them."""
    pairs = [(row["step"], row["tokens"]) for row in training if row.get("tokens") and row["step"] > 0]
    if not pairs:
        return
    per_step = np.array([tokens / step for step, tokens in pairs])
    rate = per_step[-1]
    if np.abs(per_step / rate - 1).max() > 0.02:
        return
    top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda tokens: tokens / rate))
    top.set_xlabel("tokens seen", color=GREY)
    top.xaxis.set_major_formatter(_short)
    top.tick_params(color=GREY, labelcolor=GREY)
    top.spines["top"].set_color(GREY)
