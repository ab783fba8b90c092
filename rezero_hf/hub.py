"""The model card: rendered from what a run recorded and from the model's own configuration, never typed.

A value that was not recorded is left out, together with the sentence or table row that would have held it.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .descriptions import Description, description_of
from .errors import UserError
from .figures import gate_history
from .licences import licence_section, license_of
from .markdown import duration, fenced, flat, join, number, quoted, table
from .models.residual import RESIDUAL_FORMS


USER_SECTION = (
    "<!-- your section begins: what you write between these two lines is kept when the card is rendered again -->",
    "<!-- your section ends -->",
)
REPO_PLACEHOLDER = "USER/NAME"

# What is known of the corpora that have a name of their own. Everything else is described by what the run recorded.
SOURCES = {
    "python-stdlib": {
        "title": "the Python standard library's source code",
        "language": "code",
        "licence": "Python Software Foundation License (PSF-2.0)",
        "risk": "It writes text that looks like Python. Read it before you run it.",
        "prompt": "def main(",
    },
    "stdlib-functions": {
        "title": "heads and docstrings of the Python standard library's functions",
        "language": "code",
        "licence": "Python Software Foundation License (PSF-2.0)",
        "risk": None,
        "prompt": "def close(self):",
    },
    "enwik8": {
        "title": "enwik8, the first 100 MB of an English Wikipedia dump of 2006",
        "language": "en",
        "licence": "Wikipedia text: GFDL, and CC BY-SA 3.0 since 2009",
        "risk": "It writes wiki markup, with names of real people in invented statements.",
        "prompt": "The history of ",
    },
}
# The same of images, but for the terms of use: those are in the run's record.
IMAGE_SOURCES = {"hub:uoft-cs/cifar10": "CIFAR-10", "digits": "scikit-learn's handwritten digits"}


def render_card(
    run: Mapping[str, Any] | None,
    config: PreTrainedConfig,
    *,
    metrics: Sequence[dict] | None = None,
    recipe_text: str | None = None,
    figures: Iterable[str] = (),
    previous: str | None = None,
) -> ModelCard:
    """Render a model card.

    Args:
        run: The run's record (`run.json`): name, data, device, times, versions, results, and `repo_id`, `ORG/NAME` on
            the Hub, for the usage snippets, and `license`, of code and weights, as the Hub names it
            (`licences.license_of` says what holds without). Whatever it lacks, the card leaves out, but for a
            placeholder, explained as one, instead of `repo_id`; None is a model without a record.
        config: The model's configuration: where the description of the architecture comes from.
        metrics: Rows of `metrics.jsonl`, for the sentence on what the gates became.
        recipe_text: The resolved recipe, embedded as it is.
        figures: Paths inside the folder of the pictures to show, e.g. `"figures/loss.png"`.
        previous: The text of the card this one replaces; its user's section is carried over, and its licence.

    Raises:
        UserError: there is no card for this head, or `previous` has no user's section, or more than one: its text would
            be lost.
    """
    run, about = run or {}, description_of(config)
    data = dict(run.get("data") or {})
    if len(data.get("sources") or ()) == 1:
        # The totals would repeat the one source's numbers.
        data.pop("splits", None)
    sources = _sources(data)
    known = [SOURCES[source] for source in sources if source in SOURCES]
    licences = [f"Licence of {entry['title']}: {entry['licence']}." for entry in known]
    if not about.writes:
        # The configuration names them.
        data.pop("classes", None)
    if about.of_images:
        # The notice is a sentence of its own.
        licences = [notice] if (notice := data.pop("notice", None)) else []
    titles = IMAGE_SOURCES | {name: entry["title"] for name, entry in SOURCES.items()}
    name = run.get("name") or about.name
    license = license_of(run, previous)
    prompt = known[0]["prompt"] if known else "The "
    # A Hub data set can also be a folder on disk, which the Hub could not link to.
    hub_ids = [
        match.group(1) for match in (re.fullmatch(r"hub:([\w-]+/[\w.-]+)", source) for source in sources) if match
    ]

    card_data = ModelCardData(
        language=sorted({entry["language"] for entry in known}) or None,
        license=license,
        library_name="transformers",
        pipeline_tag=about.pipeline_tag,
        tags=["rezero", *([] if about.norms else ["norm-free"])],
        datasets=hub_ids or None,
        model_name=name,
        eval_results=_eval_results(run, about, sources) or None,
    )
    return ModelCard.from_template(
        card_data,
        template_str=files("rezero_hf").joinpath("card_template.md").read_text(encoding="utf-8"),
        name=name,
        model=about.model,
        of_images=about.of_images,
        writes=about.writes,
        pipeline_tag=about.pipeline_tag,
        item=about.item,
        classes=config.num_labels,
        grey=about.of_images and config.num_channels == 1,
        unfinished=run.get("unfinished"),
        surgery=join(operation["what"] for operation in run.get("surgery") or ()),
        origin=(run.get("init_from") or {}).get("path"),
        # Every record of a run says when it began; of one without it nobody knows with which weights.
        began=run.get("started"),
        parameters=f"{run['parameters']:,}" if run.get("parameters") else None,
        sources=join(titles.get(source, f"`{source}`") for source in sources),
        difference=about.difference,
        gated=RESIDUAL_FORMS[config.residual].has_gate,
        gate_summary=_gate_summary(metrics or []),
        architecture=table(("part", "value"), about.architecture),
        results=_results(run, about),
        evaluations=_evaluations(run, about),
        figures=[{"path": path, "text": _captions(about).get(path, path)} for path in figures],
        repo_id=run.get("repo_id") or REPO_PLACEHOLDER,
        placeholder=not run.get("repo_id"),
        prompt=quoted(prompt if about.writes else prompt.strip()),
        data=table(("data", "value"), flat(data)),
        licences="\n".join(licences),
        training=table(("training", "value"), _training(run)),
        recipe=fenced(recipe_text, "yaml") if recipe_text else None,
        risks=[entry["risk"] for entry in known if about.writes and entry["risk"]],
        licence=licence_section(license, about, len(licences), len(sources)),
        user_section=_user_section(previous),
    )


def user_section(card: str) -> str | None:
    """The text a user wrote between the markers of a card, or None unless it holds exactly one such section."""
    begin, end = USER_SECTION
    if card.count(begin) != 1 or card.count(end) != 1 or card.index(begin) > card.index(end):
        return None
    return card[card.index(begin) + len(begin) : card.index(end)].strip()


def _user_section(previous: str | None) -> str:
    kept = user_section(previous) if previous is not None else ""
    if kept is None:
        raise UserError(
            "README.md: the card to replace does not hold exactly one user's section, so what you wrote in it would "
            f"be lost; put the lines {USER_SECTION[0]!r} and {USER_SECTION[1]!r} around what to keep, or move it away"
        )
    begin, end = USER_SECTION
    return f"{begin}\n\n{kept}\n\n{end}" if kept else f"{begin}\n\n{end}"


def _sources(data: Mapping[str, Any]) -> list[str]:
    """Names of the corpora in a run's data record, as recipes write them; `enwik8:PATH` is enwik8 wherever it lies."""
    found = data.get("sources") or data.get("source") or []
    found = [found] if isinstance(found, str | Mapping) else found
    names = [
        str((source.get("source") or source.get("label")) if isinstance(source, Mapping) else source)
        for source in found
    ]
    return list(dict.fromkeys("enwik8" if name.startswith("enwik8:") else name for name in names))


