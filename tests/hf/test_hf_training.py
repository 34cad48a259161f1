"""Training on the hf stack: what the model is taught, and real runs under the deepspeed launcher."""

import json
import pickle
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from launch import ROOT, environment, free_port, history, shared_memory_freed
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from llava_prune import load_pruners, prune_mode
from llava_prune.convert import convert
from llava_prune.data_check import check_training_data, question_first
from llava_prune.data_hf import Collator, ConversationDataset, end_of_answers
from llava_prune.reporting.samples import Sample
from llava_prune.resuming import newest_complete
from llava_prune.testbed.prepare import prepare
from llava_prune.train_hf import arguments_class, make_trainer
from llava_prune.turns import supervise_one_turn
from llava_prune.visualize.chat import load_chat

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
    "prune_pruner_lr": 1e-3,
    "max_grad_norm": 0.0,
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A small testbed with its base converted, and samples with one picture, one answer of one token each."""
    folder = prepare(tmp_path_factory.mktemp("bed"), train=48, test=4)
    convert(folder / "llava-mosaic-tiny", folder / "hf")
    pictures = sorted(str(path.relative_to(folder)) for path in (folder / "images" / "train").iterdir())
    samples = []
    for i, picture in enumerate(pictures[:40]):
        turns = [{"from": "human", "value": "<image>\nIs there a circle?"}, {"from": "gpt", "value": "yes"}]
        samples.append({"id": f"s{i}", "image": picture, "conversations": turns})
    (folder / "yes.json").write_text(json.dumps(samples))
    mixed = [dict(sample) for sample in samples]
    for sample in mixed[::2]:  # half of them without a picture
        del sample["image"]
        sample["conversations"] = [{"from": "human", "value": "Say yes."}, sample["conversations"][1]]
    (folder / "mixed.json").write_text(json.dumps(mixed))
    return folder


def test_arguments_can_be_pickled(tmp_path):
    """As trainers do when they save a model."""
    args = arguments_class()(output_dir=str(tmp_path), prune_config="avg128")
    assert pickle.loads(pickle.dumps(args)).prune == args.prune


@pytest.fixture(scope="module")
def processor(bed):
    return AutoProcessor.from_pretrained(bed / "hf")


def run(bed, out, processes=2, stage=2, steps=4, data="yes.json", timeout=300, **flags):
    settings = {
        "stack": "hf",
        "prune_config": "mosaic",
        "model_name_or_path": bed / "hf",
        "data_path": bed / data,
        "image_folder": bed,
        "output_dir": out,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "model_max_length": 512,
        "report_to": "none",
        "disable_tqdm": True,
        **flags,
    }
    launcher = [sys.executable, "-m", "llava_prune.train"]
    if stage is not None:
        deepspeed = Path(sys.executable).parent / "deepspeed"
        launcher = [str(deepspeed), "--master_port", str(free_port()), "--num_gpus", str(processes)]
        launcher += ["--module", "llava_prune.train", "--deepspeed", str(ROOT / f"zero_configs/zero{stage}.json")]
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    # the two stacks would rebuild DeepSpeed's operator in turns if they shared a folder
    where = {**environment(), "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions"}
    with shared_memory_freed(launcher):
        done = subprocess.run(
            launcher + arguments, env=where, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return history(out)


# ---- data


def test_labels_are_the_answers_with_their_end(bed, processor):
    data = ConversationDataset(str(bed / "train.json"), str(bed), processor, 512)
    turns = 0
    for index in range(len(data)):
        item, sample = data[index], data.list_data_dict[index]
        supervised = item["labels"][item["labels"] != -100]
        said = processor.tokenizer.decode(supervised).split("</s>")[:-1]
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        assert [text.strip() for text in said] == answers
        assert torch.equal(item["input_ids"][item["labels"] != -100], supervised)
        assert (item["input_ids"] == processor.image_token_id).sum() == 144
        turns = max(turns, len(answers))
    assert turns > 1, "no sample had several turns"


HUB = (  # as of llava-hf/llava-1.5-7b-hf: an answer ends with a space
    "{% for message in messages %}{{ message.role.upper() + ': ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}{% else %}"
    "{{ part.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_where_the_template_does_not_end_answers_they_are_taught_to(bed):
    processor = AutoProcessor.from_pretrained(bed / "hf")
    own, processor.chat_template = end_of_answers(processor), HUB
    assert (own, end_of_answers(processor)) == ("", "</s>")
    data = ConversationDataset(str(bed / "train.json"), str(bed), processor, 512)
    for index in range(8):
        item, sample = data[index], data.list_data_dict[index]
        supervised = item["labels"][item["labels"] != -100]
        said = processor.tokenizer.decode(supervised).split("</s>")
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        assert [text.strip() for text in said] == [*answers, ""] and supervised[-1] == processor.tokenizer.eos_token_id


def test_training_the_base_leaves_the_vision_tower_and_lora_leaves_the_base(bed, tmp_path):
    words = ["--prune_config", "mosaic", "--model_name_or_path", bed / "hf", "--data_path", bed / "yes.json"]
    words += ["--image_folder", bed, "--output_dir", tmp_path, "--prune_train_base", True]
    trainer = make_trainer(list(map(str, words)))
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("language_model" in name for name in trained) and any("projector" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    with pytest.raises(ValueError, match="LoRA keeps the base as it is"):
        make_trainer(list(map(str, [*words, "--lora_enable", True])))


def test_a_batch_without_pictures_carries_a_masked_blank_one(bed, processor):
    data = ConversationDataset(str(bed / "mixed.json"), str(bed), processor, 512)
    batch = Collator(processor)([data[0], data[2]])
    placeholder = batch["input_ids"] == processor.image_token_id
    assert batch["pixel_values"].shape[0] == 1 and placeholder.sum() == 144
    assert not batch["attention_mask"][placeholder].any() and (batch["labels"][placeholder] == -100).all()
    turns = supervise_one_turn(batch, torch.zeros(2), processor.image_token_id)
    assert torch.equal(turns["labels"], batch["labels"])
    mixed = Collator(processor)([data[0], data[1]])
    assert mixed["pixel_values"].shape[0] == 1 and (mixed["input_ids"] == processor.image_token_id).sum() == 144


def test_vision_tokens_that_would_be_cut_are_refused(bed, processor):
    data = ConversationDataset(str(bed / "yes.json"), str(bed), processor, 100)
    with pytest.raises(ValueError, match="raise --model_max_length"):
        data[0]


def test_turns_that_can_not_be_used_are_refused_and_no_others(processor, tmp_path):
    path = tmp_path / "turns.json"
    refused = set()
    for length in range(1, 4):
        for roles in product(("human", "gpt", "system"), repeat=length):
            if "gpt" not in roles:
                continue
            path.write_text(json.dumps([{"id": "x", "conversations": [{"from": r, "value": "hi"} for r in roles]}]))
            try:
                check_training_data(str(path), None, question_first)
            except ValueError:
                refused.add(roles)
                with pytest.raises((IndexError, KeyError)):
                    ConversationDataset(str(path), None, processor, 512)[0]
            else:
                assert (ConversationDataset(str(path), None, processor, 512)[0]["labels"] != -100).any()
    assert {("gpt",), ("gpt", "human", "gpt"), ("system", "human", "gpt")} <= refused
    assert not {("human", "gpt"), ("human", "human", "gpt"), ("human", "gpt", "human")} & refused


def test_reentrant_checkpointing_is_refused_and_the_other_kind_set(tmp_path):
    arguments = arguments_class()
    settings = {"output_dir": str(tmp_path), "prune_config": "mosaic", "use_cpu": True}
    with pytest.raises(ValueError, match="reentrant"):
        arguments(**settings, activation_checkpointing_kwargs={"use_reentrant": True})
    assert arguments(**settings).activation_checkpointing_kwargs == {"use_reentrant": False}


# ---- runs


@pytest.mark.distributed
def test_two_processes_equal_one(bed, tmp_path):
    expected = run(bed, tmp_path / "one", processes=1, stage=None, per_device_train_batch_size=8, **QUIET)
    for stage in (2, 3):
        logs = run(bed, tmp_path / f"zero{stage}", stage=stage, activation_checkpointing=stage == 3, **QUIET)
        assert len(logs) == len(expected) == 4
        for ours, theirs in zip(logs, expected, strict=True):
            for name in (
                "loss",
                "loss/task",
                "loss/adversarial",
                "loss/token_count",
                "gan/d_loss",
                "prune/keep_ratio",
            ):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), (stage, name, ours["step"])
        ours, theirs = (load_file(tmp_path / out / "pruners.safetensors") for out in (f"zero{stage}", "one"))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=0)


@pytest.mark.distributed
def test_ranks_without_pictures_do_not_hang_zero3(bed, tmp_path):
    logs = run(bed, tmp_path, stage=3, steps=6, data="mixed.json", per_device_train_batch_size=1, timeout=200)
    assert len(logs) == 6


@pytest.mark.distributed
@pytest.mark.parametrize("alignment", ["gan", "kl"])
def test_the_token_merger_trains_with_the_layer_pruners(bed, tmp_path, alignment):
    merger = {"prune_enable_token_merger": True, "prune_merger_tokens": 36, "prune_target_token_num": 18}
    steps = {"steps": 3, "data": "mixed.json", "per_device_train_batch_size": 1, "prune_pruner_lr": 1e-3}
    run(bed, tmp_path / "one", stage=3, prune_alignment=alignment, **merger, **steps)
    run(bed, tmp_path / "none", stage=None, **merger, **{**steps, "prune_pruner_lr": 1e-12})
    moved, start = (load_file(tmp_path / name / "pruners.safetensors") for name in ("one", "none"))
    names = [name for name in start if name.startswith("merger.")]
    assert names and all((moved[name] - start[name]).abs().max() > 1e-5 for name in names if "key.bias" not in name)


@pytest.mark.distributed
def test_a_resumed_run_ends_where_an_unbroken_one_does(bed, tmp_path):
    run(bed, tmp_path / "whole", steps=4, save_strategy="steps", save_steps=2)
    run(bed, tmp_path / "broken", steps=4, save_strategy="steps", save_steps=2)
    for name in ("pruners.safetensors", "prune_config.json", "trainer_state.json"):
        (tmp_path / "broken" / name).unlink()
    import shutil

    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    run(bed, tmp_path / "broken", steps=4, save_strategy="steps", save_steps=2)
    whole, broken = (load_file(tmp_path / name / "pruners.safetensors") for name in ("whole", "broken"))
    for name in whole:
        torch.testing.assert_close(broken[name], whole[name], atol=1e-6, rtol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_lora_trains_beside_the_pruners(bed, tmp_path, stage):
    run(bed, tmp_path, stage=stage, lora_enable=True, lora_r=4, steps=3)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert adapter and not any("pruner" in name for name in adapter)
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name), "LoRA did not move"
    description = json.loads((tmp_path / "prune_config.json").read_text())
    assert description["base_model"]["name"] == "llava-mosaic-tiny"
    assert len(description["keep_fractions"]) == 3
    chat = load_chat(str(tmp_path), None, None, "v1")  # the adapter on its base, and its pruners
    state = chat.model.state_dict()
    assert all(any(torch.equal(own, value) for value in state.values()) for own in list(adapter.values())[:4])
    with load_pruners(chat.model, tmp_path):
        assert chat.answers([Sample(Image.new("RGB", (64, 64)), "Is there a circle?")], 2)


def test_without_deepspeed_an_adapter_goes_on_from_the_newest_complete_checkpoint(bed, tmp_path):
    flags = {"stage": None, "lora_enable": True, "lora_r": 4, "save_strategy": "steps", "save_steps": 2, "steps": 4}
    run(bed, tmp_path, **flags)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    before = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert any((whole[name] - before[name]).abs().max() > 1e-5 for name in whole)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # written last: as if killed while it was saved
    assert newest_complete(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    (tmp_path / "adapter_model.safetensors").unlink()
    run(bed, tmp_path, **flags)
    again = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, atol=1e-5, rtol=0)


def trainer_of(bed, out, **flags):
    settings = {
        "model_name_or_path": bed / "hf",
        "data_path": bed / "yes.json",
        "image_folder": bed,
        "output_dir": out,
        "prune_config": "mosaic",
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "model_max_length": 512,
        **flags,
    }
    return make_trainer([part for name, value in settings.items() for part in (f"--{name}", str(value))])


def test_adaptation_leaves_pruners_as_they_are_to_the_bit(bed, tmp_path):
    """Also in bf16, without DeepSpeed: what was trained in fp32 is not rounded to the base's precision."""
    trainer_of(bed, tmp_path / "start", max_steps=1).train()
    flags = {"prune_train_pruners": False, "prune_start": tmp_path / "start", "prune_alignment": "none", "bf16": True}
    trainer = trainer_of(bed, tmp_path / "out", lora_enable=True, lora_r=4, **flags)
    now = trainer.prune_handle.pruners.state_dict()
    for name, value in load_file(tmp_path / "start" / "pruners.safetensors").items():
        assert torch.equal(now[name], value), name


