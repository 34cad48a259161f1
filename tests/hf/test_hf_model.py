"""Pruners on Hugging Face models: coming and going, what calls return, devices, pipelines, and what is refused."""

import pytest
import torch
from law import settings
from tiny_hf import KINDS, batch_of, randomise_pruners, tiny

from llava_prune import attach_pruners, compat, detach_pruners, last_report, load_pruners, prune_mode
from llava_prune import save_pruners as save
from llava_prune.patch import set_mode


def pruned(model, mode="hard", **changes):
    torch.manual_seed(0)
    handle = attach_pruners(model, settings(**changes))
    randomise_pruners(handle)
    set_mode(model, mode)
    return handle


# ---- coming and going


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_leaves_nothing(kind):
    model = tiny(kind)
    model.generate(**batch_of(model, [9], [1]), max_new_tokens=3)  # the host installs hooks of its own on first use
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    pruned(model)
    model.generate(**batch_of(model, [9], [1]), max_new_tokens=3)
    detach_pruners(model)
    assert [name for name, _ in model.named_modules()] == list(before)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert len(module._forward_pre_hooks) == hooks[name] and "forward" not in module.__dict__


def test_the_bound_forward_keeps_its_signature():
    # generate and Trainer ask it which arguments the model takes
    import inspect

    model = tiny()
    stock = inspect.signature(model.forward)
    pruned(model)
    assert inspect.signature(model.forward) == stock


def test_saved_pruners_load_on_the_same_base(tmp_path):
    model = tiny()
    batch = batch_of(model, [9, 12], [1, 2])
    with pruned(model), torch.no_grad():
        expected = model(**batch).logits
        save(model, tmp_path)
    with load_pruners(model, tmp_path), torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_vision_tokens_and_width_come_from_the_nested_configs():
    with pruned(tiny()) as handle:
        assert (handle.vision_tokens, handle.hidden_size, handle.num_layers) == (16, 32, 6)
    with pruned(tiny("next")) as handle:
        assert handle.vision_tokens is None


# ---- what a call computes


