"""The one law: masked and hard agree at every text position; keeping everything is the stock model, bit for bit."""

import pytest
import torch
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, detach_pruners, last_report, prune_mode

BATCHES = {
    "one": ([9], [1]),
    "four": ([9, 14, 7, 11], [1, 1, 1, 1]),
    "mixed": ([9, 14, 7, 11], [1, 0, 2, 1]),
}


def config(**values):
    return PruneConfig(pruning_layers=(1, 3, 4), target_token_num=10, pruner_dim=16, pruner_heads=4, **values)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("batch", BATCHES, ids=list(BATCHES))
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_equals_hard(tower_folder, attention, side, batch, residual):
    model = tiny_llava(tower_folder, attention=attention, padding_side=side)
    inputs = batch_of(*BATCHES[batch], side)
    stock = logits(model, inputs)
    handle = attach_pruners(model, config(use_attn_residual=residual))
    randomise_pruners(handle)
    with prune_mode(model, "masked"):
        masked = logits(model, inputs)
        masked_report = last_report(model)
    text = handle.state.record.layout.text
    with prune_mode(model, "hard"):
        hard = logits(model, inputs)
        hard_report = last_report(model)
    assert hard.shape == stock.shape
    assert (masked - hard)[text].abs().max() < 1e-4
    assert (stock - hard)[text].abs().max() > 1e-2, "nothing was pruned, so nothing was tested"
    assert torch.equal(masked_report.tokens_per_layer, hard_report.tokens_per_layer)
    for layer, kept in hard_report.kept.items():
        assert all(torch.equal(a, b) for a, b in zip(kept, masked_report.kept[layer], strict=True))

    generated = {}
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            generated[mode] = model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                images=inputs["images"],
                max_new_tokens=8,
                do_sample=False,
            )
    assert torch.equal(generated["masked"], generated["hard"])


