"""Some files here belong to one stack; on the other they are not collected."""

import importlib.util

LLAVA = importlib.util.find_spec("llava") is not None
collect_ignore_glob = ["test_hf_*"] if LLAVA else ["test_law_*", "test_training_*"]
