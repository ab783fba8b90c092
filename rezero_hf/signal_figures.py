"""Pictures of signal propagation, drawn from records of `diagnostics.signal_record` and from a `ToyLandscape`."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .diagnostics import ZERO, zeros_are_resolved
from .errors import UserError
from .figures import BLUE, GREY, STYLE, VERMILION, new_figure, save
from .toy_model import ToyLandscape


# What decades of a spectrum are drawn: at the left everything that is lost, at the right everything that has exploded.
SPECTRUM_DECADES = (round(math.log10(ZERO)), 4)
NORM_DECADES = (-10, 10)
# Of the histogram, in decades: a whole number of the tenths that records count.
BAR_WIDTH = 0.5


def norm_curves(records: Mapping[str, dict], path: str | Path) -> Path:
    """Draw RMS of stream and gradient against the layer, one panel a network, each relative to where it enters.

    The stream enters at layer 0 and the gradient after the last layer, so a network that passes both on is two lines
    at 1, an explosion of gradients a line that falls from the left. Twenty decades are shown at the most; a line ends
    where its values are not finite or are 0.

    Args:
        records: title -> `signal_record` with gradients, in the order of the panels.
        path: the PNG to write; its folder is made if needed.

    Returns:
        The path written.

    Raises:
        UserError: no records, or one without gradients.
    """
    from matplotlib.ticker import NullLocator

    _check(records)
    for title, record in records.items():
        if record["norms"]["gradient"] is None:
            raise UserError(f"the record of {title!r} has no gradients: make it from inputs with labels.")
    figure, panels = _grid(len(records), height=2.0)
    for axes, (title, record) in zip(panels, records.items(), strict=True):
        stream = _relative(record["norms"]["activation"], to=0)
        gradient = _relative(record["norms"]["gradient"], to=-1)
        axes.axhline(1, color="#BBBBBB", linewidth=0.8)
        # Dashed and on top, because in a perfect network one line hides the other.
        axes.plot(np.arange(len(stream)), stream, color=BLUE, linewidth=2.4, label="stream")
        axes.plot(np.arange(len(gradient)), gradient, color=VERMILION, linewidth=1.8, linestyle="--", label="gradient")
        axes.set_title(_wrapped(title, 20))
        axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.set_xlim(0, max(len(record["norms"]["activation"]) for record in records.values()) - 1)
    axes.set_yscale("log")
    low, high = np.clip(np.log10(axes.get_ylim()), *NORM_DECADES)
    axes.set_ylim(10.0 ** math.floor(low), 10.0 ** math.ceil(high))
    axes.yaxis.set_minor_locator(NullLocator())
    panels[0].legend(frameon=False, loc="best")
    figure.supxlabel("layers passed (0 is the embedding or the stem)", fontsize=STYLE["axes.labelsize"])
    figure.supylabel("RMS, relative to where it enters", fontsize=STYLE["axes.labelsize"])
    return save(figure, path)


def singular_value_histograms(records: Mapping[str, Mapping[int, dict]], path: str | Path) -> Path:
    """Draw the spectra of input-output Jacobians: a row for each form, a column for each depth.

    Each panel says chi, the mean squared singular value. Values below 1e-8 are lost: the vermilion bar at the left,
    grey where fp64 cannot tell them from 0 beside the largest. Those above 1e4 count in the last bar.

    Args:
        records: form -> depth -> `signal_record` with an exact Jacobian. Of a missing depth, as where a run diverged,
            the panel says "none". A depth of 0 is that of networks that were not told apart by theirs, and not shown.
        path: the PNG to write; its folder is made if needed.

    Returns:
        The path written.

    Raises:
        UserError: no records, or one whose Jacobian was only estimated.
    """
    _check(records)
    depths = sorted({depth for row in records.values() for depth in row})
    figure, panels = new_figure(1.0 + 0.85 * len(records), columns=len(depths), rows=len(records))
    panels = np.reshape(panels, (len(records), len(depths)))
    for row, (form, of_depth) in enumerate(records.items()):
        for column, depth in enumerate(depths):
            axes = panels[row, column]
            if row == 0 and depth:
                axes.set_title(f"{depth} layers")
            if column == 0:
                axes.set_ylabel(_wrapped(form, 18), rotation=0, ha="right", va="center")
            if depth in of_depth:
                _histogram(axes, of_depth[depth]["jacobian"], f"{form}, {depth} layers")
            else:
                axes.text(0.5, 0.5, "none", color=GREY, transform=axes.transAxes, ha="center", va="center", fontsize=9)
    low, high = SPECTRUM_DECADES
    axes.set_xlim(low - 1, high + BAR_WIDTH)
    axes.set_xticks(range(low, high + 1, 4), [f"$10^{{{decade}}}$" for decade in range(low, high + 1, 4)])
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 1])
    figure.supxlabel("singular value of the input-output Jacobian", fontsize=STYLE["axes.labelsize"])
    figure.supylabel("share of all singular values", fontsize=STYLE["axes.labelsize"])
    return save(figure, path)


def toy_contours(landscape: ToyLandscape, path: str | Path) -> Path:
    """Draw the cost of the toy model over (alpha, w), with the paths of gradient descent from their starts.

    Args:
        landscape: as `toy_landscape` returns it. Paths from alpha = 0 are solid, all others dashed.
        path: the PNG to write; its folder is made if needed.

    Returns:
        The path written.
    """
    from matplotlib.lines import Line2D

    figure, axes = new_figure(5.2)
    # The valley's floor is a curve of cost 0, which has no logarithm.
    log_cost = np.log10(np.maximum(landscape.cost, 1))
    levels = np.arange(max(math.ceil(log_cost.max()), 1) + 1)
    filled = axes.contourf(landscape.alpha, landscape.w, log_cost, levels=levels, cmap="Greys", alpha=0.8)
    axes.contour(landscape.alpha, landscape.w, log_cost, levels=levels, colors="white", linewidths=0.5)
    for way in landscape.paths:
        gated = way[0, 0] == 0
        colour = BLUE if gated else VERMILION
        axes.plot(*way.T, color=colour, linewidth=2, linestyle="-" if gated else "--")
        axes.plot(*way[0], color=colour, marker="o", markersize=6, markeredgecolor="white", linestyle="none")
        if _inside(landscape, way[-1]):
            axes.plot(*way[-1], color=colour, marker="*", markersize=13, markeredgecolor="white", linestyle="none")
    axes.set_xlim(landscape.alpha[[0, -1]])
    axes.set_ylim(landscape.w[[0, -1]])
    axes.set_xlabel("gate alpha")
    axes.set_ylabel("weight w")
    axes.set_title(f"{landscape.depth} layers, one learning rate of {landscape.learning_rate:g}")
    bar = figure.colorbar(filled, ax=axes, pad=0.02, aspect=28)
    bar.set_label("cost")
    bar.set_ticks(levels[::2], labels=[f"$10^{{{level}}}$" for level in levels[::2]])
    bar.outline.set_edgecolor(GREY)
    elsewhere = {float(way[0, 0]) for way in landscape.paths} - {0.0}
    others = f"from alpha = {elsewhere.pop():g}" if len(elsewhere) == 1 else "from elsewhere"
    handles = [
        Line2D([], [], color=BLUE, linewidth=2, label="from alpha = 0"),
        Line2D([], [], color=VERMILION, linewidth=2, linestyle="--", label=others),
        Line2D([], [], color=GREY, marker="o", linestyle="none", label="start"),
        Line2D([], [], color=GREY, marker="*", markersize=11, linestyle="none", label="end"),
    ]
    axes.legend(handles=handles, loc="upper right")
    return save(figure, path)


def _check(records: Mapping) -> None:
    if not records:
        raise UserError("no records of a signal: nothing to draw.")


def _grid(count: int, height: float):
    """Panels in as few rows of up to four as there must be, the unused ones taken away."""
    rows = -(-count // 4)
    columns = -(-count // rows)
    figure, panels = new_figure(1.2 + height * rows, columns=columns, rows=rows)
    panels = np.ravel(panels)
    for unused in panels[count:]:
        unused.remove()
    for above in panels[count - columns : count]:
        above.tick_params(labelbottom=True)
    return figure, panels[:count]


def _wrapped(name: str, width: int) -> str:
    """A network's name in lines that leave its panel, or the panels beside it, their room."""
    return textwrap.fill(name, width, break_long_words=False, break_on_hyphens=False)


