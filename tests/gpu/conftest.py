"""Each file here belongs to one stack; on the other it is not collected."""

import importlib.util

collect_ignore_glob = ["test_hf_*"] if importlib.util.find_spec("llava") is not None else ["test_l*", "test_t*"]
