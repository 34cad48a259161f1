"""The testbed: questions that are right by construction, files that LLaVA reads, and a base model that answers."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_prune.testbed.install import MODEL_NAME, install_base
from llava_prune.testbed.mosaic import MosaicSampler, paint
from llava_prune.testbed.pictures import COLORS, SHAPES, SPLITS, load_pictures
from llava_prune.testbed.prepare import prepare, write_text
from llava_prune.testbed.questions import KINDS, LARGEST_COUNT, PAIRS, compose, subjects
from llava_prune.testbed.score import score

TRAIN, TEST = 210, 105


@pytest.fixture(scope="module")
def pictures():
    return {split: load_pictures(split) for split in SPLITS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("testbed"), train=TRAIN, test=TEST, seed=3)


@pytest.fixture(scope="module")
def loaded(data):
    """Tokenizer, fp32 model and image processor, through LLaVA's own loader."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(str(data / MODEL_NAME), None, MODEL_NAME, device="cpu")
    return tokenizer, model.float(), processor


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked(folder):
    """(split, image, question, answer) of every turn in the files."""
    for sample in json.loads((folder / "train.json").read_text()):
        values = [message["value"].removeprefix("<image>\n") for message in sample["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            yield "train", sample["image"], question, answer
    truth = {line["question_id"]: line for line in read_lines(folder / "test_answers.jsonl")}
    for line in read_lines(folder / "test.jsonl"):
        yield "test", line["image"], line["text"], truth[line["question_id"]]["answer"]


def tiles(image, rows, columns):
    side = image.shape[0] // rows
    return [image[r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(columns)]


def true_answer(question, labels, columns):
    """The answer worked out from the words alone, without the code that made them."""
    words = set(re.findall(r"[a-z]+", question.lower()))
    shapes = [word for word in SHAPES if words & {word, f"{word}s"}]
    colors = [word for word in COLORS if word in words]
    wanted = "color" if "color" in words else "shape"
    if places := re.findall(r"\d", question):
        row, column = map(int, places)
        return labels[(row - 1) * columns + column - 1][wanted == "color"]
    matching = [(s, c) for s, c in labels if s in (shapes or SHAPES) and c in (colors or COLORS)]
    if shapes and colors:
        return "yes" if matching else "no"
    if words & {"many", "count"}:
        return str(len(matching))
    assert len(matching) == 1
    return matching[0][wanted == "color"]


def test_labels_agree_with_every_question_of_the_package(pictures):
    import easy_vqa

    for split, count in (("train", 4000), ("test", 1000)):
        labels = pictures[split].labels
        assert len(labels) == count and set(labels) == set(PAIRS)
        for question, answer, index in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
            words = set(question.rstrip("?").split())
            named, label = words & {*SHAPES, *COLORS}, set(labels[index])
            if answer in ("yes", "no"):
                assert (answer == "yes") == ((named <= label) != bool(words & {"no", "not"}))
            else:
                assert {answer} | named <= label


def test_answers_are_right_and_splits_disjoint(data, pictures):
    known = {split: {image.tobytes(): i for i, image in enumerate(pictures[split].images)} for split in SPLITS}
    assert not known["train"].keys() & known["test"].keys()
    count = 0
    for split, image, question, answer in asked(data):
        cells = tiles(np.asarray(Image.open(data / image)), 3, 3)
        labels = [pictures[split].labels[known[split][cell.tobytes()]] for cell in cells]
        assert answer == true_answer(question, labels, 3), (image, question)
        count += 1
    assert count > TRAIN + TEST


def test_files_have_llavas_fields(data):
    samples = json.loads((data / "train.json").read_text())
    turns = Counter(len(sample["conversations"]) // 2 for sample in samples)
    assert len(samples) == TRAIN and set(turns) == {1, 2, 3} and 0.15 < 1 - turns[1] / TRAIN < 0.35
    assert all(sample["conversations"][0]["value"].startswith("<image>\n") for sample in samples)
    assert json.dumps(samples).count("<image>") == TRAIN
    lines = read_lines(data / "test.jsonl")
    assert len(lines) == TEST and set(lines[0]) == {"question_id", "image", "text", "category"}
    assert "<image>" not in json.dumps(lines)
    assert Counter(line["category"] for line in lines) == dict.fromkeys(KINDS, TEST // len(KINDS))


@pytest.mark.parametrize("grid,cell", [((1, 1), 64), ((2, 4), 32), ((6, 5), 20)])
def test_grid_and_cell(tmp_path, pictures, grid, cell):
    out = prepare(tmp_path, train=21, test=14, grid=grid, cell=cell)
    rows, columns = grid
    for _, image, question, answer in asked(out):
        assert Image.open(out / image).size == (columns * cell, rows * cell)
        assert len(answer.split()) == 1 and answer == answer.lower()
        assert all(1 <= place <= max(grid) for place in map(int, re.findall(r"\d", question)))
    mosaic = MosaicSampler(pictures["test"].by_label(), grid, Random(0)).draw("exists", turns=3)
    assert paint(pictures["test"], mosaic, grid, 64).shape == (rows * 64, columns * 64, 3)


def test_bad_parameters_are_named(tmp_path):
    for wrong in ({"grid": (0, 3)}, {"cell": 0}, {"train": 0}, {"test": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} (is )?.*, expected"):
            prepare(tmp_path, **wrong)
    with pytest.raises(ValueError, match="split is 'dev', expected one of"):
        load_pictures("dev")


def test_answers_are_balanced():
    rng = Random(0)
    drawn = {kind: Counter() for kind in ("exists", "count_shape")}
    for kind, counter in drawn.items():
        for _ in range(2000):
            labels, subject = compose(kind, 9, rng)
            counter[sum((label if kind == "exists" else label[0]) == subject for label in labels)] += 1
    assert 900 < drawn["exists"][0] < 1100
    assert set(drawn["count_shape"]) == set(range(LARGEST_COUNT + 1)) and min(drawn["count_shape"].values()) > 250
    labels = [("circle", "red")] * 9
    later = Counter(("circle", "red") in subjects("exists", labels, rng) for _ in range(1000))
    assert 400 < later[True] < 600


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert not list(tmp_path.iterdir())
    texts = [f"{number}" * 9999 for number in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: write_text(path, text), texts))
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


def test_deterministic_and_idempotent(data, tmp_path):
    out = prepare(tmp_path / "a", train=12, test=7, seed=1)
    first = snapshot(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    prepare(out, train=12, test=7, seed=1)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    other = prepare(tmp_path / "b", train=12, test=7, seed=1)
    config = f"{MODEL_NAME}/config.json"
    again = snapshot(other)
    assert {name: x for name, x in first.items() if name != config} == {n: x for n, x in again.items() if n != config}

    prepare(out, train=10, test=7, seed=2)
    changed = snapshot(out)
    assert len(json.loads(changed["train.json"])) == 10 and len(list((out / "images/train").iterdir())) == 10
    assert changed["test.jsonl"] != first["test.jsonl"]

    (out / "mosaic.json").unlink()  # as after a run that broke off
    prepare(out, train=12, test=7, seed=1)
    assert snapshot(out) == first


def test_llava_reads_the_training_file(data, loaded, monkeypatch, capsys):
    import transformers
    from llava import conversation
    from llava.train.train import DataArguments, DataCollatorForSupervisedDataset, LazySupervisedDataset

    from llava_prune.testbed.tokens import conversation_ids

    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates["v1"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        data / MODEL_NAME, model_max_length=512, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    arguments = DataArguments(is_multimodal=True, image_folder=str(data), image_aspect_ratio="pad")
    arguments.image_processor, arguments.mm_use_im_start_end = loaded[2], False
    dataset = LazySupervisedDataset(str(data / "train.json"), tokenizer, arguments)
    opening, turn = conversation_ids(tokenizer)
    for item, sample in zip(dataset, dataset.list_data_dict, strict=False):
        values = [message["value"].removeprefix("<image>\n") for message in sample["conversations"]]
        supervised = item["labels"][item["labels"] != -100]
        assert tokenizer.decode(supervised).replace("</s>", " ").split() == values[1::2]
        assert (supervised == tokenizer.eos_token_id).sum() == len(values) // 2
        # What make_base trained on.
        parts = [turn(values[i], values[i + 1], i == 0)[0] for i in range(0, len(values), 2)]
        assert item["input_ids"].tolist() == [*opening, -200, *sum(parts, [])]
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[i] for i in range(8)])
    assert batch["images"].shape == (8, 3, 192, 192) and batch["input_ids"].shape == batch["labels"].shape
    assert "mismatch" not in capsys.readouterr().out


def test_tokenizer_keeps_any_text(loaded):
    text = "Héllo, what's 漢字 in row 12?\nA line — and 😀."
    tokenizer = loaded[0]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")


def test_base_answers_held_out_questions(data, loaded, tmp_path):
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, processor = loaded
    assert len(model.get_model().layers) == 8 and sum(p.numel() for p in model.parameters()) < 2.6e6
    answers = tmp_path / "answers.jsonl"
    with answers.open("w") as file:
        for line in read_lines(data / "test.jsonl"):
            talk = conv_templates["v1"].copy()
            talk.append_message(talk.roles[0], f"<image>\n{line['text']}")
            talk.append_message(talk.roles[1], None)
            ids = tokenizer_image_token(talk.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
            image = process_images([Image.open(data / line["image"])], processor, model.config)
            out = model.generate(ids[None], images=image, do_sample=False, max_new_tokens=8, use_cache=True)
            text = tokenizer.decode(out[0], skip_special_tokens=True)
            file.write(json.dumps({"question_id": line["question_id"], "text": text}) + "\n")
    result = score(answers, data / "test_answers.jsonl")
    assert result["questions"] == TEST and set(result["kinds"]) == set(KINDS)
    assert result["accuracy"] >= 0.95, result


def test_base_is_small_and_names_its_tower_where_it_lies(tmp_path):
    path = install_base(tmp_path / "x")
    tower = Path(json.loads((path / "config.json").read_text())["mm_vision_tower"])
    assert path.name == MODEL_NAME and tower.is_absolute() and (tower / "preprocessor_config.json").is_file()
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 10e6
    (path / "tokenizer.model").unlink()
    assert (install_base(tmp_path / "x") / "tokenizer.model").is_file()
    assert [file.name for file in (tmp_path / "x").iterdir()] == [MODEL_NAME]


def test_make_base_runs(tmp_path, pictures, monkeypatch):
    from llava_prune.testbed import base_data, make_base

    monkeypatch.setattr(make_base, "load_pictures", pictures.get)
    sizes = ["--steps", "2", "--batch-size", "4", "--check-size", "4", "--workers", "0"]
    make_base.train(make_base.parse_args(["--out", str(tmp_path), *sizes]))
    shipped = Path(make_base.__file__).parent / "base"
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert made == {str(path.relative_to(shipped)) for path in shipped.rglob("*")} - {"README.md"}
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((shipped / "config.json").read_text())

    # The pixels and patches it trains on are those that LLaVA's processor makes of the written pictures.
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(tmp_path / "vision_tower")
    mosaic = MosaicSampler(pictures["test"].by_label(), (3, 3), Random(0)).draw("color_at")
    images = torch.from_numpy(pictures["test"].images).permute(0, 3, 1, 2)
    cells = torch.tensor([mosaic.pictures])
    ours = base_data.paint_batch(images, cells, processor, flip=False)
    picture = Image.fromarray(paint(pictures["test"], mosaic, (3, 3), 64))
    torch.testing.assert_close(ours, processor.preprocess(picture, return_tensors="pt")["pixel_values"])
    shapes, _ = make_base.patch_targets(torch.arange(2000).view(-1, 2), cells)
    assert torch.equal(shapes.view(3, 4, 3, 4)[:, 1, :, 2].flatten() // 2, cells[0])


@pytest.mark.parametrize(
    "answers,message",
    [
        ([("a", "red")], "lacks 1 of the 2 questions"),
        ([("a", "red"), ("b", "1"), ("a", "red")], "repeats question_id 'a'"),
        ([("a", "red"), ("b", "1"), ("c", "no")], "does not hold"),
    ],
)
def test_score_refuses(tmp_path, answers, message):
    with pytest.raises(ValueError, match=message):
        score_of(tmp_path, answers)


def test_score(tmp_path):
    result = score_of(tmp_path, [("b", "1"), ("a", " Red. \n")])
    assert result == {"accuracy": 1.0, "questions": 2, "kinds": {"color_at": 1.0, "count_shape": 1.0}}
    assert score_of(tmp_path, [("b", "2"), ("a", "red")])["kinds"] == {"color_at": 1.0, "count_shape": 0.0}


def score_of(folder, answers):
    truth = [SimpleNamespace(question_id="a", answer="red", kind="color_at")]
    truth.append(SimpleNamespace(question_id="b", answer="1", kind="count_shape"))
    (folder / "truth.jsonl").write_text("".join(json.dumps(vars(line)) + "\n" for line in truth))
    lines = [json.dumps({"question_id": name, "text": text}) + "\n" for name, text in answers]
    (folder / "answers.jsonl").write_text("".join(lines))
    return score(folder / "answers.jsonl", folder / "truth.jsonl")
