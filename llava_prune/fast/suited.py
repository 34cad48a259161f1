"""Whether a decoder, or one call of it, can run in graphs; where not, the reason in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compat import slides

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOVING_ROTARY = ("dynamic", "longrope")  # tables that depend on the length


class DecoderCheck:
    """Why a decoder can not run in graphs, asked at every prefill while the GPU waits.

    Its modules are looked through, 0.4 ms of Python at 32 layers, where one is another than last time or has a hook.
    """

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder
        self.forget()

    def forget(self) -> None:
        """Hold on to no module."""
        self._suited: list[nn.Module] = []
        self._types: list[type] = []
        self._attributes: list[dict[str, Any]] = []

    def __call__(self, own_hooks: set[int]) -> str | None:
        """The reason in words, or None.

        Args:
            own_hooks: ids of the hooks on its layers that the graphs know of.
        """
        if self.decoder.training:
            return "the model is in training mode"
        modules = _modules(self.decoder)
        types = list(map(type, modules))
        if modules != self._suited or types != self._types or any(map(_is_hooked, self._attributes)):
            self.forget()
            if reason := _module_reason(self.decoder, own_hooks):
                return reason
            self._suited, self._types = modules, types
            self._attributes = [module.__dict__ for module in modules]
        return _config_reason(self.decoder.config)


def _modules(decoder: nn.Module) -> list[nn.Module]:
    """The layers, what they are made of, and what their attention and MLP are made of."""
    found: list[nn.Module] = []
    for layer in decoder.layers:
        parts = layer._modules
        found += (layer, *parts.values(), *parts["self_attn"]._modules.values(), *parts["mlp"]._modules.values())
    return found


def _is_hooked(attributes: dict[str, Any]) -> bool:
    return bool(attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "_hf_hook" in attributes)


def _module_reason(decoder: nn.Module, own_hooks: set[int]) -> str | None:
    for layer in decoder.layers:
        inner = (*layer.self_attn._modules.items(), *layer.mlp._modules.items())
        for name, module in inner:
            if name in PROJECTIONS and type(module) is not nn.Linear:
                return (
                    f"{name} is a {type(module).__module__}.{type(module).__name__}: merge LoRA "
                    "(model.merge_and_unload()), and load the base unquantised"
                )
    for module in _modules(decoder):
        if "_hf_hook" in module.__dict__:
            return "accelerate moves its layers between devices"
        hooks = module._forward_pre_hooks or module._forward_hooks
        if hooks and {*module._forward_pre_hooks, *module._forward_hooks} - own_hooks:
            return f"a {type(module).__name__} has forward hooks, which a replayed graph would pass by"
    return None


def _config_reason(config: Any) -> str | None:
    if slides(config):
        return f"its attention has a sliding window of {config.sliding_window}"
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in MOVING_ROTARY:
        return f"its rotary embedding is {kind!r}, whose tables depend on the length"
    if getattr(config, "pretraining_tp", 1) != 1:
        return "pretraining_tp is not 1"
    return None


def device_reason(device: torch.device, emulate: bool) -> str | None:
    """Why a device can not replay graphs, or None."""
    if device.type != "cuda" and not emulate:
        return "there are no CUDA graphs on a CPU"
    if not hasattr(getattr(torch.nn, "attention", None), "SDPBackend") or "enable_gqa" not in (
        torch.nn.functional.scaled_dot_product_attention.__doc__ or ""
    ):
        return (
            f"torch {torch.__version__} has no grouped queries in scaled_dot_product_attention: install 2.5 or newer"
        )
    return None


def call_reason(call: dict[str, Any], config: Any) -> str | None:
    """Why one call of the decoder asks for what graphs do not give, or None."""
    for name in ("output_attentions", "output_hidden_states"):
        value = call.get(name)
        if value or (value is None and getattr(config, name, False)):
            return f"{name} is asked for"
    given = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if torch.is_autocast_enabled(given.device.type):
        return "torch.autocast is on, which casts otherwise than what graphs and their key-value memory were made for"
    if given.shape[1] > config.max_position_embeddings:
        return f"the prompt is longer than max_position_embeddings, {config.max_position_embeddings}"
    mask = call.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return f"the attention mask has {mask.dim()} dimensions, not (batch, length)"
    if call.get("return_dict") is False:
        return "return_dict is False"
    return None
