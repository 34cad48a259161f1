"""Training-free baselines: each does what its paper says, at an exact budget, under the same law as the pruners."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from launch import environment
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, detach_pruners, last_report, prune_mode, save_pruners
from llava_prune.attention_rows import attention_of_rows
from llava_prune.baselines import METHODS, attach_baseline
from llava_prune.baselines.density_peaks import merge_clusters
from llava_prune.baselines.divprune import most_diverse
from llava_prune.baselines.pooling import pooled_grid
from llava_prune.baselines.tome import merge_pairs, merge_tokens
from llava_prune.baselines.visionzip import average_around
from llava_prune.budget import average_of
from llava_prune.drop import Rows
from llava_prune.run import attach_as_asked, main

MIXED = ([9, 14, 7, 11], [1, 0, 2, 1])
IN_DECODER = ("fastv", "pyramiddrop", "sparsevlm", "vtw")
BEFORE_DECODER = tuple(name for name in METHODS if name not in IN_DECODER)
SELECTING = ("random", "uniform", "visionzip", "divprune")


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def generated(model, batch, **how):
    images = {"attention_mask": batch["attention_mask"], "images": batch["images"]}
    return model.generate(batch["input_ids"], **images, max_new_tokens=8, **(how or {"do_sample": False}))


def decoder_inputs(model, batch):
    """What the decoder is given: embeddings and attention mask."""
    seen = {}
    hook = (
        model.get_model()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(hidden=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    logits(model, batch)
    hook.remove()
    return seen["hidden"]


# ---- the law, the budget, the way back


@pytest.mark.parametrize(("attention", "side", "kv_heads"), [("sdpa", "right", 4), ("eager", "left", 2)])
@pytest.mark.parametrize("name", METHODS)
def test_masked_equals_hard(tower_folder, name, attention, side, kv_heads):
    model = tiny_llava(tower_folder, attention=attention, padding_side=side, kv_heads=kv_heads)
    batch = batch_of(*MIXED, side)
    stock = logits(model, batch)
    results, reports, words = [], [], []
    with attach_baseline(model, name, average_tokens=9) as handle:
        for mode in ("masked", "hard"):
            with prune_mode(model, mode):
                results.append(logits(model, batch))
                reports.append(last_report(model))
                layout = handle.state.record.layout
                words.append([generated(model, batch), generated(model, batch, num_beams=3)])
        with prune_mode(model, "origin"):
            assert torch.equal(logits(model, batch), stock)
            assert last_report(model).average_tokens.tolist() == [16, 0, 32, 16]
    assert (results[0] - results[1])[layout.text].abs().max() < 1e-4
    if name in IN_DECODER:
        assert (stock - results[1])[layout.text_after_image].abs().max() > 1e-2, "nothing was dropped"
    for masked, hard in zip(*words, strict=True):
        assert torch.equal(masked, hard)
    for report in reports:
        assert report.vision_tokens.tolist() == [16, 0, 32, 16]
        assert torch.equal(report.tokens_per_layer, reports[0].tokens_per_layer)
        for layer, kept in report.kept.items():
            assert all(torch.equal(a, b) for a, b in zip(kept, reports[0].kept[layer], strict=True))
    if name in SELECTING:
        assert [len(kept) for kept in reports[1].kept[0]] == [9, 0, 18, 9]


@pytest.mark.parametrize("average", [6.5, 9, 15.9])
@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_met(llava, name, average):
    """Never exceeded, and short by less than a token; pooling has whole rows and columns, VTW whole layers."""
    with attach_baseline(llava, name, average_tokens=average):
        logits(llava, batch_of([9, 9], [1, 2]))
        report = last_report(llava)
    assert report.average_tokens[0] == pytest.approx(report.tokens_per_layer[0].float().mean().item())
    for images, reached in enumerate(report.average_tokens.tolist(), start=1):
        least = {"vtw": average - 16 / 6, "pooling": {6.5: 6, 9: 9, 15.9: 12}[average] - 1}.get(name, average - 1)
        assert images * least < reached <= images * average + 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_alone_is_a_sample_in_a_batch(llava, name):
    batch = batch_of(*MIXED)
    with attach_baseline(llava, name, average_tokens=9) as handle:
        together = logits(llava, batch)
        kept, text = last_report(llava).kept, handle.state.record.layout.text
        for row, (first, last) in enumerate([(0, 1), (1, 2), (2, 4), (4, 5)]):  # a picture for the sample without, too
            alone = {
                "input_ids": batch["input_ids"][row][batch["attention_mask"][row]][None],
                "images": batch["images"][first:last],
            }
            here = logits(llava, alone)[0]
            if row == 1:
                torch.testing.assert_close(here, together[row, : len(here)], atol=1e-4, rtol=0)
                continue
            words = handle.state.record.layout.text[0]
            torch.testing.assert_close(here[words], together[row][text[row]], atol=1e-4, rtol=0)
            for layer, rows in last_report(llava).kept.items():
                assert torch.equal(rows[0], kept[layer][row])


@pytest.mark.parametrize("name", IN_DECODER)
def test_prompts_that_end_in_their_picture_are_pruned_alike_in_every_mode(llava, name):
    """Without a question the last token that is left ranks the others."""
    batch = batch_of([2] * 6 + [9], [1] * 7)
    results, kept = [], []
    with attach_baseline(llava, name, average_tokens=7 if name == "fastv" else 4) as handle:
        for mode in ("masked", "hard"):
            with prune_mode(llava, mode):
                results.append(logits(llava, batch))
                kept.append(last_report(llava).kept)
        layout = handle.state.record.layout
    assert layout.question.sum(-1).tolist() == [0] * 6 + [7]
    assert (results[0] - results[1])[layout.text].abs().max() < 1e-4
    for layer, rows in kept[0].items():
        assert all(torch.equal(*pair) for pair in zip(rows, kept[1][layer], strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_everything_is_the_stock_model(llava, name):
    batch = batch_of(*MIXED)
    stock = logits(llava, batch)
    with attach_baseline(llava, name, average_tokens=16):
        for mode in ("masked", "hard"):
            with prune_mode(llava, mode):
                assert torch.equal(logits(llava, batch), stock)
            assert last_report(llava).average_tokens.tolist() == [16, 0, 32, 16]


@pytest.mark.parametrize(
    ("name", "budget", "floor"),
    [("fastv", 5.9, "6"), ("pyramiddrop", 3, "3.5"), ("sparsevlm", 3, "3.5"), ("vtw", 2.6, "2.66667")]
    + [(name, 0.9, "1") for name in BEFORE_DECODER],
)
def test_a_budget_under_the_floor_is_refused_with_the_floor(llava, name, budget, floor):
    before = dict(llava.__dict__)
    with pytest.raises(ValueError, match=f"{name}: {budget} average tokens are under its floor of {floor} "):
        attach_baseline(llava, name, average_tokens=budget)
    assert llava.__dict__ == before and "forward" not in llava.get_model().layers[-1].__dict__
    with attach_baseline(llava, name, average_tokens=float(floor) + 1e-4):
        logits(llava, batch_of([9], [1]))
        assert last_report(llava).average_tokens.item() == pytest.approx(float(floor), abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_detach_leaves_nothing(llava, name):
    batch = batch_of(*MIXED)
    stock = logits(llava, batch)

    def traces():
        modules = llava.named_modules()
        return [(key, set(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks)) for key, m in modules]

    before = traces()
    attach_baseline(llava, name, average_tokens=9)
    assert not torch.equal(logits(llava, batch), stock)
    assert not any(True for parameter in llava.get_model().llava_pruners.parameters())
    detach_pruners(llava)
    assert traces() == before and torch.equal(logits(llava, batch), stock)


def test_what_does_not_suit_is_refused(llava, tower_folder, tmp_path):
    with pytest.raises(ValueError, match="use one of random, uniform"):
        attach_baseline(llava, "fastV", average_tokens=9)
    with pytest.raises(ValueError, match="must be positive"):
        attach_baseline(llava, "fastv", average_tokens=0)
    with pytest.raises(ValueError, match="at least 1"):
        attach_baseline(llava, "fastv", average_tokens=9, layer=0)
    with pytest.raises(ValueError, match="origin, masked, hard"):
        attach_baseline(llava, "fastv", average_tokens=9, mode="soft")
    with attach_baseline(llava, "fastv", average_tokens=9):
        with pytest.raises(ValueError, match="detach_pruners"):
            attach_baseline(llava, "vtw", average_tokens=9)
        with pytest.raises(ValueError, match="no weights"):
            save_pruners(llava, tmp_path)
        with pytest.raises(ValueError, match="origin, masked, hard"), prune_mode(llava, "soft"):
            pass
    anyres = tiny_llava(tower_folder)
    anyres.config.image_aspect_ratio = "anyres"
    for name in (*BEFORE_DECODER, "vtw"):
        with pytest.raises(ValueError, match="any resolution"):
            attach_baseline(anyres, name, average_tokens=9)


# ---- what each method is


def eager_attention(model, batch, layer):
    """(B, T, T) of one decoder layer without pruning, mean over heads, and the positions."""
    with prune_mode(model, "origin"), torch.no_grad():
        return model(**batch, output_attentions=True).attentions[layer].mean(1)


def best(scores, count):
    return set(scores.topk(count).indices.tolist())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv_ranks_by_the_last_tokens_attention_in_the_kth_layer(tower_folder, side, layer):
    model = tiny_llava(tower_folder, attention="eager", padding_side=side)
    batch = batch_of([9, 14], [1, 1], side)
    with attach_baseline(model, "fastv", average_tokens=10, layer=layer) as handle:
        attention = eager_attention(model, batch, layer - 1)
        logits(model, batch)
        layout, kept = handle.state.record.layout, last_report(model).kept[layer]
    for row in range(2):
        last = layout.valid[row].nonzero().max()
        paid = attention[row, last, layout.vision_index[row]]
        assert set(kept[row].tolist()) == best(paid, len(kept[row])) != set(range(len(kept[row])))


def test_the_last_token_is_the_questions_not_the_answers(llava):
    """Given labels, the answer's own tokens rank nothing."""
    batch = batch_of([9], [1], answers=[3])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, -3:] = torch.tensor([5, 6, 7])
    kept = []
    with attach_baseline(llava, "fastv", average_tokens=9):
        for each in (batch, other):
            logits(llava, each)
            kept.append(last_report(llava).kept[2][0])
    assert torch.equal(*kept)


