"""Attention targets: for each text position, the visual tokens that show the text which the model needs there.

A small language model that trains on answers alone learns to guess the most common object, and for thousands of steps
it does not learn to look one up: attention gets no gradient before the model uses the attended values, and the model
does not learn to use them before attention selects them. The generated world knows where everything is, so training can
supervise the attention directly (see `training.objectives.attention_supervision`).

There are two kinds of target. `answer` targets hold the next token of the answer. `mention` targets hold the words and
objects that the question names. Questions have targets too if they spell a printed word: reading "How much is the
Towel?" letter by letter is the same search as writing "Towel".
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from convllava.data.collate import IGNORE, TARGET_KINDS
from convllava.data.dense_labels import Word, printed_words, word_text
from convllava.geometry import Box, Placement, Size, cells_under, grid, parse_box
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import COLOURS, POSITIONS, SHAPES, Glyph, Sample, Turn, position_of

CAPTION = "caption"
"""The task of a turn that is answered by the caption."""
Cells = frozenset[tuple[int, int]]
"""Visual tokens as (row, column) of the grid."""
FIRST_POSITION = (-1, -1)
"""Represents the first position of the sequence, the target if there are no objects to count."""
_SPACE, _OTHER_SPACE = "\u2581", "\u0120"
"""How tokenizers write a space before a word."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class PageCells:
    """Finds the visual tokens of a sample's characters and objects.

    Args:
        sample: The generated page.
        placement: How the image processor places the page on its canvas.
        stride: Side of a visual token in pixels.

    Attributes:
        grid: The visual tokens of the page.
        printed: All printed characters.
        words: The printed words by their text in lower case, each as its characters without punctuation around them.
        word_bounds: Indices in `printed` at which a word begins or ends, with and without its punctuation.
    """

    def __init__(self, sample: Sample, placement: Placement, stride: int) -> None:
        self.sample, self.placement, self.grid = sample, placement, grid(placement.canvas, stride)
        self.printed = "".join(glyph.char for glyph in sample.glyphs)
        self._cells: dict[Box, Cells] = {}
        self.words: dict[str, list[Word]] = {}
        self.word_bounds: set[int] = set()
        start = 0
        for word in printed_words(sample):
            text = word_text(word)
            begin = "".join(glyph.char for glyph in word).index(text)
            self.words.setdefault(text.lower(), []).append(word[begin : begin + len(text)])
            self.word_bounds |= {start, start + begin, start + begin + len(text), start + len(word)}
            start += len(word)

    def cells(self, box: Box) -> Cells:
        """Return the cells under a box in pixels of the image."""
        if box not in self._cells:  # most boxes are needed several times
            self._cells[box] = frozenset(cells_under(self.placement.box_to_normalised(box), self.grid))
        return self._cells[box]

    def objects(self, shapes: Iterable[str], colours: Iterable[str], position: str | None = None) -> Cells:
        """Return the cells of all objects with one of the shapes, one of the colours and the position.

        An empty collection or None allows any.
        """
        shapes, colours = set(shapes), set(colours)
        width, height = self.sample.image.size
        return frozenset().union(
            *(
                self.cells(thing.box)
                for thing in self.sample.things
                if (not shapes or thing.shape in shapes)
                and (not colours or thing.colour in colours)
                and (position is None or position_of(thing.box, width, height) == position)
            )
        )

    def find(self, text: str, after: int = 0) -> list[int]:
        """Return the indices at which `text`, without its spaces, is printed, from index `after` on."""
        text = text.replace(" ", "")
        found = [match.start() for match in re.finditer(f"(?={re.escape(text)})", self.printed[after:])] if text else []
        return [after + start for start in found]

    def characters(self, text: str, starts: Sequence[int]) -> list[Cells]:
        """Return the cells of each character of `text`, which is printed at every index in `starts`. A space gets the
        cells of the character after it."""
        cells: list[Cells] = []
        step = len(text.replace(" ", ""))
        last = step - 1
        for char in reversed(text):
            step -= char != " "
            boxes = [self.sample.glyphs[start + min(step, last)].box for start in starts]
            cells.append(frozenset().union(*map(self.cells, boxes)))
        return cells[::-1]


