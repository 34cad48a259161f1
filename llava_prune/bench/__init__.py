"""How close to the machine's limit: `python -m llava_prune bench inference`.

`floors` measures what the device can do, `inputs` makes batches without pictures or words, `inference` times methods
on scenarios, `decisions` holds two paths to the same tokens, `table` prints them as multiples of their floors,
`command` is the command line.
"""
