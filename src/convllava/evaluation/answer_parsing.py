"""Read answers. An answer that cannot be read is None; nothing is guessed."""

import re
from collections.abc import Sequence

from convllava.evaluation.questions import Question

_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Words before the answer in a sentence that explains it (MMMU)."""


def choice(answer: str, options: Sequence[str], letters: str) -> str | None:
    """Return the letter that an answer chooses. The first of these rules that applies decides:

    1. The answer is a letter, or begins with one that punctuation follows: "B", "(B)", "B.", "B) a dog", "**B**".
    2. It says "answer is B", "answer: B" or "option B"; the last one counts.
    3. Exactly one letter is a word of its own. "A" before a lower-case word is an article.
    4. It is the text of exactly one option, or contains that of exactly one, as whole words, ignoring case.

    Source: VLMEvalKit and lmms-eval look for the same in rules 1 to 3. If no rule applies, they draw a letter at random
    or ask another model; this function returns None.
    """
    text = answer.strip().strip("*`\"' ")
    if not letters or not text:
        return None
    leading = re.match(rf"\(?([{letters}])(?:[).:\]]|\*\*|\s*(?:\n|$))", text)
    if leading := leading or re.fullmatch(rf"([{letters.lower()}])[).]?", text):
        return leading[1].upper()
    announcement = rf"(?:[Aa]nswer(?:\s+is|:)|[Oo]ption)\s*:?\s*[*(\"']*([{letters}])(?![A-Za-z0-9'])"
    if announced := re.findall(announcement, text):
        return announced[-1]
    without_articles = re.sub(r"\bA(?=\s+(?!or\b|and\b)[a-z])", "", text)
    alone = set(re.findall(rf"(?<![A-Za-z0-9'])([{letters}])(?![A-Za-z0-9'])", without_articles))
    if len(alone) == 1:
        return alone.pop()

    def words(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    whole, texts = words(text), [words(option) for option in options]
    equal = [number for number, option in enumerate(texts) if option == whole]
    inside = [number for number, option in enumerate(texts) if option and f" {option} " in f" {whole} "]
    found = equal if len(equal) == 1 else inside
    return chr(ord("A") + found[0]) if len(found) == 1 else None


def written_options(text: str) -> tuple[str, ...]:
    """Return the options in a question's own text, one line each ("A. a dog"), from A on without a gap."""
    found = dict(re.findall(r"^\s*\(?([A-Z])[.)]\s+(.+?)\s*$", text, re.MULTILINE))
    letters = [letter for number, letter in enumerate(sorted(found)) if letter == chr(ord("A") + number)]
    return tuple(found[letter] for letter in letters)


def yes_or_no_at_start(answer: str) -> str | None:
    """Return yes or no if the first four characters contain it.

    Source: `calculation.py` of MME (arXiv 2306.13394), where any other answer is "other" and wrong.
    """
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def yes_or_no_in_sentence(answer: str) -> str | None:
    """Return "no" if the first sentence has the word no or not, else "yes" if it has the word yes.

    Source: `evaluate.py` of POPE (arXiv 2305.10355), which counts every answer without no or not as yes; here an answer
    with neither is None.
    """
    words = set(re.findall(r"[a-z]+", answer.split(".")[0].lower()))
    return "no" if words & {"no", "not"} else "yes" if "yes" in words else None


def mmmu_choice(answer: str, question: Question) -> str | None:
    """Return the letter by MMMU's rule: in brackets, else before a space, else before a full stop; in an answer of more
    than five words also by the text of an option. The last one named counts.

    Source: `parse_multi_choice_response` of MMMU (arXiv 2311.16502; eval_utils.py), which draws a letter at random
    instead of returning None.
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
    """Return what an open answer may mean: the ends of its sentences after words such as "is", and the numbers in them.

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
    """Return a number rounded to two places, or else the text in lower case; a letter gets a space on either side.

    Source: `normalize_str` of MMMU (eval_utils.py).
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def mmmu_open_match(found: set[str | float], truths: Sequence[str]) -> bool:
    """Return whether one of the texts found contains a truth, or one of the numbers equals it.

    Source: `eval_open` of MMMU (eval_utils.py).
    """
    wanted = [value for truth in truths for value in mmmu_values(truth)]
    texts = [value for value in found if isinstance(value, str)]
    return any(
        value in found if not isinstance(value, str) else any(value in text for text in texts) for value in wanted
    )
