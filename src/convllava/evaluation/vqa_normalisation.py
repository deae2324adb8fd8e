"""How VQA accuracy reads a text before it compares: lower case, digits, no articles, no punctuation, apostrophes.

Source: the answer processor of the TextVQA challenge (`EvalAIAnswerProcessor` of facebookresearch/mmf), which carries
on the evaluation of VQA (Antol et al., arXiv 1505.00468). Its oddities are kept, since published numbers have them.
"""

from __future__ import annotations

import re
from functools import lru_cache

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
# Forms with their apostrophes; the official table lists what they become when one of them is left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


@lru_cache
def _restored() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # the other way round in the official table too
    for form in _CONTRACTIONS.split():
        for place, character in enumerate(form):
            if character == "'":
                table[form[:place] + form[place + 1 :]] = form
    return table


def normalise(text: str) -> str:
    """A text as VQA accuracy compares it; normalising again may change it once more, as officially."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_restored().get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark that stands beside a blank anywhere in the text vanishes; any other becomes a blank."""
    before = text
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in before or f" {mark}" in before else " ")
    return _PERIOD.sub("", text)
