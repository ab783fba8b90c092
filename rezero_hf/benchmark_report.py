"""A benchmark's result as a table, a page and a picture, made from its recorded costs. Losses are shown like wins."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from .benchmark_arms import REFERENCE
from .benchmarks import MEASURES
from .figures import GREY, new_figure, save
from .markdown import join
from .markdown import table as markdown_table
from .runs import commit_name
from .study_figures import COLOURS
from .study_results import result_name
from .turns import Spread, ratios, sign_test


CARD = """# Speed and memory, beside other libraries

Every arm has a process of its own, in which it and ReZero as shipped take turns, one repeat each. "ReZero relative
to it" is the median of the ratios of such pairs and their quartiles: above 1 ReZero is faster or smaller, below 1
slower or larger; ReZero beside itself shows what is noise. It is "ahead" or "behind" where the median is more than 0.01
from 1 and a sign test finds the ratios on that side (5 %, each line by itself), "even" within 0.01, else "not told
apart": the repeats disagree. {sizes}

Beside rates stands the share of what the same machine reached in the same turns: `torch.mm` of the step's shapes for
training and prefill (attention's operations counted at that rate), the model's matrices times a vector a token and
nothing else for decode, and these matrices read once a token at memory bandwidth; more than 100 % of that means that
weights stay in a cache from one token to the next. Training includes the update (fused AdamW) and, in bf16, is autocast
from fp32 weights; generation has bf16 weights. Decode is `generate` of {new_tokens} tokens after the first (half as
many at batch 8), from a prompt of {prompt}. Peak memory is that of tensors: parameters, optimiser state, and the most
that a step allocates beside them. Imports, each in a fresh Python, take turns all together.

{arms}

{tables}
![how many times as good as each peer ReZero is](figures/benchmark.png)

{how}

Made from `model_cards/results/{source}` by `scripts/report.py`, like every number here.
"""
SIZES = (
    "Width {hidden_size}, {heads} heads, {vocab_size} tokens of vocabulary; training has {training_layers} layers and "
    "{batch} sequences of {context} tokens, prefill one of them, generation {generation_layers} layers."
)
NONE = "No measurement is committed yet."
LEGEND = (
    "Relative to the best peer: above 1 ReZero is faster or smaller, below 1 slower or larger. It is the median of "
    "paired measurements, so it can differ from the ratio of the two columns, with the quartiles in brackets. Shares "
    "of a limit are of ReZero beside itself."
)
TICKS = (0.1, 0.2, 0.35, 0.6, 0.8, 1, 1.25, 1.6, 3, 5, 10)


def advantage(row: dict[str, Any]) -> Spread:
    """How many times as fast, or as small, the reference was as the arm."""
    return Spread.of(_ratios(row))


def value(row: dict[str, Any], who: str = "arm") -> float:
    """The median of `arm` or `reference` in the measure's unit."""
    cost = median(row["costs"][who])
    return row["tokens"] / cost if row["tokens"] else cost * {"ms": 1e3, "MB": 1e-6}[MEASURES[row["measure"]].unit]


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Limit -> the share of it that the arm reached; with MFU where the device's peak is known."""
    found = {limit: median(ratios(costs, row["costs"]["arm"])) for limit, costs in row["limits"].items()}
    if row["flops"] and row["peak_flops"]:
        found["peak (MFU)"] = row["flops"] / median(row["costs"]["arm"]) / row["peak_flops"]
    return found


def verdict(row: dict[str, Any]) -> str:
    """Whether the reference is `ahead`, `behind`, or `even`, within 0.01; `not told apart` where it may be chance.

    What is the same every time needs no test.
    """
    found = _ratios(row)
    middle = median(found)
    if abs(middle - 1) <= 0.01:
        return "even"
    if not MEASURES[row["measure"]].once and sign_test(found) > 0.05:
        return "not told apart"
    return "ahead" if middle > 1 else "behind"


def disturbed(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons in which ReZero took 1.5 times as long as beside most arms: others used the machine meanwhile.

    Not those in which it was as much faster: what others take from a machine comes in pieces and falls on some repeats.
    """
    found = []
    for rows in _grouped(result).values():
        usual = median(median(row["costs"]["reference"]) for row in rows)
        found += [row for row in rows if median(row["costs"]["reference"]) > 1.5 * usual]
    return found


def benchmark_table(result: dict[str, Any]) -> str | None:
    """A line a measure and mode: the peer that comes out best, ReZero beside it, and ReZero's share of the limits."""
    peers = {arm["name"] for arm in result["arms"] if arm["peer"]}
    lines = []
    for rows in _grouped(result).values():
        ours = next((row for row in rows if row["arm"] == REFERENCE.name), None)
        best = min((row for row in rows if row["arm"] in peers), key=lambda row: advantage(row).median, default=None)
        if best is not None:
            reached = _shares(ours) if ours else ""
            peer = f"{best['arm']}: {_number(best)}"
            lines.append([*_what(best), _number(best, "reference"), reached, peer, *_compared(best)])
    header = ("measure", "precision", "ReZero", "of the limit", "best peer", "relative to it", "ReZero is")
    return markdown_table(header, lines)


def relatives_table(result: dict[str, Any]) -> str | None:
    """How many times as many tokens what is no peer writes as ReZero as shipped; no number where it may be chance."""
    columns = [key for key in _grouped(result) if key[0].startswith("decode")]
    found = {(row["arm"], row["measure"], row["mode"]): row for row in result["comparisons"]}
    lines = []
    for arm in result["arms"]:
        rows = [found.get((arm["name"], *key)) for key in columns]
        if not arm["peer"] and arm["name"] != REFERENCE.name and any(rows):
            lines.append([f"{arm['name']}: {arm['words']}", *(_gain(row) if row else "" for row in rows)])
    labels = [f"{MEASURES[name].label.removeprefix('decode, ')}, {mode}" for name, mode in columns]
    header = ["speed of generation, relative to ReZero as shipped", *labels]
    return markdown_table(header, lines) if lines else None


def benchmark_section(results: Iterable[dict[str, Any]]) -> str:
    """What the README shows: every committed benchmark's table and picture."""
    parts = []
    for result in results:
        page = f"model_cards/{result_name(result)}"
        parts += [
            f"[{result['device']}]({page}/README.md), {result['threads']} threads:",
            benchmark_table(result),
            LEGEND,
            relatives_table(result),
            f"![how many times as good as each peer ReZero is]({page}/figures/benchmark.png)",
        ]
    return "\n\n".join(part for part in parts if part) or NONE


def benchmark_card(result: dict[str, Any]) -> str:
    """A page on one benchmark: every arm in every measure."""
    header = ("arm", "precision", "measured", "of the limit", "ReZero relative to it", "ReZero is", "repeats")
    tables = ""
    for name, measure in MEASURES.items():
        rows = [row for row in result["comparisons"] if row["measure"] == name]
        lines = [
            [row["arm"], row["mode"], _number(row), _shares(row), *_compared(row), str(len(row["costs"]["arm"]))]
            for row in rows
        ]
        tables += f"## {measure.label}, {measure.unit}\n\n{markdown_table(header, lines)}\n\n" if lines else ""
    arms = [
        [arm["name"], arm["words"], arm["package"], *(f"{count:,}" for count in arm["parameters"].values())]
        for arm in result["arms"]
    ]
    git = result["git"]
    facts = {
        "command": f"`{result['command']}`",
        "device": result["device"],
        "threads": str(result["threads"]),
        "took": f"{result['seconds'] / 60:.0f} minutes",
        "versions": join(f"{package} {version}" for package, version in result["versions"].items()),
        "commit": commit_name(git),
    }
    if result.get("again"):
        again = [
            f"{row['measure']} {row['mode']} beside {row['arm']} ({commit_name(row['git'])})" for row in result["again"]
        ]
        facts["measured once more, the machine having been busy"] = join(again)
    return CARD.format(
        **result["sizes"],
        sizes=SIZES.format(**result["sizes"]),
        arms=markdown_table(("arm", "what it is", "package", "parameters, training", "generation"), arms),
        tables=tables,
        how=markdown_table(("how it was made", ""), facts),
        source=f"{result_name(result)}.json",
    )


def benchmark_figure(result: dict[str, Any], path: str | Path) -> Path:
    """How many times as good as each peer ReZero is: a dot the median, a bar the quartiles; 1 is equal.

    The grey bar is ReZero beside itself. Whatever its size, a ratio is drawn to the same logarithmic scale, so being
    half as fast is as far from 1 as being twice as fast.
    """
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    groups = _grouped(result)
    peers = [arm["name"] for arm in result["arms"] if arm["peer"]]
    columns = list(dict.fromkeys(mode for _, mode in groups))
    names = [name for name in MEASURES if any(name == measure for measure, _ in groups)][::-1]
    figure, axes = new_figure(1.6 + 0.55 * len(names), len(columns))
    for ax, mode in zip([axes] if len(columns) == 1 else axes, columns, strict=True):
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(mode)
        for place, name in enumerate(names):
            for row in groups.get((name, mode), ()):
                spread = advantage(row)
                if row["arm"] == REFERENCE.name:
                    ax.hlines(place, spread.low, spread.high, color=GREY, alpha=0.35, linewidth=16)
                elif row["arm"] in peers:
                    number = peers.index(row["arm"])
                    at, colour = place + 0.13 * ((len(peers) - 1) / 2 - number), COLOURS[number]
                    ax.hlines(at, spread.low, spread.high, color=colour, linewidth=2)
                    ax.plot(spread.median, at, "o", color=colour, markersize=5, label=row["arm"])
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(TICKS))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks(range(len(names)), [MEASURES[name].label for name in names])
        ax.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
    figure.supxlabel("ReZero is better by this factor (below 1: worse)")
    shown = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=5, frameon=False)
    return save(figure, path)


def _grouped(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(measure, mode) -> its comparisons, in the measures' order."""
    rows = sorted(result["comparisons"], key=lambda row: list(MEASURES).index(row["measure"]))
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["measure"], row["mode"]), []).append(row)
    return found


def _gain(row: dict[str, Any]) -> str:
    """The inverse of what ReZero is better by."""
    low, middle, high = (1 / times for times in reversed(advantage(row)))
    told = verdict(row)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if told in ("ahead", "behind") else told


def _what(row: dict[str, Any]) -> tuple[str, str]:
    measure = MEASURES[row["measure"]]
    return f"{measure.label}, {measure.unit}", row["mode"]


def _number(row: dict[str, Any], who: str = "arm") -> str:
    found = value(row, who)
    return f"{found:,.0f}" if found >= 100 else f"{found:.3g}"


def _shares(row: dict[str, Any]) -> str:
    return join(f"{share:.0%} of {limit}" for limit, share in shares(row).items())


def _compared(row: dict[str, Any]) -> tuple[str, str]:
    spread = advantage(row)
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})", verdict(row)


def _ratios(row: dict[str, Any]) -> list[float]:
    return ratios(row["costs"]["arm"], row["costs"]["reference"])
