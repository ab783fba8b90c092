"""A model's licence: what was said, else what its card said before, else that of the weights it began with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from yaml import YAMLError

from .descriptions import Description
from .errors import HUB_FAILURES


# Of a model that began with random weights, unless something else is said: this package's own.
DEFAULT = "apache-2.0"


def license_of(run: Mapping[str, Any], previous: str | None = None) -> str | None:
    """A model's licence, as the Hub names it; None if it began with another's weights, and nobody has said theirs.

    Args:
        run: its record. What was said is its `license`.
        previous: the card that is about to be replaced.
    """
    return run.get("license") or license_in(previous) or (None if run.get("init_from") else DEFAULT)


def license_in(card: str | None) -> str | None:
    """What the metadata of a card say; None where they say nothing, or are damaged."""
    # Of a text without metadata the library would warn.
    if card is None or not card.lstrip().startswith("---"):
        return None
    try:
        said = ModelCard(card, ignore_metadata_errors=True).data.get("license")
    except (YAMLError, ValueError, TypeError):
        return None
    return said if isinstance(said, str) else None


def license_there(name: str | Path) -> str | None:
    """What the card of a model says, in a folder or, as `ORG/NAME[@REVISION]`, on the Hub; None without one."""
    path = Path(name).expanduser()
    try:
        if not path.is_dir():
            repository, _, revision = str(name).partition("@")
            path = Path(hf_hub_download(repository, "README.md", revision=revision or None)).parent
        return license_in((path / "README.md").read_text(encoding="utf-8"))
    except HUB_FAILURES:
        return None


def relicensed(card: str, license: str) -> str:
    """A card under another licence, in its metadata and where it says so."""
    was = license_in(card)
    card = card.replace(f"\nlicense: {was}\n", f"\nlicense: {license}\n", 1)
    return card.replace(_of_weights(was), _of_weights(license), 1)


def licence_section(license: str | None, about: Description, stated: int, sources: int) -> str:
    """Of code and weights, and whether that of the data is known; `stated` of `sources` are."""
    text = _of_weights(license)
    data = "images" if about.of_images else "text"
    if stated and about.of_images:
        text += " What is known of the licence of the training images stands under Data."
    elif stated:
        text += " The licence of the training text is stated under Data."
    if stated < sources or not sources:
        text += f" The licence of the training {data} was not recorded: check it before you build on the model."
    return text


def _of_weights(license: str | None) -> str:
    return f"Code and weights: {license}." if license else "The licence of the weights it began with is not known."
