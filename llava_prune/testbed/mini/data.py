"""The files that pruners are trained on and methods are compared on.

DIR/train.json, DIR/images/train/       mosaics of easy-VQA's train split and of words; some questions share one
DIR/val.jsonl, DIR/val_answers.jsonl    mosaics of pictures of its train split that nothing was trained on
DIR/test.jsonl, DIR/test_answers.jsonl  mosaics of its test split and of other copies of the words
DIR/<set>.jsonl, DIR/<set>_answers.jsonl, DIR/images/<set>/   the same for every transfer set:
    4x4, ...   other grids
    wordings   questions asked in words that nothing was trained on
    plain      one picture of easy-VQA's test split over the whole, the package's own question and answer
DIR/mini.json                           the parameters, written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from ..mosaic import Mosaic, MosaicSampler, Turn, paint
from ..pictures import Pictures, load_pictures
from ..prepare import Sample, conversation, write_pictures, write_questions, write_text
from ..questions import Label
from ..words import with_words
from .size import MiniSize
from .wordings import HELD_OUT, TRAINED

RECORD = "mini.json"
HELD_BACK = 10  # one picture of the train split in so many is not trained on
WHOLE = (1, 1)


@dataclass(frozen=True)
class DataAmounts:
    """How much is written.

    Attributes:
        mosaics: to train on.
        turns: questions about each of them, every one a sample of its own.
        questions: of val, of the test, and of each transfer set.
        seed: other seeds, other data.
    """

    mosaics: int = 6000
    turns: int = 8
    questions: int = 1000
    seed: int = 0


def held_back(groups: dict[Label, list[int]], wanted: bool) -> dict[Label, list[int]]:
    """Those of the train split's pictures that are held back, or else the others; by label."""
    return {label: [i for i in group if (i % HELD_BACK == 0) == wanted] for label, group in groups.items()}


def transfer_sets(size: MiniSize) -> list[str]:
    """Names of the sets beside `val` and `test`."""
    return [*(f"{rows}x{columns}" for rows, columns in size.other_grids), "wordings", "plain"]


def write_data(out: Path, size: MiniSize, amounts: DataAmounts) -> Path:
    """Writes the files listed above, unless they are there, and returns `out`; it exists."""
    record, parameters = out / RECORD, {"size": size.name, **asdict(amounts)}
    if record.is_file() and json.loads(record.read_text()) == parameters:
        return out
    record.unlink(missing_ok=True)
    train = _mosaics(out, size, "train", size.grid, TRAINED, amounts.mosaics, amounts.turns, amounts.seed)
    write_text(out / "train.json", json.dumps(_one_question_each(train), indent=1))
    sets = {"val": (size.grid, TRAINED), "test": (size.grid, TRAINED), "wordings": (size.grid, HELD_OUT)}
    sets |= {f"{grid[0]}x{grid[1]}": (grid, TRAINED) for grid in size.other_grids}
    for name, (grid, wordings) in sets.items():
        samples = _mosaics(out, size, name, grid, wordings, amounts.questions, 1, amounts.seed)
        write_questions(out / f"{name}.jsonl", out / f"{name}_answers.jsonl", samples)
    write_questions(out / "plain.jsonl", out / "plain_answers.jsonl", _plain(out, size, amounts))
    write_text(record, json.dumps(parameters, indent=1) + "\n")
    return out


def _mosaics(
    out: Path,
    size: MiniSize,
    name: str,
    grid: tuple[int, int],
    wordings: Mapping[str, Sequence[str]],
    count: int,
    turns: int,
    seed: int,
) -> list[Sample]:
    split = "train" if name in ("train", "val") else "test"
    pictures = with_words(load_pictures(split), split)
    groups = pictures.by_label()
    if split == "train":
        groups = held_back(groups, name == "val")
    sampler = MosaicSampler(groups, grid, Random(f"mini {name} {seed}"), wordings)
    mosaics = [sampler.draw(sampler.kinds[number % len(sampler.kinds)], turns) for number in range(count)]
    return _written(out, size, name, pictures, mosaics, grid)


def _plain(out: Path, size: MiniSize, amounts: DataAmounts) -> list[Sample]:
    pictures, asked = load_pictures("test"), plain_questions("test")
    rng = Random(f"mini plain {amounts.seed}")
    chosen = [rng.randrange(len(pictures.labels)) for _ in range(amounts.questions)]
    mosaics = [Mosaic((index,), (pictures.labels[index],), (rng.choice(asked[index]),)) for index in chosen]
    return _written(out, size, "plain", pictures, mosaics, WHOLE)


def _written(
    out: Path, size: MiniSize, name: str, pictures: Pictures, mosaics: list[Mosaic], grid: tuple[int, int]
) -> list[Sample]:
    def painter(mosaic: Mosaic):
        return paint(pictures, mosaic, grid, size.cell(grid), size.pixels)

    return write_pictures(out, Path("images") / name, name, mosaics, painter)


def plain_questions(split: str) -> list[list[Turn]]:
    """The package's own questions and answers about each of its pictures, in `load_pictures`'s order."""
    import easy_vqa

    questions, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    by_picture: list[list[Turn]] = [[] for _ in getattr(easy_vqa, f"get_{split}_image_paths")()]
    for question, answer, image in zip(questions, answers, images, strict=True):
        by_picture[image].append(Turn("plain", f"{question[0].upper()}{question[1:]}", answer))
    return by_picture


def _one_question_each(samples: list[Sample]) -> list[dict]:
    """A sample a question: tests ask one question a picture, and a pruner is trained on one at a time."""
    return [
        conversation(f"{name}-{number}", image, Mosaic(mosaic.pictures, mosaic.labels, (turn,)))
        for name, image, mosaic in samples
        for number, turn in enumerate(mosaic.turns)
    ]
