"""Questions about a mosaic, given the label of each of its cells.

A mosaic is here a list of (shape, color), row by row. `compose` draws one on which a question of a given kind has a
balanced answer; `subjects` says what else can be asked about it; `answer` and `wording` turn a subject into words.
Rows and columns count from 1.

| kind | subject | example | looks at |
|---|---|---|---|
| color_at, shape_at | cell index | what color is in row 2, column 3? | one cell, named by its place |
| shape_of, color_of | a color, a shape that occurs once | what shape is red? | one cell, to be found |
| exists | (shape, color) | is there a teal triangle? | all cells |
| count_shape, count_color | a shape, a color | how many shapes are red? | all cells |
"""

from collections import Counter
from random import Random

from .pictures import COLORS, SHAPES

KINDS = ("color_at", "shape_at", "shape_of", "color_of", "exists", "count_shape", "count_color")
LARGEST_COUNT = 5

Label = tuple[str, str]
Subject = int | str | Label

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


def compose(kind: str, cells: int, rng: Random) -> tuple[list[Label], Subject]:
    """Draws the labels of `cells` cells and a subject that `kind` can ask about them.

    Counts are uniform from 0 to `LARGEST_COUNT` (or `cells`), yes and no equally likely; every other label is uniform.

    Raises:
        ValueError: `kind` is unknown or `cells` is below 1.
    """
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


def subjects(kind: str, labels: list[Label], rng: Random) -> list[Subject]:
    """All that `kind` can be asked about `labels`; for "exists" the present or the absent pairs, as `rng` tosses."""
    if kind in ("color_at", "shape_at"):
        return list(range(len(labels)))
    if kind == "exists":
        present = set(labels)
        absent = [pair for pair in PAIRS if pair not in present]
        return absent if absent and rng.random() < 0.5 else sorted(present)
    part = _part(kind)
    counts = Counter(label[part] for label in labels)
    if kind.startswith("count"):
        return [word for word in (SHAPES, COLORS)[part] if counts[word] <= LARGEST_COUNT]
    return [word for word, count in counts.items() if count == 1]


def answer(kind: str, labels: list[Label], subject: Subject) -> str:
    """The one right answer: a lower-case word or a digit."""
    if kind in ("color_at", "shape_at"):
        return labels[subject][kind == "color_at"]
    if kind == "exists":
        return "yes" if subject in labels else "no"
    part = _part(kind)
    found = [label for label in labels if label[part] == subject]
    return str(len(found)) if kind.startswith("count") else found[0][1 - part]


def wording(kind: str, subject: Subject, columns: int, rng: Random) -> str:
    """The question in words, one of `WORDINGS[kind]`; `columns` is the mosaic's width in cells."""
    if isinstance(subject, int):
        subject = (subject // columns + 1, subject % columns + 1)
    return rng.choice(WORDINGS[kind]).format(*(subject if isinstance(subject, tuple) else (subject,)))


def _part(kind: str) -> int:
    """Which half of a label the subject of `kind` names: 0 the shape, 1 the color."""
    return int(kind in ("shape_of", "count_color"))


def _others(wanted, cells: int, rng: Random) -> list[Label]:
    allowed = [pair for pair in PAIRS if wanted(pair)]
    return [rng.choice(allowed) for _ in range(cells)]
