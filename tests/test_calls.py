"""What calls return in hard mode: losses, hidden states, caches; with offloaded layers; and without an image."""

import pytest
import torch
import torch.nn.functional as F
from law import settings
from tiny import IMAGE_TOKEN, batch_of, generate, randomise_pruners, tiny_llava
from torch.utils.weak import TensorWeakRef
from transformers import GenerationConfig

from llava_prune import attach_pruners, last_report, prune_mode

VISION = 16
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def pruned(model, **changes):
    torch.manual_seed(0)
    handle = attach_pruners(model, settings(**changes))
    randomise_pruners(handle)
    return handle


# ---- labels


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_the_text_logits(tower_folder, side):
    model = tiny_llava(tower_folder, padding_side=side)
    inputs = batch_of([9, 14, 7], [1, 2, 0], side, answers=[3, 4, 2])
    with pruned(model):
        outputs = {}
        for mode in ("masked", "hard", "origin"):
            with prune_mode(model, mode):
                outputs[mode] = model(**inputs)
    per_token = []
    columns = (inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, mask, logits in zip(*columns, outputs["hard"].logits, strict=True):
        target = labels[mask].repeat_interleave(torch.where(ids[mask] == IMAGE_TOKEN, VISION, 1))
        logits = logits[-len(target) :] if side == "left" else logits[: len(target)]
        per_token.append(F.cross_entropy(logits[:-1], target[1:], reduction="none")[target[1:] != -100])
    assert [len(losses) for losses in per_token] == [3, 4, 2]
    torch.testing.assert_close(outputs["hard"].loss, torch.cat(per_token).mean())
    torch.testing.assert_close(outputs["hard"].loss, outputs["masked"].loss, atol=1e-5, rtol=0)
    assert abs(outputs["hard"].loss - outputs["origin"].loss) > 1e-3


@torch.no_grad()
def test_a_caption_that_is_supervised_right_after_the_image(llava):
    """Its first token is predicted from a vision token, which therefore stays."""
    inputs = batch_of([5, 9], [1, 1], answers=[3, 7])
    randomise_pruners(attach_pruners(llava, settings()), bias=-0.5)
    losses = []
    for mode in ("masked", "hard"):
        with prune_mode(llava, mode):
            losses.append(llava(**inputs).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    last = [[VISION - 1 in kept[row] for row in (0, 1)] for kept in last_report(llava).kept.values()]
    assert last == [[True, True]] * 3


# ---- hidden states, attentions, cache


@torch.no_grad()
def test_hidden_states_have_the_rows_that_entered_each_layer(tower_folder):
    model = tiny_llava(tower_folder, attention="eager")
    text = torch.tensor([9, 12])
    inputs = batch_of(text.tolist(), [1, 1])
    with pruned(model), prune_mode(model, "hard"):
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        report = last_report(model)
    length = 12 + VISION  # the shorter sample is padded by 3, and padding stays
    rows = [length if layer == 0 else int((report.tokens_per_layer[:, layer] + 12).max()) for layer in range(6)]
    assert rows[0] > rows[1] > rows[3] > rows[4]
    assert [state.shape for state in output.hidden_states[:-1]] == [(2, s, 32) for s in [length, *rows[:-1]]]
    assert output.hidden_states[-1].shape == (2, length, 32) and output.logits.shape == (2, length, 64)
    assert [weights.shape for weights in output.attentions] == [(2, 4, s, s) for s in rows]
    dropped = torch.ones(VISION, dtype=torch.bool).index_fill(0, report.kept[4][1], False).nonzero().flatten() + 2
    assert len(dropped) and not output.hidden_states[-1][1, dropped].any() and not output.logits[1, dropped].any()


@torch.no_grad()
def test_the_cache_shrinks_with_the_tokens(llava):
    with pruned(llava), prune_mode(llava, "hard"):
        cache = llava(**batch_of([9], [1]), use_cache=True).past_key_values
        tokens = last_report(llava).tokens_per_layer[0]
    lengths = [keys.shape[2] for keys, _ in cache]
    assert lengths == (tokens + 9).tolist() and lengths[-1] < lengths[0]


# ---- devices


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_layers_spread_and_offloaded_by_accelerate(tower_folder, tmp_path, residual):
    from accelerate import dispatch_model

    model = tiny_llava(tower_folder)
    inputs = batch_of([9, 12], [1, 2])
    with pruned(model, use_attn_residual=residual), prune_mode(model, "hard"):
        expected, answer = model(**inputs).logits, generate(model, inputs, GREEDY)
    parts = ["embed_tokens", "norm", "vision_tower", "mm_projector", *(f"layers.{i}" for i in range(6))]
    device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    for layer in (3, 4, 5):  # weights on the meta device until their layer runs
        device_map[f"model.layers.{layer}"] = "disk"
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    assert model.model.layers[4].input_layernorm.weight.device.type == "meta"
    dispatched = model.model.layers[4].forward
    with pruned(model, use_attn_residual=residual) as handle:
        assert {p.device.type for p in handle.pruners.parameters()} == {"cpu"}
        for mode in ("masked", "hard"):
            with prune_mode(model, mode):
                logits = model(**inputs).logits
                text = handle.state.record.layout.text
                torch.testing.assert_close(logits[text], expected[text], atol=1e-4, rtol=0)
                assert torch.equal(generate(model, inputs, GREEDY), answer)
    assert model.model.layers[4].forward is dispatched


# ---- no image


@pytest.mark.parametrize("mode", ["origin", "masked", "hard"])
@torch.no_grad()
def test_calls_without_an_image_cost_nothing_and_change_nothing(llava, mode):
    given = batch_of([9, 12], [0, 0])  # LLaVA's data loaders pass a picture for samples without any
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    stock = [(llava(**inputs).logits, generate(llava, inputs, GREEDY)) for inputs in (text, given)]
    with pruned(llava) as handle, prune_mode(llava, mode):
        for pruner in handle.pruners.layers.values():
            pruner.forward = None  # would fail if called
        for inputs, (logits, tokens) in zip((text, given), stock, strict=True):
            assert torch.equal(llava(**inputs).logits, logits)
            assert torch.equal(generate(llava, inputs, GREEDY), tokens)
            assert handle.state.record is None and handle.state.announced is None
        with pytest.raises(ValueError, match="no image"):
            last_report(llava)


# ---- embeddings that are given once more


def prepared(model, inputs):
    """The embeddings that LLaVA's preparation makes of a prompt."""
    ids, images = inputs["input_ids"], inputs["images"]
    return model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[4]


def kept_tokens(model):
    return {layer: [row.tolist() for row in rows] for layer, rows in last_report(model).kept.items()}


def answer_of(model, embeds, **how):
    torch.manual_seed(0)
    return super(type(model), model).generate(inputs_embeds=embeds, **{**GREEDY, **how})


@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
@torch.no_grad()
def test_embeddings_that_are_given_twice_are_pruned_twice(llava, how):
    inputs, text = batch_of([9], [1], "none", seed=3), torch.tensor([[3, 4, 5]])
    with pruned(llava), prune_mode(llava, "hard"):
        embeds = prepared(llava, inputs)
        first, kept = answer_of(llava, embeds, **how), kept_tokens(llava)
        generate(llava, {"input_ids": text}, GREEDY)
        again = answer_of(llava, embeds, **how)
        assert torch.equal(again, first) and kept_tokens(llava) == kept
        logits = [llava(inputs_embeds=given).logits for given in (embeds, embeds, embeds.clone())]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
        with pytest.raises(ValueError, match="contrastive search"):
            answer_of(llava, embeds, penalty_alpha=0.6, top_k=4)
    unpruned = llava(inputs_embeds=embeds).logits
    assert not torch.equal(unpruned[:, -1], logits[0][:, -1])


@torch.no_grad()
def test_other_embeddings_of_that_length_are_not_taken_for_them(llava):
    embeds = torch.randn(1, 9 + VISION, 32)
    stock = llava(inputs_embeds=embeds).logits
    with pruned(llava) as handle, prune_mode(llava, "hard"):
        old = prepared(llava, batch_of([9], [1], "none"))
        llava(inputs_embeds=old)
        assert torch.equal(llava(inputs_embeds=embeds).logits, stock) and handle.state.record is None


@torch.no_grad()
def test_embeddings_are_not_held_on_to(llava):
    with pruned(llava), prune_mode(llava, "hard"):
        embeds = prepared(llava, batch_of([9], [1], "none"))
        held = TensorWeakRef(embeds)
        answer_of(llava, embeds)
        del embeds
        assert held() is None


# ---- what is refused


@pytest.mark.parametrize("lengths, images", [([9], [1]), ([9, 14], [1, 0])], ids=["one", "batch"])
@torch.no_grad()
def test_contrastive_search_is_refused_where_tokens_are_removed(tower_folder, lengths, images):
    """The host compares the hidden states of all tokens, in the last of which removed ones are zero."""
    model = tiny_llava(tower_folder, padding_side="left")
    inputs, text = batch_of(lengths, images, "left"), batch_of([9], [0])
    search = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 4}
    config = GenerationConfig(**search, bos_token_id=1, pad_token_id=0)
    stock = [generate(model, given, search) for given in (inputs, text)]
    with pruned(model):
        for mode in ("masked", "hard"):
            with prune_mode(model, mode):
                with pytest.raises(ValueError, match="contrastive search.*prune_mode"):
                    generate(model, inputs, search)
                with pytest.raises(ValueError, match="contrastive search.*prune_mode"):
                    generate(model, inputs, {"generation_config": config})
                assert torch.equal(generate(model, text, search), stock[1])
        assert torch.equal(generate(model, inputs, search), stock[0])