@pytest.mark.parametrize("mode", ["origin", "masked", "hard"])
@torch.no_grad()
def test_calls_without_an_image_cost_nothing_and_change_nothing(mode):
    model = tiny()
    batch = batch_of(model, [9, 12], [0, 0])
    stock, tokens = model(**batch).logits, model.generate(**batch, max_new_tokens=8, do_sample=False)
    with pruned(model, mode) as handle:
        for pruner in handle.pruners.layers.values():
            pruner.forward = None  # would fail if called
        assert torch.equal(model(**batch).logits, stock)
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), tokens)
        assert handle.state.record is None and handle.state.announced is None
        with pytest.raises(ValueError, match="last had no image"):
            last_report(model)


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_labels_give_the_loss_of_the_text_logits(mode):
    model = tiny()
    batch = batch_of(model, [9, 14, 7], [1, 2, 0], "right", answers=[3, 4, 2])
    with pruned(model, mode), torch.no_grad():
        output = model(**batch)
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("kind", ["llava", "next", "onevision"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_training_step_computes_the_logits_of_answers_alone_and_the_same_loss(kind, padding):
    model = tiny(kind)
    batch = batch_of(model, [9, 14, 7], [1, 2, 1], padding, answers=[3, 4, 2])
    results = []
    with pruned(model, "soft") as handle:
        for loss_only in (False, True):
            handle.state.loss_only = loss_only
            handle.pruners.zero_grad()
            output = model(**batch)
            output.loss.backward()
            results.append((output.loss.detach(), output.logits.shape[1]))
            gradients = [parameter.grad for parameter in handle.pruners.parameters()]
            results[-1] += (torch.cat([g.flatten() for g in gradients if g is not None]),)
    (loss, length, gradient), (same_loss, fewer, same_gradient) = results
    first = int((batch["labels"] != -100).any(0).nonzero().min())
    assert length == batch["input_ids"].shape[1] and fewer == length - first + 1 < length
    torch.testing.assert_close(loss, same_loss)
    torch.testing.assert_close(gradient, same_gradient)
    assert gradient.abs().max() > 0


def test_the_loss_is_the_same_in_masked_and_hard():
    model = tiny()
    batch = batch_of(model, [9, 14, 7], [1, 2, 0], "left", answers=[3, 4, 2])
    losses = []
    with pruned(model), torch.no_grad():
        for mode in ("masked", "hard", "origin"):
            with prune_mode(model, mode):
                losses.append(model(**batch).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    assert abs(losses[0] - losses[2]) > 1e-3


@torch.no_grad()
def test_a_caption_that_is_supervised_right_after_the_image():
    """Its first token is predicted from a vision token, which therefore stays."""
    model = tiny()
    batch = batch_of(model, [5, 9], [1, 1], answers=[3, 7])
    randomise_pruners(attach_pruners(model, settings()), bias=-0.5)
    losses = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    last = [[15 in kept[row] for row in (0, 1)] for kept in last_report(model).kept.values()]
    assert last == [[True, True]] * 3


def test_supervised_placeholders_are_refused_in_hard_mode():
    model = tiny()
    batch = batch_of(model, [9], [1])
    batch["labels"] = batch["input_ids"].clone()
    with pruned(model), pytest.raises(ValueError, match="labels supervise image placeholders"):
        model(**batch)


def test_answers_are_no_part_of_the_question():
    model = tiny()
    batch = batch_of(model, [12], [1], answers=[4])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, -4:] = 5
    kept = []
    with pruned(model), torch.no_grad():
        for inputs in (batch, other):
            model(**inputs)
            kept.append(last_report(model).kept)
    assert all(torch.equal(kept[0][layer][0], kept[1][layer][0]) for layer in kept[0])


@torch.no_grad()
def test_hidden_states_have_the_rows_that_entered_each_layer():
    model = tiny(attention="eager")
    batch = batch_of(model, [9, 12], [1, 1])
    length = batch["input_ids"].shape[1]  # the shorter sample is padded by 3, and padding stays
    with pruned(model, selection="topk", layer_shares=(1, 0.6, 0.3)):
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        report = last_report(model)
    rows = [length if layer == 0 else int((report.tokens_per_layer[:, layer] + 12).max()) for layer in range(6)]
    assert rows[0] > rows[1] > rows[3] > rows[4]
    assert [state.shape for state in output.hidden_states[:-1]] == [(2, s, 32) for s in [length, *rows[:-1]]]
    assert output.hidden_states[-1].shape == (2, length, 32) and output.logits.shape == (2, length, 64)
    assert [weights.shape for weights in output.attentions] == [(2, 4, s, s) for s in rows]
    dropped = torch.ones(16, dtype=torch.bool).index_fill(0, report.kept[4][1], False).nonzero().flatten() + 2
    assert len(dropped) and not output.hidden_states[-1][1, dropped].any() and not output.logits[1, dropped].any()


def test_kv_cache_shrinks_with_the_tokens():
    model = tiny()
    batch = batch_of(model, [9], [1])
    with torch.no_grad(), pruned(model):
        cache = model(**batch, use_cache=True).past_key_values
        tokens = last_report(model).tokens_per_layer[0]
    text = batch["input_ids"].shape[1] - 16
    assert [cache.get_seq_length(layer) for layer in range(6)] == [text + int(count) for count in tokens]


# ---- devices


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_layers_spread_and_offloaded_by_accelerate(tmp_path, residual):
    from accelerate import dispatch_model

    model = tiny()
    batch = batch_of(model, [9, 12], [1, 2])
    with pruned(model, use_attn_residual=residual):
        expected = model(**batch).logits
        answer = model.generate(**batch, max_new_tokens=8, do_sample=False)
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    parts = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(6))]
    device_map |= {f"model.language_model.{part}": "cpu" for part in parts}
    for layer in (3, 4, 5):  # weights on the meta device until their layer runs
        device_map[f"model.language_model.layers.{layer}"] = "disk"
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    assert model.model.language_model.layers[4].input_layernorm.weight.device.type == "meta"
    dispatched = model.model.language_model.layers[4].forward
    with pruned(model, use_attn_residual=residual) as handle:
        assert {p.device.type for p in handle.pruners.parameters()} == {"cpu"}
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=0)
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), answer)
    assert model.model.language_model.layers[4].forward is dispatched