def test_pyramiddrop_ranks_with_the_next_layer_and_keeps_powers_of_one_share(tower_folder):
    model = tiny_llava(tower_folder, attention="eager", layers=8)
    batch = batch_of([9, 14], [1, 1])
    with attach_baseline(model, "pyramiddrop", average_tokens=9) as handle:
        assert handle.method.layers == (2, 4, 6)
        attention = eager_attention(model, batch, 2)
        logits(model, batch)
        layout, report = handle.state.record.layout, last_report(model)
    for row in range(2):
        paid = attention[row, layout.valid[row].nonzero().max(), layout.vision_index[row]]
        assert set(report.kept[2][row].tolist()) == best(paid, len(report.kept[2][row]))
    share, squared, cubed = handle.method.fractions(576, 270)
    assert (squared, cubed) == (pytest.approx(share**2), pytest.approx(share**3))


def test_pyramiddrop_is_the_papers_at_its_budget(tower_folder):
    """270 of 576 tokens on 32 layers: half at each stage, 576, 288, 144, 72."""
    handle = Namespace(num_layers=32)
    method = METHODS["pyramiddrop"](handle, 270)
    assert method.layers == (8, 16, 24) and method.fractions(576, 270) == pytest.approx((0.5, 0.25, 0.125))
    assert method.counts(576, 270) == (288, 144, 72)
    with pytest.raises(ValueError, match="floor of 144.75 .* set layers"):
        method.counts(576, 128)
    assert METHODS["pyramiddrop"](handle, 64, layers=(2, 8, 16)).counts(576, 64)


