"""Every probe of a host library for its models and layers, each with the reason it exists.

Signatures are probed, versions are not compared. `compat_cache` and `compat_training` do the same for theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DECODER_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
HF_MODELS = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
IMAGE_TOKEN_INDEX = -200  # LLaVA's placeholder of one image
BACKENDS = ("eager", "sdpa", "flash_attention_2")


def find_decoder(model: nn.Module) -> nn.Module:
    """The module whose `layers` are Llama-style decoder layers, also inside PEFT and trainer wrappers.

    Raises:
        ValueError: there is none, or its layers do not take the arguments that pruning changes.
    """
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and type(layers[0]).__name__ in DECODER_LAYERS:
            parameters = inspect.signature(type(layers[0]).forward).parameters
            missing = {"hidden_states", "attention_mask", "position_ids"} - parameters.keys()
            if missing or not {"past_key_value", "past_key_values"} & parameters.keys():
                raise ValueError(
                    f"{type(layers[0]).__name__}.forward has no {sorted(missing) or 'past_key_value(s)'}: this "
                    "version of transformers is not supported; install transformers 4.37.2 (LLaVA) or 5.x"
                )
            return module
    raise ValueError(
        f"no Llama decoder in {type(model).__name__}: pass a LLaVA model whose language model has "
        f"{' or '.join(DECODER_LAYERS)} layers"
    )


def find_llava(model: nn.Module) -> nn.Module | None:
    """The haotian-liu LLaVA model inside `model`, or None. PEFT forwards attributes, so the type is asked."""
    for module in model.modules():
        if hasattr(type(module), "prepare_inputs_labels_for_multimodal"):
            return module
    return None


def find_hf_llava(model: nn.Module) -> nn.Module | None:
    """The Hugging Face LLaVA model inside `model`, or None.

    Raises:
        ValueError: a vision language model that nothing would announce the vision tokens of: of another family, or of
            a transformers version (4.x) in which `input_ids` holds one placeholder an image and not one a token.
    """
    vision = None
    for module in model.modules():
        if type(module).__name__ in HF_MODELS and hasattr(module.config, "image_token_id"):
            if module.config.vision_config.model_type == "pixtral":
                raise ValueError(
                    "Pixtral is not supported: it puts tokens between the rows of a picture, and each row would count "
                    "as an image"
                )
            return module
        if vision is None and hasattr(getattr(module, "config", None), "vision_config"):
            vision = module
    if vision is not None:
        raise ValueError(
            f"{type(vision).__name__} of this version of transformers is not supported: use a LLaVA model of the "
            f"haotian-liu code base, or {', '.join(HF_MODELS)} of transformers 5.x"
        )
    return None


def image_token(model: nn.Module) -> int:
    """The placeholder of images in `input_ids`: one an image for LLaVA, one a vision token for Hugging Face."""
    hf = None if find_llava(model) is not None else find_hf_llava(model)
    return IMAGE_TOKEN_INDEX if hf is None else hf.config.image_token_id


def backend_name(decoder: nn.Module) -> str:
    """The attention that a decoder is set to, supported or not."""
    return decoder.config._attn_implementation


def attention_backend(decoder: nn.Module) -> str:
    """`eager`, `sdpa` or `flash_attention_2`.

    Raises:
        ValueError: another backend, or a sliding window, which counts rows and not positions, so that removing rows
            would widen it.
    """
    backend, config = backend_name(decoder), decoder.config
    if backend not in BACKENDS:
        raise ValueError(
            f"attention backend {backend!r} is not supported: load the model with attn_implementation set to one of "
            f"{', '.join(BACKENDS)}"
        )
    if slides(config):
        raise ValueError(
            f"sliding window attention (window {config.sliding_window}) is not supported: where prompts stay shorter "
            "than the window set sliding_window (and use_sliding_window) of the text config to None before loading "
            "the model"
        )
    return backend


def slides(config: Any) -> bool:
    """Whether a decoder's attention has a sliding window."""
    kinds = getattr(config, "layer_types", None)  # 5.x; Mistral has the window alone
    window = getattr(config, "sliding_window", None)
    sliding = any(kind != "full_attention" for kind in kinds) if kinds else window is not None
    return sliding and getattr(config, "use_sliding_window", True)


