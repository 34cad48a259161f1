"""The bench on a CPU: that its tables are complete and its answers right; no time is asserted."""

import json

import pytest

from llava_prune.bench.attention import CHANNELS, MASKED, OURS, UNMASKED
from llava_prune.bench.inference import BASELINES
from llava_prune.bench.training import PARTS
from llava_prune.cli import main

METHODS = ["stock", "stock, in graphs", "stock, static cache", "ours", "ours, in graphs", "removal alone, in graphs"]
METHODS += [f"{name}, in graphs" for name in BASELINES]


def test_every_method_has_its_figures(tmp_path, capsys):
    file, pruners = tmp_path / "bench.json", tmp_path / "small.yaml"
    # those of avg64 are made for a width of 4096, and cost as much as this decoder of width 64
    pruners.write_text("pruning_layers: [2, 8, 16]\ntarget_token_num: 64\npruner_rank: 16\npruner_dim: 16\n")
    arguments = [
        "--shape",
        "tiny",
        "--emulate",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--scenarios",
        "1",
        "--bucket",
        "16",
    ]
    main(["bench", "inference", *arguments, "--prune_config", str(pruners), "--json", str(file)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)
    written = json.loads(file.read_text())
    assert all(rate > 0 for rate in written["rates"].values())
    ((scenario, rows),) = written["scenarios"].items()
    assert scenario == "batch 1" and [row["method"] for row in rows] == METHODS
    rows = {row["method"]: row for row in rows}
    assert "under its floor of 144.75" in rows.pop("pyramiddrop, in graphs")["reason"]
    for name, row in rows.items():
        assert row["reason"] is None
        assert row["first_ms"] > 0 and row["first_floor_ms"] > 0 and row["token_floor_ms"] > 0
        assert (row["difference"] is None) is not name.endswith("graphs")
        assert row["difference"] is None or row["difference"] < 1e-4
        assert row["otherwise"] == (0 if name.endswith("graphs") and "stock" not in name else None)
        assert row["average_tokens"] == 576 if name.startswith("stock") else 60 <= row["average_tokens"] <= 64
    ours, stock = rows["ours, in graphs"], rows["stock"]
    assert ours["flops"] < stock["flops"] / 2
    assert "the pruners take " in printed and ours["deciding"] > 0 == rows["removal alone, in graphs"]["deciding"]
    # 32 layers, 4 heads of 16, fp32, keys and values: the cache of the kept tokens and the text, no more
    assert ours["cache_bytes"] == (32 * 64 + 32 * ours["average_tokens"]) * 64 * 2 * 4


def test_a_cpu_needs_to_be_told(capsys):
    with pytest.raises(SystemExit, match="add --emulate"):
        main(["bench", "inference", "--device", "cpu", "--shape", "tiny"])
    with pytest.raises(SystemExit, match="--scenarios '0': name some of 1,2,3"):
        main(["bench", "inference", "--device", "cpu", "--shape", "tiny", "--emulate", "--scenarios", "0"])


def test_a_step_of_training_is_taken_apart(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--repeats", "1", "--batch_size", "1", "--text_tokens", "24"]
    main(["bench", "training", *arguments, "--json", str(file)])
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    assert all(part in printed for part in PARTS)
    assert (
        set(written["attention_ms"]) == {UNMASKED, OURS, CHANNELS, MASKED}
        and min(written["attention_ms"].values()) > 0
    )
    written = written["steps"]
    assert set(written["pruners"]["parts_ms"]) == set(PARTS)
    assert set(written["lora"]["parts_ms"]) == set(PARTS) - {"real forward", "discriminator"}
    for times in written.values():
        assert times["step_ms"] > 0 and times["loss"] > 0
