"""The tables and the page of a study, made from its result alone. Diverged runs are shown as such."""

import math
import re
from collections.abc import Iterable, Iterator
from statistics import fmean, median, stdev
from typing import Any

from .diagnostics import zeros_are_resolved
from .markdown import table as markdown_table
from .runs import commit_name
from .study_curves import ahead_from, first_compared
from .study_plan import short
from .study_results import measured, place_of, places, result_name


CARD = """# {item}

{read}

{table}

{leads}{pictures}

{how}

Made from `model_cards/results/{source}` by `scripts/report.py`, like every number here.
"""
SPREAD = "Mean and standard deviation over seeds, on validation data unless said otherwise."
TIMED = (
    "Milliseconds a step are medians, all rows by turns in one process (on a CPU, of one thread's own time); seconds "
    "are steps times that. Rows that compute the same differ by a few percent there, so less than that is none."
)
NOT_TIMED = "Seconds are medians of training, on a machine that other runs may have shared: they hardly compare."
AIMED = (
    "The target {target}; a speed-up is how many times fewer steps than {baseline} a row takes to it, and ≤ marks one "
    "that was passed before the first evaluation."
)
REPORTED = (
    "What the paper or its authors' notebooks report is quoted and was not checked against the paper; it is of another "
    "size, so only the order of rows compares."
)
SIGNAL = (
    "chi is the mean squared singular value of the input-output Jacobian, 1 where signals pass unchanged; lost is the "
    "share of singular values that are 0."
)
TUNED = (
    "{rows} tuned by the same rule on the first seed, which is one of those shown; "
    '"edge" marks a word whose best value is the last tried.'
)
NOT_TUNED = "Rows were not tuned and differ in their form alone: do not compare where they end."
GROWN = "FLOP and seconds of a row that began with another run's model include that run's."
BEGUN = (
    "A row that begins from a base begins with the model of a run made once, whose FLOP and seconds are not the row's: "
    "{bases}. Bases were not tuned, and have one seed: the spread over seeds is of what came after, and a difference "
    "between rows from two bases may be one between their rates."
)
LEADS = (
    "From when on {label} is ahead for good, at equal steps and at equal times "
    '("always": from the first evaluation on):'
)
NUMBER = re.compile(r"(\d+)")
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats", "accuracy": "accuracy"}


def study_table(result: dict[str, Any]) -> str:
    """A study as a Markdown table: mean and spread over seeds, steps and time to the target, and what was chosen."""
    unit, aimed = UNITS[result["metric"]], any(row["target"] is not None for row in result["rows"])
    header = ["row", "reported", f"validation ({unit})", "test", "FLOP", "seconds"]
    header[4:4] = ["steps to the target", "speed-up", "ms a step", "seconds to it"] if aimed else []
    measured = {word for row in result["rows"] for run in row["runs"] for word in run}
    off, signal = "gates_off" in measured, "signal" in measured
    header += ["all alpha 0", "seconds a step", "peak memory"] if off else []
    header += ["chi at the start", "lost", "chi at the end", "lost"] if signal else []
    lines = []
    for row in result["rows"]:
        finished = [run for run in row["runs"] if not run["diverged"]]
        cells = [row_label(row), row["reported"] or "", values(row["runs"], "value"), values(row["runs"], "test")]
        if aimed:
            steps = reach(row["runs"], "steps")
            cells += [
                f"{steps} to {row['target']:.3g}" if steps and row["target"] is not None else "",
                speed_up(row, baseline_of(result, row)),
                "" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.0f}",
                reach(row["runs"], "seconds", "{:.3g}"),
            ]
        cells.append(f"{fmean(run['flops'] for run in finished):.2g}" if finished else "")
        step = row["step_seconds"]
        took = [run["steps"] * step if step else run["training_seconds"] for run in finished]
        # Where one run stood still, a mean would say nothing.
        cells.append(f"{median(took):.0f}" if took else "")
        if off:
            without = [run["gates_off"].get(result["metric"]) for run in row["runs"] if run.get("gates_off")]
            cells.append(spread(without, "{:.3f}") if without else "")
            cells.append(f"{fmean(run['training_seconds'] / max(run['steps'], 1) for run in row['runs']):.2g}")
            cells.append(f"{max(run['peak_memory_bytes'] for run in row['runs']) / 1e9:.2f} GB")
        if signal:
            cells += [text for moment in ("start", "end") for text in spectrum(row, moment)]
        lines.append([*cells, _chosen(row)])
    return markdown_table([*header, "tuned to"], lines)