@pytest.mark.parametrize("sampling", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
def test_generation_strategies_agree(llava, sampling):
    inputs = batch_of([9, 14, 7], [1, 1, 2], "right")
    randomise_pruners(attach_pruners(llava, config()))
    generated = []
    for mode in ("masked", "hard"):
        torch.manual_seed(0)
        with prune_mode(llava, mode):
            generated.append(
                llava.generate(
                    inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    images=inputs["images"],
                    max_new_tokens=8,
                    **sampling,
                )
            )
    assert torch.equal(*generated)


def test_an_empty_question_is_pruned_all_the_same(llava):
    inputs = batch_of([2, 2, 9], [1, 1, 1])  # both text tokens stand before the image
    handle = attach_pruners(llava, config(use_attn_residual=True))
    randomise_pruners(handle)
    results = []
    for mode in ("masked", "hard"):
        with prune_mode(llava, mode):
            results.append(logits(llava, inputs))
    assert handle.state.record.layout.question.sum(-1).tolist() == [0, 0, 7]
    assert (results[0] - results[1])[handle.state.record.layout.text].abs().max() < 1e-4


def test_grouped_query_attention(tower_folder):
    model = tiny_llava(tower_folder, kv_heads=2)
    inputs = batch_of([9, 14], [1, 1])
    handle = attach_pruners(model, config(use_attn_residual=True))
    randomise_pruners(handle)
    with prune_mode(model, "masked"):
        masked = logits(model, inputs)
    with prune_mode(model, "hard"):
        hard = logits(model, inputs)
    assert (masked - hard)[handle.state.record.layout.text].abs().max() < 1e-4


@pytest.mark.parametrize("mode", ["origin", "masked", "hard"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_keep_all_is_the_stock_model(tower_folder, side, mode):
    model = tiny_llava(tower_folder, padding_side=side)
    inputs = batch_of(*BATCHES["mixed"], side)
    stock = logits(model, inputs)
    attach_pruners(model, config())  # fresh pruners keep everything
    with prune_mode(model, mode):
        assert torch.equal(logits(model, inputs), stock)


def test_detach_leaves_nothing(llava):
    inputs = batch_of(*BATCHES["mixed"])
    stock = logits(llava, inputs)
    keys, names = set(llava.state_dict()), {name for name, _ in llava.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in llava.named_modules()}
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in llava.named_modules()}
    randomise_pruners(attach_pruners(llava, config(enable_token_merger=True, merger_tokens=8, merger_heads=4)))
    with prune_mode(llava, "hard"):
        logits(llava, inputs)
    detach_pruners(llava)
    assert torch.equal(logits(llava, inputs), stock)
    assert set(llava.state_dict()) == keys and {name for name, _ in llava.named_modules()} == names
    assert {name: set(module.__dict__) for name, module in llava.named_modules()} == attributes
    assert {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in llava.named_modules()} == hooks
    with pytest.raises(ValueError, match="attach_pruners"):
        detach_pruners(llava)


def test_handle_is_a_context_and_attaching_twice_is_refused(llava):
    with attach_pruners(llava, config()), pytest.raises(ValueError, match="detach_pruners"):
        attach_pruners(llava, config())
    assert "forward" not in llava.get_model().layers[1].__dict__


def test_a_second_model_is_left_alone(tower_folder, llava):
    other = tiny_llava(tower_folder, seed=1)
    inputs = batch_of(*BATCHES["one"])
    before = logits(other, inputs)
    randomise_pruners(attach_pruners(llava, config()))
    with prune_mode(llava, "hard"):
        assert torch.equal(logits(other, inputs), before)


def test_cache_really_shrinks(llava):
    inputs = batch_of([9], [1])
    randomise_pruners(attach_pruners(llava, config()))
    with prune_mode(llava, "hard"), torch.no_grad():
        cache = llava(**inputs, use_cache=True).past_key_values
    report = last_report(llava)
    lengths = [keys.shape[2] for keys, _ in cache]
    assert lengths == (report.tokens_per_layer[0] + 9).tolist()
    assert lengths[-1] < lengths[0]


def test_loss_of_labels_in_hard_mode_is_that_of_masked(llava):
    inputs = batch_of([9, 14], [1, 1], answers=[2, 3])
    randomise_pruners(attach_pruners(llava, config()))
    losses = []
    for mode in ("masked", "hard"):
        with prune_mode(llava, mode), torch.no_grad():
            losses.append(llava(**inputs).loss)
    assert torch.allclose(*losses, atol=1e-5)


def test_text_only_calls_change_nothing(llava):
    text = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        stock = llava(input_ids=text).logits
        handle = attach_pruners(llava, config())
        randomise_pruners(handle)
        with prune_mode(llava, "hard"):
            assert torch.equal(llava(input_ids=text).logits, stock)
    assert handle.state.record is None
    with pytest.raises(ValueError, match="no image"):
        last_report(llava)


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_token_merger_works_with_layer_pruners(llava, mode):
    inputs = batch_of(*BATCHES["mixed"])
    stock = logits(llava, inputs)
    merged = config(enable_token_merger=True, merger_tokens=8, merger_heads=4, min_keep=2)
    handle = attach_pruners(llava, PruneConfig(**{**merged.to_dict(), "target_token_num": 5}))
    randomise_pruners(handle)
    with prune_mode(llava, "origin"):
        assert torch.equal(logits(llava, inputs), stock)
    results = []
    for run in ("masked", mode):
        with prune_mode(llava, run):
            results.append(logits(llava, inputs))
    report = last_report(llava)
    assert report.vision_tokens.tolist() == [8, 0, 16, 8]
    assert (results[0] - results[1])[handle.state.record.layout.text].abs().max() < 1e-4


def test_min_and_max_keep_bound_every_pruning_layer(llava):
    inputs = batch_of(*BATCHES["four"])
    randomise_pruners(attach_pruners(llava, config(min_keep=3, max_keep=4, threshold=0.99)))
    with prune_mode(llava, "hard"):
        logits(llava, inputs)
    counts = last_report(llava).tokens_per_layer[:, 1:]
    assert counts.min() >= 3 and counts.max() <= 4


def test_a_cache_of_another_prompt_is_refused(llava):
    inputs = batch_of([9], [1])
    randomise_pruners(attach_pruners(llava, config()))
    with prune_mode(llava, "hard"), torch.no_grad():
        cache = llava(**inputs, use_cache=True).past_key_values
        llava(**batch_of([12], [1]), use_cache=True)
        with pytest.raises(ValueError, match="[Pp]refill"):
            llava(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_modes_and_models_are_checked(llava):
    with pytest.raises(ValueError, match="attach_pruners"), prune_mode(llava, "hard"):
        pass
    attach_pruners(llava, config())
    with pytest.raises(ValueError, match="origin, soft, masked, hard"), prune_mode(llava, "fast"):
        pass
    with pytest.raises(ValueError, match="no Llama decoder"):
        attach_pruners(torch.nn.Linear(2, 2), config())