def _gate_summary(metrics: Sequence[dict]) -> str | None:
    history = gate_history(metrics)
    if history is None:
        return None
    steps, alpha = history
    last = alpha[:, -1]
    strengths = abs(last).max(axis=1)
    if not all(map(math.isfinite, strengths)):
        return f"At step {steps[-1]} some gates were not finite."
    return (
        f"At step {steps[-1]} the gates lie between {last.min():.3g} and {last.max():.3g}; "
        f"the strongest layer is {strengths.argmax()}, the weakest {strengths.argmin()} "
        f"(0 is nearest the input, {len(strengths) - 1} nearest the output)."
    )


def _training(run: Mapping[str, Any]) -> dict[str, str]:
    versions = run.get("versions") or {}
    git = run.get("git") or {}
    world = run.get("world_size")
    rows = {
        "hardware": run.get("device"),
        "processes": str(world) if world and world > 1 else None,
        "wall time": duration(run.get("wall_seconds")),
        "energy": f"{run['energy_kwh']:.2g} kWh, estimated by codecarbon" if run.get("energy_kwh") else None,
        "tokens seen": f"{run['tokens']:,}" if run.get("tokens") else None,
        "started": run.get("started"),
        "command": f"`{run['command']}`" if run.get("command") else None,
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items() if version),
        "commit": f"{git['sha']}{' (with local changes)' if git.get('dirty') else ''}" if git.get("sha") else None,
    }
    return {label: value for label, value in rows.items() if value}


