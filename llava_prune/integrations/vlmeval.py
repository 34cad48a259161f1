"""VLMEvalKit's LLaVA with pruners or a baseline attached.

VLMEvalKit has no plug-ins; one line in its `vlmeval/config.py`, or in a program of one's own, makes it a model:

    supported_VLM["llava_prune_7b"] = partial(LLaVAPrune, model_path="liuhaotian/llava-v1.5-7b", pruners="DIR")

after `from llava_prune.integrations.vlmeval import LLaVAPrune`; then `run.py --model llava_prune_7b --data MME`.
"""

from __future__ import annotations

import os
from typing import Any

from vlmeval.vlm.llava import LLaVA

from .arguments import KeptTokens, take_arguments


class LLaVAPrune(LLaVA):
    """`vlmeval.vlm.LLaVA`, its arguments and ours: `pruners`, `baseline`, `mode`, `average_tokens`,
    `allow_other_base` and `report`. `kept.summary()` says how many tokens were kept.

    Raises:
        ValueError: arguments that do not go together, or pruners of another model.
        FileNotFoundError: `pruners` holds no checkpoint.
    """

    def __init__(self, model_path: str = "liuhaotian/llava-v1.5-7b", **keywords: Any):
        ours = take_arguments(keywords)
        super().__init__(model_path=model_path, **keywords)  # the rest is its generation config
        self.kept = KeptTokens(self.model, ours, int(os.environ.get("RANK", 0)))
