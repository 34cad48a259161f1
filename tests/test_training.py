"""Training for real: two processes under the deepspeed launcher, ZeRO-2 and ZeRO-3, killed and resumed, with LoRA."""

import json
import shutil
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
from launch import train, train_and_kill, write_data
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

# noise off and per-sample terms only: then one process on the whole batch must see what two see on halves
QUIET = {
    "prune_estimator": "sigmoid_st",
    "prune_noise_scale_start": 0.0,
    "prune_noise_scale_end": 0.0,
    "prune_disc_max_accuracy": 1.0,
    "prune_sparsity_weight": 0.0,
    "prune_token_count_weight": 50.0,
    "prune_target_warmup_ratio": 0.0,
    "prune_init_keep_logit": 0.5,
    "prune_guidance_weight": 2.0,
    "prune_guidance_only_ratio": 0.4,
    "prune_guidance_ratio": 0.5,
    "prune_selection": "topk",
    "prune_pruner_lr": 1e-3,
    "max_grad_norm": 0.0,
}

GUIDED = {"prune_guidance_weight": 1.0, "prune_guidance_only_ratio": 0.5, "prune_selection": "topk"}


def sample(name, picture, question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": picture} if picture else {}), "conversations": turns}


@pytest.fixture(scope="module")
def yes_no(testbed, tmp_path_factory):
    """Answers of one length, so that the mean over a batch is the mean over its halves."""
    pictures = sorted(str(p.relative_to(testbed)) for p in (testbed / "images" / "train").iterdir())
    samples = [
        sample(f"s{i}", picture, f"<image>\nIs there a {shape}?", "yes")
        for i, picture in enumerate(pictures[:40])
        for shape in ("circle", "triangle")
    ]
    return write_data(tmp_path_factory.mktemp("data") / "yes_no", testbed, samples)


@pytest.fixture(scope="module")
def one_process(yes_no, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    return train(yes_no, out, processes=1, stage=None, per_device_train_batch_size=8, **QUIET), out


@pytest.mark.parametrize(("stage", "checkpointing"), [(2, False), (3, True)], ids=["zero2", "zero3-checkpointed"])
def test_two_processes_equal_one(yes_no, one_process, tmp_path, stage, checkpointing):
    expected, reference = one_process
    logs = train(yes_no, tmp_path, stage=stage, gradient_checkpointing=checkpointing, **QUIET)
    assert len(logs) == len(expected) == 5
    both = {"loss/task", "loss/adversarial", "loss/token_count", "gan/d_loss", "prune/keep_ratio"}
    for ours, theirs in zip(logs, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "loss/guidance", *both} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), (name, ours["step"])
    assert ["loss/guidance" in entry for entry in logs] == [True, True, True, True, False]
    assert [both <= entry.keys() for entry in logs] == [False, False, True, True, True], "guidance alone comes first"
    ours, theirs = (load_file(Path(out) / "pruners.safetensors") for out in (tmp_path, reference))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.shape == theirs[name].shape, "a partition was saved instead of the whole tensor"
        assert torch.allclose(weight, theirs[name], atol=5e-4), name


@pytest.mark.parametrize("stage", [2, 3])
def test_text_only_batches_on_one_rank_do_not_hang(yes_no, testbed, tmp_path, stage):
    """One sample a rank, in an order that gives one rank text while the other has a picture, and both text."""
    with_picture = json.loads((yes_no / "train.json").read_text())
    text = [sample(f"t{i}", None, "Is there a circle?", "no") for i in range(4)]
    data = write_data(tmp_path / "data", testbed, with_picture[:4] + text)
    flags = {"per_device_train_batch_size": 1, **GUIDED, "prune_guidance_ratio": 1.0}
    logs = train(data, tmp_path / "out", stage=stage, steps=6, **flags)
    assert len(logs) == 6 and all(entry["loss"] == entry["loss"] for entry in logs)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(testbed, tmp_path):
    """With all the noise on: Gumbel noise, the discriminator's, sampled turns, grouped batches, accumulation."""
    flags = {
        "steps": 7,
        "processes": 2,
        "stage": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "group_by_modality_length": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "prune_pruner_lr": 1e-3,
        "prune_pruner_rank": 32,
        **GUIDED,
    }
    expected = train(testbed, tmp_path / "whole", **flags)
    broken = tmp_path / "broken"
    train_and_kill(testbed, broken, lambda: (broken / "tmp-checkpoint-4").exists(), **flags)
    assert (broken / "checkpoint-2").is_dir() and not (broken / "pruners.safetensors").exists()
    logs = train(testbed, broken, **flags)
    assert [entry["step"] for entry in logs] == list(range(1, 8))
    for ours, theirs in zip(logs, expected, strict=True):
        assert {k: v for k, v in ours.items() if "/" in k or k == "loss"} == pytest.approx(
            {k: v for k, v in theirs.items() if "/" in k or k == "loss"}, rel=1e-5
        )
    finished = (broken / "pruners.safetensors").read_bytes()
    assert len(train(testbed, broken, **{**flags, "steps": 6})) == 6, "a finished run was trained further"
    assert (broken / "pruners.safetensors").read_bytes() != finished, "step 6 is before step 7"
    # a frozen base stays out of every checkpoint
    pruners = (broken / "pruners.safetensors").stat().st_size
    base = (testbed / "llava-mosaic-tiny" / "model.safetensors").stat().st_size
    for file in (broken / "checkpoint-6").rglob("*"):
        assert file.stat().st_size < 3 * pruners < base or file.is_dir(), file


def test_a_truncated_checkpoint_folder_is_not_taken(testbed, tmp_path):
    """A kill between two files of a checkpoint leaves a folder of another name, which is not resumed from."""
    flags = {"steps": 3, "stage": None, "processes": 1, "save_strategy": "steps", "save_steps": 2}
    expected = train(testbed, tmp_path, **flags)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "tmp-checkpoint-3")
    (tmp_path / "tmp-checkpoint-3" / "adversary.pt").unlink()
    assert train(testbed, tmp_path, **flags)[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)
    with pytest.raises(AssertionError, match="other settings of .*sparsity_weight"):
        train(testbed, tmp_path, **flags, prune_sparsity_weight=3.0)


