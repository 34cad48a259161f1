"""Saved tokens as saved milliseconds: the decoder in CUDA graphs.

`accelerate` binds the decoder's forward. A prefill is packed (`prompt`) and runs in stages (`stages`), one graph
each, with the pruners inside; a token runs in one graph (`generation.decode`) over key-value caches (`arena`,
`cache`) that are as long, layer by layer, as what was kept. `layers` computes a decoder layer, `graphs` records and
replays, `suited` says where none of this applies.
"""

from .accelerate import FastHandle, accelerate

__all__ = ["FastHandle", "accelerate"]
