"""The FLOP formulas against torch's counter, to the last FLOP, and against the field's published figures."""

import pytest
import torch
from counted import counted, total
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, last_report, prune_mode
from llava_prune.flops import DecoderShape, TowerShape, decoder_flops, kv_bytes, tower_flops
from llava_prune.report import llm_flops, module_flops
from llava_prune.reporting.measure import observe

SETTINGS = PruneConfig(pruning_layers=(1, 3), target_token_num=8, selection="topk", pruner_dim=16, pruner_heads=2)
LLAVA_7B = DecoderShape(hidden=4096, intermediate=11008, layers=32, attention=4096, key_value=4096)


def layers(*spans):
    """Tokens entering each layer from (layers, tokens)."""
    return torch.tensor([tokens for count, tokens in spans for _ in range(count)])


@pytest.mark.parametrize(
    ("convention", "tokens", "text", "tera"),
    [
        ("A", layers((32, 576)), 0, 2.99),
        ("B", layers((32, 576)), 0, 3.82),
        ("C", layers((32, 576)), 0, 7.63),
        ("D", layers((32, 576)), 0, 10.07),
        ("C", layers((32, 576)), 40, 8.18),
        ("C", layers((6, 576), (6, 288), (6, 96), (14, 28)), 40, 3.06),
        ("C", layers((8, 576), (8, 288), (8, 144), (8, 72)), 40, 4.09),  # PyramidDrop
        ("C", layers((2, 576), (30, 115)), 40, 2.40),  # Dynamic-LLaVA
    ],
)
def test_conventions_give_the_published_figures(convention, tokens, text, tera):
    assert float(decoder_flops(LLAVA_7B, tokens + text, convention)) / 1e12 == pytest.approx(tera, abs=0.005)


def test_the_cache_of_576_tokens_has_288_mebibytes_in_half_precision():
    assert float(kv_bytes(LLAVA_7B, layers((32, 576)), 2)) == 288 * 2**20


def test_a_width_of_heads_that_the_config_names_counts():
    class Config:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 4
        num_key_value_heads, head_dim = 2, 16

    assert DecoderShape.of(Config) == DecoderShape(32, 64, 2, attention=64, key_value=32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("residual", "first"), [(False, 1), (True, 1), (False, 0)])
def test_language_model_and_pruners_are_what_the_torch_counter_counts(
    tower_folder, attention, kv_heads, residual, first
):
    llava = tiny_llava(tower_folder, attention=attention, kv_heads=kv_heads)
    changes = {"use_attn_residual": residual, "pruning_layers": (first, 3)}
    config = PruneConfig(**{**SETTINGS.to_dict(), **changes, "layer_shares": (2, 1)})
    handle = attach_pruners(llava, config)
    randomise_pruners(handle)
    inputs = batch_of([9], [1])
    for mode in ("origin", "hard"):
        with prune_mode(llava, mode):
            counts = counted(llava, **inputs)
        report = last_report(llava)
        everything = float(llm_flops(handle, report, pruned=mode == "hard"))
        assert total(counts, "model.layers.") == everything
        if mode == "hard":
            assert 0 < len(report.kept[3][0]) < len(report.kept[first][0]) < 16
            if not residual:  # the residual runs in the decoder layer, by its own projections
                pruners = float(module_flops(handle, report)["pruners"])
                assert total(counts, "model.llava_pruners.layers.") == pruners > 0


def test_token_merger_is_what_the_torch_counter_counts(tower_folder):
    llava = tiny_llava(tower_folder)
    config = PruneConfig(**{**SETTINGS.to_dict(), "target_token_num": 3, "enable_token_merger": True})
    config = PruneConfig(**{**config.to_dict(), "merger_tokens": 9, "merger_heads": 2})
    handle = attach_pruners(llava, config)
    randomise_pruners(handle)
    inputs = batch_of([9], [2])
    with prune_mode(llava, "hard"):
        counts = counted(llava, **inputs)
    flops = module_flops(handle, last_report(llava))
    assert counts["model.llava_pruners.merger"] == float(flops["token_merger"]) > 0
    assert float(llm_flops(handle, last_report(llava), True)) == counts["model.llava_pruners.merger"] + total(
        counts, "model.layers."
    )


def test_vision_tower_and_projector_are_what_the_torch_counter_counts(tower_folder):
    """The patch embedding, a convolution, is the matrix product of its patches."""
    from llava_prune.compat import vision_modules
    from llava_prune.flops import projector_flops
    from llava_prune.reporting.costs import linear_widths

    llava = tiny_llava(tower_folder)
    handle = attach_pruners(llava, SETTINGS)
    inputs = batch_of([9, 7], [2, 1])
    counts = counted(llava, **inputs)
    seen = observe(handle, "origin", {"inputs": inputs.pop("input_ids"), **inputs})
    tower, projector = vision_modules(llava)
    assert seen.images == 3 and seen.projector_rows == 48
    assert counts["model.vision_tower.vision_tower"] == tower_flops(TowerShape.of(tower.config), 3)
    assert counts["model.mm_projector"] == projector_flops(linear_widths(projector), 48)


def test_an_unknown_tower_is_refused():
    class Config:
        model_type = "pixtral"

    with pytest.raises(ValueError, match="pixtral"):
        TowerShape.of(Config)