def test_a_checkpoint_of_another_training_is_not_gone_on_with(testbed, tmp_path):
    flags = {"stage": None, "processes": 1, "save_strategy": "steps", "save_steps": 2, "prune_alignment": "none"}
    train(testbed, tmp_path / "out", steps=2, **flags)
    with pytest.raises(AssertionError, match="another training, with seed 42 and not 1"):
        train(testbed, tmp_path / "out", steps=2, seed=1, **flags)
    other = shutil.copytree(testbed / "llava-mosaic-tiny", tmp_path / "llava-other")
    with pytest.raises(AssertionError, match="another training, with base_model .*llava-mosaic-tiny.* and not"):
        train(testbed, tmp_path / "out", steps=2, model_name_or_path=other, **flags)
    samples = json.loads((testbed / "train.json").read_text())
    fewer = write_data(tmp_path / "fewer", testbed, samples[:8])
    with pytest.raises(AssertionError, match=f"another training, with samples {len(samples)} and not 8"):
        train(testbed, tmp_path / "out", steps=2, data_path=fewer / "train.json", **flags)
    (tmp_path / "out" / "checkpoint-2" / "prune_training.json").unlink()
    with pytest.raises(AssertionError, match="checkpoint-2 has no prune_training.json"):
        train(testbed, tmp_path / "out", steps=2, **flags)
    with pytest.raises(AssertionError, match="give its folder that name"):
        train(testbed, tmp_path / "new", steps=1, model_name_or_path=other, prune_start=tmp_path / "out", **flags)


def test_a_finished_run_keeps_all_that_it_wrote(testbed, tmp_path):
    flags = {"steps": 2, "stage": None, "processes": 1, "save_strategy": "steps", "save_steps": 2}
    train(testbed, tmp_path, **flags)
    written = [(tmp_path / name).read_bytes() for name in ("pruners.safetensors", "prune_config.json")]
    assert json.loads(written[1])["keep_fractions"]
    train(testbed, tmp_path, **flags)
    assert [(tmp_path / name).read_bytes() for name in ("pruners.safetensors", "prune_config.json")] == written


