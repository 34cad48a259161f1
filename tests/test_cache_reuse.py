"""A chat that goes on with the cache of its earlier turns: text may be added, anything else has to prefill again."""

import pytest
import torch
from law import settings
from tiny import IMAGE_TOKEN, batch_of, generate, randomise_pruners, tiny_llava

from llava_prune import attach_pruners, prune_mode
from llava_prune.patch import find_handle

REFUSED = "prefill the whole prompt again"


def with_pruners(folder, attention="sdpa"):
    """A LLaVA that pads on the left, with pruners that decide."""
    model = tiny_llava(folder, attention=attention, padding_side="left")
    randomise_pruners(attach_pruners(model, settings()))
    return model


@pytest.fixture
def pruned(tower_folder):
    return with_pruners(tower_folder)


def prefill(model, lengths, images=(1,), mode="hard", seed=0):
    """The prompt, and what a forward on it returned with its cache."""
    inputs = batch_of(list(lengths), list(images), "left" if len(lengths) > 1 else "none", seed=seed)
    with prune_mode(model, mode), torch.no_grad():
        return inputs, model(**inputs, use_cache=True)


@torch.no_grad()
def go_on(model, cache, ids, mask=None, **more):
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)


@pytest.mark.parametrize("mode", ["masked", "hard"])
@pytest.mark.parametrize(
    ("attention", "lengths", "images", "chunks"),
    [
        ("sdpa", [9], [1], [3, 1, 2]),
        ("eager", [9, 14, 6], [1, 2, 0], [3, 1, 2]),
        # the stock sdpa of 4.37 takes no more than one token at a time where a batch is padded on the left
        ("sdpa", [9, 14, 6], [1, 2, 0], [1] * 6),
    ],
)
def test_text_added_to_a_cache_is_what_a_fresh_prefill_gives(tower_folder, attention, lengths, images, chunks, mode):
    pruned = with_pruners(tower_folder, attention)
    inputs, output = prefill(pruned, lengths, images, mode)
    state = find_handle(pruned).state
    valid, kept = state.record.layout.valid, state.record.kept
    added = torch.randint(3, 64, (len(lengths), 6), generator=torch.Generator().manual_seed(1))
    logits, seen = [], 0
    for new in added.split(chunks, 1):
        seen += new.shape[1]
        mask = None if len(lengths) == 1 else torch.cat([valid, valid.new_ones(len(valid), seen)], 1)
        output = go_on(pruned, output.past_key_values, new, mask)
        logits.append(output.logits)

    # labels end the question where the first turn ended, so that the pruners decide as they did
    ids = torch.cat([inputs["input_ids"], added], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), added], 1)
    whole = {"input_ids": ids, "labels": labels, "images": inputs["images"]}
    if "attention_mask" in inputs:
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(added).bool()], 1)
    with prune_mode(pruned, "masked"), torch.no_grad():
        fresh = pruned(**whole).logits[:, -6:]
    for layer in kept:
        assert torch.equal(state.record.kept[layer], kept[layer])
    torch.testing.assert_close(torch.cat(logits, 1), fresh, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_picture_passed_again_without_its_placeholder_is_no_new_image(pruned):
    added, logits = torch.tensor([[7, 8, 9]]), []
    for again in (False, True):
        inputs, output = prefill(pruned, [9])
        more = {"images": inputs["images"]} if again else {}
        logits.append(go_on(pruned, output.past_key_values, added, **more).logits)
    assert torch.equal(*logits)


def test_a_new_image_is_refused(pruned):
    inputs, output = prefill(pruned, [9])
    ids = torch.tensor([[7, IMAGE_TOKEN, 8]])
    for mode in ("hard", "origin"):
        with prune_mode(pruned, mode), pytest.raises(ValueError, match=REFUSED):
            go_on(pruned, output.past_key_values, ids, images=inputs["images"])


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_a_cache_of_another_prompt_is_refused(pruned, mode):
    _, output = prefill(pruned, [9], mode=mode)
    prefill(pruned, [12], mode=mode)
    with pytest.raises(ValueError, match=REFUSED):
        go_on(pruned, output.past_key_values, torch.tensor([[5]]))


def test_a_cache_of_the_same_length_and_other_tokens_is_refused(pruned):
    _, output = prefill(pruned, [9])
    _, other = prefill(pruned, [9], seed=1)
    lengths = [[keys.shape[2] for keys, _ in o.past_key_values] for o in (output, other)]
    assert lengths[0][0] == lengths[1][0] and lengths[0] != lengths[1]
    with pytest.raises(ValueError, match=REFUSED):
        go_on(pruned, output.past_key_values, torch.tensor([[5]]))


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_a_cache_of_another_batch_is_refused(pruned, mode):
    _, output = prefill(pruned, [9], mode=mode)
    cache = tuple(tuple(kept.expand(3, -1, -1, -1) for kept in layer) for layer in output.past_key_values)
    with pytest.raises(ValueError, match=f"saw 1 samples, this one goes on with 3.*{REFUSED}"):
        go_on(pruned, cache, torch.full((3, 1), 5))


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_classifier_free_guidance_is_refused(pruned, mode):
    inputs = batch_of([9], [1], "none")
    with prune_mode(pruned, mode), pytest.raises(ValueError, match="without it, or in prune_mode"):
        generate(pruned, inputs, {"guidance_scale": 1.5, "max_new_tokens": 3, "do_sample": False})


def test_soft_mode_answers_no_further_than_its_prompt(pruned):
    inputs, output = prefill(pruned, [9], mode="soft")
    with pytest.raises(ValueError, match="generate in masked or hard mode"):
        go_on(pruned, output.past_key_values, torch.tensor([[5]]))
    with prune_mode(pruned, "soft"), pytest.raises(ValueError, match="generate in masked or hard mode"):
        generate(pruned, inputs, {"max_new_tokens": 2})


@pytest.mark.parametrize("mode", ["masked", "hard"])
@pytest.mark.parametrize("images", [[1], [0]], ids=["origin", "text"])
def test_a_pruned_cache_is_refused_after_an_unpruned_prompt(pruned, images, mode):
    _, output = prefill(pruned, [9], mode=mode)
    prefill(pruned, [9], images, "origin")
    with pytest.raises(ValueError, match=REFUSED):
        go_on(pruned, output.past_key_values, torch.tensor([[5]]))


@torch.no_grad()
def test_a_cache_of_an_unpruned_prompt_goes_on_unpruned(pruned):
    ids = torch.tensor([[1, 9, 7, 5, 6, 8]])
    with prune_mode(pruned, "hard"):
        output = go_on(pruned, None, ids[:, :4])
        logits = go_on(pruned, output.past_key_values, ids[:, 4:]).logits
    torch.testing.assert_close(logits, pruned(input_ids=ids).logits[:, 4:], atol=1e-5, rtol=0)
