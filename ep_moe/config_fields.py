"""How a configuration key is declared and checked, whatever the keys are."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A configuration that cannot work. The message is one line: key path, value, what is allowed."""


def key(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Declare a configuration key.

    Args:
        default: its value if not given; a function (or section class) that makes it if it is a section.
        doc: one line of documentation.
        low: least allowed number.
        high: largest allowed number.
    """
    metadata = {"doc": doc, "low": low, "high": high}
    if isinstance(default, Callable):  # type: ignore[arg-type]
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base of configuration dataclasses: every key is checked on construction, then the rules that join keys."""

    SECTION: ClassVar[str] = ""
    """Where the section stands, with a trailing dot: the prefix of key paths in messages."""

    def __post_init__(self) -> None:
        """Check types and bounds of all keys, then :meth:`_check_rules`."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, field.name), field_types(type(self))[field.name]
            if is_section(kind):
                require(isinstance(value, kind), f"{self.SECTION}{field.name}", value, f"must be a {kind.__name__}")
            else:
                check_value(f"{self.SECTION}{field.name}", value, kind, field)
        self._check_rules()

    def _check_rules(self) -> None:
        """Raise :class:`ConfigError` if keys contradict each other."""


_types: dict[type, Mapping[str, Any]] = {}  # to find them out compiles every annotation


def field_types(section: type) -> Mapping[str, Any]:
    """The type of every key of a section class."""
    if section not in _types:
        _types[section] = get_type_hints(section)
    return _types[section]


def is_section(kind: Any) -> bool:
    """Whether a key's type is a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def require(condition: bool, path: str, value: Any, rule: str) -> None:
    """Raise :class:`ConfigError` unless ``condition`` holds; ``rule`` says what is allowed."""
    if not condition:
        raise ConfigError(f"{path} = {format_value(value)}: {rule}")


def check_value(path: str, value: Any, kind: Any, field: dataclasses.Field[Any]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is of type ``kind`` and within the bounds of ``field``."""
    require(_matches(value, kind), path, value, f"must be {describe_type(kind)}")
    low, high = field.metadata["low"], field.metadata["high"]
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    require(isinstance(value, int) or math.isfinite(value), path, value, "must be finite")
    require(low is None or value >= low, path, value, f"must be at least {low}")
    require(high is None or value <= high, path, value, f"must be at most {high}")


def describe_type(kind: Any) -> str:
    """A type in words: what may be written in YAML."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {describe_type(arguments[0]).removeprefix('one of ')}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}[kind]


def format_value(value: Any) -> str:
    """A value as YAML would show it, on one line and of bounded length."""
    if value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    elif isinstance(value, tuple):
        text = "[" + ", ".join(map(format_value, value)) + "]"
    elif isinstance(value, str) and _reads_as_another_type(value):
        text = f'"{value}"'
    else:
        text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, dataclasses.Field[Any]]]:
    """Yield ``(path, value, type, field)`` of every leaf key of a section."""
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), field_types(type(section))[field.name]
        if is_section(kind):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, kind, field


def _reads_as_another_type(text: str) -> bool:
    """Whether YAML would take ``text``, without quotes, for a number, a truth value or null."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("", "~", "null", "true", "false", "yes", "no", "on", "off")
    return True


def _matches(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
