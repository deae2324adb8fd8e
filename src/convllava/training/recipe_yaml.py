"""Dataclasses from YAML: unknown keys and values of the wrong type are rejected, and the nearest known key is named."""

import dataclasses
import logging
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from convllava.errors import ConfigError, nearest


def read_yaml(kind: type, path: Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Any:
    """Return the dataclass that a YAML file describes. Old keys are accepted with one warning that names the new ones.

    Args:
        kind: The dataclass. It and the dataclasses in it may have `OLD_KEYS`, a mapping of old to new names of keys.
        path: The file.
        overrides: Dotted keys and their values: a mapping, or texts such as "stages.0.steps=10".

    Raises:
        ConfigError: if the file cannot be read, or has an unknown key or a bad value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe at {path}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # an impossible date is a ValueError
        raise ConfigError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from None
    old: dict[str, str] = {}
    content = _with_new_names(kind, content, str(path), old)
    for key, value in _pairs(overrides):
        _override(kind, content, key, value, old)
    content = _with_new_names(kind, content, str(path), old)  # an override may have set a whole section
    if old and os.environ.get("RANK", "0") == "0":
        renamed = ", ".join(f"{before} is now {after}" for before, after in old.items())
        logging.getLogger(__name__).warning("%s: old keys, which the next release will reject: %s", path, renamed)
    return build(kind, content, str(path))


def build(kind: type, content: Any, where: str) -> Any:
    """Return a dataclass from a mapping, recursively.

    Raises:
        ConfigError: if a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a section with keys, got {content!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            hint = nearest(str(key), fields) or f"; known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
    for name, f in fields.items():
        if name not in content and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: missing key {name!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def flattened(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested content by dotted keys; items of a list by their name if they have one, else by their index."""
    if isinstance(content, dict) and content:
        pairs = list(content.items())
    elif isinstance(content, list) and content:
        pairs = [
            (item.get("name", index) if isinstance(item, dict) else index, item) for index, item in enumerate(content)
        ]
    else:
        return {prefix: content}
    return {
        key: value
        for name, item in pairs
        for key, value in flattened(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Any]]:
    """Return dotted keys and their values."""
    if isinstance(overrides, Mapping):
        return [(key, str(value) if isinstance(value, Path) else value) for key, value in overrides.items()]
    pairs = []
    for change in overrides:
        key, separator, text = change.partition("=")
        if not separator:
            raise ConfigError(f"`overrides` {change}: write it as key=value, for example stages.0.steps=10")
        try:
            pairs.append((key, yaml.safe_load(text)))
        except (yaml.YAMLError, ValueError):  # an impossible date is a ValueError
            raise ConfigError(f"`overrides` {change}: the value is not YAML") from None
    return pairs


def _override(kind: Any, content: Any, key: str, value: Any, old: dict[str, str]) -> None:
    """Set one dotted key of the raw content of a dataclass; items of lists by their name or index."""
    where = f"`overrides` {key}"
    done: list[str] = []
    *parents, last = key.split(".")
    for part in [*parents, last]:
        index: Any = part
        if isinstance(content, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in content]
            if part in names:
                index = names.index(part)
            elif part.isdecimal() and int(part) < len(content):
                index = int(part)
            else:
                raise ConfigError(f"{where}: {part} is not one of {', '.join(map(str, names))}")
        elif not isinstance(content, dict):
            raise ConfigError(f"{where}: {'.'.join(done)} is not a section of the recipe")
        elif part in getattr(kind, "OLD_KEYS", {}):
            index = old[part] = kind.OLD_KEYS[part]
        done.append(part)
        if len(done) <= len(parents):
            content = content[index] if isinstance(content, list) else content.setdefault(index, {})
            kind = _kind_within(kind, index)
        else:
            content[index] = value


def _with_new_names(kind: Any, content: Any, where: str, old: dict[str, str]) -> Any:
    """Return the raw content of a dataclass with new names instead of old ones, which are added to `old`.

    Raises:
        ConfigError: if a section has the old and the new name of a key.
    """
    if isinstance(content, list):
        return [_with_new_names(_kind_within(kind, 0), item, f"{where}[{i}]", old) for i, item in enumerate(content)]
    if not isinstance(content, dict) or not dataclasses.is_dataclass(kind):
        return content
    names = getattr(kind, "OLD_KEYS", {})
    renamed = {}
    for key, value in content.items():
        new = names.get(key, key)
        if new != key:
            old[str(key)] = str(new)
            if new in content:
                raise ConfigError(f"{where}: {key} is the old name of {new}; give only {new}")
        renamed[new] = _with_new_names(_kind_within(kind, new), value, f"{where}: {new}", old)
    return renamed


def _kind_within(kind: Any, key: Any) -> Any:
    """Return the dataclass, or list of one, at a key of an annotated type; None if there is none."""
    if dataclasses.is_dataclass(kind):
        kind = typing.get_type_hints(kind).get(key)
        options = [kind, *typing.get_args(kind)]
        return next((o for o in options if dataclasses.is_dataclass(o) or typing.get_origin(o) is list), None)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def _value(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
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
    if kind is float and not isinstance(value, bool):  # YAML reads 1e-3 as a string and 1 as an integer
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    raise ConfigError(f"{where} must be a {getattr(kind, '__name__', None) or kind}; got {value!r}")
