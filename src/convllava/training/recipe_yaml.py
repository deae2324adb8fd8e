"""Dataclasses from YAML, strictly: unknown keys and values of another type are refused, with the nearest known key."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

import yaml

from convllava.errors import InputError, nearest


def override(content: Any, change: str) -> None:
    """Set one dotted key of the raw content; list items by index, or by their name."""
    path, separator, value = change.partition("=")
    if not separator:
        raise InputError(f"--set {change}: write it as key=value, for example stages.0.steps=10")
    *parents, last = path.split(".")
    for key in parents:
        content = _descend(content, key, change)
    if isinstance(content, list):
        content[_index(content, last, change)] = _parse(value, change)
    elif isinstance(content, dict):
        content[last] = _parse(value, change)
    else:
        raise InputError(f"--set {change}: there is nothing below {'.'.join(parents)} to set")


def _parse(value: str, change: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # such as a date that is none
        raise InputError(f"--set {change}: the value is not YAML") from None


def _descend(content: Any, key: str, change: str) -> Any:
    if isinstance(content, list):
        return content[_index(content, key, change)]
    if isinstance(content, dict):
        return content.setdefault(key, {})
    raise InputError(f"--set {change}: {key} is not a section of the recipe")


def _index(items: list[Any], key: str, change: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    raise InputError(f"--set {change}: {key} is none of {', '.join(str(name) for name in names)}")


def build(kind: type, content: Any, where: str) -> Any:
    """A dataclass from a mapping, recursively, refusing unknown keys and values of the wrong type."""
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a section with keys, got {content!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            hint = nearest(str(key), fields) or f"; known keys: {', '.join(fields)}"
            raise InputError(f"{where}: unknown key {key!r}{hint}")
    missing = [
        name
        for name, f in fields.items()
        if name not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where}: missing key {missing[0]!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if kind is Any:
        return value
    if origin is Literal:
        return _literal(arguments, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in arguments if option is not type(None)]
        fitting = (option for option in options if typing.get_origin(option) is type(value))
        return _value(next(fitting, options[0]), value, where)
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return _scalar(kind, value, where)


def _literal(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in options:
        raise InputError(f"{where} must be one of {', '.join(map(str, options))}; got {value!r}")
    return value


def _scalar(kind: Any, value: Any, where: str) -> Any:
    """Plain values; YAML reads 1e-3 as a string and 1 as an integer, both of which a float may be."""
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", None) or str(kind)
    raise InputError(f"{where} must be a {name}; got {value!r}")