def spectrum(row: dict[str, Any], moment: str) -> tuple[str, str]:
    """Mean squared singular value of the first seed's input-output Jacobian, and the share of them that is 0, where
    that can be told beside the largest.
    """
    found = row["runs"][0].get("signal", {}).get(moment)
    if found is None:
        return "", ""
    chi, lost = found["jacobian"]["chi"], found["jacobian"].get("share_zero")
    share = "" if lost is None else f"{lost:.0%}" if zeros_are_resolved(found["jacobian"]) else "not resolved"
    return "not finite" if chi is None else f"{chi:.3g}", share


def study_card(result: dict[str, Any], figures: Iterable[str]) -> str:
    """A page on one study: its table, its pictures, and how it was made.

    Args:
        result: `summarise`'s.
        figures: names of pictures in the folder `figures` beside the page, shown with 4 layers before 16.
    """
    figures = sorted(figures, key=lambda name: [int(part) if part.isdigit() else part for part in NUMBER.split(name)])
    versions = ["; ".join(f"{package} {version}" for package, version in found.items()) for found in result["versions"]]
    commits = [commit_name(git) for git in result["git"] if git]
    facts = {
        "command": f"`{result['command']}`",
        "size": {"cpu": "small (the default)"}.get(result["size"], result["size"]),
        "data": _data(result["data"]),
        "seeds": ", ".join(map(str, result["seeds"])),
        "device": "; ".join(result["device"]),
        "threads of a run": ", ".join(map(str, result["threads"])),
        "training of all runs": f"{result['training_seconds'] / 3600:.1f} hours",
        "versions": " / ".join(versions),
        "commits": ", ".join(commits) or "unknown",
    }
    pictures = "\n\n".join(f"![{name.partition('.')[0]}](figures/{name})" for name in figures)
    told = (" ".join(_how_to_read(result)), " ".join(_how_tuned(result)), result["note"])
    return CARD.format(
        item=result["item"],
        read="\n\n".join(filter(None, told)),
        table=study_table(result),
        leads=f"{leads}\n\n" if (leads := _leads(result)) else "",
        pictures=pictures,
        how=markdown_table(("how it was made", ""), facts),
        source=f"{result_name(result)}.json",
    )


def _how_to_read(result: dict[str, Any]) -> Iterator[str]:
    """What the numbers of a study's table are."""
    rows = result["rows"]
    yield SPREAD
    yield TIMED if any(row["step_seconds"] is not None for row in rows) else NOT_TIMED
    base = next((row for row in rows if row["row"] == result["baseline"]), None)
    if base is not None and any(row["target"] is not None for row in rows):
        read_off = f"is where {base['label']} stands, in the mean, at {result['target_at'] or 0:.0%} of its steps"
        yield AIMED.format(
            target=read_off if result["target_at"] else "was chosen before the runs", baseline=base["label"]
        )
    if any("signal" in run for row in rows for run in row["runs"]):
        yield SIGNAL
    if any(row["reported"] for row in rows):
        yield REPORTED


def _how_tuned(result: dict[str, Any]) -> Iterator[str]:
    """How its rows came to their words, and to the models they begin with."""
    tuned = list(dict.fromkeys(row["label"] for row in result["rows"] if row["chosen"]))
    every = all(row["chosen"] for row in result["rows"])
    yield TUNED.format(rows="Every row was" if every else f"Only {', '.join(tuned)} was") if tuned else NOT_TUNED
    if any(row["first"] for row in result["rows"]):
        yield GROWN
    bases = [f"`{name}` ({_base(made, result)})" for name, made in result["bases"].items()]
    if bases:
        yield BEGUN.format(bases="; ".join(bases))


def _base(made: dict[str, Any], result: dict[str, Any]) -> str:
    """What the model that rows begin with was trained as, and what came of it on its own validation data."""
    words = [f"{short(key)} {value}" for key, value in made["set"].items()]
    found = made["results"]["validation"]
    # It may have learned something else than the rows, as text before classes.
    metric = next(word for word in (result["metric"], *UNITS) if word in found)
    return ", ".join([*words, f"{made['training_seconds']:.0f} s, {found[metric]:.3f} {UNITS[metric]}"])