def contrastive_search_name(model: nn.Module) -> str:
    """The method that LLaVA's `generate` does contrastive search by; it got an underscore in 4.39 or so."""
    return "contrastive_search" if hasattr(model, "contrastive_search") else "_contrastive_search"


def bind_arguments(function: Callable) -> Callable[[tuple, dict], dict[str, Any]]:
    """A function that names positional arguments; 4.37 calls layers positionally under gradient checkpointing."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs}


def execution_device(layer: nn.Module) -> torch.device:
    """Where a decoder layer computes; with device_map accelerate may hold its weights elsewhere until then."""
    for module in (layer, layer.input_layernorm):
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return layer.input_layernorm.weight.device


def on_device(call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A layer call's arguments on the layer's device, as accelerate's own hook, which runs later, would move them."""
    # rotary tables are made where the decoder's rotary module is, which may be where its last layers are
    tables = call.get("position_embeddings") or ()
    if all(value.device == device for value in (call["hidden_states"], *tables)):
        return call
    return {name: _moved(value, device) for name, value in call.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value):  # cos and sin
        return tuple(item.to(device) for item in value)
    return value


def with_hidden_states(output: Tensor | tuple, hidden_states: Tensor) -> Tensor | tuple:
    """A layer's output with other hidden states; 4.37 returns tuples, 5.x a tensor."""
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def layer_output(layer: nn.Module, hidden_states: Tensor) -> Tensor | tuple:
    """What a layer returns without a cache: a tuple in 4.37, which names the cache argument in the singular."""
    takes = inspect.signature(type(layer).forward).parameters
    return (hidden_states,) if "past_key_value" in takes else hidden_states


def hidden_states_of(output: Tensor | tuple) -> Tensor:
    """Hidden states in a layer's output."""
    return output[0] if isinstance(output, tuple) else output


def vision_tokens_per_image(model: nn.Module) -> int | None:
    """Vision tokens of one image before any pruning, or None where it depends on the image (anyres)."""
    llava = find_llava(model)
    if llava is None:
        return _vision_tokens_per_hf_image(model)
    if getattr(llava.config, "image_aspect_ratio", None) == "anyres":
        return None
    tower = llava.get_vision_tower()
    try:
        return None if tower is None else int(tower.num_patches)
    except AttributeError:  # a tower of another project
        return None


