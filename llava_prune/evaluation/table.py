"""One table over benchmarks: what each mode scored, how much of origin's is kept, and with how many tokens.

    python -m llava_prune.evaluation.table --benchmarks pope gqa --results origin=FOLDER hard=FOLDER

A folder of results holds what `score` wrote, BENCHMARK.json; or BENCHMARK.missing, which says what data is not there;
or only BENCHMARK.log, of a run that failed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def read_result(folder: Path, benchmark: str) -> dict[str, Any] | None:
    """What `score` wrote, or None."""
    path = folder / f"{benchmark}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def cell(folder: Path, benchmark: str) -> str:
    """A score, or why there is none."""
    result = read_result(folder, benchmark)
    if result is None:
        if (folder / f"{benchmark}.missing").is_file():
            return "no data"
        return "failed" if (folder / f"{benchmark}.log").is_file() else "not run"
    if result["score"] is None:
        return "submission file"
    return f"{result['score']:.2f}"


def kept(origin: dict[str, Any] | None, pruned: dict[str, Any] | None) -> str:
    """Percent of origin's score; a dash where the two can not be compared: other model, other questions, no score."""
    if origin is None or pruned is None or not origin["score"] or pruned["score"] is None:
        return "-"
    if any(origin[name] != pruned[name] for name in ("model", "metric", "questions")):
        return "-"
    return f"{100 * pruned['score'] / origin['score']:.1f}%"


def tokens(result: dict[str, Any] | None) -> str:
    """Average tokens, of how many."""
    if result is None or result["average_tokens"] is None:
        return "-"
    return f"{result['average_tokens']:.1f} of {result['vision_tokens']:.0f}"


def build(benchmarks: list[str], folders: dict[str, Path]) -> list[list[str]]:
    """Rows of the table, header first.

    Args:
        benchmarks: one row each.
        folders: mode -> folder of results. The last mode other than origin is the one held against origin.
    """
    pruned = next((mode for mode in reversed(folders) if mode != "origin"), "origin")
    rows = [["benchmark", "metric", *folders, f"{pruned} of origin", f"average tokens, {pruned}"]]
    for benchmark in benchmarks:
        results = {mode: read_result(folder, benchmark) for mode, folder in folders.items()}
        metric = next((result["metric"] for result in results.values() if result), "-")
        cells = [cell(folder, benchmark) for folder in folders.values()]
        rows.append([benchmark, metric, *cells, kept(results.get("origin"), results[pruned]), tokens(results[pruned])])
    return rows


def notes(benchmarks: list[str], folders: dict[str, Path]) -> list[str]:
    """What stands under the table: what ran, the files for servers, the logs of failures, the data that is missing."""
    ran, files, lacking = [], [], []
    for mode, folder in folders.items():
        found = {name: read_result(folder, name) for name in benchmarks}
        results = {name: result for name, result in found.items() if result}
        for model, method in sorted({(result["model"], result["method"]) for result in results.values()}):
            those = [
                name for name, result in results.items() if (result["model"], result["method"]) == (model, method)
            ]
            ran.append(f"{mode}: {model}{f' with {method}' if method else ''} ({', '.join(those)})")
        for name in benchmarks:
            if name in results and results[name]["score"] is None:
                files.append(f"{name}, {mode}, submission file: {results[name]['submission']}")
            elif cell(folder, name) == "failed":
                files.append(f"{name}, {mode}, failed: see {folder / name}.log")
            elif cell(folder, name) == "no data":
                lacking += [f"{name} needs {line}" for line in (folder / f"{name}.missing").read_text().splitlines()]
    return ran + files + list(dict.fromkeys(lacking))


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmarks", nargs="+", required=True)
    parser.add_argument("--results", nargs="+", required=True, metavar="MODE=FOLDER")
    args = parser.parse_args()
    folders = {mode: Path(folder) for mode, _, folder in (item.partition("=") for item in args.results)}
    header, *rows = build(args.benchmarks, folders)
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
    for line in notes(args.benchmarks, folders):
        print(line)


if __name__ == "__main__":
    main()
