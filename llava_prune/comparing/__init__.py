"""Methods at several budgets on the same questions: `python -m llava_prune compare`.

A cell is one method at one budget (`cells`), answered and timed by `runner`, and kept in a file until something that
determines it changes. `summary` makes rows of the cells with the tests of `statistics`; `table` and `plot` write them.
"""