def test_sparsevlm_rates_by_the_relevant_words(tower_folder):
    model = tiny_llava(tower_folder, attention="eager")
    batch = batch_of([12], [1])
    with attach_baseline(model, "sparsevlm", average_tokens=9) as handle:
        assert handle.method.layers == (1, 3)
        attention = eager_attention(model, batch, 1)[0]
        embeddings = decoder_inputs(model, batch)[0]
        logits(model, batch)
        layout, raters = handle.state.record.layout, handle.state.record.notes["raters"][0]
        kept = last_report(model).kept[1][0]
    vision, question = layout.vision_index[0], layout.question_index[0]
    relevance = (embeddings[vision] @ embeddings[question].T).softmax(-1).mean(0)
    assert torch.equal(raters, relevance >= relevance.mean()) and 0 < raters.sum() < len(raters)
    score = attention[question[raters]][:, vision].mean(0)
    centres = set(kept.tolist()) - best(score, len(kept) - 1)  # 4 or 5 dropped, one cluster of them
    assert len(centres) == 1 and centres < set(range(16)) - best(score, len(kept) - 1)


def test_sparsevlm_at_192_tokens_keeps_the_published_counts():
    method = METHODS["sparsevlm"](Namespace(num_layers=32), 192)
    assert method.layers == (2, 6, 15)
    spent = average_of((300, 200, 110), 576, (2, 6, 15), 32)
    assert method.counts(576, spent) == (300, 200, 110)