def answer_cells(page: PageCells, turn: Turn) -> list[Cells]:
    """Return the target cells of each character of the turn's answer; empty sets if there is no target."""
    answer = turn.answer
    if (box := parse_box(answer)) is not None:
        width, height = page.sample.image.size
        cells = page.cells((box[0] * width, box[1] * height, box[2] * width, box[3] * height))
    elif turn.task == "count":
        # The number of objects is the position label of the last counted object.
        cells = page.cells(turn.evidence[-1]) if turn.evidence else frozenset([FIRST_POSITION])
    elif turn.task in ("shape", "colour", "position"):
        text = f"{turn.question} {turn.answer}"
        named = set(re.findall("[a-z]+", text.lower()))
        positions = sorted((position for position in POSITIONS if position in text), key=len)
        cells = page.objects(named & set(SHAPES), named & set(COLOURS), positions[-1] if positions else None)
    else:
        # Prefer whole words. If the turn has evidence, use only the texts that begin in it.
        starts, length = page.find(answer), len(answer.replace(" ", ""))
        starts = [start for start in starts if {start, start + length} <= page.word_bounds] or starts
        starts = [start for start in starts if not turn.evidence or page.sample.glyphs[start].box in turn.evidence]
        if 0 < len(starts) <= 4:  # a text that is printed more often, such as "1", does not show where to look
            return page.characters(answer, starts)
        cells = frozenset().union(*map(page.cells, turn.evidence)) or mentioned_cells(page, turn.question)
    return [cells] * len(answer)


def mentioned_cells(page: PageCells, question: str) -> Cells:
    """Return the cells of the printed words that a question names, such as the label of a row."""
    return frozenset().union(*whole_word_cells(page, question))


def whole_word_cells(page: PageCells, question: str) -> list[Cells]:
    """Return for each character of a question the cells of the whole printed word that it belongs to."""
    return _cells_by_word(page, question, lambda words, _: [glyph for word in words for glyph in word])


def spelled_cells(page: PageCells, question: str) -> list[Cells]:
    """Return for each character of a question the cells of the same character in the printed word."""
    return _cells_by_word(page, question, lambda words, index: [word[index] for word in words if index < len(word)])


def _cells_by_word(page: PageCells, question: str, pick: Callable[[list[Word], int], list[Glyph]]) -> list[Cells]:
    """Return the cells for each character of the question. `pick` chooses their glyphs: it gets the printed words that
    equal the character's word, and the index of the character in that word."""
    cells: list[Cells] = [frozenset()] * len(question)
    for match in re.finditer(r"[\w']+", question):
        words = page.words.get(match[0].lower(), [])
        for index in range(len(match[0]) if len(words) <= 2 else 0):
            glyphs = pick(words, index)
            cells[match.start() + index] = frozenset().union(*(page.cells(glyph.box) for glyph in glyphs))
    return cells


def caption_cells(page: PageCells, caption: str) -> list[Cells]:
    """Return the target cells of each character of a caption; its words have the order in which the page was drawn."""
    cells: list[Cells]
    if page.sample.kind == "scene":
        # "2 objects: a red square at the top, ...": each part after the colon describes one object.
        opening, _, objects = caption.partition(":")
        cells = [page.objects([], [])] * (len(opening) + 1)
        for part, thing in zip(objects.split(","), page.sample.things, strict=True):
            cells += [page.cells(thing.box)] * (len(part) + 1)
        return cells[: len(caption)]
    cells = []
    after = 0
    for word in re.findall(r"\s*\S+|\s+", caption):
        bare = word.rstrip(".,:;")
        starts = page.find(bare.strip(), after) or page.find(bare.strip())
        if starts and len(bare.strip()) > 1:
            cells += page.characters(bare, starts[:1])
            after = starts[0] + len(bare.strip())
        else:
            cells += [frozenset()] * len(bare)
        cells += [frozenset()] * (len(word) - len(bare))
    return cells


