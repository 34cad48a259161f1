"""What a model costs, origin beside hard: `python -m llava_prune report`.

`shapes` and `samples` make the model and its inputs, `measure` runs and times them, `costs` turns that into figures,
`table`, `plot` and `command` write them down. The FLOPs are those of `llava_prune.flops`.
"""