def test_rotary_tables_of_another_device_than_the_hidden_states_are_moved():
    hidden, table = torch.zeros(1, device="meta"), torch.zeros(1)
    call = compat.on_device({"hidden_states": hidden, "position_embeddings": (table, table)}, hidden.device)
    assert {value.device.type for value in (call["hidden_states"], *call["position_embeddings"])} == {"meta"}


@pytest.mark.parametrize("mode", ["masked", "hard"])
@torch.no_grad()
def test_a_record_follows_the_layers_to_another_device(mode):
    model = tiny()
    with pruned(model, mode) as handle:
        model(**batch_of(model, [9, 12], [1, 2]))
        record = handle.state.record
        record.move(torch.device("meta"))
        assert {value.device.type for value in _tensors(record)} == {"meta"}


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in _tensors(item)] if not isinstance(value, (str, int, type(None))) else []


# ---- what is refused


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_a_static_cache_is_refused(mode):
    model = tiny()
    with pruned(model, mode), pytest.raises(ValueError, match="static cache|fixed length"):
        model.generate(**batch_of(model, [9], [1]), max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("mode", ["masked", "hard"])
def test_assisted_decoding_is_refused(mode):
    model = tiny()
    batch = batch_of(model, [9], [1])
    batch["input_ids"][0, -6:] = torch.tensor([7, 8, 7, 8, 7, 8])  # looked up, proposed, and rejected
    with pruned(model, mode), pytest.raises(ValueError, match="cropped as assisted decoding does"):
        model.generate(**batch, max_new_tokens=12, prompt_lookup_num_tokens=3, do_sample=False)


@pytest.mark.parametrize("mode", ["masked", "hard"])
@pytest.mark.parametrize("size", [5, 18])  # the second piece has an image, or text alone
def test_a_prompt_in_pieces_is_refused(size, mode):
    model, how = tiny(), {"max_new_tokens": 4, "do_sample": False}
    batch, text = batch_of(model, [9], [1]), batch_of(model, [20], [0])
    stock = [model.generate(**given, **how) for given in (batch, text)]
    with pruned(model, mode):
        with pytest.raises(ValueError, match=f"prefill_chunk_size {size} cuts the prompt of 25 positions"):
            model.generate(**batch, **how, prefill_chunk_size=size)
        whole = model.generate(**batch, **how)
        assert torch.equal(model.generate(**batch, **how, prefill_chunk_size=25), whole)
        assert torch.equal(model.generate(**text, **how, prefill_chunk_size=size), stock[1])
        with prune_mode(model, "origin"):
            assert torch.equal(model.generate(**batch, **how, prefill_chunk_size=size), stock[0])


def test_inputs_embeds_are_refused():
    model = tiny()
    with pruned(model), pytest.raises(ValueError, match="inputs_embeds do not say"):
        model(inputs_embeds=torch.randn(1, 5, 32))


@pytest.mark.parametrize("kind", ["llava", "next", "onevision"])
@torch.no_grad()
def test_the_inner_model_by_itself_is_refused_with_an_image(kind):
    model = tiny(kind)
    inputs, text = batch_of(model, [9], [1]), torch.tensor([[3, 4, 5]])
    stock = [model.model(**given).last_hidden_state for given in (inputs, {"input_ids": text})]
    with pruned(model), pytest.raises(ValueError, match=f"call the {type(model).__name__} around it"):
        model(**inputs)
        model.model(**inputs)
    with pruned(model):
        assert torch.equal(model.model(text).last_hidden_state, stock[1])
        with prune_mode(model, "origin"):
            assert torch.equal(model.model(**inputs).last_hidden_state, stock[0])


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match=r"sliding window attention \(window 8\)"):
        attach_pruners(tiny("next-mistral", sliding_window=8), settings())


