"""The benchmark scripts themselves, on a playground of LLaVA's layout with the testbed's model and random pruners."""

import json
import subprocess

import playground
import pytest
from launch import ROOT, environment
from playground import LETTER
from tiny import randomise_pruners

from llava_prune import PruneConfig, attach_pruners, save_pruners
from llava_prune.evaluation.questions import read_lines

SCRIPTS = ROOT / "scripts" / "eval"
NAMES = [write.__name__ for write in playground.BENCHMARKS]
SETTINGS = PruneConfig(pruning_layers=(1, 3, 5), target_token_num=41, pruner_dim=16, pruner_heads=4)
CKPT = "llava-mosaic-tiny-hard-pruners"


def start(script, folder, *settings):
    command = ["bash", str(SCRIPTS / script), *settings]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, status=0):
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == status, output[-4000:]
    return output


@pytest.fixture(scope="module")
def played(testbed, tmp_path_factory):
    """A folder where all twelve ran in hard mode, and `output` of the runs."""
    from llava.model.builder import load_pretrained_model

    pytest.importorskip("pandas")
    folder = tmp_path_factory.mktemp("llava")
    playground.write_all(folder / "playground/data/eval")
    base = testbed / "llava-mosaic-tiny"
    _, model, _, _ = load_pretrained_model(str(base), None, base.name, device="cpu")
    randomise_pruners(attach_pruners(model.float(), SETTINGS))
    save_pruners(model, folder / "pruners")
    settings = ["MODE=hard", f"MODEL={base}", "PRUNERS=pruners"]
    halves = [" ".join(NAMES[:6]), " ".join(NAMES[6:])]
    running = [start("all.sh", folder, *settings, f"BENCHMARKS={names}") for names in halves]
    (folder / "output").write_text("".join(finish(process) for process in running))
    return folder


def results_of(data, run=CKPT):
    return {path.stem: json.loads(path.read_text()) for path in (data / "results" / run).glob("*.json")}


def test_every_benchmark_has_its_answers_in_llavas_format_and_a_sidecar(played):
    results = results_of(played / "playground/data/eval")
    assert sorted(results) == sorted(NAMES)
    for name, result in results.items():
        answers = read_lines(played / result["answers"])
        report = read_lines((played / result["answers"]).with_suffix(".report.jsonl"))
        keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        if name.startswith("mmbench"):
            keys = ["question_id", "round_id", *keys[1:3], "options", "option_char", *keys[3:]]
        assert [list(answer) for answer in answers] == [keys] * result["questions"], name
        assert [line["question_id"] for line in report] == [answer["question_id"] for answer in answers]
        assert {line["mode"] for line in report} == {"hard"}
        assert 18 < result["average_tokens"] < result["vision_tokens"] == 144, name
        assert (result["mode"], result["method"]) == ("hard", "pruners")
    # the question without a picture was asked, and keeps no token
    assert (results["sqa"]["questions"], results["sqa"]["with_image"]) == (3, 2)
    mmbench = read_lines(played / results["mmbench_cn"]["answers"])
    assert LETTER not in mmbench[0]["prompt"] and mmbench[0]["options"] == ["circle", "square"]