def _relative(values: Sequence[float | None], to: int) -> np.ndarray:
    numbers = np.array([math.nan if value is None else value for value in values])
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = numbers / numbers[to]
    relative[~(relative > 0)] = math.nan
    return relative


def _histogram(axes, jacobian: dict, title: str) -> None:
    if jacobian["method"] != "exact":
        raise UserError(
            f"the record of {title} has no spectrum, only an estimated chi: make it with a larger max_size."
        )
    low, high = SPECTRUM_DECADES
    log10, counts = (np.array(jacobian["histogram"][name]) for name in ("log10", "counts"))
    share = counts / counts.sum()
    zero = log10 < math.log10(ZERO)
    # The recorded share and not the bins': those are rounded, and tables show this one.
    lost, resolved = jacobian["share_zero"] or 0.0, zeros_are_resolved(jacobian)
    axes.bar(low - 0.75, lost, width=BAR_WIDTH, color=VERMILION if resolved else "#BBBBBB")
    shown = (np.clip(log10[~zero], low, high) / BAR_WIDTH).round() * BAR_WIDTH
    axes.hist(shown, np.arange(low - BAR_WIDTH / 2, high + BAR_WIDTH, BAR_WIDTH), weights=share[~zero], color=BLUE)
    chi = "not finite" if jacobian["chi"] is None else _short(jacobian["chi"])
    words = {"transform": axes.transAxes, "va": "top", "fontsize": 9}
    axes.text(0.06, 0.97, f"$\\chi$ = {chi}", **words)
    if not resolved:
        axes.text(0.06, 0.74, "zeros not resolved", color=GREY, **words)
    elif lost > 0:
        axes.text(0.06, 0.74, f"{100 * lost:.{0 if lost > 0.1 else 1}f} % lost", color=VERMILION, **words)


def _short(value: float) -> str:
    """Three digits, or a power of ten with two."""
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"${mantissa}\\cdot10^{{{int(exponent)}}}$"


def _inside(landscape: ToyLandscape, point: np.ndarray) -> bool:
    return bool(landscape.alpha[0] <= point[0] <= landscape.alpha[-1] and landscape.w[0] <= point[1] <= landscape.w[-1])