def test_lora_trains_beside_the_pruners_and_both_are_saved(testbed, tmp_path):
    out = tmp_path / "llava-lora"
    flags = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "prune_pruner_lr": 1e-3}
    train(testbed, out, stage=2, steps=3, **GUIDED, **flags)
    adapter = load_file(out / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for name, weight in adapter.items() if "lora_B" in name)
    assert not any("pruners" in name for name in adapter)
    other = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert other and not any("llava_pruners" in name for name in other)

    from llava.model.builder import load_pretrained_model

    from llava_prune import last_report, load_pruners

    base = testbed / "llava-mosaic-tiny"
    _, model, _, _ = load_pretrained_model(str(out), str(base), "llava-lora", device="cpu")
    load_pruners(model.float(), out, mode="hard")
    model.get_vision_tower().float()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, -200, 5, 6]]), images=torch.randn(1, 3, 192, 192))
    assert last_report(model).vision_tokens.tolist() == [144]


def test_without_deepspeed_lora_and_projector_go_on_as_they_were(testbed, tmp_path):
    """And once all steps are done, the same command trains nothing more."""
    out = tmp_path / "llava-lora"
    flags = {"stage": None, "processes": 1, "save_strategy": "steps", "save_steps": 2, "prune_alignment": "none"}
    flags |= {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 2e-3, "steps": 4}
    expected = train(testbed, out, **flags)
    names = ("adapter_model.safetensors", "pruners.safetensors")
    written = [(out / name).read_bytes() for name in names]
    trained = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert any("mm_projector" in name for name in trained)
    assert [entry["step"] for entry in train(testbed, out, **flags)] == [1, 2, 3, 4]
    assert [(out / name).read_bytes() for name in names] == written
    shutil.rmtree(out / "checkpoint-4")
    again = train(testbed, out, **flags)
    assert [entry["loss"] for entry in again] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)
    for name, value in torch.load(out / "non_lora_trainables.bin", weights_only=True).items():
        torch.testing.assert_close(value, trained[name], atol=1e-6, rtol=0)


def test_a_trained_base_is_saved_beside_its_pruners(testbed, tmp_path):
    out = tmp_path / "llava-tuned"
    train(testbed, out, steps=2, prune_train_base=True, **GUIDED)
    from llava.model.builder import load_pretrained_model

    from llava_prune import load_pruners

    weights = load_file(out / "model.safetensors")
    assert not any("llava_pruners" in name for name in weights)
    _, model, _, _ = load_pretrained_model(str(out), None, "llava-tuned", device="cpu")
    load_pruners(model.float(), out)
    original = load_file(testbed / "llava-mosaic-tiny" / "model.safetensors")
    changed = [n for n, w in original.items() if n in weights and not torch.equal(w.float(), weights[n].float())]
    assert any("layers" in name for name in changed)


def test_the_token_merger_trains_with_the_layer_pruners(testbed, tmp_path):
    logs = train(
        testbed,
        tmp_path,
        stage=3,
        steps=3,
        prune_enable_token_merger=True,
        prune_merger_tokens=36,
        prune_target_token_num=18,
    )
    assert len(logs) == 3
    assert any(name.startswith("merger.") for name in load_file(tmp_path / "pruners.safetensors"))


@pytest.mark.parametrize("alignment", ["mse", "mean_var", "kl", "none"])
def test_other_alignments_train(testbed, tmp_path, alignment):
    logs = train(testbed, tmp_path, processes=1, stage=None, steps=2, prune_alignment=alignment)
    assert ("loss/adversarial" in logs[0]) == (alignment != "none")
    assert not any(name.startswith("gan/") for name in logs[0])


