"""Models of known shapes with random weights, made where they will run: speed and memory need no download."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaVA-1.5: Llama decoder, CLIP tower, projector of two layers. Defaults: what 7B and 13B share."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32000
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image: int = 336
    patch: int = 14

    @property
    def text(self) -> dict[str, Any]:
        """Fields of the decoder's config."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }

    @property
    def vision(self) -> dict[str, Any]:
        """Fields of the tower's config."""
        return {
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_intermediate,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "image_size": self.image,
            "patch_size": self.patch,
        }

    @property
    def picture(self) -> dict[str, Any]:
        """Fields of the image processor's config."""
        return {"size": {"shortest_edge": self.image}, "crop_size": {"height": self.image, "width": self.image}}


SHAPES = {
    "llava-1.5-7b": ModelShape(hidden=4096, intermediate=11008, layers=32, heads=32),
    "llava-1.5-13b": ModelShape(hidden=5120, intermediate=13824, layers=40, heads=40),
    # for tests and for trying a command out: it measures nothing that matters
    "tiny": ModelShape(
        hidden=64,
        intermediate=128,
        layers=32,
        heads=4,
        vocabulary=512,
        vision_hidden=32,
        vision_intermediate=64,
        vision_layers=2,
        vision_heads=2,
        image=336,
    ),
}


def build_llava(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, attention: str
) -> tuple[nn.Module, None, Any]:
    """A haotian-liu LLaVA of this shape.

    Returns:
        The model in eval mode, no tokenizer, the image processor.
    """
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    processor = CLIPImageProcessor(**shape.picture)
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        # LLaVA reads the tower's config from a folder even where it is to load no weights
        tower_config = CLIPVisionConfig(**shape.vision)
        tower_config.save_pretrained(Path(folder))
        config = LlavaConfig(
            vocab_size=shape.vocabulary,
            mm_vision_tower=folder,
            mm_hidden_size=shape.vision_hidden,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            mm_patch_merge_type="flat",
            image_aspect_ratio="pad",
            **shape.text,
        )
        model = LlavaLlamaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation=attention)
        tower = model.get_vision_tower()
        tower.vision_tower = CLIPVisionModel._from_config(tower_config, torch_dtype=dtype)
        tower.image_processor, tower.is_loaded = processor, True
    return model.eval(), None, processor


def build_hf(shape: ModelShape, device: torch.device, dtype: torch.dtype, attention: str) -> tuple[nn.Module, Any]:
    """A Hugging Face LLaVA of this shape, with one more token than LLaVA's vocabulary, for the image.

    Returns:
        The model in eval mode and a processor that knows no words, only the image placeholder.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision),
        text_config=LlamaConfig(vocab_size=shape.vocabulary + 1, **shape.text),
        image_token_id=shape.vocabulary,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(shape.image // shape.patch) ** 2,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    return model.eval(), _wordless_processor(shape)


def _wordless_processor(shape: ModelShape) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    from ..compat import llava_image_processor_class
    from .samples import IMAGE_MARK

    words = Tokenizer(WordLevel({"<unk>": 0, IMAGE_MARK: shape.vocabulary}, unk_token="<unk>"))
    words.add_special_tokens([IMAGE_MARK])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_MARK},
    )
    return LlavaProcessor(
        image_processor=llava_image_processor_class()(**shape.picture, do_pad=True),
        tokenizer=tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
        image_token=IMAGE_MARK,
    )