def test_clusters_are_means_around_density_peaks():
    """Two groups on a line, and tokens outside the pool that must not count."""
    line = torch.tensor([0.0, 0.1, 0.2, 50.0, 9.0, 9.1, 9.2, 70.0])
    vision = torch.stack([line, torch.ones(8)], -1)[None]
    pool = torch.tensor([[True, True, True, False, True, True, True, False]])
    centres, merged = merge_clusters(vision.repeat(2, 1, 1), pool.repeat(2, 1), torch.tensor([2, 0]))
    first, second = centres[0].nonzero().flatten().tolist()
    assert first in (0, 1, 2) and second in (4, 5, 6)
    assert merged[0, first].tolist() == pytest.approx([0.1, 1]) and merged[0, second].tolist() == pytest.approx(
        [9.1, 1]
    )
    others = ~centres[0]
    assert torch.equal(merged[0, others], vision[0, others])
    assert not centres[1].any() and torch.equal(merged[1], vision[0])
    # tokens that coincide: each centre keeps itself
    _, merged = merge_clusters(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.tensor([2]))
    assert torch.equal(merged, torch.ones(1, 2, 3))


def test_vtw_withdraws_all_vision_tokens_at_one_layer(llava):
    batch = batch_of([9, 14], [1, 1])
    with attach_baseline(llava, "vtw", average_tokens=9):
        with torch.no_grad():
            cache = llava(**batch, use_cache=True).past_key_values
        assert last_report(llava).tokens_per_layer.tolist() == [[16, 16, 16, 0, 0, 0]] * 2
        assert [keys.shape[2] for keys, _ in cache] == [30, 30, 30, 14, 14, 14]


