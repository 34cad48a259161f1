"""A small real task and a small real LLaVA, to train and measure pruning on one CPU core.

`prepare` writes pictures and questions in LLaVA's own files, `install` puts a tiny LLaVA checkpoint beside them,
`score` marks answers, and `make_base` is the script that trained that checkpoint.

The folder `mini` holds a larger one, of real parts, for one GPU.
"""