def test_what_is_scored_here_and_what_is_a_file_for_a_server(played):
    results = results_of(played / "playground/data/eval")
    scored = {name for name, result in results.items() if result["score"] is not None}
    assert scored == {"gqa", "sqa", "textvqa", "pope", "mme", "seed"}
    data = played / "playground/data/eval"
    assert {name: results[name]["submission"].removeprefix("./") for name in results.keys() - scored} == {
        "vqav2": f"playground/data/eval/vqav2/answers_upload/llava_vqav2_mscoco_test-dev2015/{CKPT}.json",
        "vizwiz": f"playground/data/eval/vizwiz/answers_upload/{CKPT}.json",
        "mmbench": f"playground/data/eval/mmbench/answers_upload/mmbench_dev_20230712/{CKPT}.xlsx",
        "mmbench_cn": f"playground/data/eval/mmbench_cn/answers_upload/mmbench_dev_cn_20231003/{CKPT}.xlsx",
        "llavabench": f"playground/data/eval/llava-bench-in-the-wild/answers/{CKPT}.jsonl",
        "mmvet": f"playground/data/eval/mm-vet/results/{CKPT}.json",
    }
    assert all((played / results[name]["submission"]).is_file() for name in results.keys() - scored)
    # LLaVA's places
    assert (data / f"gqa/answers/llava_gqa_testdev_balanced/{CKPT}/1_0.jsonl").is_file()
    assert (data / f"MME/eval_tool/answers/{CKPT}/color.txt").is_file()
    assert (data / f"seed_bench/answers/{CKPT}/merge.jsonl").is_file()
    output = (played / "output").read_text()
    assert "IMG-Accuracy" in output and f"vizwiz, hard, submission file: {results['vizwiz']['submission']}" in output


def test_mosaic_in_two_modes_beside_what_is_missing_and_what_fails(testbed, tmp_path):
    """One table over a benchmark that ran in chunks, one without data and one whose pictures are broken."""
    data = tmp_path / "data"
    playground.pope(data)
    playground.gqa(data)
    (data / "pope/coco/coco_pope_random.json").unlink()
    (data / "pope/coco").rename(data / "pope/elsewhere")
    (data / "gqa/data/images/n161313.jpg").write_text("no picture")
    model, names = testbed / "llava-mosaic-tiny", "BENCHMARKS=pope,gqa,mosaic"
    settings = [
        f"EVAL={data}",
        f"MODEL={model}",
        "BASELINE=uniform",
        "AVERAGE_TOKENS=60",
        names,
        "CHUNKS=3",
        "TEST_QUESTIONS=4",
    ]
    output = finish(start("all.sh", tmp_path, "MODE=origin,hard", *settings), status=1)
    origin, hard = (results_of(data, f"llava-mosaic-tiny-{run}") for run in ("origin", "hard-uniform-60"))
    assert set(origin) == set(hard) == {"mosaic"}
    assert origin["mosaic"]["average_tokens"] == 144 and 59 < hard["mosaic"]["average_tokens"] <= 60
    # ceil(4 / 3) = 2 questions a chunk make two chunks
    chunks = sorted(path.name for path in (data / "mosaic/answers/llava-mosaic-tiny-origin").glob("*.jsonl"))
    assert chunks == ["2_0.jsonl", "2_0.report.jsonl", "2_1.jsonl", "2_1.report.jsonl"]
    answers = read_lines(data / "mosaic/answers/llava-mosaic-tiny-origin.jsonl")
    assert [a["question_id"] for a in answers] == [f"test-{i:06d}" for i in range(4)]
    table = output[output.index("┏") :]
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in table.splitlines()
        if "│" in line
    }
    assert rows["pope"][1:3] == ["no data"] * 2 and rows["gqa"][1:3] == ["failed"] * 2
    assert rows["mosaic"][1] == f"{origin['mosaic']['score']:.2f}" and rows["mosaic"][4].endswith("of 144")
    assert f"pope needs {data}/pope/coco: https://github.com/AoiDragon/POPE" in table and "gqa.log" in table


def test_settings_are_checked_before_anything_runs(tmp_path):
    assert "MODE=hard needs PRUNERS" in finish(start("pope.sh", tmp_path), status=2)
    assert "MODE=hard needs PRUNERS" in finish(start("all.sh", tmp_path, "MODE=origin,hard"), status=2)
    assert "'hard' is no setting" in finish(start("pope.sh", tmp_path, "hard"), status=2)
    assert "'AVERAGE_TOKEN=64' is no setting" in finish(start("pope.sh", tmp_path, "AVERAGE_TOKEN=64"), status=2)
    assert "no benchmark 'popes'" in finish(
        start("all.sh", tmp_path, "MODE=origin", "BENCHMARKS=pope,popes"), status=2
    )
    output = finish(start("pope.sh", tmp_path, "MODE=origin", "EVAL=data"), status=3)
    assert output.count("pope needs data/pope/") == 3


