"""Which positions are vision, question and text, found without a fork of LLaVA."""

import torch
from tiny import IMAGE_TOKEN, batch_of, tiny_llava

from llava_prune import PruneConfig, attach_pruners
from llava_prune.turns import supervise_one_turn

CONFIG = PruneConfig(pruning_layers=(2,), target_token_num=10, pruner_dim=16, pruner_heads=4)


def announced(model, inputs):
    """Layout, and what LLaVA's preparation returned."""
    handle = attach_pruners(model, CONFIG)
    order = ("input_ids", "attention_mask", "labels", "images")
    ids, mask, labels, images = (inputs.get(name) for name in order)
    prepared = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, labels, images)
    layout = handle.state.announced
    handle.remove()
    return layout, prepared


def test_prepared_inputs_are_those_of_the_stock_model(tower_folder):
    for side in ("right", "left"):
        model = tiny_llava(tower_folder, padding_side=side)
        inputs = batch_of([9, 14, 7, 11], [1, 0, 2, 1], side, answers=[2, 3, 2, 4])
        order = ("input_ids", "attention_mask", "labels", "images")
        ids, mask, labels, images = (inputs[name] for name in order)
        stock = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, labels, images)
        _, ours = announced(model, inputs)
        for a, b in zip(stock, ours, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_vision_text_and_question_of_a_batch(llava):
    inputs = batch_of([9, 14, 7, 11], [1, 0, 2, 1], answers=[2, 3, 2, 4])
    layout, (_, _, mask, _, embeds, labels) = announced(llava, inputs)
    assert layout.vision_counts.tolist() == [16, 0, 32, 16]
    assert layout.text.sum(-1).tolist() == [9, 14, 7, 11]
    assert torch.equal(layout.valid, mask.bool())
    # batch_of puts two text tokens before the first image
    assert layout.question.sum(-1).tolist() == [9 - 2 - 2, 0, 7 - 2 - 2, 11 - 2 - 4]
    assert not (layout.question & (labels != -100)).any()
    # a vision position holds an image feature, every other valid one an embedding of the vocabulary
    table = llava.get_model().embed_tokens.weight
    is_word = (embeds[:, :, None] == table[None, None]).all(-1).any(-1)
    assert torch.equal(is_word & layout.valid, layout.text)


def test_truncation_is_followed(llava):
    llava.config.tokenizer_model_max_length = 20
    layout, (*_, embeds, _) = announced(llava, batch_of([9, 14], [1, 1], answers=[2, 2]))
    assert embeds.shape[1] == 20 and layout.vision_counts.tolist() == [16, 16]
    assert layout.text.sum(-1).tolist() == [4, 4]


def multi_turn():
    """One image, three turns: prompt [3, image, 4, 5], answers [6, 2], [8, 2], [10, 2] after questions 7 and 9."""
    ids = torch.tensor([[3, IMAGE_TOKEN, 4, 5, 6, 2, 7, 8, 2, 9, 10, 2]])
    labels = torch.tensor([[-100, -100, -100, -100, 6, 2, -100, 8, 2, -100, 10, 2]])
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def test_one_turn_is_supervised_and_later_ones_are_cut():
    for draw, answer, length in ((0.0, [6, 2], 6), (0.4, [8, 2], 9), (0.99, [10, 2], 12)):
        one = supervise_one_turn(multi_turn(), torch.tensor([draw]))
        assert one["labels"][one["labels"] != -100].tolist() == answer
        assert one["attention_mask"].sum() == length and one["attention_mask"][0, :length].all()


def test_the_question_never_holds_an_answer_token(llava):
    pixels = torch.randn(1, 3, 32, 32)
    for draw, question in ((0.0, [4, 5]), (0.4, [4, 5, 6, 2, 7]), (0.99, [4, 5, 6, 2, 7, 8, 2, 9])):
        one = supervise_one_turn(multi_turn(), torch.tensor([draw]))
        layout, (*_, embeds, labels) = announced(llava, {**one, "images": pixels})
        expected = llava.get_model().embed_tokens(torch.tensor(question))
        assert torch.equal(embeds[0][layout.question[0]], expected)
        assert not (layout.question & (labels != -100)).any()


def test_turns_before_the_last_image_are_not_drawn():
    """Cutting an image would hand its features to the next sample."""
    ids = torch.tensor([[3, IMAGE_TOKEN, 4, 6, 2, 7, IMAGE_TOKEN, 8, 9, 2]])
    labels = torch.tensor([[-100, -100, -100, 6, 2, -100, -100, -100, 9, 2]])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    for draw in (0.0, 0.5, 0.99):
        one = supervise_one_turn(inputs, torch.tensor([draw]))
        assert one["labels"][one["labels"] != -100].tolist() == [9, 2] and one["attention_mask"].all()


def test_a_sample_without_answer_or_image_passes_unchanged():
    ids = torch.tensor([[3, 4, 5], [3, 4, 5]])
    labels = torch.tensor([[-100, -100, -100], [-100, 4, 5]])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    one = supervise_one_turn(inputs, torch.tensor([0.5, 0.5]))
    assert torch.equal(one["labels"], labels) and one["attention_mask"].all()
