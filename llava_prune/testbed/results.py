"""Origin against hard on the testbed: table, `results.json` and `kept_tokens.png`.

    python -m llava_prune.testbed.results --data DIR --out OUT

reads what two `llava_prune run` calls wrote to OUT: `origin.jsonl`, `hard.jsonl` (LLaVA's answers) and
`origin.report.jsonl`, `hard.report.jsonl` (tokens and FLOPs, a line a question).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..checkpoint import read_description, write_atomically
from ..sidecar import read_sidecar
from .score import normalised, score

PICTURES = 6


def summarise(data: Path, out: Path) -> dict[str, Any]:
    """The figures of `results.json`.

    Raises:
        ValueError: answers and reports do not belong together.
    """
    rows: dict[str, Any] = {}
    texts: dict[str, dict[str, str]] = {}
    layers = read_description(out)["prune_config"]["pruning_layers"]
    for mode in ("origin", "hard"):
        answers = [json.loads(line) for line in (out / f"{mode}.jsonl").read_text().splitlines()]
        report = read_sidecar(out / f"{mode}.report.jsonl")
        if len(answers) != len(report) or any(line["mode"] != mode for line in report):
            raise ValueError(f"{out}/{mode}.jsonl and {mode}.report.jsonl are not of one run: evaluate again")
        scores = score(out / f"{mode}.jsonl", data / "test_answers.jsonl")
        texts[mode] = {line["question_id"]: normalised(line["text"]) for line in answers}
        rows[mode] = {
            **scores,
            "average_tokens": _mean(line["average_tokens"] for line in report),
            "tokens_per_pruning_layer": [
                _mean(line["tokens_per_layer"][layer] for line in report) for layer in layers
            ],
            "llm_flops": _mean(line["llm_flops"] for line in report),
            "text_tokens": _mean(line["text_tokens"] for line in report),
        }
    hard, origin = rows["hard"], rows["origin"]
    same = [texts["hard"][name] == text for name, text in texts["origin"].items()]
    origin["agreement"], hard["agreement"] = 1.0, _mean(same)
    origin["flops_ratio"], hard["flops_ratio"] = 1.0, hard["llm_flops"] / origin["llm_flops"]
    vision_tokens = _mean(line["vision_tokens"] for line in read_sidecar(out / "origin.report.jsonl"))
    return {
        "vision_tokens": int(vision_tokens),
        "questions": len(same),
        "pruning_layers": layers,
        "hard_over_origin_accuracy": hard["accuracy"] / origin["accuracy"],
        "token_ratio": hard["average_tokens"] / vision_tokens,
        "origin": origin,
        "hard": hard,
    }


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def print_table(results: dict[str, Any]) -> None:
    """The two rows, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    layers = ", ".join(map(str, results["pruning_layers"]))
    table = Table(title=f"{results['questions']} held-out questions, {results['vision_tokens']} vision tokens")
    for column in (
        "mode",
        "accuracy",
        "agreement",
        "average tokens",
        f"tokens entering layers {layers}",
        "LLM GFLOPs",
        "ratio",
    ):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode in ("origin", "hard"):
        row = results[mode]
        table.add_row(
            mode,
            f"{row['accuracy']:.2%}",
            f"{row['agreement']:.2%}",
            f"{row['average_tokens']:.1f}",
            " / ".join(f"{count:.1f}" for count in row["tokens_per_pruning_layer"]),
            f"{row['llm_flops'] / 1e9:.3f}",
            f"{row['flops_ratio']:.3f}",
        )
    Console(width=140).print(table)
    print(
        f"hard keeps {results['hard_over_origin_accuracy']:.1%} of origin's accuracy with {results['token_ratio']:.1%}"
        " of its vision tokens"
    )


def draw(data: Path, out: Path) -> Path:
    """`kept_tokens.png`: one picture per question kind, both answers beside it."""
    from ..visualize import draw_kept_tokens, recorded_sample

    questions = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    answers = {
        mode: [json.loads(line)["text"] for line in (out / f"{mode}.jsonl").read_text().splitlines()]
        for mode in ("origin", "hard")
    }
    report = read_sidecar(out / "hard.report.jsonl")
    first_of_kind = {question["category"]: i for i, question in reversed(list(enumerate(questions)))}
    samples = [
        recorded_sample(
            report[i],
            data / questions[i]["image"],
            questions[i]["text"],
            {mode: answers[mode][i] for mode in answers},
        )
        for i in sorted(first_of_kind.values())[:PICTURES]
    ]
    path = out / "kept_tokens.png"
    draw_kept_tokens(samples, path)
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder that testbed.prepare wrote")
    parser.add_argument("--out", required=True, type=Path, help="folder with answers and reports of both modes")
    args = parser.parse_args()
    results = summarise(args.data, args.out)
    text = json.dumps(results, indent=2) + "\n"
    write_atomically(args.out / "results.json", lambda path: path.write_text(text))
    picture = draw(args.data, args.out)
    print_table(results)
    print(f"wrote {args.out / 'results.json'} and {picture}")


if __name__ == "__main__":
    main()
