"""What defines each training-free baseline: the rule of its paper, on models and on cases made by hand."""

from argparse import Namespace

import pytest
import torch
from tiny import batch_of, tiny_llava

from llava_prune import last_report, prune_mode
from llava_prune.attention_rows import attention_of_rows
from llava_prune.baselines import METHODS, attach_baseline
from llava_prune.baselines.density_peaks import merge_clusters
from llava_prune.baselines.divprune import most_diverse
from llava_prune.baselines.pooling import pooled_grid
from llava_prune.baselines.tome import merge_pairs, merge_tokens
from llava_prune.baselines.visionzip import average_around
from llava_prune.budget import average_of
from llava_prune.drop import Rows
from llava_prune.flops import DecoderShape


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def decoder_inputs(model, batch):
    """(B, T, D) embeddings that the decoder is given."""
    seen = {}

    def look(_layer, args, kwargs):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    hook = model.get_model().layers[0].register_forward_pre_hook(look, with_kwargs=True)
    logits(model, batch)
    hook.remove()
    return seen["hidden"]


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
        paid = attention_of_rows(layer, seen, layout, Rows.full(2, length, index.device), None, index, valid)
    torch.testing.assert_close(paid[0], expected[0, [5, 20]].mean(0))
    torch.testing.assert_close(paid[1], expected[1, 30])


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "vtw"])
def test_the_flops_of_ranking_are_those_of_the_torch_counter(tower_folder, name):
    """With nothing dropped, ranking is all that hard mode does on top of origin."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llava(tower_folder, attention="eager", kv_heads=2)
    batch = batch_of([9], [1])
    counted = {}
    with attach_baseline(model, name, average_tokens=16) as handle:
        for mode in ("origin", "hard"):
            with prune_mode(model, mode), FlopCounterMode(display=False) as counter:
                logits(model, batch)
            counted[mode] = counter.get_total_flops()
        flops = handle.method.flops(DecoderShape.of(model.config), last_report(model)).item()
    extra = 0
    if name == "sparsevlm":  # similarity and mean over 7 question and 16 vision tokens; two cluster sums over 16
        extra = 2 * (16 * 7 * 32 + 16 * 7) + 2 * 2 * 16 * 16 * 32
    # the mean over a single row is no product to the counter
    assert counted["hard"] - counted["origin"] == pytest.approx(flops + extra, rel=0.003)
