"""Every probe of a host library, each with the reason it exists. Signatures are probed, versions are not compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

DECODER_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


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


def attention_backend(decoder: nn.Module) -> str:
    """`eager`, `sdpa` or `flash_attention_2`."""
    return decoder.config._attn_implementation


def bind_arguments(function: Callable) -> Callable[[tuple, dict], dict[str, Any]]:
    """A function that names positional arguments; 4.37 calls layers positionally under gradient checkpointing."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs}


def cache_of(call: dict[str, Any]) -> Any:
    """The key-value cache argument, whose name lost nothing but an s on the way to 5.x."""
    return call.get("past_key_values", call.get("past_key_value"))


def cache_length(cache: Any, layer: int) -> int:
    """Cached positions of one layer; 4.37's generate passes tuples to the decoder, `Cache` objects to layers."""
    if cache is None:
        return 0
    if isinstance(cache, tuple):
        return cache[layer][0].shape[-2]
    return int(cache.get_seq_length(layer))


def with_hidden_states(output: Tensor | tuple, hidden_states: Tensor) -> Tensor | tuple:
    """A layer's output with other hidden states; 4.37 returns tuples, 5.x a tensor."""
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def hidden_states_of(output: Tensor | tuple) -> Tensor:
    """Hidden states in a layer's output."""
    return output[0] if isinstance(output, tuple) else output


def vision_tokens_per_image(model: nn.Module) -> int | None:
    """Vision tokens of one image before any pruning, or None where it depends on the image (anyres)."""
    llava = find_llava(model)
    if llava is None or getattr(llava.config, "image_aspect_ratio", None) == "anyres":
        return None
    tower = llava.get_vision_tower()
    try:
        return None if tower is None else int(tower.num_patches)
    except AttributeError:  # a tower of another project
        return None


def rotary_tables(attention: nn.Module, call: dict[str, Any], like: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (1 or B, T, head_dim), of the positions of a layer call's hidden states."""
    if call.get("position_embeddings") is not None:
        return call["position_embeddings"]
    cos, sin = attention.rotary_emb(like, seq_len=length)
    return cos[call["position_ids"]], sin[call["position_ids"]]


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, S, d) by (B, S, d) tables, Llama's half-split layout."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return states * cos[:, None] + rotated * sin[:, None]


def rotary_module(layer: nn.Module) -> nn.Module | None:
    """The layer's own rotary table, where there is one (4.37); its length follows the layer's own, short cache."""
    return getattr(layer.self_attn, "rotary_emb", None)


def leave_accumulation_to_the_engine(engine: Any) -> None:
    """accelerate 0.27 enters the engine's `no_sync` between accumulated micro-batches, which ZeRO-2 and 3 refuse.

    The engine counts micro-batches itself; newer accelerate no longer asks.
    """
    engine.no_sync = nullcontext


def exclude_frozen_parameters(engine: Any) -> None:
    """Make a DeepSpeed engine write and expect trainable parameters only.

    The Trainers ask for this for PEFT models alone (and 4.37 then fails to load). A non-strict load drops nothing
    unseen: trainable weights come back from the optimizer's fp32 partitions, whose shapes are checked.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return save(*args, **{**kwargs, "exclude_frozen_parameters": True})

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "load_module_strict": False})

    # the Trainer asks the method's signature which arguments it takes
    save_checkpoint.__signature__ = inspect.signature(save)
    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def loading_numpy_random_state() -> AbstractContextManager:
    """Let `torch.load` read a Trainer's RNG file: torch >= 2.6 loads weights only, 4.37 lists no numpy types."""
    if not hasattr(torch.serialization, "safe_globals"):
        return nullcontext()
    import numpy as np

    reconstruct = np.random.get_state()[1].__reduce__()[0]  # numpy.core or numpy._core, by version
    types = [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    return torch.serialization.safe_globals(types)


@contextmanager
def as_model_with_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block a quantised base passes as what it is here, a frozen model with trainable adapters.

    The Trainers look for PEFT's own mark and refuse any other adapter on a 4- or 8-bit model; `PreTrainedModel.to`
    refuses to be called on one, and DeepSpeed calls it, with the device it is on already. Under PEFT neither shows,
    since PEFT's wrapper is the model that they see.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    names = ("_hf_peft_config_loaded", "to", "half", "float")
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    model._hf_peft_config_loaded = True
    for name in names[1:]:
        setattr(model, name, MethodType(getattr(nn.Module, name), model))
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
