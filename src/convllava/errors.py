"""Errors that the user can fix. Each message is one line: what is wrong, where, and how to fix it.

    InputError (a ValueError)
    ├── ConfigError       a recipe, a setting or an argument
    ├── DataError         a record, a data file, a benchmark file
    ├── CheckpointError   a model or adapter on disk
    └── ImageError        a picture

A message writes the name of an argument in backquotes, as in "`max_pixels` must be positive". The command line prints
the option of that name instead.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The base of all errors that the user can fix. The message says what is wrong, where, and how to fix it."""


class ConfigError(InputError):
    """A recipe, a setting or an argument cannot be used."""


class DataError(InputError):
    """A record, a data file or a benchmark file cannot be used."""


class CheckpointError(InputError):
    """A model or an adapter on disk cannot be used."""


class ImageError(InputError):
    """A picture cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" with the known name that is most similar, or "" if none is similar.

    Use it at the end of a message: `f"there is no part {part!r}{nearest(part, parts)}"`.
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""
