"""Where on the page stands what a conversation speaks of: what the language model's attention is told to look at.

A small language model that has only answers to learn from finds the commonest object of a scene at once and then,
for thousands of steps, not how to look one up: the score of "which token do I need" has no gradient until the value of
that token is used, and the other way round. The generated world knows the place, so training can point there (see
`training.attention`). Answers, and the words that a question names, are looked for among what was printed and drawn;
what stands nowhere on its page has no guide. What a question counts and where a chart shows a value, the world tells:
how many there are is the number of the last of them (see `data.marks`).

Questions are guided too, where they spell a word of the page: reading "How much is the Towel?" letter by letter is the
same search as writing "Towel", and it has to be over before the answer begins.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from convllava.data.collate import GUIDES, IGNORE
from convllava.data.dense_labels import Word, text_of, words
from convllava.geometry import Box, Placement, Size, cells_under, grid, parse_box
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import COLOURS, POSITIONS, SHAPES, Glyph, Sample, Turn, position_of

CAPTION = "caption"
"""The task of a turn that is answered by the caption."""
Cells = frozenset[tuple[int, int]]
NOWHERE = (-1, -1)
"""In place of a cell: the first position of the sequence, which is always the same token."""
_MOST_OCCURRENCES = 4
"""What is printed more often than this ("1") says nothing about where to look."""
_MOST_NAMESAKES = 2
_SPACE = "\u2581"
_SPACES = _SPACE + "\u0120"
"""How tokenizers write a space before a word."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Page:
    """The visual tokens, as cells (row, column), in which a sample's characters and things stand."""

    def __init__(self, sample: Sample, placement: Placement, stride: int) -> None:
        self.sample, self.placement, self.grid = sample, placement, grid(placement.canvas, stride)
        self.printed = "".join(glyph.char for glyph in sample.glyphs)
        self._cells: dict[Box, Cells] = {}

    def cells(self, box: Box) -> Cells:
        """The cells under a box in pixels of the image."""
        if box not in self._cells:  # most boxes are asked for several times
            self._cells[box] = frozenset(cells_under(self.placement.box_to_normalised(box), self.grid))
        return self._cells[box]

    def things(self, shapes: Iterable[str], colours: Iterable[str], place: str | None = None) -> Cells:
        """Of every thing that has one of these shapes, one of these colours and this place; nothing named, any."""
        shapes, colours = set(shapes), set(colours)
        width, height = self.sample.image.size
        return frozenset().union(
            *(
                self.cells(thing.box)
                for thing in self.sample.things
                if (not shapes or thing.shape in shapes)
                and (not colours or thing.colour in colours)
                and (place is None or position_of(thing.box, width, height) == place)
            )
        )

    def named(self, text: str) -> list[Word]:
        """The printed words that read `text`, in lower case, unless they are too many to mean one place."""
        found = self.words.get(text, [])
        return found if len(found) <= _MOST_NAMESAKES else []

    @cached_property
    def words(self) -> dict[str, list[Word]]:
        """The printed words by what they say, in lower case; of each its characters without punctuation around them."""
        found: dict[str, list[Word]] = {}
        for word in words(self.sample):
            text = text_of(word)
            begin = "".join(glyph.char for glyph in word).index(text)
            found.setdefault(text.lower(), []).append(word[begin : begin + len(text)])
        return found

    @cached_property
    def bounds(self) -> set[int]:
        """The numbers of the printed characters before which a word begins or ends, with the punctuation around it or
        without."""
        found: set[int] = set()
        start = 0
        for word in words(self.sample):
            text = text_of(word)
            begin = start + "".join(glyph.char for glyph in word).index(text)
            found |= {start, begin, begin + len(text), start + len(word)}
            start += len(word)
        return found

    def find(self, text: str, after: int = 0) -> list[int]:
        """Where `text`, its spaces left out, stands among the printed characters from number `after` on."""
        text = text.replace(" ", "")
        found = [match.start() for match in re.finditer(f"(?={re.escape(text)})", self.printed[after:])] if text else []
        return [after + start for start in found]

    def characters(self, text: str, starts: Sequence[int]) -> list[Cells]:
        """For each character of `text` the cells where it is printed; a space belongs to what follows it."""
        cells: list[Cells] = []
        step = len(text.replace(" ", ""))
        last = step - 1
        for char in reversed(text):
            step -= char != " "
            boxes = [self.sample.glyphs[start + min(step, last)].box for start in starts]
            cells.append(frozenset().union(*map(self.cells, boxes)))
        return cells[::-1]