def test_accumulated_batches_are_one_batch(bed, tmp_path):
    """The loss that is logged, and its gradient's norm."""
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        flags = {**QUIET, "prune_alignment": "none", "max_grad_norm": 1e9, "logging_steps": 1, **size}
        trainer = trainer_of(bed, tmp_path, **flags)
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_evaluation_is_the_task_loss_of_what_is_kept(bed, tmp_path):
    trainer = trainer_of(bed, tmp_path)
    trainer.eval_dataset = torch.utils.data.Subset(trainer.train_dataset, range(4))
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad(), prune_mode(trainer.model.eval(), "masked"):
        assert found == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-4)


@pytest.mark.parametrize("mode, guided", [("hard", False), ("soft", False), ("soft", True)])
def test_lora_is_held_to_the_base_as_it_was(bed, tmp_path, mode, guided):
    """Adapting to pruners and beside ones that learn, also with adapted layers before the first pruner."""
    flags = {"prune_alignment": "mse"}
    if mode == "hard":
        trainer_of(bed, tmp_path / "start", max_steps=1).train()
        flags |= {"prune_train_pruners": False, "prune_start": tmp_path / "start"}
    trainer = trainer_of(bed, tmp_path / "out", lora_enable=True, lora_r=4, **flags)
    trainer.prune_handle.state.guided = guided
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        with model.disable_adapter(), trainer.prune_handle.suspended():
            states = model(**batch, output_hidden_states=True).hidden_states
        with prune_mode(model, mode):
            model(**batch, use_cache=False)
            found, index, shares = trainer._unpruned(trainer.prune_handle.state.record, batch)
    assert found and index.shape[1] > 1
    assert bool(shares) == guided
    for layer, features in found.items():
        if layer + 1 < len(states) - 1:  # the last one is normalised
            torch.testing.assert_close(features, states[layer + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("baseline", ["divprune", "fastv"])
def test_lora_learns_to_answer_from_what_a_baseline_keeps(bed, tmp_path, baseline):
    flags = {"prune_baseline": baseline, "prune_target_token_num": 48, "lora_enable": True, "lora_r": 4}
    logs = run(bed, tmp_path, stage=None, steps=2, data="mixed.json", **flags)
    assert all(entry["prune/kept_share"] == pytest.approx(48 / 144, abs=0.01) for entry in logs)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name), "LoRA did not move"
    assert not list(tmp_path.rglob("pruners.safetensors")), "there are none"


def test_under_guidance_alone_pruners_run_in_half_precision_too(bed, tmp_path):
    """The host's autocast is around the model's forward alone, where pruners do not run then."""
    words = ["--model_name_or_path", bed / "hf", "--data_path", bed / "yes.json", "--image_folder", bed]
    words += [
        "--output_dir",
        tmp_path,
        "--prune_config",
        "mosaic",
        "--bf16",
        True,
        "--use_cpu",
        True,
        "--max_steps",
        2,
    ]
    words += ["--per_device_train_batch_size", 2, "--save_strategy", "no", "--report_to", "none"]
    words += ["--prune_guidance_weight", 1.0, "--prune_guidance_only_ratio", 1.0, "--prune_selection", "topk"]
    trainer = make_trainer([str(word) for word in words])
    seen = set()
    for scorer in trainer.prune_handle.scorers.values():
        scorer.pruner.joint_hidden.register_forward_hook(
            lambda module, inputs, output: seen.add((module.weight.dtype, output.dtype))
        )
    trainer.train()
    assert seen == {(torch.float32, torch.bfloat16)}
