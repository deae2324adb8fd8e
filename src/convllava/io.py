"""Files on disk: JSON, files that are replaced as a whole, and JSON Lines files that a killed run continues."""

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convllava.errors import ConfigError, DataError, InputError

ANSWERS, JUDGEMENTS, SETTINGS, RESULT = "answers.jsonl", "judgements.jsonl", "settings.json", "result.json"
WEIGHTS = "weights"
"""The setting that holds a digest of the model's weights, because a folder's weights can change under the same name."""
Entry = Mapping[str, Any]
"""A JSON object with a text under `id`."""


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a repository on the Hugging Face Hub: owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, and the second one too if the first ends with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InputError: if the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object; got {str(content)[:40]}")
    return content


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text. `where` names the text's place in the error message.

    Raises:
        DataError: if the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None


def parse_lines(text: str, path: Path | str) -> Iterator[tuple[str, Any]]:
    """Yield for each line of a JSON Lines text its place ("line 3 of PATH") and its value. Blank lines are skipped.

    Raises:
        DataError: if a line is not JSON.
    """
    # str.splitlines would also split at separators that JSON allows inside a text, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            yield where, parse_json(line, where)


def make_output(output: Path) -> None:
    """Create the folder for a command's results if it does not exist.

    Raises:
        ConfigError: if the path cannot be a folder.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"`output` {output} cannot be a folder: {error.strerror}") from None


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Write a file so that `path` holds either the old or the new content, also after a crash or on a full disk.

        with replacing(path) as partial:
            partial.write_text(content)

    The block writes a temporary file next to `path`, which replaces `path` if the block succeeds and is deleted
    otherwise. Processes that write the same path at the same time do not disturb each other; the last one wins.

    Args:
        path: The file to write. Its folder must exist.
        sync: Flush the content to the disk before the file is renamed. Set it to False for caches.

    Raises:
        InputError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or one_line(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with `replacing`: the file holds either the old or the new content.

    Raises:
        InputError: if the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class JsonLines:
    """A JSON Lines file that only grows, and that survives a kill at any moment.

        findings = JsonLines(folder / "findings.jsonl", header=digest_of_the_inputs)
        done = sum(1 for _ in findings)
        findings.append(check(record) for record in records[done:])

    A last line without its end (the process was killed while it wrote) is removed when the file is opened. Use
    `ResumableJsonl` for entries with ids; use this class if a run simply continues after the last line.

    Args:
        path: The file. It is created with the first line.
        header: The first line of the file, which iteration skips. A file with another header was made from other
            inputs: it is emptied.

    Raises:
        InputError: if the file cannot be read or written.
    """

    def __init__(self, path: Path, header: str | None = None) -> None:
        self.path, self.header = path, header
        try:
            content = path.read_bytes() if path.exists() else b""
            complete = content[: content.rfind(b"\n") + 1]
            if header is not None and complete.partition(b"\n")[0] != header.encode():
                path.write_text(f"{header}\n", encoding="utf-8")
            elif len(complete) < len(content):
                os.truncate(path, len(complete))
        except OSError as error:
            raise InputError(f"{path} cannot be used: {error.strerror}") from None

    def __iter__(self) -> Iterator[Any]:
        """Yield the value of each line.

        Raises:
            DataError: if a line is not UTF-8 or not JSON.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if (number > 1 or self.header is None) and line.strip():
                    where = f"line {number} of {self.path}"
                    try:
                        text = line.decode("utf-8")
                    except UnicodeDecodeError as error:
                        raise DataError(f"{where} is not UTF-8: {error.reason}; choose another `output`") from None
                    yield parse_json(text, where)

    def append(self, values: Iterable[Any]) -> None:
        """Write one line for each value.

        Raises:
            InputError: if the file cannot be written.
        """
        lines = (json.dumps(value, ensure_ascii=False) for value in values)
        # A lone surrogate has no UTF-8 form, so the line is escaped: a JSON text in ASCII means the same.
        lines = (json.dumps(json.loads(line)) if re.search(r"[\ud800-\udfff]", line) else line for line in lines)
        text = "".join(f"{line}\n" for line in lines)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}; free some space and resume") from None


class ResumableJsonl:
    """Entries of one run by their ids, in memory and in a JSON Lines file that a killed run continues.

        answers = ResumableJsonl(folder, {"model": "tiny", "max_new_tokens": 64})
        for question in questions:
            if question.id not in answers.entries:
                answers.add([{"id": question.id, "answer": ...}])

    The settings are written next to the entries. A later run with other settings is rejected, so that one file never
    mixes results of different settings.

    Args:
        folder: The folder of both files; None keeps the entries in memory only.
        settings: Everything that the entries depend on, as JSON values.
        name: Name of the file with the entries.
        settings_name: Name of the file with the settings.

    Attributes:
        entries: The entries by their ids, oldest first.

    Raises:
        InputError: if the folder holds entries that were made with other settings (the message lists them), is
            damaged, or cannot be created. The messages call the folder `output`.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], name: str = ANSWERS, settings_name: str = SETTINGS
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.lines: JsonLines | None = None
        if folder is None:
            return
        make_output(folder)
        path, wanted = folder / settings_name, json.loads(json.dumps(settings))  # the same types as in the file
        if not path.exists():
            if (folder / name).exists():
                raise ConfigError(f"{folder} holds {name} without {settings_name}; choose another `output`")
            write_json(path, wanted)
        found = read_json(path)
        known = {key: wanted[key] for key in (WEIGHTS,) if key in wanted} | found  # old files do not name the weights
        if changed := [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]:
            changes = "; ".join(f"{key} was {known.get(key)!r} and is {wanted.get(key)!r}" for key in changed)
            raise ConfigError(f"{folder} holds results of other settings: {changes}; choose another `output`")
        if known != found:
            write_json(path, known)
        self.lines = JsonLines(folder / name)
        for entry in self.lines:
            if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
                raise DataError(f"{folder / name} holds a line that is not an entry of a run; choose another `output`")
            self.entries[entry["id"]] = entry

    def add(self, entries: Iterable[Entry]) -> None:
        """Keep the entries whose ids are new.

        Raises:
            InputError: if the file cannot be written.
        """
        fresh = {entry["id"]: entry for entry in entries if entry["id"] not in self.entries}
        self.entries |= fresh
        if self.lines is not None and fresh:
            self.lines.append(fresh.values())
