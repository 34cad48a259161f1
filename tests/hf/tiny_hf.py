"""Tiny random Hugging Face models and batches: real transformers classes, no download."""

import torch
from law import randomise_pruners  # noqa: F401 (tests take it from here)
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE_TOKEN = 63
IMAGE, PATCH = 32, 8
KINDS = ("llava", "llava-mistral", "next", "next-mistral", "onevision")


def text_config(kind="llama", layers=6, hidden=32, heads=4, **extra):
    """A random decoder's config with a vocabulary of 64."""
    shape = {
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }
    if kind == "llama":
        return LlamaConfig(**{"num_key_value_heads": heads, **shape})
    if kind == "mistral":
        return MistralConfig(**{"num_key_value_heads": heads // 2, "sliding_window": None, **shape})
    return Qwen2Config(**{"num_key_value_heads": heads // 2, "use_sliding_window": False, **shape})


def tiny(kind="llava", attention="sdpa", layers=6, seed=0, **text):
    """A random model in eval mode, fp32: `llava` and `dino` have 16 vision tokens an image, of others it depends."""
    torch.manual_seed(seed)
    tower = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    pinpoints = [[2 * IMAGE, IMAGE], [IMAGE, 2 * IMAGE], [2 * IMAGE, 2 * IMAGE]]
    shared = {"image_token_id": IMAGE_TOKEN, "vision_feature_layer": -1, "tie_word_embeddings": False}
    family, _, decoder = kind.partition("-")
    if family in ("llava", "dino"):
        dino = {name: value for name, value in tower.items() if name != "intermediate_size"}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**tower) if family == "llava" else Dinov2Config(**dino, mlp_ratio=2),
            text_config=text_config(decoder or "llama", layers, **text),
            **shared,
        )
        model = LlavaForConditionalGeneration
    elif family == "next":
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**tower),
            text_config=text_config(decoder or "llama", layers, **text),
            image_grid_pinpoints=pinpoints,
            **shared,
        )
        model = LlavaNextForConditionalGeneration
    else:
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**tower, vision_use_head=False),
            text_config=text_config("qwen2", layers, **text),
            image_grid_pinpoints=pinpoints,
            video_token_id=62,
            **shared,
        )
        model = LlavaOnevisionForConditionalGeneration
    config._attn_implementation = attention
    built = model._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # the stock initialisation is too small for pruning to change an argmax
        for parameter in built.model.language_model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
        built.lm_head.weight.normal_(0, 0.2)
    built.generation_config.pad_token_id = 0
    return built


def batch_of(model, lengths, images, padding_side="left", answers=None, seed=0):
    """input_ids, attention_mask (and labels) of a batch, with pixel_values as the model's processor would make them.

    Args:
        lengths: text tokens of each sample.
        images: images of each sample, near the front, with a text token between two.
        padding_side: `left`, `right`, or `none` for no attention_mask and more text where samples would be shorter.
        answers: supervised tokens at the end of each sample, or None for no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    anyres = model.config.model_type != "llava"
    sizes, crops, vision, rows, labels = [], [], [], [], []
    for count in images:
        vision.append([])
        for _ in range(count):
            sizes.append([(20, 60), (64, 40), (40, 40)][len(sizes) % 3])
            crops.append(torch.randn(_crops(model, sizes[-1]), 3, IMAGE, IMAGE, generator=generator))
            vision[-1].append(_tokens(model, sizes[-1], crops[-1]))
    if padding_side == "none":
        total = max(length + sum(tokens) for length, tokens in zip(lengths, vision, strict=True))
        lengths = [total - sum(tokens) for tokens in vision]
    for i, (length, images_tokens) in enumerate(zip(lengths, vision, strict=True)):
        text = torch.randint(3, 62, (length,), generator=generator)
        pieces = [text[:2]]
        for j, tokens in enumerate(images_tokens):
            pieces += [torch.full((tokens,), IMAGE_TOKEN), text[2 + j : 3 + j]]
        pieces.append(text[2 + len(images_tokens) :])
        row = torch.cat(pieces)
        label = torch.full_like(row, -100)
        if answers is not None:
            label[-answers[i] :] = row[-answers[i] :]
        rows.append(row)
        labels.append(label)
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    target = torch.full_like(ids, -100)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        place = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place], target[i, place] = row, 1, label
    batch = {"input_ids": ids}
    if padding_side != "none":
        batch["attention_mask"] = mask
    if crops and anyres:
        most = max(len(crop) for crop in crops)
        padded = [torch.cat([crop, crop.new_zeros(most - len(crop), *crop.shape[1:])]) for crop in crops]
        batch |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
    elif crops:
        batch["pixel_values"] = torch.cat(crops)
    if answers is not None:
        batch["labels"] = target
    return batch


def _crops(model, size):
    if model.config.model_type == "llava":
        return 1
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(size, model.config.image_grid_pinpoints, IMAGE)


@torch.no_grad()
def _tokens(model, size, crops):
    """Vision tokens of one image, counted by the model itself."""
    if model.config.model_type == "llava":
        return (IMAGE // PATCH) ** 2
    features = model.get_image_features(crops[None], image_sizes=torch.tensor([size]), return_dict=True)
    return sum(len(feature) for feature in features.pooler_output)


def generate(model, inputs, arguments):
    """The model's `generate` on a batch."""
    return model.generate(**inputs, **arguments)
