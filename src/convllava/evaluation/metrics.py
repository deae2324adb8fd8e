"""Metrics: does an answer match the truth, and how well."""

import re
from collections.abc import Sequence

from convllava.errors import ConfigError
from convllava.geometry import Box, parse_box


def exact_match(answer: str, truth: str) -> bool:
    """Return whether both texts are equal, apart from white space at the ends."""
    return answer.strip() == truth.strip()


def relaxed_match(answer: str, truth: str, tolerance: float = 0.05) -> bool:
    """Return whether two numbers differ by at most `tolerance` of the truth, or two other texts are equal.

    Source: relaxed accuracy of ChartQA (arXiv 2203.10244, section 5), there attributed to PlotQA.
    """
    try:
        value, target = float(answer), float(truth)
    except ValueError:
        return exact_match(answer, truth)
    return abs(value - target) <= tolerance * abs(target)


def chart_match(answer: str, truth: str, tolerance: float = 0.05) -> bool:
    """Return `relaxed_match` as ChartQA's numbers are published: percentages are numbers, case does not matter.

    "45%" is 0.45 on both sides, so "45" is wrong if the truth is "45%". If the truth is 0 or not a number, the texts
    must be equal except for case. Numbers with thousands separators are not numbers.

    Source: `relaxed_correctness` of google-research/pix2struct (metrics.py), the rule with which Qwen-VL, VLMEvalKit
    and lmms-eval report ChartQA.
    """
    value, target = _number(answer), _number(truth)
    if value is not None and target:
        return abs(value - target) / abs(target) <= tolerance
    return answer.strip().lower() == truth.strip().lower()


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return the VQA accuracy: leave out each person's answer in turn, and average min(1, equal answers left / 3).

    With ten people: 0, 0.3, 0.6, 0.9, 1 for none, one, two, three, and four or more who agree.

    Source: arXiv 1505.00468 (VQA); the TextVQA challenge leaves out each answer in turn. Texts are compared after
    `normalise`.
    """
    found, given = normalise(answer), [normalise(truth) for truth in truths]
    agreeing = given.count(found)
    shares = [min(1.0, (agreeing - (truth == found)) / 3) for truth in given]
    return sum(shares) / len(shares)


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Return the similarity to the nearest truth (ANLS), or 0 if it is below the threshold.

    A similarity of exactly 0.5 counts as 0.5, as in the official script (`if result < threshold: result = 0`); the
    formula in the paper keeps only similarities *above* 0.5. Texts are compared in lower case and with single spaces.
    The script takes their lengths before that step, so extra spaces would add similarity.

    Source: arXiv 1905.13648 (ST-VQA), equation 1; arXiv 2007.00398 (DocVQA); the script of rrc.cvc.uab.es, task 17.
    """
    nearest = max(similarity(answer, truth) for truth in truths)
    return nearest if nearest >= threshold else 0.0


def similarity(a: str, b: str) -> float:
    """Return 1 minus the edit distance (Levenshtein) over the length of the longer text; 1 for two empty texts.

    Raises:
        ConfigError: if rapidfuzz is missing.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ConfigError("ANLS needs rapidfuzz; pip install 'convllava[eval]'") from None
    a, b = " ".join(a.lower().split()), " ".join(b.lower().split())
    longer = max(len(a), len(b))
    return 1 - Levenshtein.distance(a, b) / longer if longer else 1.0


def contains(answer: str, truths: Sequence[str], *, is_formula: bool = False) -> bool:
    """Return whether the answer contains one of the truths, ignoring case; in formulas, ignoring spaces but not case.

    Source: OCRBench (arXiv 2305.07895): containment for all tasks; handwritten mathematical expressions (HME100k) are
    compared without spaces and with their case.
    """

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    return any(plain(truth) in plain(answer) for truth in truths)


def intersection_over_union(a: Box, b: Box) -> float:
    """Return the shared area over the area that either box covers, 0 to 1; 0 for boxes without area."""

    def area(box: Box) -> float:
        return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)

    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    covered = area(a) + area(b) - shared
    return shared / covered if covered > 0 else 0.0


def box_match(answer: str, truth: str, threshold: float = 0.5) -> bool:
    """Return whether both texts have a box and the boxes' IoU reaches the threshold (the RefCOCO rule)."""
    found, target = parse_box(answer), parse_box(truth)
    return found is not None and target is not None and intersection_over_union(found, target) >= threshold


# The text normalisation of VQA accuracy.
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
# The official table lists these words without one of their apostrophes.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_RESTORED = (
    {"somebody'd": "somebodyd"}
    | {  # the official table has this one reversed
        form[:place] + form[place + 1 :]: form
        for form in _CONTRACTIONS.split()
        for place, character in enumerate(form)
        if character == "'"
    }
)


def normalise(text: str) -> str:
    """Return a text as VQA accuracy compares it: lower case, digits, no articles or punctuation, apostrophes restored.

    Normalising twice may change a text once more, as in the official code. Its oddities are kept, because published
    numbers have them.

    Source: the answer processor of the TextVQA challenge (`EvalAIAnswerProcessor` of facebookresearch/mmf), which
    continues the evaluation of VQA (arXiv 1505.00468).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    before = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        # A mark that is next to a space anywhere in the text is removed; any other becomes a space.
        text = text.replace(mark, "" if f"{mark} " in before or f" {mark}" in before else " ")
    words = [_NUMBER_WORDS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