def answer_cells(page: Page, turn: Turn) -> list[Cells]:
    """For each character of the turn's answer the cells to look at; empty sets where there is nothing to point at."""
    answer = turn.answer
    if (box := parse_box(answer)) is not None:
        width, height = page.sample.image.size
        everywhere = page.cells((box[0] * width, box[1] * height, box[2] * width, box[3] * height))
    elif turn.task == "count":
        everywhere = _last_counted(page, turn)
    elif turn.task in ("shape", "colour", "position"):
        everywhere = _named_things(page, turn)
    else:
        starts = _printed_as(page, turn)
        if 0 < len(starts) <= _MOST_OCCURRENCES:
            return page.characters(answer, starts)
        everywhere = frozenset().union(*map(page.cells, turn.evidence)) or mentioned_cells(page, turn.question)
    return [everywhere] * len(answer)


def _printed_as(page: Page, turn: Turn) -> list[int]:
    """Where the answer is printed, as whole words if anywhere; of a turn that is read from somewhere, only there."""
    starts, length = page.find(turn.answer), len(turn.answer.replace(" ", ""))
    starts = [start for start in starts if {start, start + length} <= page.bounds] or starts
    return [start for start in starts if not turn.evidence or page.sample.glyphs[start].box in turn.evidence]


def _last_counted(page: Page, turn: Turn) -> Cells:
    """Where the last of what is counted stands, whose number is the answer; nowhere, the first position of all."""
    return page.cells(turn.evidence[-1]) if turn.evidence else frozenset([NOWHERE])


def _named_things(page: Page, turn: Turn) -> Cells:
    text = f"{turn.question} {turn.answer}"
    words = set(re.findall("[a-z]+", text.lower()))
    places = sorted((place for place in POSITIONS if place in text), key=len)
    return page.things(words & set(SHAPES), words & set(COLOURS), places[-1] if places else None)


def mentioned_cells(page: Page, question: str) -> Cells:
    """The cells of the printed words that a question names, such as a row's label: where its answer is looked up."""
    return frozenset().union(*named_cells(page, question))


def named_cells(page: Page, question: str) -> list[Cells]:
    """For each character of a question the cells of the printed word that it belongs to, in whole."""
    return _by_word(page, question, lambda found, _: [glyph for word in found for glyph in word])


def spelled_cells(page: Page, question: str) -> list[Cells]:
    """For each character of a question that belongs to a printed word the cells where that character stands."""
    return _by_word(page, question, lambda found, number: [word[number] for word in found if number < len(word)])


def _by_word(page: Page, question: str, pick: Callable[[list[Word], int], list[Glyph]]) -> list[Cells]:
    """For each character of a question the cells of the glyphs that `pick` takes of the printed words that read as its
    own word, and of the character's number in it."""
    cells: list[Cells] = [frozenset()] * len(question)
    for match in re.finditer(r"[\w']+", question):
        found = page.named(match[0].lower())
        for number in range(len(match[0])):
            glyphs = pick(found, number)
            cells[match.start() + number] = frozenset().union(*(page.cells(glyph.box) for glyph in glyphs))
    return cells


def caption_cells(page: Page, caption: str) -> list[Cells]:
    """As `answer_cells` for a caption: its words follow the order in which the page was printed or drawn."""
    if page.sample.kind == "scene":
        return _scene_cells(page, caption)
    cells: list[Cells] = []
    place = 0
    for word in re.findall(r"\s*\S+|\s+", caption):
        bare = word.rstrip(".,:;")
        starts = page.find(bare.strip(), place) or page.find(bare.strip())
        if starts and len(bare.strip()) > 1:
            cells += page.characters(bare, starts[:1])
            place = starts[0] + len(bare.strip())
        else:
            cells += [frozenset()] * len(bare)
        cells += [frozenset()] * (len(word) - len(bare))
    return cells


def _scene_cells(page: Page, caption: str) -> list[Cells]:
    """Each ", "-separated part of "2 objects: a red square at the top, ..." tells one thing, in the order drawn."""
    opening, _, told = caption.partition(":")
    cells: list[Cells] = [page.things([], [])] * (len(opening) + 1)
    for part, thing in zip(told.split(","), page.sample.things, strict=True):
        cells += [page.cells(thing.box)] * (len(part) + 1)
    return cells[: len(caption)]


