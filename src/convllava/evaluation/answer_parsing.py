"""What an answer says, or None: an answer that cannot be read is counted as such and never guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from convllava.evaluation.questions import Question

_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What stands before the answer in a sentence that explains itself (MMMU)."""


def choice(answer: str, options: Sequence[str], letters: str) -> str | None:
    """The letter that an answer chooses. The first of these that applies, decides:

    1. The answer is a letter, or begins with one that a mark follows: "B", "(B)", "B.", "B) a dog", "**B**".
    2. It says "answer is B", "answer: B" or "option B"; the last such saying counts.
    3. Exactly one letter stands alone in it. "A" before a word in small letters is an article.
    4. It is the text of exactly one option, or contains that of exactly one, as whole words, whatever the case.

    Source: rules 1 to 3 are what VLMEvalKit and lmms-eval look for; where they draw a letter at random or ask another
    model, this gives None.
    """
    text = answer.strip().strip("*`\"' ")
    if not letters or not text:
        return None
    return _leading(text, letters) or _announced(text, letters) or _alone(text, letters) or _by_text(text, options)


def _leading(text: str, letters: str) -> str | None:
    found = re.match(rf"\(?([{letters}])(?:[).:\]]|\*\*|\s*(?:\n|$))", text) or re.fullmatch(
        rf"([{letters.lower()}])[).]?", text
    )
    return found[1].upper() if found else None


def _announced(text: str, letters: str) -> str | None:
    saying = rf"(?:answer(?:\s+is|:)|option)\s*:?\s*[*(\"']*([{letters}])(?![A-Za-z0-9'])"
    found = re.findall(saying.replace("answer", "[Aa]nswer").replace("option", "[Oo]ption"), text)
    return found[-1] if found else None


def _alone(text: str, letters: str) -> str | None:
    text = re.sub(r"\bA(?=\s+(?!or\b|and\b)[a-z])", "", text)
    found = set(re.findall(rf"(?<![A-Za-z0-9'])([{letters}])(?![A-Za-z0-9'])", text))
    return found.pop() if len(found) == 1 else None


def _by_text(text: str, options: Sequence[str]) -> str | None:
    whole = _words(text)
    equal = [number for number, option in enumerate(options) if _words(option) == whole]
    inside = [
        number for number, option in enumerate(options) if _words(option) and f" {_words(option)} " in f" {whole} "
    ]
    found = equal if len(equal) == 1 else inside
    return chr(ord("A") + found[0]) if len(found) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def written_options(text: str) -> tuple[str, ...]:
    """Options that stand in a question's own text, a line each: "A. a dog"; those from A on without a gap."""
    found = dict(re.findall(r"^\s*\(?([A-Z])[.)]\s+(.+?)\s*$", text, re.MULTILINE))
    letters = [letter for number, letter in enumerate(sorted(found)) if letter == chr(ord("A") + number)]
    return tuple(found[letter] for letter in letters)


def yes_or_no_at_start(answer: str) -> str | None:
    """Which of yes and no stands in the first four characters.

    Source: `calculation.py` of MME (arXiv 2306.13394), where anything else is "other" and wrong.
    """
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def yes_or_no_in_sentence(answer: str) -> str | None:
    """Of the first sentence: "no" where one of its words is no or not, else "yes" where one is yes.

    Source: `evaluate.py` of POPE (arXiv 2305.10355), which takes anything without no or not for a yes; here an answer
    with neither is unread.
    """
    words = set(re.findall(r"[a-z]+", answer.split(".")[0].lower()))
    return "no" if words & {"no", "not"} else "yes" if "yes" in words else None


def mmmu_choice(answer: str, question: Question) -> str | None:
    """The letter as MMMU looks for it: in brackets, else before a blank, else before a full stop; in an answer of more
    than five words also by an option's text. The last one named counts.

    Source: `parse_multi_choice_response` of MMMU (arXiv 2311.16502; eval_utils.py), which draws a letter at random
    where this gives None.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", "{} ", "{}."):
        if found := [letter for letter in question.letters if form.format(letter) in text]:
            place = "({})" if form == "({})" else " {} "
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    named = [number for number, option in enumerate(question.options) if option and option.lower() in lower]
    best = max(named, key=lambda number: lower.rfind(question.options[number].lower()), default=None)
    return None if best is None else question.letters[best]


def mmmu_open(answer: str) -> set[str | float]:
    """What an open answer may mean: the tails of its sentences after words such as "is", and the numbers in them.

    Source: `parse_open_response` of MMMU (eval_utils.py).
    """
    text = answer.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    tails = []
    for number, sentence in enumerate(sentences):
        leads = (*_LEADS, "=") if number == len(sentences) - 1 else _LEADS
        ends = [sentence.split(lead)[-1].strip() for lead in leads if lead in sentence]
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in set(":,.!?;'"):
            tails.append(shortest)
    tails = tails or [text]
    found = [*tails, *(number for tail in tails for form in _NUMBERS for number in form.findall(tail))]
    return {value for item in found for value in mmmu_values(item)}


def mmmu_values(text: str) -> list[str | float]:
    """A number rounded to two places; else the text in lower case, a single letter with a blank on either side.

    Source: `normalize_str` of MMMU (eval_utils.py).
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def mmmu_open_match(found: set[str | float], truths: Sequence[str]) -> bool:
    """A truth stands in one of the texts found, or is one of the numbers.

    Source: `eval_open` of MMMU (eval_utils.py).
    """
    wanted = [value for truth in truths for value in mmmu_values(truth)]
    texts = [value for value in found if isinstance(value, str)]
    return any(
        value in found if not isinstance(value, str) else any(value in text for text in texts) for value in wanted
    )