def test_visionzip_keeps_what_the_class_token_attends_to(tower_folder):
    model = tiny_llava(tower_folder)
    batch = batch_of([9, 9], [1, 1])
    tower = model.get_vision_tower().vision_tower
    with torch.no_grad():
        outputs = tower(batch["images"], output_attentions=True, output_hidden_states=True)
        paid = outputs.attentions[-1][:, :, 0, 1:].sum(1)
        patches = outputs.hidden_states[-1][:, 1:]
        features = model.get_model().mm_projector(patches)
        layer = tower.vision_model.encoder.layers[-1]
        keys = layer.self_attn.k_proj(layer.layer_norm1(outputs.hidden_states[-2]))[:, 1:]
        keys = torch.nn.functional.normalize(keys.unflatten(-1, (2, -1)).mean(2), dim=-1)
    with attach_baseline(model, "visionzip", average_tokens=12) as handle:
        hidden = decoder_inputs(model, batch)
        kept, layout = last_report(model).kept[0], handle.state.record.layout
    for row in range(2):  # 10 dominant and 2 contextual
        dominant = sorted(best(paid[row], 10))
        vision = hidden[row][layout.vision[row]]
        torch.testing.assert_close(vision[:10], features[row][dominant])
        assert set(dominant) < set(kept[row].tolist()) and len(kept[row]) == 12
        others = sorted(set(range(16)) - set(dominant))  # the first and the fourth of these six become means
        assert set(kept[row].tolist()) == {*dominant, others[0], others[3]}
        means = average_around(patches[row, others][None], keys[row, others][None], torch.tensor([0, 3]))
        torch.testing.assert_close(vision[10:], model.get_model().mm_projector(means)[0])


def test_contextual_tokens_are_means_of_the_alike():
    keys = torch.nn.functional.normalize(torch.tensor([[[1.0, 0.1], [1, 0], [0, 1], [0.1, 1], [0.2, 1]]]), dim=-1)
    tokens = torch.arange(5.0)[None, :, None]
    assert average_around(tokens, keys, torch.tensor([0, 3])).flatten().tolist() == [0.5, 3]
    # of two targets with equal keys each keeps its own
    same = torch.ones(1, 3, 1)
    assert average_around(torch.tensor([[[1.0], [2], [4]]]), same, torch.tensor([0, 2])).flatten().tolist() == [1.5, 4]


def test_divprune_is_greedy_max_min():
    place = torch.tensor([[0.0], [1.0], [2.5], [7.0], [10.0]])
    distance = torch.cdist(place, place)[None]
    # nearest others are 1, 1, 1.5, 3, 3 away: 7 comes first; then 0 (7 away), 2.5 and 10 (1.5 < 2.5 < 3): 10, 2.5, 1
    assert most_diverse(distance, 5)[0].tolist() == [3, 0, 4, 2, 1]
    twice = torch.cat([distance, distance.flip(1, 2)])
    assert most_diverse(twice, 2).tolist() == [[3, 0], [0, 4]]
    assert sorted(most_diverse(torch.zeros(1, 4, 4), 4)[0].tolist()) == [0, 1, 2, 3], "no token twice among equals"


def test_divprune_measures_cosine_distance_after_the_projector(llava):
    batch = batch_of([9], [1])
    with attach_baseline(llava, "divprune", average_tokens=5):
        logits(llava, batch)
        kept = last_report(llava).kept[0][0]
        with prune_mode(llava, "origin"), torch.no_grad():
            features = llava.encode_images(batch["images"])
    unit = features / features.norm(dim=-1, keepdim=True)
    chosen = most_diverse(1 - unit @ unit.transpose(1, 2), 5)[0]
    assert kept.tolist() == sorted(chosen.tolist())


def test_random_draws_depend_on_picture_and_seed_alone(llava):
    batch = batch_of([9, 9, 9], [1, 1, 1])

    def draws(**settings):
        with attach_baseline(llava, "random", average_tokens=8, **settings):
            logits(llava, batch)
            return [tuple(row.tolist()) for row in last_report(llava).kept[0]]

    assert draws() == draws() and len(set(draws())) == 3 and all(len(set(row)) == 8 for row in draws())
    assert set(draws()).isdisjoint(draws(seed=1))
    counts = torch.zeros(16)
    with attach_baseline(llava, "random", average_tokens=8):
        for seed in range(40):
            logits(llava, batch_of([4] * 10, [1] * 10, seed=seed))
            counts += torch.stack(last_report(llava).kept[0]).flatten().bincount(minlength=16)
    assert (counts / 400 - 0.5).abs().max() < 0.1, "some token is drawn more often than others"