def test_the_token_merger_is_refused_at_any_resolution():
    model = tiny("next")
    with pytest.raises(ValueError, match="needs a LLaVA model with a fixed number of vision tokens"):
        attach_pruners(model, settings(enable_token_merger=True, merger_tokens=4))
    assert "forward" not in model.__dict__


def test_other_vision_language_models_are_refused():
    from tiny_hf import text_config
    from transformers import CLIPVisionConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    tower = CLIPVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    other = VipLlavaForConditionalGeneration(VipLlavaConfig(vision_config=tower, text_config=text_config()))
    with pytest.raises(ValueError, match="VipLlavaForConditionalGeneration .* is not supported"):
        attach_pruners(other, settings())


def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="attention backend 'flex_attention' is not supported"):
        attach_pruners(tiny(attention="flex_attention"), settings())


@pytest.mark.parametrize("mode", ["masked", "hard"])
@torch.no_grad()
def test_a_backend_that_is_set_later_is_followed_or_refused(mode):
    model, how = tiny(), {"max_new_tokens": 6, "do_sample": False}
    batch = batch_of(model, [9, 14], [1, 2])
    with pruned(model, mode) as handle:
        answer = model.generate(**batch, **how)
        model.set_attn_implementation("eager")
        assert torch.equal(model.generate(**batch, **how), answer)
        assert all(run.eager for run in handle.layer_forwards.values())
        output = model(**batch, use_cache=True)
        model.set_attn_implementation("flex_attention")
        new = torch.ones(2, 1).long()
        step = {"input_ids": new, "attention_mask": torch.cat([batch["attention_mask"], new], 1)}
        for call in (step | {"past_key_values": output.past_key_values}, batch):
            with pytest.raises(ValueError, match="attention backend 'flex_attention' is not supported"):
                model(**call)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model.generate(**batch, **how), answer)


def test_reentrant_checkpointing_is_refused_in_training():
    model = tiny()
    batch = batch_of(model, [9], [1], answers=[3])
    with pruned(model, "soft") as handle:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(ValueError, match="reentrant"):
            model(**batch)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch).loss.backward()
        left = {layer: int(kept.sum()) for layer, kept in handle.state.record.kept.items()}
        for name, parameter in handle.pruners.named_parameters():
            _, layer, *part = name.split(".")
            before = min((count for pruned_at, count in left.items() if pruned_at < int(layer)), default=None)
            # among one token there is nothing to choose
            chooses = part[0] in ("neighbours", "looking") and part[1] in ("to_query", "to_key") and before == 1
            assert parameter.grad is not None and (chooses or parameter.grad.abs().sum() > 0), name


# ---- pipelines


@torch.no_grad()
def test_pipeline(tmp_path):
    from reference import FOLDER, pictures
    from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

    from llava_prune.convert import convert
    from llava_prune.testbed.install import install_base

    convert(install_base(tmp_path), tmp_path / "hf")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    run = pipeline("image-text-to-text", model=model, processor=AutoProcessor.from_pretrained(tmp_path / "hf"))
    question = "What color is the shape in the top left?"
    content = [{"type": "image", "image": pictures()[0]}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    with load_pruners(model, FOLDER / "pruners"):
        answer = run(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)
        assert last_report(model).average_tokens[0] < 144
    assert isinstance(answer[0]["generated_text"], str) and answer[0]["generated_text"]