def _splits(measured: Mapping[str, Any], about: Description) -> dict[str, dict[str, float]]:
    """The measured numbers of each split under `results`, in the order they were recorded in.

    Without the loss of words: a mean of batches' means, it changes with the size of a batch.
    """
    splits = {
        split: {
            metric: value
            for metric, value in (found or {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
            if not (metric == "loss" and about.item == "word")
        }
        for split, found in (measured.get("results") or {}).items()
    }
    return {split: found for split, found in splits.items() if found}


def _metric(name: str, about: Description) -> str:
    """A measured number's name for a reader."""
    return f"loss (nats per {about.item})" if name == "loss" else name.replace("_", " ")


def _captions(about: Description) -> dict[str, str]:
    loss = _metric(about.measure, about)
    return {
        "figures/loss.png": f"{loss[0].upper()}{loss[1:]} during training",
        "figures/gates.png": "Gates alpha during training, layer by layer",
    }


def _results(run: Mapping[str, Any], about: Description) -> str | None:
    splits = _splits(run, about)
    columns = list(dict.fromkeys(metric for measured in splits.values() for metric in measured))
    rows = [[split, *(number(measured.get(metric)) for metric in columns)] for split, measured in splits.items()]
    return table(("split", *(_metric(metric, about) for metric in columns)), rows)


def _evaluations(run: Mapping[str, Any], about: Description) -> str | None:
    rows = [
        (", ".join(_sources(evaluation)), split, *([] if about.of_images else [_way(evaluation)]), found)
        for evaluation in run.get("evaluations") or ()
        for split, found in _splits(evaluation, about).items()
    ]
    columns = list(dict.fromkeys(metric for *_, found in rows for metric in found))
    cells = [[*words, *(number(found.get(metric)) for metric in columns)] for *words, found in rows]
    words = ("data", "split") if about.of_images else ("data", "split", "way")
    return table((*words, *(_metric(metric, about) for metric in columns)), cells)


def _way(evaluation: Mapping[str, Any]) -> str:
    if "way" not in evaluation:
        return ""
    every = f" every {evaluation['stride']}" if evaluation["way"] == "sliding" else ""
    return f"{evaluation['way']}, {evaluation['window']} tokens{every}"


def _eval_results(run: Mapping[str, Any], about: Description, sources: list[str]) -> list[EvalResult]:
    measured = [(sources, "", run)]
    measured += [(_sources(found), _way(found), found) for found in run.get("evaluations") or ()]
    results = []
    for names, way, found in measured:
        data_name = ", ".join(names).replace("hub:", "") or ("images" if about.of_images else "text")
        results += [
            EvalResult(
                task_type=about.pipeline_tag,
                dataset_type=data_name,
                dataset_name=data_name,
                dataset_split=split,
                metric_type=metric,
                metric_name=_metric(metric, about) + (f" ({way})" if way else ""),
                metric_value=value,
            )
            for split, numbers in _splits(found, about).items()
            for metric, value in numbers.items()
            # Counts of what was measured on are no metrics.
            if not isinstance(value, int)
            # The Hub's metadata are JSON, which has no word for infinities; the card's table says so instead.
            and math.isfinite(value)
        ]
    return results