def test_pruners_of_guidance_alone_are_a_start_for_others(testbed, tmp_path):
    """Whatever the budget, the losses and the estimator are then, but not of other pruners or for another base."""
    alone = {**GUIDED, "prune_guidance_only_ratio": 1.0, "prune_guidance_replays": 5, "prune_pruner_lr": 1e-3}
    logs = train(testbed, tmp_path / "alone", stage=3, steps=3, **alone)
    assert all({"loss", "loss/guidance"} == {name for name in entry if name.startswith("loss")} for entry in logs)
    start = {"prune_start": tmp_path / "alone", "processes": 1, "stage": None, "steps": 1}
    train(testbed, tmp_path / "then", prune_target_token_num=72, prune_alignment="none", learning_rate=0, **start)
    written, begun = (load_file(tmp_path / name / "pruners.safetensors") for name in ("then", "alone"))
    assert written.keys() == begun.keys()
    differences = [(written[name] - weight).abs().max() for name, weight in begun.items()]
    assert max(differences) < 5e-3, "one step from there"
    description = json.loads((tmp_path / "then" / "prune_config.json").read_text())
    assert description["prune_config"]["target_token_num"] == 72
    with pytest.raises(AssertionError, match="have other pruning_layers, pruner_dim"):
        train(testbed, tmp_path / "other", prune_pruning_layers=[1, 5, 6], prune_pruner_dim=32, **start)


def checked(folder, turns, *turns_problem):
    """What the check says of a sample with these turns, or None."""
    from llava_prune.data_check import check_training_data

    (folder / "turns.json").write_text(json.dumps([{"id": "x", "conversations": turns}]))
    try:
        check_training_data(str(folder / "turns.json"), None, *turns_problem)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("version", ["v0", "v1", "own", "llava_v0"])
def test_turns_that_llava_can_not_use_are_refused_and_no_others(testbed, tmp_path, monkeypatch, version):
    import transformers
    from llava.train import train as llava_train

    from llava_prune.train import turns_problem_of

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        testbed / "llava-mosaic-tiny", model_max_length=512, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    conversation = llava_train.conversation_lib
    monkeypatch.setattr(conversation, "default_conversation", conversation.default_conversation)
    problem = turns_problem_of(conversation, version)
    if version == "llava_v0":  # as LLaVA's train() does
        conversation.default_conversation = conversation.conv_templates[version]

    def learns(turns):
        try:
            return bool((llava_train.preprocess([deepcopy(turns)], tokenizer)["labels"][0] != -100).any())
        except (AssertionError, KeyError, TypeError):
            return False

    refused = set()
    for length in range(1, 5):
        for roles in product(("human", "gpt", "system"), repeat=length):
            turns = [{"from": role, "value": "hi"} for role in roles]
            said = checked(tmp_path, turns, problem)
            if said is None:
                # with a question last, LLaVA learns from a conversation that it cuts, and not from a short one
                assert learns(turns) or roles[-1] == "human", roles
            elif "gpt" in roles:
                assert not learns(turns), (roles, said)
                refused.add(roles)
    unusable = {("gpt",), ("system", "human", "gpt"), ("human", "human", "gpt")}
    assert unusable <= refused if version != "llava_v0" else not refused
    assert not {("human", "gpt"), ("gpt", "human", "gpt"), ("human", "gpt", "human", "gpt")} & refused


@pytest.mark.parametrize("value", [None, 3, ["hi"]])
def test_a_turn_without_text_is_refused_and_named(tmp_path, value):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "hi"}]
    assert "sample 0 (id 'x'): a turn whose 'value' is no text" in checked(tmp_path, turns)


def test_whatever_a_sample_raises_names_it(tmp_path):
    """A PNG whose second chunk of pixels is broken raises SyntaxError, and only when it is decoded."""
    from PIL import Image

    from llava_prune.data_check import NamedErrors, check_training_data

    path = tmp_path / "broken.png"
    Image.effect_noise((400, 400), 80).save(path)
    picture = bytearray(path.read_bytes())
    second = picture.find(b"IDAT", picture.find(b"IDAT") + 4)
    picture[second : second + 4] = b"\0\1\2\3"
    path.write_bytes(picture)
    samples = [sample("s0", "broken.png", "<image>\nIs there a circle?", "yes")]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    assert check_training_data(str(tmp_path / "train.json"), str(tmp_path)) == 1

    class Pictures:
        list_data_dict = samples

        def __getitem__(self, index):
            return Image.open(tmp_path / self.list_data_dict[index]["image"]).convert("RGB")

    with pytest.raises(
        ValueError, match="sample 0 .id 's0', image 'broken.png'. can not be used .SyntaxError: broken"
    ):
        NamedErrors(Pictures())[0]


