"""A chat that goes on with the cache of its earlier turns: text may be added, anything else has to prefill again."""

import copy
from contextlib import nullcontext

import pytest
import torch
from law import settings
from tiny_hf import IMAGE_TOKEN, batch_of, randomise_pruners, tiny

from llava_prune import accelerate, attach_pruners, prune_mode
from llava_prune.baselines import attach_baseline
from llava_prune.compat_cache import change_cache
from llava_prune.integrations.arguments import DEFAULTS, KeptTokens
from llava_prune.patch import find_handle
from llava_prune.sidecar import read_sidecar

REFUSED = "prefill the whole prompt again"


def with_pruners(kind="llava", first=1):
    model = tiny(kind)
    randomise_pruners(attach_pruners(model, settings(pruning_layers=(first, 3, 4))))
    return model


def prefill(model, lengths, images=(1,), mode="hard", seed=0):
    """The prompt, and what a forward on it returned with its cache."""
    inputs = batch_of(model, list(lengths), list(images), seed=seed)
    with prune_mode(model, mode), torch.no_grad():
        return inputs, model(**inputs, use_cache=True)


@torch.no_grad()
def go_on(model, cache, ids, mask=None, **more):
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)


@pytest.mark.parametrize("kind", ["llava", "next-mistral", "onevision"])
@pytest.mark.parametrize("mode", ["masked", "hard"])
@pytest.mark.parametrize("first", [1, 0], ids=["layer 1", "layer 0"])
@pytest.mark.parametrize(("lengths", "images"), [([9], [1]), ([9, 14, 6], [1, 2, 0])], ids=["one", "batch"])
def test_text_added_to_a_cache_is_what_a_fresh_prefill_gives(kind, lengths, images, first, mode):
    model = with_pruners(kind, first)
    inputs, output = prefill(model, lengths, images, mode)
    state = find_handle(model).state
    kept = state.record.kept
    added = torch.randint(3, 62, (len(lengths), 6), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(added)], 1)
    logits, seen = [], inputs["input_ids"].shape[1]
    for new in added.split([3, 1, 2], 1):
        seen += new.shape[1]
        output = go_on(model, output.past_key_values, new, mask[:, :seen])
        logits.append(output.logits)

    # labels end the question where the first turn ended, so that the pruners decide as they did
    ids = torch.cat([inputs["input_ids"], added], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), added], 1)
    with prune_mode(model, "masked"), torch.no_grad():
        fresh = model(**inputs | {"input_ids": ids, "attention_mask": mask, "labels": labels}).logits[:, -6:]
    for layer in kept:
        assert torch.equal(state.record.kept[layer], kept[layer])
    torch.testing.assert_close(torch.cat(logits, 1), fresh, atol=1e-4, rtol=0)


def test_a_second_turn_of_generate_is_the_same_in_masked_and_hard():
    model = with_pruners()
    first = batch_of(model, [12], [1])
    answers = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            out = model.generate(**first, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
            ids = torch.cat([out.sequences, torch.tensor([[7, 8, 9, 10]])], -1)
            follow = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out = model.generate(**follow, past_key_values=out.past_key_values, max_new_tokens=12, do_sample=False)
            answers.append(out)
    assert torch.equal(*answers)


GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [2, IMAGE_TOKEN]}  # no end, and no image


def with_merger():
    model = tiny()
    merger = {"enable_token_merger": True, "merger_tokens": 4, "merger_heads": 4}
    randomise_pruners(attach_pruners(model, settings(**merger)))
    find_handle(model).state.mode = "hard"
    return model


def chat_of(model, lengths, images):
    """The first prompt, its cache, and the whole chat with four more tokens."""
    first = batch_of(model, list(lengths), list(images))
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[7, 8, 9, 10]] * len(lengths))], -1)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, 9), value=1)
    return first, out.past_key_values, {"input_ids": ids, "attention_mask": mask}


PROMPTS = {"one": ([9], [1]), "filler": ([9, 14], [1, 2]), "no image": ([9, 14, 6], [1, 2, 0])}


