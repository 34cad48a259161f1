"""Tiny random models from configs: real LLaVA classes, no download."""

import torch

IMAGE_TOKEN = -200


def tiny_llava(
    folder,
    layers=6,
    hidden=32,
    heads=4,
    kv_heads=None,
    image=32,
    patch=8,
    attention="sdpa",
    merge_type="flat",
    padding_side="right",
    seed=0,
):
    """A random `LlavaLlamaForCausalLM` with 16 vision tokens and a vocabulary of 64, in eval mode, fp32."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    tower = folder / "tower"
    if not tower.exists():
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image,
            patch_size=patch,
        )
        CLIPVisionModel(vision).save_pretrained(tower)
        CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image}).save_pretrained(
            tower
        )
    torch.manual_seed(seed)  # the same weights whether or not the tower was made just now
    config = LlavaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=512,
        mm_vision_tower=str(tower),
        mm_hidden_size=24,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-1,
        mm_vision_select_feature="patch",
        mm_patch_merge_type=merge_type,
        tokenizer_padding_side=padding_side,
        initializer_range=0.2,
        attn_implementation=attention,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    return model.eval()


def randomise_pruners(handle, seed=0, bias=0.3, scale=1.0):
    """Give fresh pruners decisions of their own, so that each keeps some tokens and drops others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pruner in handle.pruners.layers.values():
            weight = pruner.joint_logits.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            pruner.joint_logits.bias.copy_(torch.tensor([0.0, bias]))


def batch_of(lengths, images, padding_side="right", answers=None, seed=0, image=32, vocab=64):
    """input_ids, attention_mask, labels and images of a batch.

    Args:
        lengths: text tokens of each sample.
        images: images of each sample; each is placed near the front, with a text token between two.
        answers: supervised tokens at the end of each sample, or None for no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for i, (length, count) in enumerate(zip(lengths, images, strict=True)):
        text = torch.randint(3, vocab, (length,), generator=generator)
        pieces = [text[:2]]
        for j in range(count):
            pieces += [torch.tensor([IMAGE_TOKEN]), text[2 + j : 3 + j]]
        pieces.append(text[2 + count :])
        row = torch.cat(pieces)
        label = torch.full_like(row, -100)
        if answers is not None:
            label[-answers[i] :] = row[-answers[i] :]
        rows.append(row)
        labels.append(label)
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    target = torch.full_like(ids, -100)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        place = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place], target[i, place] = row, True, label
    # LLaVA takes one image for a sample without any
    pixels = torch.randn(sum(max(1, count) for count in images), 3, image, image, generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask, "images": pixels}
    if answers is not None:
        batch["labels"] = target
    return batch