def _vision_tokens_per_hf_image(model: nn.Module) -> int | None:
    hf = find_hf_llava(model)
    if hf is None or hf.config.model_type != "llava":
        return None
    vision = hf.config.vision_config
    if not isinstance(getattr(vision, "image_size", None), int):
        return None
    dropped = hf.config.vision_feature_select_strategy == "default"
    return (vision.image_size // vision.patch_size) ** 2 + class_tokens(hf.model.vision_tower) - dropped


def class_tokens(tower: nn.Module) -> int:
    """1 if a vision transformer puts a class token before its patches (CLIP, DINOv2), else 0 (SigLIP)."""
    names = ("class_embedding", "cls_token")
    return int(any(hasattr(module, name) for module in tower.modules() for name in names))


def vision_modules(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The vision transformer, whose input is (images or crops, C, H, W), and the projector after it."""
    llava = find_llava(model)
    if llava is not None:
        return llava.get_vision_tower().vision_tower, llava.get_model().mm_projector
    inner = find_hf_llava(model).model
    return inner.vision_tower, inner.multi_modal_projector


def tower_tokens(model: nn.Module) -> int | None:
    """Features that the vision tower makes of one image or crop, None where that depends on it."""
    llava = find_llava(model)
    return _vision_tokens_per_hf_image(model) if llava is None else int(llava.get_vision_tower().num_patches)


def merged_width(model: nn.Module) -> int:
    """Width of the vision features that a token merger works on.

    Raises:
        ValueError: the model arranges the features of an image on a grid, which merged ones have not.
    """
    llava = find_llava(model)
    if llava is not None and str(getattr(llava.config, "mm_patch_merge_type", "flat")).startswith("spatial"):
        raise ValueError(
            "enable_token_merger leaves no grid for mm_patch_merge_type 'spatial': set enable_token_merger to false, "
            "or use a model with mm_patch_merge_type 'flat'"
        )
    if llava is not None:
        return llava.config.mm_hidden_size
    if _vision_tokens_per_hf_image(model) is None:
        raise ValueError(
            "enable_token_merger needs a LLaVA model with a fixed number of vision tokens an image (LLaVA-1.5): set "
            "enable_token_merger to false for models of any resolution"
        )
    layers = find_hf_llava(model).config.vision_feature_layer
    width = find_hf_llava(model).config.vision_config.hidden_size
    return width * (len(layers) if isinstance(layers, list | tuple) else 1)


def rotary_tables(attention: nn.Module, call: dict[str, Any], like: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (1 or B, T, head_dim), of the positions of a layer call's hidden states."""
    if call.get("position_embeddings") is not None:
        return call["position_embeddings"]
    cos, sin = attention.rotary_emb(like, seq_len=length)
    return cos[call["position_ids"]], sin[call["position_ids"]]


def position_tables(decoder: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (P, head_dim), of all positions that the decoder is made for; 4.37 has them in its layers."""
    length = decoder.config.max_position_embeddings
    rotary = rotary_module(decoder.layers[0])
    if rotary is not None:
        cos, sin = rotary(like, seq_len=length)
        return cos.to(like.dtype), sin.to(like.dtype)
    cos, sin = decoder.rotary_emb(like, torch.arange(length, device=like.device)[None])
    return cos[0], sin[0]


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, S, d) by (B, S, d) tables, Llama's half-split layout."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return states * cos[:, None] + rotated * sin[:, None]


def rotary_module(layer: nn.Module) -> nn.Module | None:
    """The layer's own rotary table, where there is one (4.37); its length follows the layer's own, short cache."""
    return getattr(layer.self_attn, "rotary_emb", None)


def feature_layer(model: nn.Module) -> nn.Module:
    """The layer of a CLIP or DINOv2 vision transformer whose output the projector gets.

    Raises:
        ValueError: the transformer has no class token, or the features are of several layers.
    """
    tower, _ = vision_modules(model)
    llava = find_llava(model)
    number = (
        find_hf_llava(model).config.vision_feature_layer if llava is None else llava.get_vision_tower().select_layer
    )
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module)]
    stacks = [layers for layers in stacks if any(hasattr(layers[0], name) for name in ("layer_norm1", "norm1"))]
    if not stacks or not class_tokens(tower):
        raise ValueError(f"{type(tower).__name__} is no CLIP or DINOv2 vision transformer with a class token")
    if not isinstance(number, int) or number == 0 or not -len(stacks[0]) <= number <= len(stacks[0]):
        raise ValueError(f"the vision features must be the output of one layer, not {number}")
    return stacks[0][number if number < 0 else number - 1]  # hidden_states[0] is the embedding


def queries_and_keys(layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Attention queries and keys of a CLIP or DINOv2 vision layer for its input (B, S, D): (B, heads, S, d) each.

    DINOv2's projections are in a module of their own, under other names, before transformers 5.20 or so.
    """
    if hasattr(layer, "layer_norm1"):
        norm, attention = layer.layer_norm1, layer.self_attn
    else:
        norm, attention = layer.norm1, getattr(layer.attention, "attention", layer.attention)
    projections = [getattr(attention, name, None) for name in ("q_proj", "k_proj")]
    if None in projections:
        projections = [attention.query, attention.key]
    heads = attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads
    normed = norm(hidden_states)
    query, key = (projection(normed).unflatten(-1, (heads, -1)).transpose(1, 2) for projection in projections)
    return query, key


def llava_image_processor_class() -> type:
    """LLaVA's image processor of 5.x; without torchvision its first name raises on use, the PIL one works."""
    import transformers

    try:
        import torchvision  # noqa: F401
    except ImportError:
        return transformers.LlavaImageProcessorPil
    return transformers.LlavaImageProcessor
