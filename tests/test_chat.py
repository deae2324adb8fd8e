"""Chat sessions equal asking with the whole history; answers can be interrupted; `convllava chat` reads a pipe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import picture

from convllava import InputError
from convllava.checkpoints import write
from convllava.cli.chat import answer_lines, paths_in
from convllava.inference import Assistant
from convllava.inference.chat_session import ChatSession


@pytest.fixture(scope="module")
def assistant(parts):
    return Assistant(*parts)


@pytest.fixture
def conversation(assistant):
    return ChatSession(assistant, max_new_tokens=6)


def offline(assistant, turns):
    """Answer (text, images) turns with `Assistant.chat` and the whole history each time."""
    messages, seen, answers = [], [], []
    for text, images in turns:
        marks = [{"type": "image"} for _ in images]
        messages.append({"role": "user", "content": [*marks, {"type": "text", "text": text}]})
        seen += images
        answers.append(assistant.chat(messages, seen, max_new_tokens=6))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


TURNS = [
    ("what is red?", [picture(64, 64, 1)]),
    ("describe the image", []),
    ("what?", [picture(64, 128, 2), picture(64, 64, 1)]),
]


def test_session_answers_equal_answers_to_the_whole_history(conversation, assistant):
    found = []
    for text, images in TURNS:
        for image in images:
            conversation.add_image(image)
        found.append("".join(conversation.say(text)))
    assert found == offline(assistant, TURNS)
    conversation.reset()
    assert ["".join(conversation.say("what?"))] == offline(assistant, [("what?", [])])


def test_session_keeps_the_text_of_an_interrupted_answer(conversation, assistant):
    pieces = conversation.say("what is red?")
    said = next(pieces)
    pieces.close()
    messages = [
        {"role": "user", "content": "what is red?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "what?"},
    ]
    assert "".join(conversation.say("what?")) == assistant.chat(messages, max_new_tokens=6)


def test_rejected_message_is_not_kept(conversation, assistant):
    image = picture(64, 64, 1)
    conversation.add_image(image)
    for text in ("<image>", "\udcff", "what " * 600):
        with pytest.raises(InputError):
            next(conversation.say(text))
    assert ["".join(conversation.say("what?"))] == offline(assistant, [("what?", [image])])


class Interrupted:
    """A session in which the user presses Ctrl-C during each answer."""

    def say(self, text):
        yield f"{text} an"
        raise KeyboardInterrupt


def test_ctrl_c_interrupts_the_answer_but_not_the_chat(capsys):
    answer_lines(Interrupted(), iter(["one", "two", "/quit", "three"]))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one an\ntwo an\n"


class Failing:
    """A session in which the first answer fails."""

    def say(self, text):
        if text == "one":
            raise RuntimeError("the model failed; the log says why")
        yield text


def test_failed_answer_does_not_end_the_chat(capsys):
    answer_lines(Failing(), iter(["one", "two"]))  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("two\n", "the model failed; the log says why\n")


def test_conversation_that_fills_the_context_is_rejected(conversation):
    with pytest.raises(InputError, match="fills the 512 tokens of the context; start a new one"):
        next(conversation.say("what " * 600))


def test_paths_are_found_in_all_notations_of_terminals(tmp_path):
    plain, spaced = tmp_path / "a.png", tmp_path / "b's c.png"
    for path in (plain, spaced):
        path.touch()
    escaped = str(spaced).replace(" ", "\\ ").replace("'", "\\'")
    for line in (str(spaced), escaped, f'"{spaced}"', spaced.as_uri()):
        assert paths_in(line) == [str(spaced)]
    assert paths_in(f"'{plain}' {escaped} ") == [str(plain), str(spaced)]
    for line in ("what's red?", f"what is {plain}?", str(tmp_path), "", "a\0.png", "x" * 5000 + ".png"):
        assert paths_in(line) == []


def test_chat_through_a_pipe_prints_only_answers(parts, assistant, tmp_path):
    write(*parts, tmp_path / "model")
    first, second = picture(64, 64, 1), picture(64, 128, 2)
    first.save(tmp_path / "1.png")
    second.save(tmp_path / "2.png")
    wrong = ["/image nowhere.png", "/nonsense", "\udcff"]
    lines = ["what is red?", str(tmp_path / "2.png"), *wrong, "", "what?", "/reset", "what?"]
    command = (sys.executable, "-m", "convllava", "chat", str(tmp_path / "1.png"))
    finished = subprocess.run(
        [*command, "--model", str(tmp_path / "model"), "--max-new-tokens", "6"],
        input="\n".join(lines), capture_output=True, encoding="utf-8", errors="surrogateescape",
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    expected = offline(assistant, [("what is red?", [first]), ("what?", [second])]) + offline(
        assistant, [("what?", [])]
    )
    assert finished.stdout == "".join(f"{answer}\n" for answer in expected)
    assert "1.png: seen as" in finished.stderr
    for word in ("2.png: seen as", "nowhere.png: no such file", "there is no /nonsense", "is not UTF-8"):
        assert word in finished.stderr
