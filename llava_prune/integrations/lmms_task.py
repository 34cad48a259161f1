"""The testbed as a local task of lmms-eval, complete offline.

    python -m llava_prune.integrations.lmms_task --out DIR --questions 600
    lmms-eval --model llava_prune_hf --include_path DIR/tasks --tasks llava_prune_mosaic ...

DIR/tasks/llava_prune_mosaic.yaml names its data by an absolute path, since lmms-eval looks it up from where it runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..testbed.prepare import prepare
from ..testbed.score import normalised

TASK = "llava_prune_mosaic"
YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function {module}.doc_to_visual
doc_to_text: !function {module}.doc_to_text
doc_to_target: !function {module}.doc_to_target
process_results: !function {module}.process_results
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_task(out: str | Path, questions: int = 600) -> Path:
    """Write pictures, questions and the task; returns the folder for `--include_path`."""
    data = prepare(out, train=1, test=questions)
    asked = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    truth = [json.loads(line) for line in (data / "test_answers.jsonl").read_text().splitlines()]
    documents = [
        {
            "question_id": question["question_id"],
            "image": str(data / question["image"]),
            "question": question["text"],
            "answer": answer["answer"],
        }
        for question, answer in zip(asked, truth, strict=True)
    ]
    tasks = data / "tasks"
    tasks.mkdir(exist_ok=True)
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    write_atomically(tasks / f"{TASK}.jsonl", lambda path: path.write_text(lines))
    # as JSON, a path with any character is a YAML string
    text = YAML.format(task=TASK, data=json.dumps(str(tasks / f"{TASK}.jsonl")), module=__spec__.name)
    write_atomically(tasks / f"{TASK}.yaml", lambda path: path.write_text(text))
    return tasks


def doc_to_visual(document: dict[str, Any]) -> list:
    """The mosaic, as one PIL picture."""
    from PIL import Image

    with Image.open(document["image"]) as picture:
        return [picture.convert("RGB")]


def doc_to_text(document: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question as it is."""
    return document["question"]


def doc_to_target(document: dict[str, Any]) -> str:
    """The one right answer."""
    return document["answer"]


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`accuracy` of one answer, 0 or 1, by the testbed's own comparison."""
    return {"accuracy": float(normalised(results[0]) == normalised(document["answer"]))}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--questions", type=int, default=600)
    args = parser.parse_args()
    tasks = write_task(args.out, args.questions)
    print(f"lmms-eval --include_path {tasks} --tasks {TASK} --model llava_prune_hf --model_args pretrained=...")


if __name__ == "__main__":
    main()
