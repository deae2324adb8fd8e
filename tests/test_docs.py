"""Documentation: links lead to existing files, and every command on a page exists with its options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks import SUITES
from benchmarks.__main__ import app as benchmarks_app
from convllava.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dev/*.md"), *ROOT.glob("experiments/**/*.md")]
CHANGELOG = ROOT / "CHANGELOG.md"  # it names commands of older versions
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(convllava|python -m benchmarks) ([^`|]*)")


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """Return the program and the arguments of every command in code blocks and in backquotes."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in lines:
        if match := _COMMAND.match(line.strip()):
            words = shlex.split(match[2], comments=True)
            # "[--resume]" marks an optional part, and "..." arguments that are left out.
            found.append((match[1], [word.strip("[]") for word in words if word != "..."]))
    return found


def headings_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_to_existing_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings_of(file), target


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != CHANGELOG], ids=lambda page: f"{page.parent.name}/{page.name}"
)
def test_commands_exist_with_their_options(page):
    for program, words in commands_of(page):
        command = typer.main.get_command(app if program == "convllava" else benchmarks_app)
        if program != "convllava" and words:
            assert words[0] in {*SUITES, "SUITE"}, words
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        if default := getattr(command, "default", None):  # `convllava eval --model M` is short for `eval run`
            command = command.commands[default]
        if words and words[0].startswith("-"):  # `convllava eval --model X` is `convllava eval run --model X`
            command = getattr(command, "commands", {}).get("run", command)
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        if getattr(command, "commands", {}):  # a group must be followed by one of its commands
            assert not words or words[0].startswith("-"), (program, words)
        assert not {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)} - known, words


def test_walkthroughs_name_existing_functions():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \| `(\w+)` \|", text, re.MULTILINE)
    assert len(steps) >= 10
    for file, function in steps:
        assert f"def {function}(" in (ROOT / "src" / "convllava" / file).read_text(encoding="utf-8"), (file, function)