def token_cells(pieces: Sequence[str], cells: Sequence[Cells], start: int = -1) -> list[Cells]:
    """Return the cells of each token, given the tokens as text and the cells of each character.

    `start` is the index of the first token's first character; -1 is a space before the text.
    """
    lengths = (1 if _BYTE.fullmatch(piece) else len(piece) for piece in pieces)
    bounds = pairwise(accumulate(lengths, initial=start))
    return [frozenset().union(*cells[max(begin, 0) : max(end, 0)]) for begin, end in bounds]


def attention_targets(
    encoded: dict[str, Tensor], turns: Sequence[Turn], sample: Sample, processor: ConvLlavaProcessor
) -> dict[str, Tensor]:
    """Return where the positions of an encoded conversation should attend to predict their next tokens.

    Args:
        encoded: From `collate.encode`: the sample's image, then these turns.
        turns: The conversation; the answer of a turn with the task "caption" is the sample's caption.
        sample: The page.
        processor: The processor that encoded the conversation.

    Returns:
        `answer_targets` and `mention_targets`, (pairs, 2) each: a position of the sequence, and a position that it
        should attend to.
    """
    pixels = processor.image_processor
    page = PageCells(sample, pixels.placement(Size(sample.image.height, sample.image.width)), pixels.stride)
    first = int((encoded["input_ids"] == processor.image_token_id).nonzero()[0, 0])
    row_length = page.grid.width + processor.row_separator
    pieces = processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"].tolist())
    spans = answer_spans(encoded["labels"])
    pairs: dict[str, list[tuple[int, int]]] = {kind: [] for kind in TARGET_KINDS}

    def add(kind: str, position: int, cells_of_tokens: Sequence[Cells]) -> None:
        for offset, cells in enumerate(cells_of_tokens):
            for cell in sorted(cells):
                target = 0 if cell == FIRST_POSITION else first + cell[0] * row_length + cell[1]
                pairs[kind].append((position + offset, target))

    for turn, (start, stop), (_, before) in zip(turns, spans, [(0, 0), *spans[:-1]], strict=True):
        answer = pieces[start : stop - 1]
        if turn.task == CAPTION:
            add("answer", start - 1, token_cells(answer, caption_cells(page, turn.answer)))
            continue
        add("answer", start - 1, token_cells(answer, answer_cells(page, turn)))
        add("mention", start - 1, [mentioned_cells(page, turn.question)] * len(answer))
        # The question's own tokens: the printed word that they spell, and the character that comes next in it.
        question = pieces[before:start]
        begin, end, offset = question_span(question, turn.question)
        words, characters = (
            token_cells(question[begin:end], cells, offset)
            for cells in (whole_word_cells(page, turn.question), spelled_cells(page, turn.question))
        )
        add("mention", before + begin, words)
        # The page does not determine the first token of a word, because the question could name any word.
        continues = [one == other != frozenset() for one, other in pairwise(words)]
        following = [cells if same else frozenset() for same, cells in zip(continues, characters[1:], strict=True)]
        add("answer", before + begin, following)
    return {f"{kind}_targets": torch.tensor(pairs[kind], dtype=torch.long).view(-1, 2) for kind in pairs}


def question_span(pieces: Sequence[str], question: str) -> tuple[int, int, int]:
    """Return the start and stop of the tokens that write the question, and the character with which the first begins.

    -1 is the space before the question. All three are zero if no tokens write it, for example because the tokenizer
    normalises the text.
    """
    marked = question.replace(" ", _SPACE)
    written = [_BYTE.sub("?", piece).replace(_OTHER_SPACE, _SPACE) for piece in pieces]
    place = "".join(written).rfind(marked)
    starts = [0, *accumulate(map(len, written))]
    if place < 0 or place + len(marked) not in starts:
        return 0, 0, 0
    begin = bisect_right(starts, place) - 1
    return begin, starts.index(place + len(marked)), starts[begin] - place


def answer_spans(labels: Tensor) -> list[tuple[int, int]]:
    """Return start and stop of each run of supervised tokens."""
    supervised = torch.nn.functional.pad((labels != IGNORE).long(), (1, 1))
    change = supervised.diff()
    starts, stops = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
