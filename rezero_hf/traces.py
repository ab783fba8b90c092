"""What must not be published: access tokens, absolute paths, names of host and user. Found, and taken out."""

import getpass
import re
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any


# An absolute path of two parts or more, or of one telling part; not the inside of a URL or of a relative path.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w./~<*-])(?:file://)?"
    r"(?:~?/[\w.+@-]+(?:/[\w.+@-]*)+|~?/(?:home|root|Users|tmp|mnt|data|scratch)\b|~/[\w.+@-]*)"
    r"|\b[A-Za-z]:\\+Users\b"
)
# Called like the person whose it is.
HOME_FOLDER = re.compile(r"~|/root|.*/(?:home|Users)/[^/]+")
# The sections of a recipe in which people name their own things, and of such a line what is no word of ours.
NAMED_BY_PEOPLE = re.compile(r"(?ms)^(?:data|init_from):\s.*?(?=^\S|\Z)")
_LINE = re.compile(r"(?m)^(?P<key>[ -]*+(?:\w+:(?= |$))?+)(?P<value>.*)$")
TOKEN = re.compile(r"\b(?:hf_|ghp_|github_pat_|glpat-|sk-|AKIA)[A-Za-z0-9_-]{16,}")
# Account and host names that identify nobody, or are ordinary words in a recipe or a card.
NAMES_OF_NOBODY = {
    "root", "user", "admin", "test", "tests", "ubuntu", "debian", "runner", "docker", "nobody", "jovyan", "localhost",
    "node", "server", "worker", "data", "model", "train", "training", "python", "torch", "rezero", "alpha", "main",
}  # fmt: skip
OWN_WORDS = {
    *("README.md", "config.json", "generation_config.json"),
    *("tokenizer_config.json", "preprocessor_config.json"),
}
PERSONAL_KEYS = {"user", "username", "login", "host", "hostname", "node", "nodename", "fqdn", "cwd", "home"}


def scrub(record: Any, names: bool = True) -> Any:
    """Copy a record without what only the machine it was made on needs to know.

    Absolute paths shrink to their last part and home folders to `<home>`, names of user and host become `<user>` and
    `<host>`, and fields that hold one of them or a directory of theirs are dropped. `classes`, the names that a model
    gives, are its user's words and stay.

    Args:
        record: Text, or anything JSON can hold.
        names: Also replace the names of user and host.
    """
    if isinstance(record, dict):
        kept = {key: value for key, value in record.items() if str(key).lower() not in PERSONAL_KEYS}
        return {key: value if key == "classes" else scrub(value, names) for key, value in kept.items()}
    if isinstance(record, list | tuple):
        return [scrub(value, names) for value in record]
    if not isinstance(record, str):
        return record
    text = ABSOLUTE_PATH.sub(_shortened, record)
    text = TOKEN.sub("<token>", text)
    for kind, name in _own_names() if names else ():
        text = re.sub(_whole(name), f"<{kind}>", text)
    return text


def scrub_recipe(text: str) -> str:
    """`scrub` for a recipe as it is saved: names are replaced where people chose the words, in data and init_from.

    Elsewhere a host may be called like one of the package's words.
    """
    line = lambda found: found["key"] + scrub(found["value"])  # noqa: E731
    return NAMED_BY_PEOPLE.sub(lambda section: _LINE.sub(line, section.group()), scrub(text, names=False))


def _shortened(found: re.Match) -> str:
    """The last part of a path, and the slash after it where a pattern follows."""
    path = found.group().removeprefix("file://")
    whole = path.rstrip("/\\")
    last = "<home>" if HOME_FOLDER.fullmatch(whole) or whole == str(Path.home()) else whole.rpartition("/")[2]
    return last + path[len(whole) :]


def find_traces(path: Path, name: str, classes: Collection[str] = ()) -> list[str]:
    """Secrets and traces of the machine in one file, when it is text: a line for each.

    Args:
        path: the file.
        name: its path inside the folder, for the lines.
        classes: names that the model gives, which may look like paths.
    """
    if path.suffix in (".safetensors", ".png"):
        return []
    try:
        with path.open("rb") as file:
            # What torch writes is large, and no text.
            if b"\0" in file.read(4096):
                return []
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    problems = [f"{name}: holds an access token ({found.group()[:6]}...)" for found in TOKEN.finditer(text)]
    # Vocabularies are learnt from text, in which paths and names are ordinary words.
    if name in ("tokenizer.json", "vocab.json", "merges.txt"):
        return problems
    # An escaped line break would hide that a path begins after it.
    text = re.sub(r"\\[nrt]", "  ", text)
    for found in ABSOLUTE_PATH.finditer(text):
        if not any(found.group() in word for word in classes):
            line = text.count("\n", 0, found.start()) + 1
            problems.append(f"{name}:{line}: holds an absolute path, {found.group()}")
    # What the package writes from its own words is not searched for names: a host may be called like one of them.
    if name == "recipe.yaml":
        sections = NAMED_BY_PEOPLE.findall(text)
        text = "\n".join(line["value"] for section in sections for line in _LINE.finditer(section))
    elif path.suffix == ".py" or name in OWN_WORDS:
        return problems
    if name == "run.json":
        text = "\n".join(re.findall(r':\s*"([^"]*)"', text))
    problems += [
        f"{name}: holds this machine's {kind} name, {own}" for kind, own in _own_names() if re.search(_whole(own), text)
    ]
    return problems


def _own_names() -> list[tuple[str, str]]:
    """(kind, name) of this host and account, as far as they identify somebody."""
    host = socket.gethostname()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that no account has.
        user = ""
    names = dict.fromkeys([("host", host), ("host", host.partition(".")[0]), ("user", user)])
    return [(kind, name) for kind, name in names if len(name) > 3 and name.lower() not in NAMES_OF_NOBODY]


def _whole(name: str) -> str:
    """Pattern of a name as a word; before a slash it is a namespace on the Hub, which is public anyway."""
    return rf"(?<!\w){re.escape(name)}(?![\w/])"
