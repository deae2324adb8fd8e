"""Files that are replaced as a whole, and JSON Lines files that a killed run continues."""

from __future__ import annotations

import pytest

from convllava.errors import DataError, InputError, nearest
from convllava.io import JsonLines, ResumableJsonl, make_output, replacing, write_json


def test_failed_write_keeps_only_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as partial, partial.open("w", encoding="ascii") as file:
        file.write("half\xff")
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match=r"a.json cannot be written: No such file"):
        write_json(tmp_path / "nowhere" / "a.json", {})


def test_file_as_output_folder_is_rejected(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=r"^`output` .*a cannot be a folder: File exists"):
        make_output(tmp_path / "a")


def test_lines_continue_after_a_kill(tmp_path):
    path = tmp_path / "findings.jsonl"
    JsonLines(path, header="digest").append([1, {"a": "\u2028\ud800"}])
    with path.open("a") as file:
        file.write('{"cut": ')
    lines = JsonLines(path, header="digest")
    assert list(lines) == [1, {"a": "\u2028\ud800"}]
    lines.append([3])
    assert list(JsonLines(path, header="digest")) == [1, {"a": "\u2028\ud800"}, 3]
    assert list(JsonLines(path, header="other")) == []


def test_entries_continue_only_with_the_same_settings(tmp_path):
    ResumableJsonl(tmp_path, {"batch": (1, 2)}).add([{"id": "1"}, {"id": "2"}])
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"id": "3')
    again = ResumableJsonl(tmp_path, {"batch": [1, 2]})
    again.add([{"id": "2", "answer": "ignored"}, {"id": "3"}])
    assert list(ResumableJsonl(tmp_path, {"batch": [1, 2]}).entries.values()) == [{"id": "1"}, {"id": "2"}, {"id": "3"}]
    with pytest.raises(InputError, match=r"batch was \[1, 2\] and is 3; choose another `output`"):
        ResumableJsonl(tmp_path, {"batch": 3})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"answers.jsonl without settings.json"):
        ResumableJsonl(tmp_path, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"id": "\xff"}\n', "line 1 of .* not UTF-8"), (b"{\n", "line 1 of .* not JSON"), (b"[]\n", "not an entry")],
)
def test_damaged_entries_are_rejected(tmp_path, line, message):
    ResumableJsonl(tmp_path, {})
    (tmp_path / "answers.jsonl").write_bytes(line)
    with pytest.raises(DataError, match=message):
        ResumableJsonl(tmp_path, {})


def test_nearest_known_name_is_suggested():
    assert nearest("sed", ["seed", "steps"]) == "; did you mean seed?"
    assert nearest("other", ["seed"]) == ""
