"""What `generate` of either stack holds as the key-value cache of a generation that runs in graphs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .generation import Generation

REFUSAL = (
    "the key-value cache of accelerated generation can not {}: use the plain path (remove the handle that "
    "llava_prune.accelerate returned) for assisted decoding and the like"
)


class FastLayer:
    """One layer of the cache; transformers 5 reads lengths off it."""

    is_compileable = is_sliding = is_croppable = False
    is_initialized = True

    def __init__(self, generation: Generation, index: int):
        self.generation, self.index = generation, index

    @property
    def keys(self) -> Tensor:
        """(B, heads, rows, head width), rows of the fullest sample."""
        return self.generation.caches.views[self.index].keys[:, :, : self.generation.rows(self.index)]

    @property
    def values(self) -> Tensor:
        """Likewise."""
        return self.generation.caches.views[self.index].values[:, :, : self.generation.rows(self.index)]

    def get_seq_length(self) -> int:
        """See `Generation.length`."""
        return self.generation.length(self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of a mask for this layer."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beams: Tensor) -> None:
        """Rows of the batch in another order, within each sample's beams."""
        view = self.generation.caches.views[self.index]
        for states in (view.keys, view.values):
            states.copy_(states.index_select(0, beams.to(states.device)))

    def update(self, *_: Any, **__: Any) -> Any:
        """Not by a stock layer."""
        raise ValueError(REFUSAL.format("be written by a stock forward"))

    def crop(self, *_: Any) -> None:
        """Refused."""
        raise ValueError(REFUSAL.format("be cropped"))

    batch_repeat_interleave = batch_select_indices = crop


def cache_class() -> type:
    """A `Cache` of the installed transformers over `FastLayer`s: 5.x asks the layers, 4.37 the cache."""
    from transformers.cache_utils import Cache

    class FastCache(Cache):
        """Holds `generation` and its `layers`."""

        def __init__(self, generation: Generation):
            self.generation = generation
            self.layers = [FastLayer(generation, index) for index in range(sum(generation.caches.spans))]

        is_compileable = False

        def __len__(self) -> int:
            return len(self.layers)

        @property
        def seen_tokens(self) -> int:
            return self.layers[0].get_seq_length()

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.layers[layer_idx or 0].get_seq_length()

        def get_max_length(self) -> None:
            return None

        def reorder_cache(self, beam_idx: Tensor) -> None:
            for layer in self.layers:
                layer.reorder_cache(beam_idx)

        def update(self, *_: Any, **__: Any) -> Any:
            raise ValueError(REFUSAL.format("be written by a stock forward"))

        def crop(self, *_: Any, **__: Any) -> None:
            raise ValueError(REFUSAL.format("be cropped"))

    return FastCache
