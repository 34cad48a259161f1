"""Acceleration on LLaVA's own stack, without a GPU: the same code with calls in place of graphs."""

import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
from fast_law import FACTORS, SMALL, assert_fast_is_plain
from law import matrix, settings, texts_and_images, with_lora
from test_law import KINDS
from tiny import batch_of, generate, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, last_report, prune_mode
from llava_prune.baselines import METHODS, attach_baseline
from llava_prune.compat import find_decoder
from llava_prune.decoder_layer import PLAIN, added_and_normed, normed, rotated
from llava_prune.fast import accelerate
from llava_prune.fast.fused import fused_parts
from llava_prune.fast.suited import DecoderCheck
from llava_prune.patch import find_handle, set_mode
from llava_prune.pruner import LayerPruner
from llava_prune.run import attach_as_asked, build_parser
from llava_prune.scoring import scored


@matrix({"kind": tuple(KINDS), **FACTORS})
def test_fast_is_plain(tower_folder, kind, batch, padding, images, selection, residual, first, how):
    side = "left" if padding == "left" else "right"
    model = tiny_llava(tower_folder, padding_side=side, **KINDS[kind])
    inputs = batch_of(*texts_and_images(batch, images), padding, anyres="anyres" in KINDS[kind])
    config = settings(pruning_layers=(first, 3, 4), selection=selection, use_attn_residual=residual)
    assert_fast_is_plain(model, config, inputs, generate, how, padding == "right" and batch > 1)


@pytest.mark.parametrize("name", METHODS)
def test_baselines_are_the_same_in_graphs(tower_folder, name):
    model = tiny_llava(tower_folder, padding_side="left")
    inputs = batch_of([9, 14, 8], [1, 0, 2], "left")
    with attach_baseline(model, name, average_tokens=12):
        expected, report = answer(model, inputs), last_report(model)
        with accelerate(model, **SMALL) as fast:
            for _ in range(2):
                assert torch.equal(answer(model, inputs), expected)
            assert len(fast.graphs) > 0
            assert torch.equal(last_report(model).tokens_per_layer, report.tokens_per_layer)


def test_merged_tokens_are_pruned_in_graphs(tower_folder):
    model = tiny_llava(tower_folder, padding_side="left")
    inputs = batch_of([9, 14, 8], [1, 0, 2], "left")
    randomise_pruners(attach_pruners(model, settings(enable_token_merger=True, merger_tokens=9, merger_heads=4)))
    with prune_mode(model, "hard"):
        expected = answer(model, inputs)
        with accelerate(model, **SMALL):
            assert torch.equal(answer(model, inputs), expected)


def test_a_call_in_inference_mode_leaves_what_later_calls_can_use(tower_folder):
    """LLaVA's programs generate in inference mode, pipelines do not."""
    model = tiny_llava(tower_folder, padding_side="left")
    inputs = batch_of([9, 14, 8], [1, 0, 2], "left")
    randomise_pruners(attach_pruners(model, settings()))
    with prune_mode(model, "hard"):
        expected = answer(model, inputs)
        with accelerate(model, **SMALL) as fast:
            for inference in (True, False, True):
                with torch.inference_mode(inference):
                    assert torch.equal(answer(model, inputs), expected)
            assert len(fast.graphs) > 0


def answer(model, inputs, **arguments):
    return generate(model, inputs, {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **arguments})


@pytest.fixture
def pruned(tower_folder):
    """A LLaVA that pads on the left, with pruners that decide, in mode hard."""
    model = tiny_llava(tower_folder, padding_side="left")
    randomise_pruners(attach_pruners(model, settings(selection="topk")))
    set_mode(model, "hard")
    return model


INPUTS = {"lengths": [9, 14, 8], "images": [1, 0, 2], "padding_side": "left"}


def _with_a_hook(model):
    find_decoder(model).layers[2].mlp.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("change", "emulate", "message"),
    [
        (lambda model: model, False, "no CUDA graphs on a CPU"),
        (_with_a_hook, True, "a LlamaMLP has forward hooks"),
        (partial(with_lora, how="attached"), True, "merge LoRA"),
    ],
    ids=["cpu", "hook", "lora"],
)
@torch.no_grad()
def test_what_graphs_can_not_do_is_said_once_and_done_plainly(tower_folder, change, emulate, message):
    model = change(tiny_llava(tower_folder, padding_side="left"))
    randomise_pruners(attach_pruners(model, settings()))
    inputs = batch_of(**INPUTS)
    with prune_mode(model, "hard"):
        expected = model(**inputs).logits
        with accelerate(model, **{**SMALL, "emulate": emulate}) as fast:
            with pytest.warns(UserWarning, match=message):
                assert torch.equal(model(**inputs).logits, expected)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(model(**inputs).logits, expected)
            assert len(fast.graphs) == 0


