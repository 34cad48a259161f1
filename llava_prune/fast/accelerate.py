"""`accelerate(model)`: prefill and decoding of the decoder in CUDA graphs, under `model.generate` as it is.

The decoder's `forward` is bound, and nothing else: `generate`, a pipeline, LLaVA's own programs and every search and
sampling strategy go on as they are, with or without pruners. One call switches it on and its handle off, so a model
that was loaded anywhere can be accelerated, which an option of `attach_pruners` could not offer for origin.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .. import compat, compat_cache
from ..decoder_layer import PLAIN
from ..layout import SampleSize, TokenLayout, sizes_of
from ..patch import PruneHandle, handle_of
from ..state import ForwardRecord
from .arena import Arena
from .cache import REFUSAL, cache_class
from .fused import fused_parts
from .generation import Caches, Generation, capacities, decode
from .graphs import Graphs
from .packing import Packing
from .prompt import Prompt
from .stages import Stage, StageRows
from .suited import DecoderCheck, call_reason, device_reason

_FAST = "llava_prune_fast"


def accelerate(
    model: nn.Module,
    room: int = 64,
    bucket: int = 32,
    max_graphs: int = 128,
    fuse: bool = True,
    emulate: bool = False,
) -> FastHandle:
    """Run the decoder of a LLaVA model in CUDA graphs, in place: in modes origin and hard, wherever `generate` runs.

    What graphs can not do (masked and soft mode, hooks, LoRA that is not merged, quantised layers, autocast,
    attentions as output, a CPU) runs on the plain path, with one warning a reason. Generations share their key-value
    memory, so a cache is valid until the next prefill.

    Args:
        model: with or without pruners; they may be attached, changed and detached later.
        room: new tokens that a key-value cache has room for at first; it doubles when they are used up.
        bucket: rows and vision tokens are rounded up to multiples of this, one graph for each.
        max_graphs: graphs kept at the most.
        fuse: compile what lies between matrix products, at the first prefill: about a fifth faster, but half
            precision rounds otherwise here and there, and a token that is decided by a hair may be another one.
        emulate: run the same code without graphs where there is no CUDA device, for tests.

    Returns:
        A handle with `.remove()`, also usable as `with accelerate(model):`.

    Raises:
        ValueError: the model has no Llama decoder, or is accelerated already.
    """
    return FastHandle(model, room, bucket, max_graphs, fuse, emulate)


def _text_alone(mask: Tensor | None, batch: int, length: int, device: torch.device) -> TokenLayout:
    """The layout of prompts in which nothing is pruned."""
    valid = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.bool()
    none = torch.zeros_like(valid)
    images = valid.new_zeros(batch, dtype=torch.long)
    filler = (images[:, None], none[:, :1])
    return TokenLayout(
        valid, none, none, None, images, *filler, *filler, sizes=sizes_of(valid, none, none, images, none)
    )


class FastHandle:
    """What `accelerate` returns.

    Attributes:
        decoder: the module whose forward is bound.
        graphs, arena: what runs and where keys and values lie; both are bounded, by `max_graphs` and by the largest
            batch so far.
    """

    def __init__(self, model: nn.Module, room: int, bucket: int, max_graphs: int, fuse: bool, emulate: bool):
        self.decoder = compat.find_decoder(model)
        if _FAST in self.decoder.__dict__:
            raise ValueError("this model is accelerated already: call remove() on the handle that accelerate returned")
        self.room, self.emulate = room, emulate
        self.graphs = Graphs(compat.execution_device(self.decoder.layers[0]), max_graphs)
        self.arena: Arena | None = None
        self._original, self._previous = self.decoder.forward, self.decoder.__dict__.get("forward")
        self._bind = compat.bind_arguments(self._original)
        self._cache_class = cache_class()
        self._parts = fused_parts() if fuse and self.graphs.cuda else PLAIN
        self._tables: tuple[Tensor, Tensor] | None = None
        self._packing = Packing(self.graphs, bucket)
        self._buffers: dict[Any, Tensor] = {}
        self._live: Generation | None = None
        self._weights: Any = None
        self._check = DecoderCheck(self.decoder)
        self._said: set[str] = set()
        self._replaced: WeakSet = WeakSet()
        self.decoder.__dict__[_FAST] = self
        self.decoder.forward = MethodType(lambda _decoder, *args, **kwargs: self(*args, **kwargs), self.decoder)

    def remove(self) -> None:
        """The plain path again; safe to call twice."""
        if self.decoder.__dict__.pop(_FAST, None) is self:
            if self._previous is None:
                del self.decoder.forward
            else:
                self.decoder.forward = self._previous
        self._forget()

    def __deepcopy__(self, memo: dict) -> None:
        raise ValueError("a copy of this model would run the original's decoder: call remove() on this handle first")

    def __enter__(self) -> FastHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _forget(self) -> None:
        self.graphs.clear()
        self._packing.clear()
        self._buffers.clear()
        self._check.forget()
        self._live = self._tables = self.arena = None

    # ---- one call of the decoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        call = self._bind(args, kwargs)
        cache = compat_cache.cache_of(call)
        if isinstance(cache, self._cache_class):
            with _ordinary_tensors():
                return self._decode(call, cache)
        prune = handle_of(self.decoder)
        if not self._begins_to_generate(call, cache, prune):
            return self._original(*args, **kwargs)
        if cache is not None and cache in self._replaced:
            raise ValueError(REFUSAL.format("fill a cache of yours, go on with the one that was returned, or"))
        reason = self._why_not(call, prune)
        with _ordinary_tensors():
            output = None if reason else self._prefill(call, prune)
        if output is None:
            self._say(reason or "prompts are padded on the right, where the stock model would go on from the padding")
            return self._original(*args, **kwargs)
        if cache is not None:
            self._replaced.add(cache)  # it stays empty, and must not be taken for a new prompt's
        return output

    def _say(self, reason: str) -> None:
        """Warn, once a reason."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"llava_prune.accelerate: {reason}; the plain path is used", stacklevel=2)

    def _begins_to_generate(self, call: dict[str, Any], cache: Any, prune: PruneHandle | None) -> bool:
        """Whether this is a prefill with a cache, in a mode that inference uses."""
        use_cache = call.get("use_cache")
        if not (self.decoder.config.use_cache if use_cache is None else use_cache) or torch.is_grad_enabled():
            return False
        if compat_cache.cache_length(cache, 0):
            return False
        return prune is None or prune.state.record is None or prune.state.record.mode in ("origin", "hard")

    def _why_not(self, call: dict[str, Any], prune: PruneHandle | None) -> str | None:
        embeds = call.get("inputs_embeds")
        device = compat.execution_device(self.decoder.layers[0]) if embeds is None else embeds.device
        own = set() if prune is None else prune.hook_ids
        return device_reason(device, self.emulate) or self._check(own) or call_reason(call, self.decoder.config)

    # ---- prefill

    def _prefill(self, call: dict[str, Any], prune: PruneHandle | None) -> Any:
        """The decoder's output, None for prompts that end in padding."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = self.decoder.embed_tokens(call["input_ids"])
        batch, length = embeds.shape[:2]
        self._renew(embeds, prune)
        record = None if prune is None else prune.state.record
        pruned = record is not None and record.mode == "hard" and bool(prune.scorers)
        layout = record.layout if pruned else _text_alone(call.get("attention_mask"), batch, length, embeds.device)
        sizes = layout.sizes
        if not all(size.ends for size in sizes):
            return None
        position = call.get("position_ids")
        if position is None:
            position = torch.arange(length, device=embeds.device)[None]
        budgets = [prune.layer_budget(size.vision, size.images) if pruned else None for size in sizes]
        prompt = self._packing(embeds, position.expand(batch, -1), layout, budgets)
        caches, last = self._run(prompt, sizes, budgets, prune if pruned else None)
        self._live = Generation(caches, length)
        index = prompt.index.gather(1, last.source).masked_fill(~last.valid, length)
        full = last.hidden.new_zeros(batch, length + 1, last.hidden.shape[-1])
        full = full.scatter(1, index[..., None].expand_as(last.hidden), last.hidden)[:, :length]
        return BaseModelOutputWithPast(last_hidden_state=full, past_key_values=self._cache_class(self._live))

    def _renew(self, embeds: Tensor, prune: PruneHandle | None) -> None:
        """Forget graphs of other weights or other pruners, and make what all calls share."""
        ends = [next(module.parameters()).data_ptr() for module in (self.decoder.layers[0], self.decoder.norm)]
        weights = (prune, *ends, embeds.dtype)
        if weights != self._weights:
            self._forget()
            self._weights = weights
        if self.arena is None:
            attention = self.decoder.layers[0].self_attn
            heads = attention.k_proj.out_features // attention.head_dim
            self.arena = Arena(heads, attention.head_dim, embeds.dtype, embeds.device)
            self._tables = compat.position_tables(self.decoder, embeds)

    def _stages(self, prune: PruneHandle | None) -> list[Stage]:
        layers = self.decoder.layers
        bounds = [0, *([] if prune is None else sorted(prune.scorers)), len(layers)]
        decisions = {} if prune is None else {layer: prune.layer_forwards[layer] for layer in prune.scorers}
        common = (layers, self.decoder.norm, self._tables)
        return [
            Stage(start, end, *common, decisions.get(end), prune.watchers if end in decisions else {}, self._parts)
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]

    def _run(
        self, prompt: Prompt, sizes: tuple[SampleSize, ...], budgets: list[Any], prune: PruneHandle | None
    ) -> tuple[Caches, StageRows]:
        """All stages, one after the other; the last one's rows are those of a graph, to be read at once."""
        batch, stages = len(sizes), self._stages(prune)
        spans = tuple(stage.end - stage.start for stage in stages)
        rows, vision = prompt.hidden.shape[1], prompt.tokens["vision_index"].shape[1]
        before: StageRows | None = None
        widths: tuple[int, ...] = ()
        lengths = []
        for number, stage in enumerate(stages):
            widths += (rows,)
            layer_rows = capacities(spans[: number + 1], widths, self.room)
            if self.arena.reserve(batch, sum(layer_rows)):
                self.graphs.clear()
            counts = None if prompt.counts is None or stage.decision is None else prompt.counts[number]
            call = partial(self._stage_rows, stage, prompt, before, rows, vision, counts, layer_rows)
            # what a graph reads is told by its identity: the graph holds on to it, so no other can take that over
            key = ("prompt", id(prompt), id(before), widths, vision)
            replay = self.graphs.get(key, call)
            before = replay()
            lengths.append(before.lengths.clone())
            if stage.decision is not None:
                self._note(prune.state.record, stage.end, before)
                if counts is None:
                    kept = before.kept.tolist()
                else:
                    kept = [size.text + budget[number] for size, budget in zip(sizes, budgets, strict=True)]
                most = max(own - size.text for own, size in zip(kept, sizes, strict=True))
                rows = min(self._packing.rounded(max(kept)), rows)
                vision = min(self._packing.rounded(most), rows)
        start, held = (self._buffer(name, torch.stack(lengths)) for name in ("start", "held"))
        return Caches(spans, widths, self.room, start, held, self.arena), before

    def _stage_rows(
        self,
        stage: Stage,
        prompt: Prompt,
        before: StageRows | None,
        rows: int,
        vision: int,
        counts: Tensor | None,
        layer_rows: list[int],
    ) -> StageRows:
        """`stage`, its caches behind those of the layers before it."""
        views = self.arena.views(len(prompt.hidden), layer_rows)
        return stage(prompt, before, rows, vision, counts, views[stage.start :])

    @staticmethod
    def _note(record: ForwardRecord, layer: int, rows: StageRows) -> None:
        """Write down what was kept; what a graph returned is valid until the next one runs."""
        tokens = record.layout.vision_valid.shape[1]
        record.kept[layer] = rows.vision_kept[:, :tokens].clone()
        if rows.probability is not None:
            record.probabilities[layer] = rows.probability[:, :tokens].clone()

    # ---- decoding

    def _decode(self, call: dict[str, Any], cache: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        generation = cache.generation
        reason = call_reason(call, self.decoder.config)
        if reason is not None:
            raise ValueError(REFUSAL.format(f"go on where {reason}"))
        if generation is not self._live:
            raise ValueError(
                "this key-value cache is of another generation than the latest, whose memory it shared: prefill the "
                "whole prompt again"
            )
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = self.decoder.embed_tokens(call["input_ids"])
        batch, tokens = embeds.shape[:2]
        caches = self._with_room(generation, tokens)
        position = call.get("position_ids")
        if position is None:
            seen = generation.prompt_length + generation.new
            position = torch.arange(seen, seen + tokens, device=embeds.device)[None]
        end = generation.new + tokens
        limit = self.decoder.config.max_position_embeddings
        if generation.prompt_length + end > limit:
            raise ValueError(
                f"position {generation.prompt_length + end} is past max_position_embeddings, {limit}: lower "
                "max_new_tokens, or generate on the plain path"
            )
        blocked = torch.zeros(batch, caches.room, dtype=torch.bool, device=embeds.device)
        if call.get("attention_mask") is not None:
            blocked[:, :end] = ~call["attention_mask"][:, -end:].bool()
        given = {"embeds": embeds, "position": position.expand(batch, -1), "blocked": blocked}
        if tokens == 1:  # several at once, of any number, run without a graph
            given = {name: self._buffer(name, values) for name, values in given.items()}
        shared = (self.decoder.layers, self.decoder.norm, self._tables, caches)
        run = partial(decode, *shared, *given.values(), self._parts)
        if tokens == 1:
            key = ("token", batch, caches.spans, caches.widths, caches.room)
            hidden = self.graphs.get(key, run)()[0].clone()
        else:
            (hidden,) = run()
        caches.held.add_(tokens)
        generation.new = end
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _with_room(self, generation: Generation, tokens: int) -> Caches:
        """The generation's caches with room for so many more tokens, by doubling."""
        room = generation.caches.room
        while room < generation.new + tokens:
            room *= 2
        if room != generation.caches.room:
            generation.caches, moved = generation.caches.widened(room)
            if moved:
                self.graphs.clear()
        return generation.caches

    def _buffer(self, name: str, values: Tensor) -> Tensor:
        """`values` in the memory that graphs read under this name and shape."""
        key = (name, values.shape)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(values, memory_format=torch.contiguous_format)
        return self._buffers[key].copy_(values)


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """What is made within can be written to later, also where the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
