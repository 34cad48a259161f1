"""The law as an assertion, and the matrix it is held over; both stacks use it.

A pairwise covering design over the factors runs by default (every pair of levels meets in some case); the rest of the
full product is marked slow.
"""

from itertools import combinations, product

import pytest
import torch

from llava_prune import PruneConfig, attach_pruners, detach_pruners, last_report, prune_mode

FACTORS = {
    "attention": ("eager", "sdpa"),
    "batch": (1, 3, 8),
    "padding": ("none", "left", "right"),
    "images": ("0", "1", "2", "mixed"),
    "lora": ("absent", "attached", "merged"),
    "residual": (False, True),
    "first": (1, 0),  # pruning layer
}
LENGTHS = [9, 14, 8, 11, 17, 7, 12, 10]  # text tokens of each sample
IMAGES = {"0": [0], "1": [1], "2": [2], "mixed": [1, 0, 2]}
GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
}
NEW_TOKENS = 32


# ---- the matrix


def covering(cases):
    """A few of `cases`, always the same, in which every pair of levels that meets in some case meets."""
    wanted = set().union(*map(pairs, cases))
    chosen = []
    while wanted:
        best = max(cases, key=lambda case: len(wanted & pairs(case)))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def pairs(case):
    """Every two factors' levels of a case."""
    return {(a, case[a], b, case[b]) for a, b in combinations(range(len(case)), 2)}


def matrix(factors, possible=lambda *case: True):
    """Decorates a test with the covering design of the possible cases, and with the others marked slow."""
    cases = [case for case in product(*factors.values()) if possible(*case)]
    few = covering(cases)
    rest = [pytest.param(*case, marks=pytest.mark.slow) for case in cases if case not in set(few)]
    return pytest.mark.parametrize(list(factors), [*few, *rest])


def texts_and_images(batch, images):
    """Text tokens and images of each sample of a batch."""
    return LENGTHS[:batch], (IMAGES[images] * 8)[:batch]


def with_lora(model, how):
    """`model` with random LoRA weights `attached` or `merged`, or as it is (`absent`)."""
    if how == "absent":
        return model
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return adapted.eval() if how == "attached" else adapted.merge_and_unload().eval()


# ---- the law


def settings(**changes):
    """A `PruneConfig` for decoders of six layers and 32 channels."""
    usual = {"pruning_layers": (1, 3, 4), "target_sparsity": 0.5, "pruner_dim": 16, "pruner_heads": 4}
    return PruneConfig(**usual | changes)


def randomise_pruners(handle, seed=0, bias=0.3, scale=1.0):
    """Give fresh pruners decisions of their own, so that each keeps some tokens and drops others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pruner in handle.pruners.layers.values():
            weight = pruner.joint_logits.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            pruner.joint_logits.bias.copy_(torch.tensor([0.0, bias]))


@torch.no_grad()
def assert_the_law(model, config, inputs, generate, has_image):
    """Keep-all is the stock model bit for bit; masked and hard agree at text positions and in what they generate.

    Args:
        model: without pruners; left without.
        config: of the pruners to attach.
        inputs: keyword arguments of the model's forward.
        generate: (model, inputs, generation arguments) -> tokens.
        has_image: whether any sample has an image.
    """

    def logits(mode):
        with prune_mode(model, mode):
            return model(**inputs).logits

    def tokens(mode, how):
        with prune_mode(model, mode):
            return _generate(model, inputs, generate, how)

    stock, stock_tokens = model(**inputs).logits, _generate(model, inputs, generate, "greedy")
    torch.manual_seed(0)
    handle = attach_pruners(model, config)
    merged = has_image and config.enable_token_merger

    # fresh pruners keep all; with a merger that is the stock decoder on merged tokens
    assert torch.equal(logits("origin"), stock) and torch.equal(tokens("origin", "greedy"), stock_tokens)
    everything = logits("masked") if merged else stock
    everything_tokens = tokens("masked", "greedy") if merged else stock_tokens
    for mode in ("masked", "hard"):
        assert torch.equal(logits(mode), everything), mode
        assert torch.equal(tokens(mode, "greedy"), everything_tokens), mode

    randomise_pruners(handle)
    masked, masked_record = logits("masked"), handle.state.record
    hard, hard_record = logits("hard"), handle.state.record
    if has_image:
        layout = hard_record.layout
        assert masked.shape == hard.shape == everything.shape
        text, after_image = layout.text, layout.text_after_image
        if merged and hasattr(model.config, "image_token_id"):  # fewer placeholders, logits at their old places
            image = inputs["input_ids"] == model.config.image_token_id
            text = ~image & inputs.get("attention_mask", torch.ones_like(image)).bool()
            after_image = text & (image.cumsum(-1) > 0)
        torch.testing.assert_close(masked[text], hard[text], atol=1e-4, rtol=0)
        assert (hard - everything)[after_image].abs().max() > 1e-2, "nothing was pruned"
        assert (last_report(model).average_tokens[layout.vision_counts > 0] > 0).all()
        for layer in config.pruning_layers:
            assert torch.equal(masked_record.kept[layer], hard_record.kept[layer])
    else:
        assert masked_record is None and hard_record is None
        assert torch.equal(masked, stock) and torch.equal(hard, stock)
    for how in GENERATION:
        expected = tokens("masked", how)
        assert expected.shape[1] >= NEW_TOKENS
        assert torch.equal(tokens("hard", how), expected), how

    detach_pruners(model)
    assert torch.equal(model(**inputs).logits, stock)


def _generate(model, inputs, generate, how):
    torch.manual_seed(0)
    return generate(model, inputs, {**GENERATION[how], "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS})
