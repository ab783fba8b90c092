"""The page of a study, made from its result alone: its table, its pictures, and what a reader has to know of both."""

import math
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from .markdown import table as markdown_table
from .runs import commit_name
from .study_curves import ahead_from, first_compared
from .study_plan import short
from .study_results import places, result_name
from .study_tables import UNITS, shown, study_table, with_unit


CARD = """# {item}

{read}

{table}

{leads}{pictures}

{how}

Made from `model_cards/results/{source}` by `scripts/report.py`, like every number here.
"""
SPREAD = "Mean and standard deviation over seeds, on validation data unless said otherwise."
ONE_SEED = "One seed, on validation data unless said otherwise."
TIMED = (
    "Milliseconds a step are medians, all rows by turns in one process (on a CPU, of one thread's own time); seconds "
    "are steps times that. Timing noise is a few percent: smaller differences mean nothing."
)
NOT_TIMED = "Seconds are medians of training, on a machine that other runs may have shared: they hardly compare."
AIMED = (
    "The target {target}; a speed-up is how many times as many steps as a row {baseline} takes to it, and ≤ marks a "
    "target that was passed before the first evaluation."
)
REPORTED = (
    "What the paper or its authors' notebooks report is quoted and was not checked against the paper; it is of another "
    "size, so only the order of rows compares."
)
SIGNAL = (
    "chi is the mean squared singular value of the input-output Jacobian, 1 if signals pass unchanged. It can be near "
    "1 as well where much is lost (the share of singular values that are 0), and it stays at 1 while gates hardly open "
    "(the mean size of alpha is that at the end)."
)
TUNED = (
    "{rows} tuned by the same rule on the first seed, which is one of those shown; "
    '"edge" marks a word whose best value is the smallest or the largest tried.'
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
# By how the names of pictures begin, in `study_figures.draw`.
CAPTIONS = {
    "curves": (
        "On the way: the mean over seeds and a band from the lowest to the highest; dotted the target, a cross where a "
        "row that diverged ends. A recipe may measure less on the way than at the end, so curves need not end at the "
        "table's numbers."
    ),
    "depths": (
        "At the end: the mean over seeds and a bar from the lowest to the highest; a cross where a run diverged, a "
        "triangle with its value for what lies far above."
    ),
    "gates": "The gates of the first seed, alpha, at each evaluation.",
    "norms": "Stream and gradient after each layer in the first seed, relative to where each enters.",
    "spectra": (
        "Singular values of the first seed's input-output Jacobian: at the left those that are 0, grey where that "
        "cannot be told; the last bar has all above. None where a run diverged."
    ),
    "steps": "Steps to the target: a bar for the mean, grey where not all seeds arrived, and a dot for each seed.",
    "toy": "The toy model of depth (section 3 of the paper): the cost, and the ways that gradient descent takes.",
}
NUMBER = re.compile(r"(\d+)")


def study_card(result: dict[str, Any], figures: Iterable[str]) -> str:
    """A page on one study: its table, its pictures, and how it was made.

    Args:
        result: `summarise`'s.
        figures: names of pictures in the folder `figures` beside the page, shown with 4 layers before 16.
    """
    figures = sorted(figures, key=lambda name: [int(part) if part.isdigit() else part for part in NUMBER.split(name)])
    versions = ["; ".join(f"{package} {version}" for package, version in found.items()) for found in result["versions"]]
    commits = [commit_name(git) for git in result["git"] if git]
    # Those of before it had to be said searched, too.
    search = "" if "--search" in result["command"] else " --search"
    facts = {
        "command": f"`{result['command']}{search}`",
        "size": {"cpu": "small (the default)"}.get(result["size"], result["size"]),
        "data": _data(result["data"]),
        "seeds": ", ".join(map(str, result["seeds"])),
        "device": "; ".join(result["device"]),
        "threads of a run": ", ".join(map(str, result["threads"])),
        "training of all runs": _duration(result["training_seconds"]),
        "versions": " / ".join(versions),
        "commits": ", ".join(commits) or "unknown",
    }
    pictures = "\n\n".join(
        "\n\n".join([CAPTIONS[kind], *(f"![{name.partition('.')[0]}](figures/{name})" for name in names)])
        for kind, names in groupby(figures, key=lambda name: re.split(r"[_.]", name)[0])
    )
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
    yield SPREAD if len(result["seeds"]) > 1 else ONE_SEED
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
    words = [f"{short(key)} {value}" for key, value in made["set"].items() if value is not None]
    found = made["results"]["validation"]
    # It may have learned something else than the rows, as text before classes.
    metric = next(word for word in (result["metric"], *UNITS) if word in found)
    return ", ".join([*words, f"{made['training_seconds']:.0f} s", with_unit(shown([found[metric]], metric), metric)])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


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
