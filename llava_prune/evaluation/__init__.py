"""LLaVA's benchmarks around the answering itself: question files, merged chunks, converters, scores, one table.

`questions` reads questions and holds answers against them, `merge` puts chunks together, `convert` writes what the
scorers and servers take, `score` runs a scorer on answers that were checked, `table` prints origin beside pruned.
"""
