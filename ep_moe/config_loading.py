"""YAML files and command-line overrides to a checked :class:`~ep_moe.config.Config`, and back to plain data."""

from __future__ import annotations

import dataclasses
import difflib
import math
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
        mapping = _with_override(mapping, override)
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
        path = f"{prefix}{format_value(name)}"
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
        # A list of anything else is refused as it stands, so that the message shows what was written.
        return tuple(value) if all(isinstance(item, str) for item in value) else value
    if isinstance(value, str | int) and not isinstance(value, bool) and (kind is float or float in get_args(kind)):
        try:
            return float(value)
        except ValueError:
            return value
        except OverflowError:  # an integer of 309 digits and more; text of that size becomes inf by itself
            return math.inf
    return value


def _unknown_key(path: str, value: Any) -> str:
    leaves = [known_path for known_path, *_ in walk(Config())]
    sections = sorted({name.rpartition(".")[0] for name in leaves} | {name.split(".")[0] for name in leaves})
    parent, _, name = path.rpartition(".")
    if isinstance(value, Mapping):
        shown, candidates = path, sections
    else:  # null may also be a misspelt section with nothing in it
        shown, candidates = f"{path} = {format_value(value)}", leaves + sections
    siblings = [other for other in candidates if other.rpartition(".")[0] == parent]
    # A slip within the right section is likelier than the right key in the wrong section, and that likelier than a
    # sibling that looks only a little alike.
    close = _nearest(name, siblings, 0.75) or _nearest(name, candidates, 0.75) or _nearest(name, siblings, 0.6)
    if close:
        return f"{shown}: unknown key; did you mean {close}?"
    if not siblings:  # a section where there are none, but keys
        siblings = [other for other in leaves if other.rpartition(".")[0] == parent]
    allowed = ", ".join(sorted(other.rpartition(".")[2] for other in siblings))
    return f"{shown}: unknown key; {parent or 'the configuration'} has {allowed}"


def _nearest(name: str, paths: Sequence[str], cutoff: float) -> str | None:
    """The path whose last part is most like ``name``, if any is at least ``cutoff`` alike; of equal parts the first."""
    by_name = {path.rpartition(".")[2]: path for path in reversed(paths)}
    # difflib finds adam_bet1a as near to adam_beta2 as to adam_beta1; the same letters in another order decide.
    close = [other for other in by_name if sorted(other) == sorted(name)]
    close = close or difflib.get_close_matches(name, by_name, n=1, cutoff=cutoff)
    return by_name[close[0]] if close else None


def _with_override(mapping: Mapping[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    *sections, name = names = [part.strip() for part in path.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"override {format_value(override)}: must look like moe.top_k=4")
    # Sections on the way are copied: through a YAML alias another section may be the same object.
    result = place = dict(mapping)
    for depth, section in enumerate(sections, start=1):
        below = place.get(section, {})
        if not isinstance(below, Mapping):
            raise ConfigError(f"{'.'.join(sections[:depth])} = {format_value(below)}: must be a section of keys")
        place[section] = place = dict(below)
    place[name] = _parse_yaml(text, f"override {format_value(override)}")
    return result


def _read_yaml(path: Path) -> dict[str, Any]:
    shown = " ".join(str(path).splitlines())
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{shown}: cannot be read ({reason})") from None
    content = _parse_yaml(text, shown)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{shown}: must hold sections of keys, got {format_value(content)}")
    return content


def _parse_yaml(text: str, source: str) -> Any:
    """The content of YAML ``text``; errors begin with ``source``."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position) + 1, f"character {error.character:#04x} is not allowed"
        raise ConfigError(f"{source}: line {line}: {problem}") from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ConfigError(f"{source}: {where}{error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Refuses, with the line, what PyYAML lets pass or answers with a Python error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key given twice, of which PyYAML keeps the last: one of the two values is a mistake."""
        # Here and not in construct_mapping, where merged keys (<<) already stand beside those that override them.
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be a name", key_node.start_mark)
            if key_node.value in seen:
                problem = f"key {format_value(key_node.value)} is given twice"
                raise yaml.composer.ComposerError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Give the line of a value that looks like a date or number but is none, such as 2001-13-01."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, KeyError, OverflowError, ValueError):
            problem = f"{format_value(node.value)} is not a valid {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
