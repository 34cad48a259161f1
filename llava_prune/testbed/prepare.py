"""Writes the testbed to a folder: `python -m llava_prune.testbed.prepare --out DIR`.

    DIR/images/train/*.png, DIR/images/test/*.png
    DIR/train.json            LLaVA's conversation file; one sample in four has 2 or 3 turns
    DIR/test.jsonl            LLaVA's question file
    DIR/test_answers.jsonl    for `score`
    DIR/llava-mosaic-tiny/    the base model, see `install`
    DIR/mosaic.json           the parameters, written last

The image folder to give to LLaVA is DIR itself. Train mosaics hold pictures of easy-vqa's train split alone, test
mosaics those of its test split.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np

from ..checkpoint import write_atomically
from .install import install_base
from .mosaic import Mosaic, MosaicSampler, check_grid, paint
from .pictures import load_pictures
from .questions import KINDS

LAYOUT_VERSION = 1
MULTI_TURN_SHARE = 0.25
THREADS = 8  # that write pictures

Sample = tuple[str, str, Mosaic]  # id, path of the picture within the testbed's folder, what it shows


def prepare(
    out_dir: str | os.PathLike,
    train: int = 4000,
    test: int = 600,
    grid: tuple[int, int] = (3, 3),
    cell: int = 64,
    seed: int = 0,
) -> Path:
    """Writes the files listed above, unless they are there, made with the same parameters.

    Args:
        out_dir: made if need be.
        train: training samples, one mosaic each; at least 1.
        test: test questions, one mosaic each; at least 1.
        grid: rows and columns of a mosaic.
        cell: side of a cell in pixels.
        seed: the same seed gives the same files.

    Returns:
        `out_dir`, absolute.

    Raises:
        ValueError: a number is below 1.
    """
    check_grid(grid, cell)
    if min(train, test) < 1:
        raise ValueError(f"train is {train} and test {test}, expected at least 1 of each")
    out = Path(out_dir).resolve()
    parameters = {
        "version": LAYOUT_VERSION,
        "train": train,
        "test": test,
        "grid": list(grid),
        "cell": cell,
        "seed": seed,
    }
    install_base(_made(out))
    record = out / "mosaic.json"
    if record.is_file() and json.loads(record.read_text()) == parameters:
        return out
    record.unlink(missing_ok=True)

    samples = _write_split(out, "train", train, grid, cell, seed)
    write_text(out / "train.json", json.dumps([conversation(*sample) for sample in samples], indent=1))
    write_questions(out / "test.jsonl", out / "test_answers.jsonl", _write_split(out, "test", test, grid, cell, seed))
    write_text(record, json.dumps(parameters, indent=1) + "\n")
    return out


def _write_split(out: Path, split: str, count: int, grid: tuple[int, int], cell: int, seed: int) -> list[Sample]:
    """Draws `count` mosaics and writes their pictures."""
    pictures = load_pictures(split)
    rng = Random(f"{split} {seed}")
    sampler = MosaicSampler(pictures.by_label(), grid, rng)

    def draw(number: int) -> Mosaic:
        turns = rng.choice((2, 3)) if split == "train" and rng.random() < MULTI_TURN_SHARE else 1
        return sampler.draw(KINDS[number % len(KINDS)], turns)

    mosaics = [draw(number) for number in range(count)]
    return write_pictures(
        out, Path("images") / split, split, mosaics, lambda mosaic: paint(pictures, mosaic, grid, cell)
    )


def write_pictures(
    out: Path, folder: Path, prefix: str, mosaics: Sequence[Mosaic], painter: Callable[[Mosaic], np.ndarray]
) -> list[Sample]:
    """Writes a PNG a mosaic, all or none.

    Args:
        out: the testbed's folder.
        folder: for the pictures, relative to `out`; what it held is replaced.
        prefix: of the samples' ids.
        painter: a mosaic's pixels, (H, W, 3) uint8; called in several threads.
    """
    staging = out / f".{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)
    _made(staging)
    names = [f"{number:06d}.png" for number in range(len(mosaics))]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda mosaic, name: _save(painter(mosaic), staging / name), mosaics, names))
    shutil.rmtree(out / folder, ignore_errors=True)
    staging.rename(_made((out / folder).parent) / folder.name)
    return [
        (f"{prefix}-{number:06d}", str(folder / name), mosaic)
        for number, (name, mosaic) in enumerate(zip(names, mosaics, strict=True))
    ]


def _save(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, compress_level=1)


def conversation(name: str, image: str, mosaic: Mosaic) -> dict:
    """A sample of LLaVA's conversation file."""
    messages = []
    for turn in mosaic.turns:
        messages.append({"from": "human", "value": turn.question if messages else f"<image>\n{turn.question}"})
        messages.append({"from": "gpt", "value": turn.answer})
    return {"id": name, "image": image, "conversations": messages}


def write_questions(questions: Path, answers: Path, samples: list[Sample]) -> None:
    """The first turn of each sample in LLaVA's question file, and the right answers for `score`."""
    write_text(questions, _lines(_question(*sample) for sample in samples))
    write_text(answers, _lines(_answer(*sample) for sample in samples))


def _question(name: str, image: str, mosaic: Mosaic) -> dict:
    turn = mosaic.turns[0]
    return {"question_id": name, "image": image, "text": turn.question, "category": turn.kind}


def _answer(name: str, image: str, mosaic: Mosaic) -> dict:
    turn = mosaic.turns[0]
    return {"question_id": name, "answer": turn.answer, "kind": turn.kind}


def _lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text(path: Path, text: str) -> None:
    """Writes all of it or nothing."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=4000, help="training samples")
    parser.add_argument("--test", type=int, default=600, help="test questions")
    parser.add_argument("--grid", type=int, nargs=2, default=(3, 3), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--cell", type=int, default=64, help="side of a cell in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(prepare(args.out, args.train, args.test, tuple(args.grid), args.cell, args.seed))


if __name__ == "__main__":
    main()