@pytest.mark.parametrize("name", ["uniform", "pooling"])
@pytest.mark.parametrize(("lengths", "images"), PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("new", ["all", "new alone"])
@pytest.mark.parametrize("how", ["hard", "origin", "fast"])
def test_a_chat_of_fewer_features_is_what_a_fresh_prefill_gives(name, lengths, images, new, how):
    model = tiny()
    attach_baseline(model, name, average_tokens=4)
    first, _, chat = chat_of(model, lengths, images)
    fresh = model.generate(**{**first, **chat}, **GREEDY)
    with accelerate(model, emulate=True) if how == "fast" else nullcontext():
        _, cache, _ = chat_of(model, lengths, images)
        given = {**chat, "input_ids": chat["input_ids"][:, -5:]} if new == "new alone" else chat
        with prune_mode(model, "origin" if how == "origin" else "hard"):  # the cache is what it is
            answer = model.generate(**given, past_key_values=cache, **GREEDY)
    assert torch.equal(answer, torch.cat([given["input_ids"], fresh[:, -5:]], 1))


@pytest.mark.parametrize(("lengths", "images"), PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_a_forward_on_merged_tokens_goes_on_by_generate_and_by_hand(lengths, images):
    model = with_merger()
    first = batch_of(model, lengths, images)
    answer = model.generate(**first, **GREEDY)
    start, mask = first["input_ids"].shape[1], torch.nn.functional.pad(first["attention_mask"], (0, 5), value=1)
    output = model(**first, use_cache=True)
    for step in range(start, start + 5):
        output.logits[..., GREEDY["suppress_tokens"]] = -torch.inf
        assert torch.equal(output.logits[:, -1].argmax(-1), answer[:, step])
        output = go_on(model, output.past_key_values, answer[:, step : step + 1], mask[:, : step + 1])
    if len(lengths) == 1:  # the positions of padded prompts are others in `generate`
        cache = model(**first, use_cache=True).past_key_values
        begun = {"input_ids": answer[:, :-4], "attention_mask": mask[:, :-4]}
        assert torch.equal(model.generate(**begun, past_key_values=cache, **{**GREEDY, "max_new_tokens": 4}), answer)


@torch.no_grad()
def test_what_does_not_fit_a_cache_of_merged_tokens_is_refused():
    model = with_merger()
    first, cache, chat = chat_of(model, [9], [1])
    ids, mask = chat["input_ids"], chat["attention_mask"]
    for change, message in (
        ({"pixel_values": first["pixel_values"]}, "leave pixel_values out.*" + REFUSED),
        ({"input_ids": torch.cat([ids[:, :1], ids], 1)[:, :-1]}, "do not begin with the 25"),
        ({"input_ids": ids[:, -5:], "attention_mask": mask[:, 1:]}, "give it 34 positions, or 22 without those"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**{**chat, **change}, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="leave position_ids out"):
        go_on(model, cache, ids[:, -5:], mask, position_ids=torch.arange(29, 34)[None])


def test_a_chat_goes_on_under_what_counts_its_tokens(tmp_path):
    model = tiny()
    kept = KeptTokens(model, {**DEFAULTS, "baseline": "fastv", "average_tokens": 8, "report": tmp_path / "r.jsonl"})
    for _ in range(2):
        _, cache, chat = chat_of(model, [9, 14], [1, 2])
        model.generate(**chat, past_key_values=cache, **GREEDY)
    assert [line["vision_tokens"] for line in read_sidecar(tmp_path / "r.jsonl")] == [16, 32, 0, 0] * 2
    assert kept.summary().endswith("of 24.0 over 4 samples")


def test_a_new_image_is_refused():
    model = with_pruners()
    inputs, output = prefill(model, [9])
    ids = torch.tensor([[7] + [IMAGE_TOKEN] * 16 + [8]])
    for mode in ("hard", "origin"):
        with prune_mode(model, mode), pytest.raises(ValueError, match=REFUSED):
            go_on(model, output.past_key_values, ids, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_a_cache_of_another_prompt_is_refused(mode):
    model = with_pruners()
    _, output = prefill(model, [9], mode=mode)
    prefill(model, [12], mode=mode)
    with prune_mode(model, mode), pytest.raises(ValueError, match=REFUSED):
        go_on(model, output.past_key_values, torch.tensor([[5]]))


def test_a_cache_of_the_same_length_and_other_tokens_is_refused():
    model = with_pruners()
    _, output = prefill(model, [9])
    _, other = prefill(model, [9], seed=1)
    lengths = [[o.past_key_values.get_seq_length(layer) for layer in range(6)] for o in (output, other)]
    assert lengths[0][0] == lengths[1][0] and lengths[0] != lengths[1]
    with prune_mode(model, "hard"), pytest.raises(ValueError, match=REFUSED):
        go_on(model, output.past_key_values, torch.tensor([[5]]))


@pytest.mark.parametrize("mode", ["masked", "hard"])
@pytest.mark.parametrize(("samples", "change"), [(1, "select"), (2, "select"), (1, "repeat"), (2, "repeat")])
def test_a_cache_of_another_batch_is_refused(samples, change, mode):
    model = with_pruners()
    inputs, output = prefill(model, [9, 14][:samples], [1] * samples, mode)
    cache, rows = output.past_key_values, torch.arange(samples)
    if change == "select":
        rows = torch.tensor([samples - 1, 0, 0])
        cache.batch_select_indices(rows)
    else:
        rows = rows.repeat_interleave(3)
        cache.batch_repeat_interleave(3)
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(len(rows), 1).long()], 1)
    with pytest.raises(ValueError, match=f"saw {samples} samples, this one goes on with {len(rows)}.*{REFUSED}"):
        go_on(model, cache, torch.full((len(rows), 1), 5), mask)


@pytest.mark.parametrize("mode", ["masked", "hard"])
@pytest.mark.parametrize("beams", [1, 2])
def test_classifier_free_guidance_is_refused(mode, beams):
    model = with_pruners()
    how = {"guidance_scale": 1.5, "num_beams": beams, "max_new_tokens": 3, "do_sample": False}
    with prune_mode(model, mode), pytest.raises(ValueError, match="without it, or in prune_mode"):
        model.generate(**batch_of(model, [9], [1]), **how)


def test_soft_mode_answers_no_further_than_its_prompt():
    model = with_pruners()
    inputs, output = prefill(model, [9], mode="soft")
    with pytest.raises(ValueError, match="generate in masked or hard mode"):
        go_on(model, output.past_key_values, torch.tensor([[5]]))
    with prune_mode(model, "soft"), pytest.raises(ValueError, match="generate in masked or hard mode"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("mode", ["masked", "hard"])
@pytest.mark.parametrize("images", [[1], [0]], ids=["origin", "text"])
def test_a_pruned_cache_is_refused_after_an_unpruned_prompt(images, mode):
    model = with_pruners()
    _, output = prefill(model, [9], mode=mode)
    prefill(model, [9], images, "origin")
    with prune_mode(model, mode), pytest.raises(ValueError, match=REFUSED):
        go_on(model, output.past_key_values, torch.tensor([[5]]))


@torch.no_grad()
def test_a_masked_cache_of_the_same_lengths_is_refused_and_a_copy_or_an_emptied_one_is_not():
    model, new = with_pruners(), torch.tensor([[5]])
    _, old = prefill(model, [9], mode="masked")
    inputs, output = prefill(model, [9], mode="masked", seed=1)
    with pytest.raises(ValueError, match=REFUSED):
        go_on(model, old.past_key_values, new)
    cache = copy.deepcopy(output.past_key_values)
    logits = go_on(model, cache, new).logits
    _, output = prefill(model, [9], mode="masked", seed=1)
    assert torch.equal(go_on(model, output.past_key_values, new).logits, logits)

    cache.crop(-cache.get_seq_length())
    with prune_mode(model, "hard"):
        model(**inputs, past_key_values=cache, use_cache=True)
        hard = go_on(model, cache, new).logits
    torch.testing.assert_close(hard, logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_cache_of_an_unpruned_prompt_goes_on_unpruned():
    model = with_pruners()
    ids = torch.tensor([[1, 9, 7, 5, 6, 8]])
    with prune_mode(model, "hard"):
        output = go_on(model, None, ids[:, :4])
        logits = go_on(model, output.past_key_values, ids[:, 4:]).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits[:, 4:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_layer_0_keeps_a_place_for_what_was_dropped_before_it():
    model = with_pruners(first=0)
    _, output = prefill(model, [9])
    keys = output.past_key_values.layers[0].keys
    layout, kept = find_handle(model).state.record.layout, find_handle(model).state.record.kept[0]
    dropped = layout.vision_index[layout.vision_valid & ~kept]
    assert 0 < len(dropped) < layout.vision.sum()
    empty = (keys == 0).all(-1).all(1)[0].nonzero().flatten()
    assert torch.equal(empty, dropped) and keys.shape[2] == layout.valid.shape[1]


def test_a_cache_that_keeps_states_otherwise_is_refused_before_layer_0():
    class Other:
        layers = [object()]

    with pytest.raises(ValueError, match="a object keeps them otherwise.*prune from layer 1 on"):
        change_cache(Other, 0, torch.clone)
