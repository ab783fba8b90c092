"""Recorded values as Markdown: numbers, durations, tables, code blocks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def number(value: float | int | None) -> str:
    """Whole numbers with thousands marked, others to four digits; None is an empty cell."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if math.isfinite(value) else "not finite (diverged)"


def duration(seconds: float | None) -> str | None:
    """Hours and minutes, or minutes and seconds; None when nothing was measured."""
    if not seconds:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested record as rows of words and values; what is None or empty is left out."""
    rows = {}
    for key, value in data.items():
        label = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            rows |= flat(value, label)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value, start=1):
                rows |= flat(item if isinstance(item, Mapping) else {"": item}, f"{label} {place}")
        elif isinstance(value, bool):
            rows[label] = "yes" if value else "no"
        elif isinstance(value, int):
            rows[label] = f"{value:,}"
        elif isinstance(value, list | tuple) and value:
            rows[label] = ", ".join(map(str, value))
        elif value not in (None, "", [], ()):
            rows[label] = str(value)
    return rows


def table(header: Sequence[str], rows: Mapping[str, str] | Sequence[Sequence[str]]) -> str | None:
    """A Markdown table, or None when there is nothing in it."""
    rows = list(rows.items()) if isinstance(rows, Mapping) else rows
    if not rows:
        return None
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def join(items: Iterable[str]) -> str:
    """Items that may hold commas, in a row."""
    return "; ".join(items)


def quoted(text: str) -> str:
    """A string in Python's double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
