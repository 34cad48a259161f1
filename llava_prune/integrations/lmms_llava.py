"""`lmms-eval --model llava_prune`: haotian's LLaVA, as lmms-eval runs it, with pruners or a baseline attached.

    lmms-eval --model llava_prune --tasks mme --batch_size 1 --output_path logs \\
        --model_args pretrained=liuhaotian/llava-v1.5-7b,pruners=DIR,mode=hard,average_tokens=128
"""

from __future__ import annotations

from typing import Any

from lmms_eval.models.simple.llava import Llava
from loguru import logger

from .arguments import KeptTokens, take_arguments


class LlavaPrune(Llava):
    """lmms-eval's `llava`, its arguments and ours: `pruners`, `baseline`, `mode`, `average_tokens`,
    `allow_other_base` and `report` (a file; lmms-eval sorts the samples, so its lines are not in the task's order).

    Raises:
        ValueError: arguments that do not go together, or pruners of another model.
        FileNotFoundError: `pruners` holds no checkpoint.
    """

    def __init__(self, pretrained: str = "liuhaotian/llava-v1.5-7b", **keywords: Any):
        ours = take_arguments(keywords)
        super().__init__(pretrained=pretrained, **keywords)
        self.kept = KeptTokens(self.model, ours, self.rank)

    def generate_until(self, requests: list) -> list[str]:
        """Answers in the order of the requests; then says how many tokens were kept."""
        answers = super().generate_until(requests)
        logger.info(self.kept.summary())
        return answers
