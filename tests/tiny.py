"""Tiny random models from configs: real LLaVA classes, no download."""

import torch
from law import randomise_pruners  # noqa: F401 (tests take it from here)

IMAGE_TOKEN = -200
PINPOINTS = [[64, 32], [32, 64], [64, 64]]  # of anyres, for images of 32 pixels a side
SIZES = [(60, 20), (40, 64), (40, 40)]  # width and height of anyres pictures, in turn


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
    anyres=False,
    padding_side="right",
    decoder="llama",
    seed=0,
):
    """A random LLaVA with a Llama or Mistral decoder and a vocabulary of 64, in eval mode, fp32.

    An image has 16 vision tokens; with anyres 16 a crop, less what `spatial_unpad` takes off.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    if decoder == "mistral":
        from llava.model.language_model.llava_mistral import LlavaMistralConfig as LlavaConfig
        from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM as LlavaForCausalLM
    else:
        from llava.model.language_model.llava_llama import LlavaConfig
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM as LlavaForCausalLM

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
        image_aspect_ratio="anyres" if anyres else "square",
        image_grid_pinpoints=PINPOINTS,
        tokenizer_padding_side=padding_side,
        initializer_range=0.2,
        attn_implementation=attention,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"sliding_window": None} if decoder == "mistral" else {}),
    )
    model = LlavaForCausalLM(config)
    model.get_vision_tower().load_model()
    if "unpad" in merge_type:  # LLaVA leaves it uninitialised for a checkpoint to fill
        torch.nn.init.normal_(model.get_model().image_newline)
    return model.eval()


def batch_of(lengths, images, padding_side="right", answers=None, seed=0, image=32, vocab=64, anyres=False):
    """input_ids, attention_mask, labels and images of a batch.

    Args:
        lengths: text tokens of each sample.
        images: images of each sample; each is placed near the front, with a text token between two.
        padding_side: `left`, `right`, or `none` for no attention_mask and more text where input_ids would be shorter.
        answers: supervised tokens at the end of each sample, or None for no labels.
        anyres: images as lists of crops, with their image_sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    if padding_side == "none":
        width = max(length + count for length, count in zip(lengths, images, strict=True))
        lengths = [width - count for count in images]
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
    given = sum(max(1, count) for count in images)
    batch = {"input_ids": ids}
    if padding_side != "none":
        batch["attention_mask"] = mask
    if anyres:
        sizes = [SIZES[i % 3] for i in range(given)]
        batch["images"] = [torch.randn(_crops(size, image), 3, image, image, generator=generator) for size in sizes]
        batch["image_sizes"] = sizes
    else:
        batch["images"] = torch.randn(given, 3, image, image, generator=generator)
    if answers is not None:
        batch["labels"] = target
    return batch


def _crops(size, image):
    """Crops of an anyres picture: the whole one and its tiles."""
    from llava.mm_utils import get_anyres_image_grid_shape

    columns, rows = get_anyres_image_grid_shape(size, PINPOINTS, image)
    return 1 + columns * rows


def generate(model, inputs, arguments):
    """LLaVA's `generate` on a batch."""
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "labels")}
    return model.generate(inputs["input_ids"], **rest, **arguments)