def _leads(result: dict[str, Any]) -> str | None:
    """From when on the row that the study is about is ahead of each other row, for good."""
    parts = []
    for place, rows in places(result).items():
        ours = next((row for row in rows if row["row"] == result["ours"]), None)
        others = [row for row in rows if row is not ours and any(len(run["curve"]) > 2 for run in row["runs"])]
        if ours is None or ours["target"] is None or not others or not any(run["curve"] for run in ours["runs"]):
            continue
        where = "".join(f", {short(key)} {value}" for key, value in place)
        lines = [[row["label"], *_lead(ours, row, result["metric"])] for row in others]
        header = ("row", "in the mean", "with every seed", "in the mean, in seconds", "with every seed, in seconds")
        parts += [LEADS.format(label=f"{ours['label']}{where}"), markdown_table(header, lines)]
    return "\n\n".join(parts) or None


def _lead(ours: dict[str, Any], other: dict[str, Any], metric: str) -> Iterator[str]:
    timed = bool(ours["step_seconds"] and other["step_seconds"])
    for seconds in (False, True):
        for mean in (True, False):
            if seconds and not timed:
                yield ""
                continue
            since = ahead_from(ours, other, metric, mean=mean, seconds=seconds)
            if since is None:
                yield "not at the end"
            elif math.isclose(since, first_compared(ours, other, seconds)):
                yield "always"
            else:
                yield f"from {since:.3g} s on" if seconds else f"from step {since} on"


def _data(data: dict[str, Any]) -> str:
    """What was trained and measured on, in a few words."""
    if "sources" in data:
        return ", ".join(source["source"] for source in data["sources"])
    origin = {"files": ", from files on the machine", "hub": ""}.get(data["origin"]["kind"], "")
    return "; ".join([f"{data['source']}{origin}", *lossy(data)])


def lossy(data: dict[str, Any]) -> list[str]:
    """A remark where images had lost detail before they were read: accuracy is a little below that on the originals."""
    return ["from JPEG copies"] if "JPEG" in data.get("formats", ()) else []


def baseline_of(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    """The row that this one's speed-up is against: the baseline at the same value of `across`."""
    return next((base for base in places(result)[place_of(row)] if base["row"] == result["baseline"]), None)


def values(runs: list[dict[str, Any]], word: str) -> str:
    """Mean and spread of the runs that did not diverge, and how many did."""
    found = measured(runs, word)
    if not found:
        return "diverged" if diverged(runs) else ""
    return spread(found, "{:.3f}") + diverged(runs)


def diverged(runs: list[dict[str, Any]]) -> str:
    """A remark where some did, or ended without a number."""
    lost = sum(run["diverged"] is not None or run["value"] is None for run in runs)
    return f" ({lost} of {len(runs)} diverged)" if lost else ""


def reach(runs: list[dict[str, Any]], word: str, form: str = "{:.0f}") -> str:
    if all(run["diverged"] for run in runs):
        return ""
    found = measured(runs, "to_target")
    if not found:
        return "never"
    within = "≤ " if _within(runs) else ""
    share = f" ({len(found)} of {len(runs)})" if len(found) < len(runs) else ""
    return within + spread([reached[word] for reached in found], form) + share


def _within(runs: list[dict[str, Any]]) -> bool:
    """Whether one of them was at the target when it was first measured."""
    return any("within" in reached for reached in measured(runs, "to_target"))


def speed_up(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """How many times fewer steps than the baseline, by means over seeds; only if all runs of both arrive, and not where
    the baseline did before it was first measured.
    """
    means = []
    for runs in ([] if base is None else base["runs"], row["runs"]):
        reached = [run["to_target"] for run in runs]
        means.append(fmean(found["steps"] for found in reached) if reached and all(reached) else math.nan)
    ratio = means[0] / means[1]
    if not math.isfinite(ratio) or (row is not base and _within(base["runs"])):
        return ""
    return f"{'≥ ' if row is not base and _within(row['runs']) else ''}{ratio:.2f}x"


def row_label(row: dict[str, Any]) -> str:
    """A row's label, and where it stands."""
    return ", ".join([row["label"], *(f"{short(key)} {value}" for key, value in row["at"].items())])


def _chosen(row: dict[str, Any]) -> str:
    edge = [key for key, inside in row["inside"].items() if not inside]
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in row["chosen"].items()}
    words = [f"{short(key)} {value}{' (edge)' if key in edge else ''}" for key, value in shown.items()]
    return ", ".join(words)


def spread(values: list[float], form: str) -> str:
    mean = form.format(fmean(values))
    return f"{mean} ± {form.format(stdev(values))}" if len(values) > 1 else mean
