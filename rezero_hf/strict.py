"""Values that a user has written, checked against a dataclass: one line says what is wrong, and where."""

import dataclasses
import difflib
import typing
from typing import Any

from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

from .errors import UserError


class RecipeError(UserError):
    """A recipe says something that cannot be; the message names file, key and value."""


def checked(values: dict[str, Any], cls: type, where: str) -> dict[str, Any]:
    """The values, each checked against the dataclass field of its name."""
    types = field_types(cls)
    check_names(values, types, f"{where}: key")
    found = {}
    for name, value in values.items():
        expected = types[name]
        members = typing.get_args(expected) or (expected,)
        found[name] = _as_meant(value, members)
        try:
            type_validator(name, found[name], expected)
        except TypeError as error:
            hint = " (YAML reads 3e-4 as text; write 3.0e-4)" if isinstance(value, str) and _is_number(value) else ""
            raise RecipeError(f"{where}.{name}={value!r}: expected {_describe(expected)}{hint}.") from error
    return found


def made(cls: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass from what `checked` finds right, with all that it needs.

    Raises:
        RecipeError: one line that says what is wrong or missing.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: is not a mapping of keys to values.")
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise RecipeError(f"{where}: {field.name} is missing.")
    return cls(**checked(values, cls, where))


def _as_meant(value: Any, members: tuple) -> Any:
    """Undo two readings of YAML: a whole number where only a float is due, and `no` where only a word is."""
    if isinstance(value, int) and not isinstance(value, bool) and float in members and int not in members:
        return float(value)
    if value is False and str in members and bool not in members:
        return "no"
    return value


def check_names(given: typing.Iterable[str], known: typing.Iterable[str], where: str) -> None:
    """Refuse a name that is not known, with the nearest that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:40])}."
            raise RecipeError(f"{where} {name!r} is unknown; {hint}")


def field_types(cls: type) -> dict[str, Any]:
    """The fields a recipe may set, with their types: a configuration's own ones, not the hundred it inherits."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if issubclass(cls, PreTrainedConfig):
        fields = [field for field in fields if field.name in cls.__annotations__]
    return {field.name: field.type for field in fields}


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(expected)))
    return expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")


def default_of(field: dataclasses.Field) -> Any:
    """The value of a dataclass field that is not given."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plain(value: Any) -> Any:
    """The value in types that YAML writes plainly: enums by value, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
