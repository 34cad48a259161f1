"""Attaching pruners to a model instance and taking them off again.

Bound on the instance, never on a class, so that a second model in the process is left alone; the original forward is
stored and called, never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import compat, compat_cache
from .announce import announcing_prepare, forgetting_generate, merging_hook, refusing_contrastive_search
from .announce_hf import announcing_forward, announcing_questions, refusing_pieces, requiring_outer
from .budget import layer_counts
from .config import PruneConfig
from .forward import LayerForward
from .merger import TokenMerger
from .placeholders import Shrinking, shrinking_forward, shrinking_generate
from .pruner import LayerPruner, PrunerInputs
from .scoring import LayerView, PrunerScorer, Scorer
from .state import MODES, ForwardRecord, PruneState

_HANDLE = "llava_prune_handle"


class Pruners(nn.Module):
    """All trainable modules of the plug-in, one child of the decoder: `layers.<L>` and, if enabled, `merger`."""

    def __init__(self, layers: dict[int, LayerPruner], merger: TokenMerger | None):
        super().__init__()
        self.layers = nn.ModuleDict({str(index): pruner for index, pruner in layers.items()})
        self.merger = merger


class PruneHandle:
    """What `attach_pruners` returns: the settings, the modules and the way back.

    Attributes:
        config: the `PruneConfig`.
        state: `PruneState` that the bound forwards read.
        pruners: the trainable `Pruners`.
        decoder: the module that holds the decoder layers.
        vision_tokens: of one image as the decoder gets them before any pruning, None where it depends on the image.
        modes: what `prune_mode` takes.
    """

    modes = MODES

    def __init__(self, model: nn.Module, config: PruneConfig):
        self._inspect(model)
        self.config = config
        config.check_layers(self.num_layers)
        if config.enable_token_merger and self.vision_tokens is not None:
            if config.merger_tokens >= self.vision_tokens:
                raise ValueError(
                    f"merger_tokens {config.merger_tokens} must be fewer than the {self.vision_tokens} vision tokens"
                )
            self.vision_tokens = config.merger_tokens
        if self.vision_tokens is not None:
            config.check_budget(self.vision_tokens, self.num_layers)
        self.pruners = self._build_modules()
        self.scorers = {int(index): PrunerScorer(pruner) for index, pruner in self.pruners.layers.items()}

    def _inspect(self, model: nn.Module) -> None:
        """Find what will be bound; refuses a model that can not be pruned."""
        self.model = model
        self.state = PruneState()
        self.decoder = compat.find_decoder(model)
        self.num_layers = len(self.decoder.layers)
        self.hidden_size = self.decoder.config.hidden_size
        self.backend = compat.attention_backend(self.decoder)
        self.vision_tokens = compat.vision_tokens_per_image(model)
        self._decoder_arguments = compat.bind_arguments(self.decoder.forward)
        self.scorers: dict[int, Scorer] = {}
        self.layer_forwards: dict[int, LayerForward] = {}
        self._bound: list[tuple[nn.Module, str, Any]] = []
        self._hooks: list[Any] = []

    def layer_budget(self, tokens: int, images: int) -> tuple[int, ...] | None:
        """Tokens that each pruning layer keeps of a sample with `tokens` vision tokens, None by threshold."""
        config = self.config
        if config.selection == "threshold":
            return None
        average = self.state.target_token_num or config.target_token_num
        average = (1 - config.target_sparsity) * tokens if average is None else average * images
        average = tokens + (average - tokens) * self.state.target_ease
        shares = self.state.keep_fractions or config.layer_shares
        settings = (config.pruning_layers, self.num_layers, shares, config.min_keep)
        return layer_counts(tokens, average, *settings)

    def _build_modules(self) -> Pruners:
        layers = {}
        for index in self.config.pruning_layers:
            layer = self.decoder.layers[index]
            device, dtype = compat.execution_device(layer), layer.input_layernorm.weight.dtype
            layers[index] = LayerPruner(self.hidden_size, self.config).to(device, dtype)
        return Pruners(layers, self._build_merger())

    def _build_merger(self) -> TokenMerger | None:
        if not self.config.enable_token_merger:
            return None
        width = compat.merged_width(self.model)
        like = next(compat.vision_modules(self.model)[1].parameters())
        return TokenMerger(width, self.hidden_size, self.config).to(like.device, like.dtype)

    # ---- binding

    def _bind(self, module: nn.Module, name: str, function: Any) -> None:
        """Set an instance attribute and remember what the instance had under that name, if anything."""
        self._bound.append((module, name, module.__dict__.get(name)))
        setattr(module, name, function)

    def _attach(self) -> None:
        self.decoder.llava_pruners = self.pruners
        self.decoder.__dict__[_HANDLE] = self
        for index in range(min(self.scorers, default=self.num_layers), self.num_layers):
            layer = self.decoder.layers[index]
            settings = (self.num_layers, self.config, self.state, self.backend)
            run = LayerForward(index, layer, self.scorers, self.layer_budget, *settings)
            self.layer_forwards[index] = run
            self._bind(layer, "forward", MethodType(_without_self(run), layer))
            self._extend_rotary(compat.rotary_module(layer))
        self._hooks.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        llava = compat.find_llava(self.model)
        if llava is not None:
            prepare = llava.prepare_inputs_labels_for_multimodal
            announcing = announcing_prepare(prepare, llava, self.state, self.pruners.merger)
            self._bind(llava, "prepare_inputs_labels_for_multimodal", announcing)
            self._bind(llava, "generate", forgetting_generate(llava.generate, self.state))
            if self.scorers:
                name = compat.contrastive_search_name(llava)
                self._bind(llava, name, refusing_contrastive_search(getattr(llava, name), self.state))
        hf = compat.find_hf_llava(self.model) if llava is None else None
        if hf is not None:
            self._bind(hf, "forward", announcing_forward(hf.forward, hf, self.state, self.vision_tokens))
            if hasattr(hf, "_prefill"):  # else the second piece of a prompt is refused if it has an image
                self._bind(hf, "_prefill", refusing_pieces(hf._prefill, self.state))
            self._hooks.append(hf.model.register_forward_pre_hook(requiring_outer(hf, self.state), with_kwargs=True))
        if self.pruners.merger is not None:
            projector = compat.vision_modules(self.model)[1]
            self._hooks.append(projector.register_forward_pre_hook(merging_hook(self.state, self.pruners.merger)))
            if hf is not None:
                before, after = compat.vision_tokens_per_image(self.model), self.vision_tokens
                questions = announcing_questions(hf, self.state, after)
                self._bind_shrinking(hf, Shrinking(hf, self.state, before, after, questions))

    def _bind_shrinking(self, hf: nn.Module, shrinking: Shrinking) -> None:
        self._bind(hf, "forward", shrinking_forward(hf.forward, shrinking))
        self._bind(hf, "generate", shrinking_generate(hf.generate, shrinking))

    def _extend_rotary(self, rotary: nn.Module | None) -> None:
        """4.37 cuts the table to the layer's own, short length while kept tokens have their original positions."""
        if rotary is None:
            return
        original = rotary.forward
        state = self.state

        def forward(x: Tensor, seq_len: int | None = None) -> Any:
            if state.record is not None and state.record.mode == "hard":
                seq_len = max(seq_len or 0, state.record.full_length)
            return original(x, seq_len=seq_len)

        self._bind(rotary, "forward", forward)

    def remove(self) -> None:
        """Take everything off again: the model is the stock model, bit for bit. Safe to call twice."""
        for module, name, previous in reversed(self._bound):
            if previous is None:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, previous)
        for hook in self._hooks:
            hook.remove()
        if self.decoder.__dict__.get(_HANDLE) is self:
            del self.decoder.__dict__[_HANDLE]
            del self.decoder.llava_pruners
        self._bound, self._hooks, self.layer_forwards = [], [], {}

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The stock model within the block, then the same pruners on it again."""
        self.remove()
        try:
            yield
        finally:
            self._attach()

    @property
    def hook_ids(self) -> set[int]:
        """Ids of the hooks that are registered for these pruners."""
        return {hook.id for hook in self._hooks}

    @property
    def watchers(self) -> dict[int, Callable[[LayerView], None]]:
        """Layer -> what is to be shown that layer's inputs in a prefill."""
        return {}

    def __repr__(self) -> str:
        config = self.config
        target = f"target_token_num={config.target_token_num}"
        if config.target_token_num is None:
            target = f"target_sparsity={config.target_sparsity}"
        layers = f"pruning_layers={config.pruning_layers}"
        return f"PruneHandle(mode={self.state.mode!r}, {layers}, {target}, selection={config.selection!r})"

    def __deepcopy__(self, memo: dict) -> None:
        raise ValueError(
            "a copy of this model would run the original's layers, by what is bound on it: call detach_pruners(model) "
            "first, and load the pruners on the copy"
        )

    def __reduce__(self) -> str:
        raise ValueError(
            "what is bound on this model can not be pickled: save the pruners with save_pruners(model, directory), "
            "and the model after detach_pruners(model)"
        )

    def __enter__(self) -> PruneHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    # ---- one forward pass

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Start a record when the decoder starts on a fresh cache; go on with the old one otherwise."""
        call = self._decoder_arguments(args, kwargs)
        inputs = call.get("inputs_embeds") if call.get("inputs_embeds") is not None else call.get("input_ids")
        batch, length = inputs.shape[:2]
        cache = compat_cache.cache_of(call)
        cached = compat_cache.cache_length(cache, 0)
        state, layout = self.state, self.state.layout_of(inputs)
        state.announced, state.prepared = None, layout or state.prepared
        if cached:
            self._continue(cache, cached, (batch, length), layout is not None and layout.has_vision)
            return
        state.record = None
        compat_cache.number_cache(cache, None)  # it may have been another prompt's, and emptied
        if layout is None or not (layout.has_vision or decoder.training):
            return
        if layout.valid.shape[1] != length or batch % len(layout.valid):
            raise ValueError(
                f"the prepared inputs have {tuple(layout.valid.shape)} positions but the decoder was given "
                f"{(batch, length)}: call the model with what prepare_inputs_labels_for_multimodal returned last"
            )
        if state.mode in ("masked", "hard"):
            compat_cache.check_cache(cache)
        if batch != len(layout.valid):
            layout = layout.repeat(batch // len(layout.valid))
        if state.mode != "origin":
            self._follow_backend()
        self._check_mode(decoder)
        state.record = ForwardRecord(layout, state.mode, full_length=length)

    def _continue(self, cache: Any, cached: int, shape: tuple[int, int], new_image: bool) -> None:
        """Go on with the record of the latest prefill; a cache that is of another one is refused."""
        record = self.state.record
        pruned = record is not None and record.mode in ("masked", "hard")
        if new_image and (pruned or self.state.mode != "origin"):
            raise ValueError(
                "an image was added to a key-value cache that is in use: prefill the whole prompt again, in one piece "
                "(leave prefill_chunk_size unset)"
            )
        if pruned and cached != record.full_length:
            raise ValueError(
                f"the key-value cache holds {cached} positions, the latest pruned forward saw {record.full_length}: "
                "this cache is of another prompt, or was cropped as assisted decoding does; prefill the whole "
                "prompt again, without an assistant"
            )
        if record is not None and record.mode == "soft":
            raise ValueError(
                "mode 'soft' is for training: what is generated after a soft prompt would see its tokens whole or "
                "not at all; generate in masked or hard mode"
            )
        batch, length = shape
        if pruned and self.scorers and batch != len(record.layout.valid):
            raise ValueError(
                f"the latest pruned forward saw {len(record.layout.valid)} samples, this one goes on with {batch}: "
                "samples of its cache can not be selected or repeated; prefill the whole prompt again, for those alone"
            )
        number = compat_cache.number_of_cache(cache)
        foreign = number is not None and (record is None or number != record.number)
        if foreign or not pruned and compat_cache.cache_length(cache, self.num_layers - 1) != cached:
            raise ValueError(
                "the key-value cache is of a pruned prompt, and another was run: prefill the whole prompt again. "
                "In classifier-free guidance (guidance_scale) two take turns: generate without it, or in "
                "prune_mode(model, 'origin')"
            )
        if record is None:
            return
        if pruned:
            self._follow_backend()
        record.decoding = True
        record.full_length = cached + length
        record.attention_masks.clear()

    def _follow_backend(self) -> None:
        """Go on with the attention backend that the model was set to since; refuses one that is not supported."""
        if compat.backend_name(self.decoder) == self.backend:
            return
        self.backend = compat.attention_backend(self.decoder)
        for run in self.layer_forwards.values():
            run.use_backend(self.backend)

    def _check_mode(self, decoder: nn.Module) -> None:
        mode = self.state.mode
        trains = decoder.training and torch.is_grad_enabled()  # by an attention that needs no mask
        if self.backend == "flash_attention_2" and mode == "soft" and not trains:
            raise ValueError(
                "mode 'soft' outside training needs an attention bias, which flash_attention_2 does not take: use "
                "masked or hard mode, or load the model with attn_implementation='sdpa'"
            )
        if mode in ("soft", "masked") and decoder.training and getattr(decoder, "gradient_checkpointing", False):
            keywords = getattr(getattr(decoder, "_gradient_checkpointing_func", None), "keywords", {})
            if keywords.get("use_reentrant", True):
                raise ValueError(
                    "reentrant gradient checkpointing leaves the pruners without a gradient: call "
                    "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )

    def pruner_inputs(self, layer: int, hidden: Tensor, record: ForwardRecord) -> PrunerInputs:
        """What a pruner reads where (B, T, hidden_size) enter its layer with every token."""
        call = {**record.prefix, "hidden_states": hidden}
        return self.scorers[layer].inputs(LayerView.of_all_rows(self.decoder.layers[layer], call, record))

    @torch.no_grad()
    def unpruned_features(self, record: ForwardRecord) -> dict[int, Tensor]:
        """Outputs of `state.feature_layers` without pruning, from the hidden states that entered the first pruner.

        Runs the original layers up to the last one asked for and computes no logits.

        Returns:
            layer -> (B, T, hidden_size).
        """
        # the pruned pass filled the cache already
        call = {**record.prefix, **{name: None for name in record.prefix if name.startswith("past_key_value")}}
        features = {}
        for index in range(self.config.pruning_layers[0], max(self.state.feature_layers) + 1):
            hidden = compat.hidden_states_of(self.layer_forwards[index].original(**call))
            call["hidden_states"] = hidden
            if index in self.state.feature_layers:
                features[index] = hidden
        return features


def _without_self(run: LayerForward) -> Any:
    def forward(_layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return forward


def handle_of(decoder: nn.Module) -> PruneHandle | None:
    """The handle of pruners attached to this very decoder, or None."""
    return decoder.__dict__.get(_HANDLE)


def find_handle(model: nn.Module) -> PruneHandle | None:
    """The handle of pruners attached to `model`, or None."""
    for module in model.modules():
        if _HANDLE in module.__dict__:
            return module.__dict__[_HANDLE]
    return None


def require_handle(model: nn.Module) -> PruneHandle:
    """The handle of `model`; raises ValueError if no pruners are attached."""
    handle = find_handle(model)
    if handle is None:
        raise ValueError(
            "no pruners on this model: call attach_pruners(model, config), load_pruners(model, dir) or "
            "attach_baseline(model, name, average_tokens)"
        )
    return handle


def attach_pruners(model: nn.Module, config: PruneConfig) -> PruneHandle:
    """Put freshly initialised pruners on a LLaVA model, in place, in mode `origin`.

    Attach after LoRA: LLaVA's own search for LoRA targets would otherwise adapt the pruners too.

    Args:
        model: a LLaVA model, also inside PEFT.
        config: what to prune.

    Returns:
        A handle with `.remove()`, also usable as `with attach_pruners(...) as handle:`.

    Raises:
        ValueError: pruners are attached already, there is no Llama decoder, layers are out of range, or the target
            lies under its floor.
    """
    if find_handle(model) is not None:
        raise ValueError("this model has pruners already: call detach_pruners(model) first")
    handle = PruneHandle(model, config)
    handle._attach()
    return handle


def detach_pruners(model: nn.Module) -> None:
    """Make `model` the stock model again; raises ValueError if no pruners are attached."""
    require_handle(model).remove()


@contextmanager
def prune_mode(model: nn.Module, mode: str) -> Iterator[PruneHandle]:
    """Run `model` in `origin`, `soft`, `masked` or `hard` mode within the block, then in the mode it had before.

    What a call returns in hard mode, for a batch of B samples that LLaVA makes T positions long:

    - `logits` (B, T, vocabulary), `last_hidden_state` and the last of `hidden_states` (B, T, hidden_size): of full
      length, zero in the last hidden state and in the logits where a vision token was removed.
    - `loss`: that of masked mode. The vision token before a supervised token is always kept.
    - `hidden_states[i]` (B, S_i, hidden_size) for i < num_layers: the embeddings (i = 0), then what layer i - 1
      returned: the rows that layer saw, S_i of them in the fullest sample, in their order and packed to the left.
      S_i is T for layers before the first pruning layer. Rows beyond a sample's own (that much is
      `text_tokens + tokens_per_layer[:, i - 1]` of `last_report`, if nothing is padded) are filler.
    - `attentions[i]` (B, heads, S, S) over the rows that layer i saw.
    - `past_key_values`: layer i holds the rows that entered it. The cache takes further text, of any number of tokens;
      a new image, and a cache that was cropped, is of another batch size or is of another prompt than the latest, are
      refused: prefill the whole prompt again. (A cache of another prompt with the same lengths in all layers is not
      told apart, nor one whose samples were reordered: they must stay in the order of the prefill.)

    Calls without an image are the stock model's in every mode. So are embeddings in place of ids, but for those that
    LLaVA's `prepare_inputs_labels_for_multimodal` returned last: given unchanged, they are pruned as often as asked.

    Raises:
        ValueError: unknown mode, or no pruners attached.
    """
    handle = require_handle(model)
    previous = handle.state.mode
    set_mode(model, mode)
    try:
        yield handle
    finally:
        handle.state.mode = previous


def set_mode(model: nn.Module, mode: str) -> None:
    """Set the mode until it is set again; raises ValueError as `prune_mode`."""
    handle = require_handle(model)
    check_mode(mode, handle.modes)
    handle.state.mode = mode


def check_mode(mode: str, modes: tuple[str, ...] = MODES) -> None:
    """Raises ValueError for a mode that is not one of those."""
    if mode not in modes:
        raise ValueError(f"unknown mode {mode!r}: use one of {', '.join(modes)}")