def test_baselines_and_budgets_are_handed_on(tmp_path):
    def arguments(*settings):
        program = f'source {SCRIPTS}/common.sh; begin pope; echo "${{METHOD[@]}} $CKPT"'
        command = ["bash", "-c", program, "pope.sh", "MODEL=a/llava-v1.5-7b", *settings]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
        ).stdout

    assert arguments("MODE=origin", "PRUNERS=out/p") == "--mode origin llava-v1.5-7b-origin\n"
    assert arguments("PRUNERS=out/p") == "--mode hard --pruners out/p llava-v1.5-7b-hard-p\n"
    asked = arguments("BASELINE=fastv", "AVERAGE_TOKENS=128")
    assert asked == "--mode hard --baseline fastv --average_tokens 128 llava-v1.5-7b-hard-fastv-128\n"
    asked = arguments("PRUNERS=out/p", "AVERAGE_TOKENS=96", "MODE=masked")
    assert asked == "--mode masked --pruners out/p --average_tokens 96 llava-v1.5-7b-masked-p-96\n"


def test_another_run_of_the_same_name_is_refused(tmp_path):
    data, base = tmp_path / "eval data", ["MODEL=my models/llava", "PRUNERS=x/prune"]
    for folder in ("my models/llava", "other models/llava", "x/prune", "y/prune"):
        (tmp_path / folder).mkdir(parents=True)
    name, keep = data / "results/llava-hard-prune", data / "results/llava-hard-prune/pope.json"

    def begin(*settings, status=0, benchmark="gqa"):
        program = f'source "{SCRIPTS}/common.sh"; begin {benchmark}'
        command = ["bash", "-c", program, "pope.sh", f"EVAL={data}", *base, *settings]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stderr

    begin()
    keep.write_text("{}")
    for same in ([], [f"MODEL={tmp_path}/my models/llava/", f"PRUNERS={tmp_path}/x/prune", "CHUNKS=2"]):
        begin(*same)
    for other in ("MODEL=other models/llava", "MODEL_BASE=lmsys/vicuna-7b-v1.5", "PRUNERS=y/prune", "CONV_MODE=v0"):
        said = begin(other, benchmark="pope", status=2)
        asked = other.replace("=y/", f"={tmp_path}/y/").replace("=other", f"={tmp_path}/other")
        assert f"{name} is of another run" in said and f"Set another EVAL, or remove {name}" in said
        there, asked_for = said.split("Asked for:")
        assert f"PRUNERS={tmp_path}/x/prune\n" in there and f"\n{asked}\n" in asked_for and keep.exists()
    # all.sh refuses before it clears what it will write
    all_of = ["MODE=origin,hard", f"EVAL={data}", "MODEL=my models/llava", "PRUNERS=y/prune", "BENCHMARKS=pope"]
    assert "is of another run" in finish(start("all.sh", tmp_path, *all_of), status=2) and keep.exists()
    # what prunes is nothing to origin; and mosaic's model is not there when it first begins
    begin("MODE=origin")
    begin("MODE=origin", "PRUNERS=y/prune")
    begin("MODEL=eval data/mosaic/tiny", "MODE=origin", benchmark="mosaic")
    (data / "mosaic/tiny").mkdir(parents=True)
    begin("MODEL=eval data/mosaic/tiny", "MODE=origin", benchmark="mosaic")


def test_there_is_a_script_for_each_benchmark_and_all_of_them_are_valid():
    names = {script.stem for script in SCRIPTS.glob("*.sh")}
    assert names == {*NAMES, "mosaic", "all", "common"}
    for script in SCRIPTS.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