def token_cells(pieces: Sequence[str], cells: Sequence[Cells], place: int = -1) -> list[Cells]:
    """The cells of each token of a text, whose character number `place` the first one begins with: -1, a space before
    the text."""
    found = []
    for piece in pieces:
        length = 1 if _BYTE.fullmatch(piece) else len(piece)
        own = cells[max(place, 0) : max(place + length, 0)]
        found.append(frozenset().union(*own))
        place += length
    return found


Guide = tuple[str, int, tuple[int, int]]
"""A kind of guide, the position that it is for, and the cell to look at."""


def guides(
    encoded: dict[str, Tensor], turns: Sequence[Turn], sample: Sample, processor: ConvLlavaProcessor
) -> dict[str, Tensor]:
    """What the positions of an encoded conversation should look at to write their next tokens.

    Args:
        encoded: From `conversation.encode`: the sample's image and then these turns.
        turns: The conversation; a turn of the task "caption" is answered by the sample's caption.
        sample: The page.
        processor: Which encoded it.

    Returns:
        `answer_guides`, to where the next token stands, and `mention_guides`, to what the question names: (pairs, 2)
        each, a position of the sequence, and one that it should look at.
    """
    pixels = processor.image_processor
    page = Page(sample, pixels.placement(Size(sample.image.height, sample.image.width)), pixels.stride)
    first = int((encoded["input_ids"] == processor.image_token_id).nonzero()[0, 0])
    row_length = page.grid.width + processor.row_separator
    pieces = processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"].tolist())
    spans = answer_spans(encoded["labels"])
    pairs: dict[str, list[tuple[int, int]]] = {kind: [] for kind in GUIDES}
    for turn, (start, stop), (_, before) in zip(turns, spans, [(0, 0), *spans[:-1]], strict=True):
        for kind, position, cell in _guides_of(page, turn, pieces, (before, start, stop)):
            target = 0 if cell == NOWHERE else first + cell[0] * row_length + cell[1]
            pairs[kind].append((position, target))
    return {f"{kind}_guides": torch.tensor(pairs[kind], dtype=torch.long).view(-1, 2) for kind in pairs}


def _guides_of(page: Page, turn: Turn, pieces: Sequence[str], bounds: tuple[int, int, int]) -> Iterator[Guide]:
    """Of a turn whose question lies between the first two of `bounds`, and whose answer between the last two."""
    before, start, stop = bounds
    answer = pieces[start : stop - 1]
    if turn.task == CAPTION:
        yield from _pointing("answer", start - 1, token_cells(answer, caption_cells(page, turn.answer)))
        return
    yield from _pointing("answer", start - 1, token_cells(answer, answer_cells(page, turn)))
    yield from _pointing("mention", start - 1, [mentioned_cells(page, turn.question)] * len(answer))
    yield from _reading(page, turn.question, pieces[before:start], before)


def _pointing(kind: str, position: int, cells: Sequence[Cells]) -> Iterator[Guide]:
    for number, found in enumerate(cells):
        yield from ((kind, position + number, cell) for cell in sorted(found))


def _reading(page: Page, question: str, pieces: Sequence[str], start: int) -> Iterator[Guide]:
    """To the printed words that a question's tokens spell, and to what the next token of such a word says."""
    begin, end, place = question_span(pieces, question)
    named, spelled = (
        token_cells(pieces[begin:end], cells, place)
        for cells in (named_cells(page, question), spelled_cells(page, question))
    )
    yield from _pointing("mention", start + begin, named)
    # A word's first token is not foretold by the page: any word could be named.
    goes_on = [before == cells != frozenset() for before, cells in pairwise(named)]
    following = [cells if same else frozenset() for same, cells in zip(goes_on, spelled[1:], strict=True)]
    yield from _pointing("answer", start + begin, following)


def question_span(pieces: Sequence[str], question: str) -> tuple[int, int, int]:
    """Which tokens write the question, and with which of its characters the first of them begins: -1, the space before
    it. Three zeros where none do, as where a tokenizer changes what it reads."""
    marked = question.replace(" ", _SPACE)
    written = [_BYTE.sub("?", piece).replace(_SPACES[1], _SPACE) for piece in pieces]
    place = "".join(written).rfind(marked)
    starts = [0, *accumulate(map(len, written))]
    if place < 0 or place + len(marked) not in starts:
        return 0, 0, 0
    begin = bisect_right(starts, place) - 1
    return begin, starts.index(place + len(marked)), starts[begin] - place


def answer_spans(labels: Tensor) -> list[tuple[int, int]]:
    """Start and stop of each run of supervised tokens."""
    supervised = torch.nn.functional.pad((labels != IGNORE).long(), (1, 1))
    change = supervised.diff()
    starts, stops = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
