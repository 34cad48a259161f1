"""Saved tokens as saved milliseconds: the decoder in CUDA graphs.

`accelerate` binds the decoder's forward. A prefill is packed (`prompt`) and runs in stages (`stages`), one graph
each, with the pruners inside; a token runs in one graph (`generation.decode`) over key-value caches (`arena`,
`cache`) that are as long, layer by layer, as what was kept. `layers` computes a decoder layer, `steps` what lies
between stages, `graphs` records and replays, `fused` has fewer and faster kernels, `suited` says where none of this
applies.

What was tried, on an H100 at the 7B shape, bf16, 576 + 64 tokens, batch 1, 64 average tokens; the first token, and
milliseconds of each further one (`bench inference`):

    plain path                          33.5   22.3    stock: 24.2, 21.3; floors 4.4, 4.5
    graphs                              13.3    8.8    stock in graphs: 22.5, 8.9
    and steps between products fused    10.3    7.3    on a slower CPU; stock: 40.2, 24.0; in graphs: 16.6, 7.3

Fusing was expected to save 3 ms a further token (30 small kernels a layer, 3 us each) and saved half of it, as far as
two machines compare. Of a token's 7.3 ms the GPU is idle for 0.9, between graphs.
"""

from .accelerate import FastHandle, accelerate

__all__ = ["FastHandle", "accelerate"]
