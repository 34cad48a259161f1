"""Baselines on Hugging Face's classes: the same law, and prompts whose placeholders are fewer than the processor's."""

import pytest
import torch
from tiny_hf import batch_of, tiny
from transformers import GenerationConfig

from llava_prune import detach_pruners, last_report, prune_mode
from llava_prune.baselines import METHODS, attach_baseline

LENGTHS, IMAGES = [9, 14, 7, 11], [1, 0, 2, 1]
IN_DECODER = ("fastv", "pyramiddrop", "sparsevlm", "vtw")
BEFORE_DECODER = tuple(name for name in METHODS if name not in IN_DECODER)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def generate(model, batch, **how):
    return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **{"do_sample": False, **how})


KINDS = (("llava", "left"), ("llava-mistral", "right"), ("next", "none"), ("dino", "left"))
CASES = [(*kind, name) for kind in KINDS for name in IN_DECODER if (kind[0], name) != ("next", "vtw")]


@pytest.mark.parametrize(("kind", "padding", "name"), CASES)
def test_masked_equals_hard(kind, padding, name):
    model = tiny(kind)
    batch = batch_of(model, LENGTHS, IMAGES, padding)
    stock = logits(model, batch)
    results, words = [], []
    handle = attach_baseline(model, name, average_tokens=9 if kind != "next" else 28)
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            results.append(logits(model, batch))
            report, layout = last_report(model), handle.state.record.layout
            words.append((generate(model, batch), generate(model, batch, num_beams=3)))
    assert (results[0] - results[1])[layout.text].abs().max() < 1e-4
    assert (stock - results[1])[layout.text_after_image].abs().max() > 1e-2, "nothing was dropped"
    assert all(torch.equal(*pair) for pair in zip(*words, strict=True))
    budget = torch.tensor(IMAGES) * handle.average_tokens
    assert (report.average_tokens <= budget + 1e-4).all()
    kept_all = report.average_tokens == report.vision_tokens
    assert name == "vtw" or ((report.average_tokens > budget - 1) | kept_all).all()
    detach_pruners(model)
    assert torch.equal(logits(model, batch), stock)


@pytest.mark.parametrize(
    ("kind", "padding"), [("llava", "left"), ("llava", "right"), ("llava", "none"), ("dino", "left")]
)
@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_fewer_features_go_in_and_the_prompt_stays_as_it_was(name, kind, padding):
    model = tiny(kind)
    batch = batch_of(model, LENGTHS, IMAGES, padding)
    stock = logits(model, batch)
    attach_baseline(model, name, average_tokens=9)
    together = logits(model, batch)
    report = last_report(model)
    assert together.shape == stock.shape
    assert report.average_tokens.tolist() == [9, 0, 18, 9] and report.vision_tokens.tolist() == [16, 0, 32, 16]
    pictures = [torch.arange(4)[slice(*bounds)] for bounds in ((0, 1), (0, 0), (1, 3), (3, 4))]
    for row, picture in enumerate(pictures):  # each sample alone, without padding
        valid = batch["attention_mask"][row].bool() if padding != "none" else slice(None)
        alone = {"input_ids": batch["input_ids"][row][valid][None]}
        if len(picture):
            alone["pixel_values"] = batch["pixel_values"][picture]
        torch.testing.assert_close(logits(model, alone)[0], together[row][valid], atol=1e-4, rtol=0)
        text = alone["input_ids"][0] != model.config.image_token_id
        assert (together[row][valid][text].abs().sum(-1) > 0).all()
    if padding != "right":
        answers = generate(model, batch)
        with prune_mode(model, "masked"):
            assert torch.equal(generate(model, batch), answers)
        assert torch.equal(answers[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        first = together[:, -1].clone()
        first[:, model.generation_config.eos_token_id] = -torch.inf  # which the least length forbids
        assert torch.equal(answers[:, batch["input_ids"].shape[1]], first.argmax(-1))
    detach_pruners(model)
    assert torch.equal(logits(model, batch), stock) and "generate" not in model.__dict__


@pytest.mark.parametrize("name", ["uniform", "pooling"])
def test_generation_is_that_of_the_whole_prompt_at_every_step(name):
    model = tiny("llava")
    batch = batch_of(model, [9, 12], [1, 2])
    with attach_baseline(model, name, average_tokens=6):
        answers = generate(model, batch)
        beams = generate(model, batch, num_beams=3, num_return_sequences=2, return_dict_in_generate=True).sequences
        short = model.generate(**batch, max_length=batch["input_ids"].shape[1] + 2, do_sample=False)
        start = batch["input_ids"].shape[1]
        assert short.shape[1] == start + 2 and beams.shape == (4, start + 6)
        how = GenerationConfig(max_length=start + 3, min_length=start + 3, do_sample=False)
        assert model.generate(**batch, generation_config=how).shape[1] == start + 3
        model.generation_config.max_length = start + 4
        assert model.generate(**batch, min_length=start + 4, do_sample=False).shape[1] == start + 4
        assert torch.equal(beams[:, :start], batch["input_ids"].repeat_interleave(2, 0))
        for step in range(start, start + 6):
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, step - start), value=1)
            seen = {**batch, "input_ids": answers[:, :step], "attention_mask": mask}
            assert torch.equal(logits(model, seen)[:, -1].argmax(-1), answers[:, step])


def test_the_loss_of_an_answer_is_that_of_the_shorter_prompt():
    model = tiny("llava")
    batch = batch_of(model, [9, 12], [1, 2], answers=[2, 3])
    with attach_baseline(model, "uniform", average_tokens=6), torch.no_grad():
        output = model(**batch)
        target = batch["labels"][:, 1:]
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), target)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("name", [*BEFORE_DECODER, "vtw"])
def test_any_resolution_is_refused_by_what_needs_a_fixed_number(name):
    with pytest.raises(ValueError, match="any resolution.*Use fastv"):
        attach_baseline(tiny("next"), name, average_tokens=20)


def test_visionzip_needs_a_class_token():
    model = tiny("llava")
    del model.model.vision_tower.embeddings.class_embedding
    with pytest.raises(ValueError, match="class token"):
        attach_baseline(model, "visionzip", average_tokens=9)


@pytest.mark.parametrize("kind", ["llava", "dino"])
@torch.no_grad()
def test_visionzip_keeps_what_the_class_token_of_either_tower_attends_to(kind):
    model = tiny(kind, attention="eager")
    batch = batch_of(model, [9, 9], [1, 1])
    tower = model.model.vision_tower
    paid = tower(batch["pixel_values"], output_attentions=True).attentions[-1][:, :, 0, 1:].sum(1)
    with attach_baseline(model, "visionzip", average_tokens=12):
        logits(model, batch)
        kept = last_report(model).kept[0]
    for row in range(2):  # 10 dominant and 2 contextual
        assert set(paid[row].topk(10).indices.tolist()) < set(kept[row].tolist()) and len(kept[row]) == 12
