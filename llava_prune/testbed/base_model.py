"""The tiny LLaVA itself: LLaVA's own classes at toy sizes, and how its checkpoint folder is written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .tokens import train_tokenizer

PIXELS = 192
PATCH = 16
VISION_FOLDER = "vision_tower"


@dataclass(frozen=True)
class BaseSize:
    """Layers, widths and the side of a picture; the defaults are those of the shipped checkpoint."""

    vision_layers: int = 4
    vision_hidden: int = 128
    vision_mlp: int = 384
    layers: int = 8
    hidden: int = 128
    mlp: int = 320
    heads: int = 4
    pixels: int = PIXELS


def build_base(directory: Path, size: BaseSize):
    """Makes a randomly initialised `LlavaLlamaForCausalLM` and its tokenizer, and writes the tokenizer to `directory`.

    Args:
        directory: an existing, empty folder, which becomes the checkpoint's by `save_base`.
        size: layers and widths.

    Returns:
        The model in fp32, its vision tower loaded, and the tokenizer.
    """
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    tower = directory / VISION_FOLDER
    CLIPVisionModel(
        CLIPVisionConfig(
            image_size=size.pixels,
            patch_size=PATCH,
            num_hidden_layers=size.vision_layers,
            hidden_size=size.vision_hidden,
            intermediate_size=size.vision_mlp,
            num_attention_heads=size.heads,
        )
    ).save_pretrained(tower)
    crop = {"height": size.pixels, "width": size.pixels}
    CLIPImageProcessor(size={"shortest_edge": size.pixels}, crop_size=crop).save_pretrained(tower)
    tokenizer = train_tokenizer(directory)
    model = LlavaLlamaForCausalLM(
        LlavaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=2048,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            mm_vision_tower=str(tower.resolve()),
            mm_hidden_size=size.vision_hidden,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-1,
            mm_vision_select_feature="patch",
            mm_patch_merge_type="flat",
            mm_use_im_start_end=False,
            mm_use_im_patch_token=False,
            image_aspect_ratio="pad",
            tokenizer_model_max_length=tokenizer.model_max_length,
            use_mm_proj=True,
        )
    )
    model.get_vision_tower().load_model()
    return model, tokenizer


def save_base(model: nn.Module, directory: Path) -> None:
    """Writes `model` to `directory` in fp16, the vision tower in a folder of its own beneath.

    `config.json` names the tower by a relative path, which `install.install_base` makes absolute.
    """
    tower = model.get_vision_tower().vision_tower
    tower.config._name_or_path = ""
    tower.save_pretrained(directory / VISION_FOLDER, state_dict=_half(tower))
    path, model.config.mm_vision_tower = model.config.mm_vision_tower, VISION_FOLDER
    model.generation_config.pad_token_id = model.config.pad_token_id
    rest = {name: weight for name, weight in _half(model).items() if ".vision_tower." not in name}
    model.save_pretrained(directory, state_dict=rest)
    model.config.mm_vision_tower = path


def _half(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().to("cpu", torch.float16) for name, weight in module.state_dict().items()}
