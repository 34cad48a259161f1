"""mini: a LLaVA of real parts that pip brings, and a question set, to tell on one GPU whether pruning learns.

Language model (`language`) and vision encoder (`vision`) come out of pip packages (`packages`) and are put together by
`assemble`; `conversations`, `trainee` and `base` train them; `data` writes what pruners are trained on and methods
compared on. `pipeline` does the steps once, `trainings` and `comparisons` by the product's own commands (`jobs`), and
`results` makes tables of them. `python -m llava_prune.testbed.mini --help` says how it is used.
"""
