"""The law: masked and hard give the same text logits and the same generated tokens; keep-all gives the stock model's.

A pairwise covering design over the factors runs by default (every pair of levels meets in some case); the full
product is marked slow.
"""

from itertools import combinations, product

import pytest
import torch
from tiny_hf import KINDS, batch_of, randomise_pruners, tiny

from llava_prune import PruneConfig, attach_pruners, detach_pruners, last_report, prune_mode

FACTORS = {
    "kind": KINDS,
    "attention": ("eager", "sdpa"),
    "batch": (1, 3, 8),
    "padding": ("none", "left", "right"),
    "images": ("0", "1", "2", "mixed"),
    "lora": ("absent", "attached", "merged"),
    "residual": (False, True),
}
IMAGES = {"0": [0], "1": [1], "2": [2], "mixed": [1, 0, 2]}
LENGTHS = [9, 14, 8, 11, 17, 7, 12, 10]
GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
}
NEW_TOKENS = 32


def covering(factors):
    """Cases, few and always the same, in which every pair of levels of two factors meets."""
    everything = list(product(*factors.values()))
    wanted = set().union(*map(_pairs, everything))
    cases = []
    while wanted:
        best = max(everything, key=lambda case: len(wanted & _pairs(case)))
        cases.append(best)
        wanted -= _pairs(best)
    return cases


def _pairs(case):
    return {(a, case[a], b, case[b]) for a, b in combinations(range(len(case)), 2)}


COVERING = covering(FACTORS)
FULL = [
    pytest.param(*case, marks=pytest.mark.slow) for case in product(*FACTORS.values()) if case not in set(COVERING)
]


def with_lora(model, how):
    if how == "absent":
        return model
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return adapted.eval() if how == "attached" else adapted.merge_and_unload().eval()


def generate(model, batch, how, seed=0):
    torch.manual_seed(seed)
    return model.generate(**batch, **GENERATION[how], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize(list(FACTORS), [*COVERING, *FULL])
@torch.no_grad()
def test_the_law(kind, attention, batch, padding, images, lora, residual):
    model = with_lora(tiny(kind, attention), lora)
    counts = (IMAGES[images] * 8)[:batch]
    inputs = batch_of(model, LENGTHS[:batch], counts, padding)
    stock, stock_tokens = model(**inputs).logits, generate(model, inputs, "greedy")
    config = PruneConfig(
        pruning_layers=(1, 3, 4), target_sparsity=0.5, pruner_dim=16, pruner_heads=4, use_attn_residual=residual
    )
    handle = attach_pruners(model, config)

    for mode in ("origin", "masked", "hard"):  # fresh pruners keep all
        with prune_mode(model, mode):
            assert torch.equal(model(**inputs).logits, stock), mode
            assert torch.equal(generate(model, inputs, "greedy"), stock_tokens), mode

    randomise_pruners(handle)
    with prune_mode(model, "masked"):
        masked = model(**inputs).logits
        record = handle.state.record
    with prune_mode(model, "hard"):
        hard = model(**inputs).logits
    if images == "0":
        assert record is None and handle.state.record is None
        assert torch.equal(masked, stock) and torch.equal(hard, stock)
    else:
        text = record.layout.text
        torch.testing.assert_close(masked[text], hard[text], atol=1e-4, rtol=0)
        assert (hard - stock)[record.layout.text_after_image].abs().max() > 1e-2, "nothing was pruned"
        assert (last_report(model).average_tokens[record.layout.vision_counts > 0] > 0).all()
        for layer, kept in record.kept.items():
            assert torch.equal(kept, handle.state.record.kept[layer])
        for how in GENERATION:
            with prune_mode(model, "masked"):
                expected = generate(model, inputs, how)
            with prune_mode(model, "hard"):
                assert torch.equal(generate(model, inputs, how), expected), how

    detach_pruners(model)
    assert torch.equal(model(**inputs).logits, stock)


def test_every_pair_of_levels_is_covered():
    met = set().union(*map(_pairs, COVERING))
    for (a, first), (b, second) in combinations(enumerate(FACTORS.values()), 2):
        assert all((a, x, b, y) in met for x in first for y in second)
