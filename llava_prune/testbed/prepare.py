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
from pathlib import Path
from random import Random

from .install import install_base
from .mosaic import Mosaic, MosaicSampler, check_grid, paint
from .pictures import load_pictures
from .questions import KINDS

LAYOUT_VERSION = 1
MULTI_TURN_SHARE = 0.25


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
    _write(out / "train.json", json.dumps([_conversation(*sample) for sample in samples], indent=1))
    questions = _write_split(out, "test", test, grid, cell, seed)
    _write(out / "test.jsonl", _lines(_question(*sample) for sample in questions))
    _write(out / "test_answers.jsonl", _lines(_answer(*sample) for sample in questions))
    _write(record, json.dumps(parameters, indent=1) + "\n")
    return out


def _write_split(out: Path, split: str, count: int, grid, cell: int, seed: int) -> list[tuple[str, str, Mosaic]]:
    """Draws `count` mosaics and writes their pictures; gives (id, path within `out`, mosaic) of each."""
    from PIL import Image

    pictures = load_pictures(split)
    rng = Random(f"{split} {seed}")
    sampler = MosaicSampler(pictures.by_label(), grid, rng)
    folder = Path("images") / split
    staging = out / f".{split}"
    shutil.rmtree(staging, ignore_errors=True)
    samples = []
    for number in range(count):
        turns = rng.choice((2, 3)) if split == "train" and rng.random() < MULTI_TURN_SHARE else 1
        mosaic = sampler.draw(KINDS[number % len(KINDS)], turns)
        name = f"{number:06d}.png"
        Image.fromarray(paint(pictures, mosaic, grid, cell)).save(_made(staging) / name, compress_level=1)
        samples.append((f"{split}-{number:06d}", str(folder / name), mosaic))
    shutil.rmtree(out / folder, ignore_errors=True)
    staging.rename(_made(out / "images") / split)
    return samples


def _conversation(name: str, image: str, mosaic: Mosaic) -> dict:
    messages = []
    for turn in mosaic.turns:
        messages.append({"from": "human", "value": turn.question if messages else f"<image>\n{turn.question}"})
        messages.append({"from": "gpt", "value": turn.answer})
    return {"id": name, "image": image, "conversations": messages}


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


def _write(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}")
    staging.write_text(text, encoding="utf-8")
    staging.rename(path)


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