@torch.no_grad()
def test_what_changes_between_two_prompts_is_noticed(tower_folder):
    model = tiny_llava(tower_folder, padding_side="left")
    check = DecoderCheck(find_decoder(model))
    layer = find_decoder(model).layers[3]
    assert check(set()) is None and check(set()) is None
    hook = layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    assert "a Linear has forward hooks" in check(set()) and check({hook.id}) is None
    layer.mlp.up_proj._forward_hooks = OrderedDict()
    assert check(set()) is None
    layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    assert "a Linear has forward hooks" in check(set())
    layer.mlp.up_proj._forward_hooks = OrderedDict()
    torch.nn.utils.parametrize.register_parametrization(layer.mlp.up_proj, "weight", torch.nn.Identity())
    assert "up_proj is a" in check(set())
    torch.nn.utils.parametrize.remove_parametrizations(layer.mlp.up_proj, "weight")
    assert check(set()) is None
    projection, layer.self_attn.k_proj = layer.self_attn.k_proj, torch.nn.Sequential(layer.self_attn.k_proj)
    assert "k_proj is a torch.nn.modules.container.Sequential" in check(set())
    layer.self_attn.k_proj = projection
    assert check(set()) is None
    layer.mlp._hf_hook = object()
    assert "moves its layers between devices" in check(set())
    del layer.mlp._hf_hook
    model.train()
    assert "training mode" in check(set())