@pytest.mark.parametrize(("keep", "expected"), [(4, [2, 6, 10, 14]), (1, [8]), (5, [1, 4, 8, 11, 14])])
def test_uniform_takes_equal_strides(llava, keep, expected):
    with attach_baseline(llava, "uniform", average_tokens=keep):
        logits(llava, batch_of([9], [1]))
        assert last_report(llava).kept[0][0].tolist() == expected


def test_the_decoder_gets_the_kept_features_in_a_row(llava):
    """The stock language model on hand-made embeddings gives the same logits: positions are consecutive."""
    batch = batch_of([9], [1])
    with torch.no_grad():
        features, words = llava.encode_images(batch["images"]), llava.get_model().embed_tokens
        text = batch["input_ids"][0]
        rows = [words(text[:2]), features[0, [2, 6, 10, 14]], words(text[3:])]
        stock = llava(inputs_embeds=torch.cat(rows)[None]).logits
    with attach_baseline(llava, "uniform", average_tokens=4):
        torch.testing.assert_close(logits(llava, batch), stock)


def test_pooling_averages_the_grid(llava):
    batch = batch_of([9], [1])
    with torch.no_grad():
        features = llava.encode_images(batch["images"])[0]
    with attach_baseline(llava, "pooling", average_tokens=7) as handle:  # 4 x 4 becomes 2 x 3
        hidden = decoder_inputs(llava, batch)[0]
        vision = hidden[handle.state.record.layout.vision[0]]
        assert last_report(llava).kept == {}
    assert len(vision) == 6
    torch.testing.assert_close(vision[0], features[[0, 1, 4, 5]].mean(0))
    torch.testing.assert_close(vision[5], features[[10, 11, 14, 15]].mean(0))


def test_pooled_grids():
    assert [pooled_grid(n, 24) for n in (192, 128, 64, 1, 576)] == [(12, 16), (8, 16), (8, 8), (1, 1), (24, 24)]
    assert [pooled_grid(n, 12) for n in (41, 17, 2)] == [(5, 8), (4, 4), (1, 2)]


def test_tome_merges_the_most_similar_pair_into_its_weighted_mean():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.1], [6.0, 6.0], [0.0, -1.0], [1.0, 1.0]]])
    sizes = torch.tensor([[[1.0], [1], [3], [1], [1], [1]]])
    merged, sizes = merge_pairs(tokens, sizes, 1)  # the third joins the fourth, which is nearly parallel
    assert merged.shape == (1, 5, 2) and sizes.flatten().tolist() == [1, 1, 4, 1, 1]
    assert merged[0, 2].tolist() == pytest.approx([(3 * 5 + 6) / 4, (3 * 5.1 + 6) / 4])
    assert torch.equal(merged[0, [0, 1, 3, 4]], tokens[0, [0, 1, 4, 5]]), "the others stay, in sequence"


