"""Questions about a mosaic, given the label of each of its cells.

A mosaic is here a list of labels, row by row: (shape, color), or the word that is written in a cell. `compose` draws
one on which a question of a given kind has a balanced answer; `subjects` says what else can be asked about it;
`answer` and `wording` turn a subject into words. Rows and columns count from 1.

| kind | subject | example | looks at |
|---|---|---|---|
| color_at, shape_at | cell index | what color is in row 2, column 3? | one cell, named by its place |
| shape_of, color_of | a color, a shape that occurs once | what shape is red? | one cell, to be found |
| exists | (shape, color) | is there a teal triangle? | all cells |
| count_shape, count_color | a shape, a color | how many shapes are red? | all cells |
| word_at | cell index | what word is in row 2, column 3? | one cell, named by its place |
| word_row, word_column | a word | which row is the word lamp in? | one cell, to be found |
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

from .pictures import COLORS, SHAPES

KINDS = ("color_at", "shape_at", "shape_of", "color_of", "exists", "count_shape", "count_color")
WORD_KINDS = ("word_at", "word_row", "word_column")  # of mosaics with words
LARGEST_COUNT = 5

Pair = tuple[str, str]
Label = Pair | str
Subject = int | str | Pair

PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
WORDINGS = {
    "color_at": ("What color is in row {}, column {}?", "Row {}, column {}: what color is it?"),
    "shape_at": ("What shape is in row {}, column {}?", "Row {}, column {}: what shape is it?"),
    "shape_of": ("What shape is {}?", "What is the {} shape?"),
    "color_of": ("What color is the {}?", "What is the color of the {}?"),
    "exists": ("Is there a {1} {0}?", "Do you see a {1} {0}?"),
    "count_shape": ("How many {}s are there?", "Count the {}s."),
    "count_color": ("How many shapes are {}?", "Count the {} shapes."),
}
WORD_WORDINGS = {
    "word_at": ("What word is in row {}, column {}?", "Row {}, column {}: what word is it?"),
    "word_row": ("Which row is the word {} in?", "In which row is the word {}?"),
    "word_column": ("Which column is the word {} in?", "In which column is the word {}?"),
}
ALL_WORDINGS = {**WORDINGS, **WORD_WORDINGS}


def compose(kind: str, cells: int, rng: Random, words: Sequence[str] = ()) -> tuple[list[Label], Subject]:
    """Draws the labels of `cells` cells and a subject that `kind` can ask about them.

    Counts are uniform from 0 to `LARGEST_COUNT` (or `cells`), yes and no equally likely; every other label is uniform.

    Args:
        kind: one of `KINDS`, and with `words` of `WORD_KINDS`.
        words: if any, a quarter of the cells hold some of them, each once.

    Raises:
        ValueError: `kind` is unknown, there are no words for it, or `cells` is below 1 (with words below 4).
    """
    if words:
        return _compose_with_words(kind, cells, rng, words)
    if kind not in WORDINGS or cells < 1:
        raise ValueError(f"kind is {kind!r} and cells {cells}, expected one of {KINDS} and at least 1 cell")
    if kind in ("color_at", "shape_at"):
        return [rng.choice(PAIRS) for _ in range(cells)], rng.randrange(cells)
    if kind == "exists":
        pair = rng.choice(PAIRS)
        labels = _others(lambda label: label != pair, cells, rng)
        if rng.random() < 0.5:
            labels[rng.randrange(cells)] = pair
        return labels, pair
    part = _part(kind)
    subject = rng.choice((SHAPES, COLORS)[part])
    count = rng.randint(0, min(LARGEST_COUNT, cells)) if kind.startswith("count") else 1
    labels = _others(lambda label: label[part] != subject, cells, rng)
    for cell in rng.sample(range(cells), count):
        shape, color = rng.choice(PAIRS)
        labels[cell] = (shape, subject) if part else (subject, color)
    return labels, subject


def _compose_with_words(kind: str, cells: int, rng: Random, words: Sequence[str]) -> tuple[list[Label], Subject]:
    count = min(cells // 4, len(words))
    if kind not in (*KINDS, *WORD_KINDS) or count < 1:
        raise ValueError(
            f"kind is {kind!r} and cells {cells}, expected one of {(*KINDS, *WORD_KINDS)} and with words 4 cells"
        )
    places = sorted(rng.sample(range(cells), count))
    others = [cell for cell in range(cells) if cell not in places]
    labels: list[Label] = [""] * cells
    pairs, subject = compose("color_at" if kind in WORD_KINDS else kind, len(others), rng)
    for cell, label in (*zip(others, pairs, strict=True), *zip(places, rng.sample(words, count), strict=True)):
        labels[cell] = label
    if kind in WORD_KINDS:
        return labels, rng.choice(subjects(kind, labels, rng))
    return labels, others[subject] if isinstance(subject, int) else subject


def subjects(kind: str, labels: list[Label], rng: Random) -> list[Subject]:
    """All that `kind` can be asked about `labels`; for "exists" the present or the absent pairs, as `rng` tosses."""
    words = {cell: label for cell, label in enumerate(labels) if isinstance(label, str)}
    if kind in WORD_KINDS:
        return list(words) if kind == "word_at" else list(words.values())
    if kind in ("color_at", "shape_at"):
        return [cell for cell in range(len(labels)) if cell not in words]
    labels = [label for label in labels if not isinstance(label, str)]
    if kind == "exists":
        present = set(labels)
        absent = [pair for pair in PAIRS if pair not in present]
        return absent if absent and rng.random() < 0.5 else sorted(present)
    part = _part(kind)
    counts = Counter(label[part] for label in labels)
    if kind.startswith("count"):
        return [word for word in (SHAPES, COLORS)[part] if counts[word] <= LARGEST_COUNT]
    return [word for word, count in counts.items() if count == 1]


def answer(kind: str, labels: list[Label], subject: Subject, columns: int) -> str:
    """The one right answer: a lower-case word or a number; `columns` is the mosaic's width in cells."""
    if kind == "word_at":
        return labels[subject]
    if kind in WORD_KINDS:
        row, column = divmod(labels.index(subject), columns)
        return str((row if kind == "word_row" else column) + 1)
    if kind in ("color_at", "shape_at"):
        return labels[subject][kind == "color_at"]
    if kind == "exists":
        return "yes" if subject in labels else "no"
    part = _part(kind)
    found = [label for label in labels if label[part] == subject]
    return str(len(found)) if kind.startswith("count") else found[0][1 - part]


def wording(
    kind: str, subject: Subject, columns: int, rng: Random, wordings: Mapping[str, Sequence[str]] = ALL_WORDINGS
) -> str:
    """The question in words, one of `wordings[kind]`; `columns` is the mosaic's width in cells."""
    if isinstance(subject, int):
        subject = (subject // columns + 1, subject % columns + 1)
    return rng.choice(wordings[kind]).format(*(subject if isinstance(subject, tuple) else (subject,)))


def _part(kind: str) -> int:
    """Which half of a label the subject of `kind` names: 0 the shape, 1 the color."""
    return int(kind in ("shape_of", "count_color"))


def _others(wanted, cells: int, rng: Random) -> list[Pair]:
    allowed = [pair for pair in PAIRS if wanted(pair)]
    return [rng.choice(allowed) for _ in range(cells)]