@torch.no_grad()
def test_hidden_states_are_those_of_the_plain_path(pruned):
    inputs = batch_of(**INPUTS)
    expected = pruned(**inputs, output_hidden_states=True).hidden_states
    with accelerate(pruned, **SMALL), pytest.warns(UserWarning, match="output_hidden_states"):
        found = pruned(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_autocast_goes_the_plain_way_and_a_cache_of_graphs_does_not_go_there(pruned):
    inputs, autocast = batch_of(**INPUTS), partial(torch.autocast, "cpu", torch.bfloat16)
    with autocast():
        expected = answer(pruned, inputs)
    with accelerate(pruned, **SMALL) as fast:
        with autocast(), pytest.warns(UserWarning, match="torch.autocast is on"):
            assert torch.equal(answer(pruned, inputs), expected)
        assert len(fast.graphs) == 0
        cache = pruned(**inputs, use_cache=True).past_key_values
        mask = _longer(find_handle(pruned).state.record.layout.valid, 1)
        with autocast(), pytest.raises(ValueError, match="can not go on where torch.autocast is on"):
            pruned(input_ids=torch.tensor([[7]] * 3), attention_mask=mask, past_key_values=cache)


def test_masked_mode_and_gradients_go_the_plain_way_without_a_word(pruned):
    inputs = batch_of(**INPUTS)
    with accelerate(pruned, **SMALL) as fast, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruned(**inputs).logits.requires_grad
        with prune_mode(pruned, "masked"), torch.no_grad():
            pruned(**inputs)
        assert len(fast.graphs) == 0


@torch.no_grad()
@pytest.mark.parametrize("hidden", [None, 1, 4], ids=["all", "token 1", "token 4"])
def test_text_added_to_a_cache_is_what_the_plain_path_makes_of_it(pruned, hidden):
    """In pieces of several tokens, further than the cache has room for at first, and with a token hidden."""
    inputs, added = batch_of(**INPUTS), torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(1))

    def logits():
        output, found = pruned(**inputs, use_cache=True), []
        mask = find_handle(pruned).state.record.layout.valid
        for place, new in enumerate(added.split(1, 1)):
            mask = torch.cat([mask, mask.new_full((3, 1), place != hidden)], 1)
            output = pruned(input_ids=new, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits)
        return torch.cat(found, 1)

    expected = logits()
    with accelerate(pruned, **SMALL):
        found = logits()
    seen = [token for token in range(40) if token != hidden]
    torch.testing.assert_close(found[:, seen], expected[:, seen], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_turn_of_several_tokens_is_one_call(pruned):
    inputs, added = batch_of(**INPUTS), torch.tensor([[7, 8, 9, 10, 11]] * 3)
    with accelerate(pruned, **SMALL):
        output = pruned(**inputs, use_cache=True)
        cache, mask = output.past_key_values, find_handle(pruned).state.record.layout.valid
        together = pruned(input_ids=added, attention_mask=_longer(mask, 5), past_key_values=cache).logits
        cache = pruned(**inputs, use_cache=True).past_key_values
        one_by_one = []
        for place in range(5):
            new, seen = added[:, place : place + 1], _longer(mask, place + 1)
            one_by_one.append(pruned(input_ids=new, attention_mask=seen, past_key_values=cache).logits)
    torch.testing.assert_close(together, torch.cat(one_by_one, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_turns_of_several_tokens_keep_no_memory(pruned, inference):
    inputs, kept = batch_of(**INPUTS), set()
    with accelerate(pruned, **SMALL) as fast, torch.inference_mode(inference), torch.no_grad():
        for tokens in (2, 5, 9):
            cache = pruned(**inputs, use_cache=True).past_key_values
            mask = _longer(find_handle(pruned).state.record.layout.valid, tokens)
            pruned(input_ids=torch.full((3, tokens), 7), attention_mask=mask, past_key_values=cache)
            kept.add(frozenset(fast._buffers))
    assert len(kept) == 1


def _longer(mask, tokens):
    return torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)


@torch.no_grad()
def test_a_cache_whose_memory_was_taken_over_is_refused(pruned):
    inputs = batch_of(**INPUTS)
    with accelerate(pruned, **SMALL):
        old = pruned(**inputs, use_cache=True).past_key_values
        mask = _longer(find_handle(pruned).state.record.layout.valid, 1)
        pruned(**inputs, use_cache=True)
        with pytest.raises(ValueError, match="prefill the whole prompt again"):
            pruned(input_ids=torch.tensor([[7]] * 3), attention_mask=mask, past_key_values=old)


def test_positions_that_the_model_does_not_know_are_refused(tower_folder):
    model = tiny_llava(tower_folder)
    model.config.max_position_embeddings = 40
    inputs = batch_of([9], [1], "none")
    with (
        accelerate(model, **SMALL),
        pytest.raises(ValueError, match="position 41 is past max_position_embeddings, 40"),
    ):
        answer(model, inputs)


def test_accelerating_twice_is_refused(llava):
    with accelerate(llava, **SMALL), pytest.raises(ValueError, match="accelerated already"):
        accelerate(llava)
    assert "forward" not in find_decoder(llava).__dict__


def test_pruners_may_come_and_go(llava):
    inputs = batch_of([9], [1], "none")

    def pruned_answer(seed):
        torch.manual_seed(seed)
        with attach_pruners(llava, settings()) as handle, prune_mode(llava, "hard"):
            randomise_pruners(handle, seed)
            return answer(llava, inputs)

    stock, *others = answer(llava, inputs), pruned_answer(0), pruned_answer(1)
    assert len({tuple(tokens[0].tolist()) for tokens in (stock, *others)}) == 3
    with accelerate(llava, **SMALL) as fast:
        for seed in (0, 1, 0):
            assert torch.equal(answer(llava, inputs), stock)
            assert torch.equal(pruned_answer(seed), others[seed])
        assert len(fast.graphs) > 0


def test_few_graphs_are_made_again_and_again(pruned):
    batches = [batch_of([length], [1], "none") for length in (5, 9, 14, 20, 5, 14)]
    expected = [answer(pruned, inputs) for inputs in batches]
    with accelerate(pruned, **SMALL, max_graphs=3) as fast:
        for inputs, tokens in zip(batches, expected, strict=True):
            assert torch.equal(answer(pruned, inputs), tokens)
            assert len(fast.graphs) <= 3


def test_a_shorter_prompt_sees_nothing_of_the_longer_one_before_it(pruned):
    longer, shorter = (batch_of(lengths, [1, 1], "left") for lengths in ([20, 14], [9, 12]))
    expected = [answer(pruned, inputs) for inputs in (longer, shorter)]
    with accelerate(pruned, **{**SMALL, "bucket": 64}) as fast:
        for _ in range(2):  # the first time memory grows and graphs are made anew
            assert torch.equal(answer(pruned, longer), expected[0])
        made = len(fast.graphs)
        assert made == 1 + (len(find_handle(pruned).scorers) + 1) + 2, "packing, stages, a token in two sizes of cache"
        assert torch.equal(answer(pruned, shorter), expected[1])
        assert len(fast.graphs) == made  # the same shapes, rounded up


@torch.no_grad()
def test_caches_hold_the_kept_rows_and_the_room(pruned):
    inputs = batch_of([9], [1], "none")
    with accelerate(pruned, **SMALL) as fast:
        pruned(**inputs, use_cache=True)
        rows = last_report(pruned).tokens_per_layer[0] + 9  # one placeholder became 16 vision tokens
        rounded = (rows + SMALL["bucket"] - 1) // SMALL["bucket"] * SMALL["bucket"]
        assert fast.arena.bytes == 4 * 2 * 32 * int((rounded + SMALL["room"]).sum())


def test_run_accelerates_what_it_attaches(llava):
    args = ["--baseline", "fastv", "--average_tokens", "12", "--fast", "-m", "program"]
    attach_as_asked(build_parser().parse_args(args), llava)
    assert "forward" in find_decoder(llava).__dict__ and find_handle(llava).method.name == "fastv"


@torch.no_grad()
def test_fused_steps_are_the_stock_ones_in_few_compilations():
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

    counter = CompileCounterWithBackend("aot_eager")
    fused = fused_parts(counter, PLAIN.products)
    norms = [LlamaRMSNorm(16) for _ in range(12)]  # of more layers than torch.compile tries again for
    mlps = [LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24)) for _ in range(12)]
    config = PruneConfig(target_token_num=4, pruner_rank=8, pruner_dim=8, pruner_heads=2)
    pruners = [LayerPruner(16, config) for _ in range(12)]
    for norm, mlp, pruner in zip(norms, mlps, pruners, strict=True):
        norm.weight.copy_(torch.randn(16))
        for batch, rows in ((1, 1), (1, 9), (3, 1), (3, 12)):
            hidden, added = torch.randn(2, batch, rows, 16)
            query, key = torch.randn(batch, rows, 4, 8).transpose(1, 2), torch.randn(batch, rows, 2, 8).transpose(1, 2)
            tables = torch.randn(2, batch, rows, 8).unbind()
            question, asked = torch.randn(batch, rows + 3, 16), torch.ones(batch, rows + 3).bool()
            seen = (torch.rand(batch, rows, 2), torch.zeros(batch, rows), question, asked)
            given = (norm, mlp, pruner, hidden, added, query, key, tables, seen)
            for found, expected in zip(_steps(fused, *given), _steps(PLAIN, *given), strict=True):
                assert torch.equal(found, expected)
        # one for each step, and for one or more samples and rows, of the first layer alone; torch starts two of the
        # pruner's over
        assert counter.frame_count <= 5 * 4 + 2
    for dtype in (torch.float64, torch.bfloat16, torch.float16):  # past the limit of compilations
        for batch, rows in ((1, 1), (1, 9), (3, 1), (3, 12)):
            norm, hidden = LlamaRMSNorm(16).to(dtype), torch.randn(batch, rows, 16, dtype=dtype)
            assert torch.equal(fused_parts("aot_eager", PLAIN.products).step(normed)(norm, hidden), norm(hidden))


def _steps(parts, norm, mlp, pruner, hidden, added, query, key, tables, seen):
    step = parts.step
    layer = [step(normed)(norm, hidden), *step(added_and_normed)(norm, hidden, added), parts.mlp(mlp, hidden)]
    return layer + [*step(rotated)(query, key, *tables), *step(scored)(pruner, hidden, *seen, None)]


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@torch.no_grad()
def test_compiled_steps_decide_alike(tower_folder, selection):
    """All that `accelerate` compiles on a GPU, without a break, in the same graphs' code."""
    model = tiny_llava(tower_folder, padding_side="left")
    randomise_pruners(attach_pruners(model, settings(selection=selection)))
    inputs = batch_of([9, 14, 8], [1, 0, 2], "left")
    with prune_mode(model, "hard"):
        expected, report = answer(model, inputs), last_report(model)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with accelerate(model, **SMALL) as fast:
            fast._parts = fused_parts("aot_eager", PLAIN.products)
            for _ in range(2):
                assert torch.equal(answer(model, inputs), expected)
                assert torch.equal(last_report(model).tokens_per_layer, report.tokens_per_layer)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 10, "nothing was compiled"
        assert not torch._dynamo.utils.counters["graph_break"]
