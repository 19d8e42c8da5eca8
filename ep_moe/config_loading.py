"""YAML files and command-line overrides to a checked :class:`~ep_moe.config.Config`, and back to plain data."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from ep_moe.config import Config, ConfigError
from ep_moe.config_fields import Section, check_value, field_types, format_value, is_section, walk

SectionType = TypeVar("SectionType", bound=Section)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration.

    Args:
        path: of a YAML file; ``None`` for defaults only.
        overrides: such as ``"moe.top_k=4"``, with a YAML value; they win over the file, later ones over earlier.

    Raises:
        ConfigError: with one line that says which file or key is wrong and what is allowed.
    """
    mapping = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(mapping, override)
    return config_from_dict(mapping)


def config_from_dict(mapping: Mapping[str, Any]) -> Config:
    """Build a configuration from nested mappings, as YAML yields them; keys left out keep their defaults.

    Raises:
        ConfigError: for unknown keys, wrong types, values out of bounds, and keys that contradict each other.
    """
    return _build(Config(), mapping, "")


def config_to_dict(section: Section) -> dict[str, Any]:
    """The inverse of :func:`config_from_dict`: nested dicts of plain YAML values, every key included."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if isinstance(value, Section):
            value = config_to_dict(value)
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def _build(base: SectionType, mapping: Any, prefix: str) -> SectionType:
    """``base`` with the keys of ``mapping`` replaced; all values are checked before any section is made of them."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'configuration'} = {format_value(mapping)}: must be a section of keys"
        )
    fields = {field.name: field for field in dataclasses.fields(base)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        path = f"{prefix}{name}"
        if name not in fields:
            raise ConfigError(_unknown_key(path, value))
        kind = field_types(type(base))[name]
        if is_section(kind):
            values[name] = _build(getattr(base, name), value, f"{path}.")
        else:
            values[name] = _coerce(value, kind)
            check_value(path, values[name], kind, fields[name])
    return dataclasses.replace(base, **values)  # type: ignore[type-var]


def _coerce(value: Any, kind: Any) -> Any:
    """Lists become tuples; integers, and text that YAML 1.1 does not read as a number (1e-3), become floats."""
    if isinstance(value, list) and get_origin(kind) is tuple:
        return tuple(value)
    if isinstance(value, str | int) and not isinstance(value, bool) and (kind is float or float in get_args(kind)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _unknown_key(path: str, value: Any) -> str:
    known = [known_path for known_path, *_ in walk(Config())]
    sections = {known_path.rpartition(".")[0] for known_path in known} | {name.split(".")[0] for name in known}
    parent, _, name = path.rpartition(".")
    shown, candidates = f"{path} = {format_value(value)}", known
    if isinstance(value, Mapping):
        shown, candidates = path, sorted(sections)
    siblings = [other for other in candidates if other.rpartition(".")[0] == parent]
    # A slip within the right section is likelier than the right key in the wrong section, and that likelier than a
    # key elsewhere that happens to look alike.
    close = difflib.get_close_matches(path, siblings, n=1, cutoff=0.9)
    close = close or [other for other in candidates if other.rpartition(".")[2] == name]
    close = close or difflib.get_close_matches(path, siblings, n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(path, candidates, n=1, cutoff=0.6)
    if close:
        return f"{shown}: unknown key; did you mean {close[0]}?"
    allowed = ", ".join(sorted(name.rpartition(".")[2] for name in siblings))
    return f"{shown}: unknown key; {parent or 'the configuration'} has {allowed}"


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"override {format_value(override)}: must look like moe.top_k=4")
    *sections, name = path.strip().split(".")
    for place, section in enumerate(sections):
        mapping = mapping.setdefault(section, {})
        if not isinstance(mapping, dict):
            raise ConfigError(f"{'.'.join(sections[: place + 1])} = {format_value(mapping)}: must be a section of keys")
    try:
        mapping[name] = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {format_value(override)}: {_describe_yaml_error(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_describe_yaml_error(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections of keys, got {format_value(content)}")
    return content


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{where}{getattr(error, 'problem', None) or 'not YAML'}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; a configuration with two values for a key is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name} is given twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