def test_a_picture_too_large_to_be_opened_is_named(tmp_path, monkeypatch):
    from PIL import Image

    from llava_prune.data_check import check_training_data

    Image.new("L", (9, 9)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    (tmp_path / "train.json").write_text(json.dumps([sample("s0", "large.png", "<image>\nWhat?", "yes")]))
    with pytest.raises(ValueError, match="sample 0 .id 's0'.: image .*large.png can not be read"):
        check_training_data(str(tmp_path / "train.json"), str(tmp_path))


def test_an_image_that_breaks_off_is_named(testbed, tmp_path):
    from llava_prune.data_check import NamedErrors, check_training_data

    samples = json.loads((testbed / "train.json").read_text())[:2]
    picture = (testbed / samples[1]["image"]).read_bytes()
    (tmp_path / "half.png").write_bytes(picture[: len(picture) // 2])
    samples[1]["image"] = "half.png"
    (tmp_path / "train.json").write_text(json.dumps(samples[1:]))
    assert check_training_data(str(tmp_path / "train.json"), str(tmp_path)) == 1  # its header is whole

    class Pictures:
        list_data_dict = samples[1:]

        def __len__(self):
            return 1

        def __getitem__(self, index):
            from PIL import Image

            return Image.open(tmp_path / self.list_data_dict[index]["image"]).convert("RGB")

    with pytest.raises(ValueError, match="half.png.*resumes from the last checkpoint"):
        NamedErrors(Pictures())[0]


def test_bad_data_and_settings_stop_before_the_model_is_loaded(testbed, tmp_path):
    import subprocess

    from launch import command, environment

    samples = json.loads((testbed / "train.json").read_text())[:4]
    samples[1]["image"] = "images/train/gone.png"
    data = write_data(tmp_path / "data", testbed, samples)
    for flags, message in (
        ({}, "gone.png can not be read"),
        ({"prune_target_token_num": 10}, "floor of 18"),
        ({"prune_pruning_layers": [2, 8]}, "8 layers, so they must lie in 0..7"),
        ({"prune_config": "mozaic"}, "no prune config 'mozaic'"),
        ({"data_path": tmp_path / "none.json"}, "none.json can not be read"),
        ({"prune_target_token_num": 144}, "leaves nothing to prune of 144 vision tokens"),
        ({"prune_config": "mosaic_guided", "lora_enable": True}, "LoRA or the base would not learn"),
    ):
        chosen = testbed if flags else data
        done = subprocess.run(
            command(chosen, tmp_path / "out", 1, None, 2, **flags), env=environment(), capture_output=True, text=True
        )
        assert done.returncode != 0 and message in done.stdout + done.stderr, (message, done.stderr[-2000:])
    assert not (tmp_path / "out" / "pruners.safetensors").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_at_the_width_of_7b_takes_tens_of_megabytes(wide_base, yes_no, tmp_path, stage):
    """Pruners and discriminator of preset `default`, their optimizers' moments, and nothing of the frozen base."""
    flags = {
        "model_name_or_path": wide_base,
        "vision_tower": wide_base / "vision_tower",
        "prune_config": "default",
        "prune_pruning_layers": [1, 2, 3],
        "prune_disc_layers": [-1, -2, -3],
        "prune_target_token_num": 6,
        "per_device_train_batch_size": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    train(yes_no, tmp_path, processes=1, stage=stage, steps=1, **flags)
    files = {p.name: p.stat().st_size for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()}
    print(files)
    # 20 bytes a weight; in bf16, which takes minutes on some CPUs, 16, so under 100e6. One decoder layer takes 400e6
    assert 30e6 < sum(files.values()) < 125e6, files
    assert (tmp_path / "pruners.safetensors").stat().st_size < 20e6


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A random LLaVA as wide as the 7B model, of few layers and vision tokens."""
    from llava_prune.testbed.base_model import BaseSize, build_base, save_base

    folder = tmp_path_factory.mktemp("wide") / "llava-wide"
    folder.mkdir()
    model, _ = build_base(folder, BaseSize(layers=4, hidden=4096, mlp=64, heads=32, pixels=64))
    save_base(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(folder / "vision_tower")
    (folder / "config.json").write_text(json.dumps(config))
    yield folder
    shutil.rmtree(folder)
