"""LLaVA's `playground/data/eval` in small: every benchmark's files as they are, a few questions each."""

import base64
import csv
import io
import json
import random

from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
YES_NO = " Please answer yes or no."

# stand-ins for the two scorers that their authors distribute: same arguments, same lines of output
GQA_EVAL = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("--tier")
parser.add_argument("--predictions", default="{tier}_predictions.json")
args = parser.parse_args()
questions = json.load(open(f"{args.tier}_questions.json"))
with open(args.predictions.format(tier=args.tier)) as file:
    predictions = {p["questionId"]: p["prediction"] for p in json.load(file)}
right = [predictions[name] == question["answer"] for name, question in questions.items()]
print("Loading questions...")
print("Binary: 50.00%")
print(f"Accuracy: {100 * sum(right) / len(right):.2f}%")
print("Distribution: 1.90 (lower is better)")
"""
MME_CALCULATION = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--results_dir")
folder = pathlib.Path(parser.parse_args().results_dir)
for kind, tasks in (("Perception", ["color"]), ("Cognition", ["code_reasoning"])):
    print("===========", kind, "===========")
    scores = 0
    for task in tasks:
        lines = [line.split("\\t") for line in (folder / f"{task}.txt").read_text().splitlines()]
        right = [truth.lower() in answer.lower() for _, _, truth, answer in lines]
        both = [a and b for a, b in zip(right[::2], right[1::2])]
        scores += 100 * sum(right) / len(right) + 100 * sum(both) / len(both)
    print("total score:", scores, "\\n")
"""


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(seed):
    pixels = random.Random(seed).randbytes(48 * 32 * 3)
    return Image.frombytes("RGB", (48, 32), pixels)


def write_picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, format="PNG")


def question(name, image, text, category="default"):
    return {"question_id": name, "image": image, "text": text, "category": category}


def vqav2(root):
    folder = root / "vqav2"
    names = [262144000 + i for i in range(4)]
    image = "COCO_test2015_000000262144.jpg"
    rows = [question(name, image, f"Is there a red circle?\n{SHORT}") for name in names]
    write_picture(folder / "test2015" / image)
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[1:3])


def gqa(root):
    folder = root / "gqa"
    names = ["201307251", "201640614", "202225914"]
    write_picture(folder / "data/images/n161313.jpg")
    rows = [
        question(name, "n161313.jpg", f"What color is in row {i + 1}, column 1?\n{SHORT}")
        for i, name in enumerate(names)
    ]
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    truth = {name: {"answer": "red", "isBalanced": True} for name in names}
    write_json(folder / "data/testdev_balanced_questions.json", truth)
    (folder / "data/eval").mkdir()
    (folder / "data/eval/eval.py").write_text(GQA_EVAL)


def vizwiz(root):
    rows = []
    for i in range(2):
        write_picture(root / f"vizwiz/test/VizWiz_test_0000000{i}.jpg", i)
        text = f"What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
        rows.append(question(i, f"VizWiz_test_0000000{i}.jpg", text))
    write_lines(root / "vizwiz/llava_test.jsonl", rows)


def sqa(root):
    folder = root / "scienceqa"
    samples, problems = [], {}
    for name in ("4", "5", "11"):
        has_image = name != "5"
        value = "What color is in row 1, column 2?\nOptions: (A) red (B) blue"
        sample = {"id": name, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]}
        if has_image:
            sample["image"] = f"{name}/image.png"
            sample["conversations"][0]["value"] = f"<image>\n{value}"
            write_picture(folder / f"images/test/{name}/image.png")
        samples.append(sample)
        problems[name] = {"question": value, "choices": ["red", "blue"], "answer": 0, "split": "test"}
    write_json(folder / "llava_test_CQM-A.json", samples)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def textvqa(root):
    folder = root / "textvqa"
    name = "003a8ae2ef43b901"
    asked = ["what is the brand of this camera?", "What shape is red?"]  # two of one image, thus of one id
    write_picture(folder / f"train_images/{name}.jpg")
    rows = [question(name, f"{name}.jpg", f"{text}\nReference OCR token: DAKOTA, DIGITAL\n{SHORT}") for text in asked]
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    data = [{"image_id": name, "question": text, "answers": ["dakota"] * 10} for text in asked]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})


