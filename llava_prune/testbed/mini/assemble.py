"""Parts put together to a `LlavaForConditionalGeneration` and its processor, in an ordinary checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .language import CHAT_TEMPLATE, IMAGE_TOKEN, load_smollm2, random_language_model
from .size import PATCH, MiniSize
from .vision import cached_vision_tower
from .wordings import TRAINED

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 wants them
MULTIPLE = 64  # rows of the embeddings, for the GPU's sake


def assemble(size: MiniSize) -> tuple[nn.Module, Any]:
    """The untrained model in fp32, its projector random, and its `LlavaProcessor`.

    Raises:
        OSError, ValueError, ImportError: a part can not be had, see `packages.fetch_file`.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language, tokenizer = load_smollm2() if size.real else random_language_model(_corpus())
    processor = _processor(size, tokenizer)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    tower = _vision_tower(size)
    text_config = language.config
    text_config.vocab_size = -(-len(tokenizer) // MULTIPLE) * MULTIPLE
    for name in ("quantization_config", "_name_or_path"):
        text_config.__dict__.pop(name, None)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_id=image_token,
            projector_hidden_act="gelu",
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=size.vision_tokens,
            tie_word_embeddings=True,
            llava_prune_base=size.name,
        )
    )
    model.model.vision_tower.load_state_dict(tower.state_dict())
    weights = language.model.state_dict()
    # the rows of <image> and of filler are never read; as outputs they are no likelier than <|endoftext|>
    rows = weights["embed_tokens.weight"]
    known = rows[: image_token if len(rows) > image_token else len(rows)]
    missing = text_config.vocab_size - len(known)
    weights["embed_tokens.weight"] = torch.cat([known, rows[:1].expand(missing, -1)])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = model.config.text_config.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = [image_token]
    return model.float(), processor


def save(model: nn.Module, processor: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a copy of `model` in `dtype` and the processor to `folder`, which exists."""
    weights = {name: value.detach().to("cpu", dtype) for name, value in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def _vision_tower(size: MiniSize) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    if not size.real:
        shape = {"hidden_size": 24, "num_hidden_layers": size.blocks, "num_attention_heads": 2, "mlp_ratio": 2}
        return Dinov2Model(Dinov2Config(**shape, image_size=size.pixels, patch_size=PATCH))
    return Dinov2Model.from_pretrained(cached_vision_tower(size.pixels, size.blocks), dtype=torch.float32)


def _processor(size: MiniSize, tokenizer: Any) -> Any:
    from transformers import LlavaProcessor

    from ...compat import llava_image_processor_class

    side = {"height": size.pixels, "width": size.pixels}
    images = llava_image_processor_class()(
        do_pad=True,
        size={"shortest_edge": size.pixels},
        crop_size=side,
        image_mean=list(MEAN),
        image_std=list(DEVIATION),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy "default" drops again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _corpus() -> list[str]:
    """What a small tokenizer should know."""
    from ..pictures import COLORS, SHAPES
    from ..words import WORDS

    text = [template.format("1", "2") for templates in TRAINED.values() for template in templates]
    return [*text, *(f"assistant\n{word} {word} user" for word in (*COLORS, *SHAPES, *WORDS, "yes", "no"))] * 20
