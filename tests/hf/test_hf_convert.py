"""A converted checkpoint is the LLaVA checkpoint: same ids, pixels, kept tokens, logits and answers."""

import json
import shutil

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BASE, CONVERSATIONS, FOLDER, NEW_TOKENS, attach_merged, pictures
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_prune import last_report, load_pruners, prune_mode
from llava_prune.convert import build_tokenizer, convert, main
from llava_prune.stacks import installed_stack
from llava_prune.testbed.install import install_base

REFERENCE = json.loads((FOLDER / "reference.json").read_text())
TENSORS = load_file(FOLDER / "reference.safetensors")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    main(["--model", str(install_base(folder)), "--out", str(folder / "hf")])
    return folder / "hf"


@pytest.fixture(scope="module")
def model(converted):
    return LlavaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(converted):
    return AutoProcessor.from_pretrained(converted)


def inputs_of(processor, cases, **kwargs):
    texts, images = [], []
    for case in cases:
        messages = []
        for i, turn in enumerate(case["turns"]):
            parts = [{"type": "image"} for _ in case["pictures"]] if i == 0 else []
            messages.append(
                {"role": ["user", "assistant"][i % 2], "content": [*parts, {"type": "text", "text": turn}]}
            )
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
        images += [pictures()[i] for i in case["pictures"]]
    return processor(text=texts, images=images or None, return_tensors="pt", **kwargs)


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_ids_are_those_of_llava_with_each_image_as_its_tokens(processor, number):
    ids = inputs_of(processor, [CONVERSATIONS[number]])["input_ids"][0].tolist()
    expected = []
    for token in REFERENCE[number]["ids"]:
        expected += [processor.image_token_id] * 144 if token == -200 else [token]
    assert ids == expected


def test_pixels_are_those_of_llava(processor):
    pixels = processor.image_processor(pictures(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[:, :, ::16, ::16], TENSORS["pixels"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batched", [False, True])
def test_pruners_of_the_llava_stack_keep_the_same_tokens_and_give_the_same_answers(model, processor, batched):
    groups = [range(len(CONVERSATIONS))] if batched else [[i] for i in range(len(CONVERSATIONS))]
    with load_pruners(model, FOLDER / "pruners", mode="hard"):
        for group in groups:
            inputs = inputs_of(processor, [CONVERSATIONS[i] for i in group], padding=True)
            with torch.no_grad():
                logits = model(**inputs).logits[:, -1, :-1]
            kept = last_report(model).kept if inputs.get("pixel_values") is not None else {}
            answers = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
            for row, number in enumerate(group):
                expected = REFERENCE[number]
                for layer, rows in kept.items():
                    assert rows[row].tolist() == expected["kept"].get(str(layer), []), (number, layer)
                torch.testing.assert_close(logits[row], TENSORS[f"logits_{number}"], atol=1e-4, rtol=0)
                answer = answers[row, inputs["input_ids"].shape[1] :].tolist()
                wanted = [token for token in expected["answer"] if token != 1]  # LLaVA's output has a first <s>
                assert answer[: len(wanted)] == wanted, number


@pytest.mark.parametrize("batched", [False, True])
def test_a_token_merger_makes_the_same_tokens_on_both_stacks(model, processor, batched):
    numbers = [i for i, case in enumerate(CONVERSATIONS) if case["pictures"]]
    with attach_merged(model), prune_mode(model, "hard"):
        for group in [numbers] if batched else [[i] for i in numbers]:
            inputs = inputs_of(processor, [CONVERSATIONS[i] for i in group], padding=True)
            answers = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
            kept = last_report(model).kept
            for row, number in enumerate(group):
                expected = REFERENCE[number]["merged"]
                assert {str(layer): rows[row].tolist() for layer, rows in kept.items()} == expected["kept"], number
                answer = answers[row, inputs["input_ids"].shape[1] :].tolist()
                wanted = [token for token in expected["answer"] if token != 1]
                assert answer[: len(wanted)] == wanted, number


def test_the_placeholder_is_never_generated(model, processor):
    inputs = inputs_of(processor, CONVERSATIONS[:1])
    sampled = model.generate(**inputs, do_sample=True, temperature=50.0, max_new_tokens=200, min_new_tokens=200)
    assert (sampled[0, inputs["input_ids"].shape[1] :] < processor.image_token_id).all()


TOKENIZER = build_tokenizer(BASE / "tokenizer.model", 512)
SLOW = sentencepiece.SentencePieceProcessor(model_file=str(BASE / "tokenizer.model"))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40))
def test_tokenizer_agrees_with_sentencepiece_on_any_text(text):
    if any(token in text for token in ("<s>", "</s>", "<unk>", "<image>")):
        return
    assert TOKENIZER(text, add_special_tokens=False).input_ids == SLOW.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_vision_tower": "/nowhere/tower"}, "vision tower '/nowhere/tower'"),
    ],
)
def test_what_can_not_be_converted_is_named(tmp_path, change, message):
    source = install_base(tmp_path)
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_written_over_and_pruners_beside_it_are_not_read(tmp_path, converted):
    source = install_base(tmp_path)
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        convert(source, source / ".." / source.name)
    assert (source / "model.safetensors").read_bytes() == before
    shutil.copy(FOLDER / "pruners" / "pruners.safetensors", source)
    convert(source, tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_command_ends_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match="no config.json"):
        main(["--model", str(tmp_path), "--out", str(tmp_path / "out")])


def test_origin_answers_are_stock(model, processor):
    inputs = inputs_of(processor, CONVERSATIONS, padding=True)
    stock = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    with load_pruners(model, FOLDER / "pruners", mode="hard"), prune_mode(model, "origin"):
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS), stock)


def test_a_checkout_of_llava_in_the_way_is_not_its_stack(tmp_path, monkeypatch):
    (tmp_path / "llava").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_stack() == "hf"