@pytest.mark.parametrize("count", [1, 7, 30])
def test_tome_keeps_the_mean_of_all(count):
    tokens = torch.randn(2, 31, 8)
    left, sizes = tokens, torch.ones(2, 31, 1)
    while left.shape[1] > count:
        left, sizes = merge_pairs(left, sizes, min(2, left.shape[1] - count, left.shape[1] // 2))
    torch.testing.assert_close((left * sizes).sum(1), tokens.sum(1), atol=1e-4, rtol=0)
    assert (sizes.sum(1) == 31).all() and merge_tokens(tokens, count).shape == (2, count, 8)


def test_attention_of_rows_is_the_layers_own(tower_folder):
    model = tiny_llava(tower_folder, attention="eager", kv_heads=2)
    batch = batch_of([9, 14], [1, 2])
    with attach_baseline(model, "fastv", average_tokens=16) as handle:
        expected = eager_attention(model, batch, 2)
        seen = {}
        layer = model.get_model().layers[2]
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(kwargs, hidden_states=args[0]), with_kwargs=True
        )
        with prune_mode(model, "origin"):
            logits(model, batch)
        hook.remove()
        layout = handle.state.record.layout
        length = layout.valid.shape[1]
        index = torch.tensor([[5, 20], [30, 40]])
        valid = torch.tensor([[True, True], [True, False]])
        paid = attention_of_rows(layer, seen, layout, Rows.full(2, length, index.device), None, None, index, valid)
    torch.testing.assert_close(paid[0], expected[0, [5, 20]].mean(0))
    torch.testing.assert_close(paid[1], expected[1, 30])


# ---- the command


@pytest.fixture(scope="module")
def answered(testbed, tmp_path_factory):
    """The testbed's test questions answered through LLaVA's own program with two baselines at once."""
    out, base, running = tmp_path_factory.mktemp("out"), testbed / "llava-mosaic-tiny", {}
    for name in ("fastv", "divprune"):
        arguments = ["run", "--baseline", name, "--average_tokens", "50.5", "--report", out / f"{name}.report.jsonl"]
        arguments += ["-m", "llava.eval.model_vqa_loader", "--model-path", base, "--image-folder", testbed]
        arguments += ["--question-file", testbed / "test.jsonl", "--answers-file", out / f"{name}.jsonl"]
        arguments += ["--temperature", "0", "--conv-mode", "v1"]
        command = [sys.executable, "-m", "llava_prune", *map(str, arguments)]
        running[name] = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    for process in running.values():
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    return out


@pytest.mark.parametrize(("name", "layer", "average"), [("fastv", "2", (2 * 144 + 6 * 19) / 8), ("divprune", "0", 50)])
def test_run_answers_with_a_baseline_and_reports_what_it_kept(answered, testbed, name, layer, average):
    questions = [json.loads(line) for line in (testbed / "test.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (answered / f"{name}.jsonl").read_text().splitlines()]
    report = [json.loads(line) for line in (answered / f"{name}.report.jsonl").read_text().splitlines()]
    assert [a["question_id"] for a in answers] == [q["question_id"] for q in questions]
    assert len(report) == len(questions)
    for line in report:
        assert line["mode"] == "hard" and line["vision_tokens"] == 144 and line["llm_flops"] > 0
        assert line["average_tokens"] == pytest.approx(average)
        assert list(line["kept"]) == [layer] and len(line["kept"][layer]) == line["tokens_per_layer"][-1]
    assert len({tuple(line["kept"][layer]) for line in report}) > 1


def test_run_says_what_is_wrong(llava, capsys):
    for message, arguments in {
        "--baseline needs --average_tokens": ["--baseline", "fastv"],
        "not allowed with": ["--baseline", "fastv", "--pruners", "x"],
        "is required": [],
        "invalid choice": ["--baseline", "fast"],
    }.items():
        with pytest.raises(SystemExit):
            main([*arguments, "-m", "program"])
        assert message in capsys.readouterr().err
    asked = Namespace(baseline="fastv", mode="hard", average_tokens=3)
    with pytest.raises(SystemExit, match="llava_prune: fastv: 3 average tokens are under its floor of 6 "):
        attach_as_asked(asked, llava)


def test_run_gives_trained_pruners_a_budget_too(llava, tmp_path):
    config = PruneConfig(pruning_layers=(1, 3), target_token_num=12, pruner_dim=16, pruner_heads=4)
    with attach_pruners(llava, config) as handle:
        randomise_pruners(handle)
        save_pruners(llava, tmp_path)
    asked = Namespace(baseline=None, pruners=tmp_path, mode="hard", allow_other_base=False, average_tokens=8)
    attach_as_asked(asked, llava)
    logits(llava, batch_of([9], [1]))
    assert last_report(llava).average_tokens.item() == 8