def pope(root):
    folder = root / "pope"
    image = "COCO_val2014_000000310196.jpg"
    write_picture(folder / "val2014" / image)
    rows = []
    for category in ("adversarial", "popular", "random"):
        asked = [
            (f"Is there a {color} circle in the image?", "yes" if color == "red" else "no")
            for color in ("red", "blue")
        ]
        labels = [
            {"question_id": i + 1, "image": image, "text": text, "label": label}
            for i, (text, label) in enumerate(asked)
        ]
        write_lines(folder / f"coco/coco_pope_{category}.json", labels)
        rows += [question(len(rows) + i, image, f"{text}\n{SHORT}", category) for i, (text, _) in enumerate(asked)]
    write_lines(folder / "llava_pope_test.jsonl", rows)


def mme(root):
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    rows = []
    # one category keeps pictures and questions in folders of their own, the other together
    for category, images, texts in (
        ("code_reasoning", "code_reasoning", "code_reasoning"),
        ("color", "color/images", "color/questions_answers_YN"),
    ):
        file = "0020.png"
        write_picture(release / images / file)
        asked = ["Is there a red circle?", "Is there a blue circle?"]
        spelled = [asked[0] + YES_NO, f"{asked[1]} {YES_NO}"]  # some of MME's have two spaces
        text = "".join(f"{line}\t{answer}\n" for line, answer in zip(spelled, ("Yes", "No"), strict=True))
        (release / texts).mkdir(parents=True, exist_ok=True)
        (release / texts / "0020.txt").write_text(text)
        rows += [question(f"{images}/{file}", f"{images}/{file}", f"{line}\n{SHORT}", category) for line in asked]
    write_lines(folder / "llava_mme.jsonl", rows)
    (folder / "eval_tool").mkdir()
    (folder / "eval_tool/calculation.py").write_text(MME_CALCULATION)


def mmbench(root, folder="mmbench", split="mmbench_dev_20230712"):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    columns += ["comment", "split"]
    path = root / folder / f"{split}.tsv"
    path.parent.mkdir(parents=True)
    buffer = io.BytesIO()
    picture(0).save(buffer, format="PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    with path.open("w", newline="") as file:
        sheet = csv.writer(file, delimiter="\t")
        sheet.writerow(columns)
        for index in (241, 252):
            row = [index, "What shape is red?", "Look\nat it", "circle", "square", "", "", "A", "shape", image]
            sheet.writerow([*row, "s", "l2", "", "dev"])


def mmbench_cn(root):
    mmbench(root, "mmbench_cn", "mmbench_dev_cn_20231003")


def seed(root):
    folder = root / "seed_bench"
    questions, rows = [], []
    for number, kind in ((101669, "image"), (101670, "image"), ("v3", "video")):
        image = f"SEED-Bench-{kind}{'-image' if kind == 'video' else ''}/{number}"
        write_picture(folder / image)
        rows.append(question(number, image, f"What shape is red?\nA. circle\nB. square\nC. star\nD. none\n{LETTER}"))
        questions.append(
            {
                "question_id": str(number),
                "question_type_id": 1 if kind == "image" else 10,
                "data_type": kind,
                "data_id": str(number),
                "answer": "A",
            }
        )
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    write_json(folder / "SEED-Bench.json", {"question_type": types, "questions": questions})
    write_lines(folder / "llava-seed-bench.jsonl", rows)


def llavabench(root):
    folder = root / "llava-bench-in-the-wild"
    write_picture(folder / "images/001.jpg")
    write_lines(folder / "questions.jsonl", [question(0, "001.jpg", "What color is in row 2, column 2?", "conv")])


def mmvet(root):
    folder = root / "mm-vet"
    write_picture(folder / "images/v1_0.png")
    write_lines(folder / "llava-mm-vet.jsonl", [question(i, "v1_0.png", "How many shapes are red?") for i in range(2)])


BENCHMARKS = (vqav2, gqa, vizwiz, sqa, textvqa, pope, mme, mmbench, mmbench_cn, seed, llavabench, mmvet)


def write_all(root):
    """Every benchmark under `root`."""
    for write in BENCHMARKS:
        write(root)
    return root
