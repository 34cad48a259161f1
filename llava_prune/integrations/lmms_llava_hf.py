"""`lmms-eval --model llava_prune_hf`: Hugging Face's LLaVA classes with pruners or a baseline attached.

    lmms-eval --model llava_prune_hf --tasks mme --batch_size 8 --output_path logs \\
        --model_args pretrained=HF_DIR,pruners=DIR,mode=hard,average_tokens=128

Written anew rather than over lmms-eval's `llava_hf`, which needs the video package decord, takes one sample at a
time, and answers '' where generation fails.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..convert import CHAT_TEMPLATE, IMAGE_TOKEN
from .arguments import KeptTokens, take_arguments

SAMPLING = ("temperature", "top_p", "num_beams")


class LlavaPruneHf(lmms):
    """LLaVA, LLaVA-NeXT and LLaVA-OneVision in batches.

    Args:
        pretrained: a Hugging Face model, as `python -m llava_prune convert` writes it or from the hub.
        batch_size: samples at a time, padded on the left.
        device: where the model runs; None takes a GPU if there is one. One process a GPU under `accelerate launch`.
        dtype: of the weights, `auto` as they are saved; fp32 on a CPU.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        conv_template: `vicuna_v1` for LLaVA-1.5's conversation; None for the processor's own.
        keywords: `pruners`, `baseline`, `mode`, `average_tokens`, `allow_other_base`, `report`.

    Raises:
        ValueError: unknown arguments, arguments that do not go together, or pruners of another model.
        FileNotFoundError: `pruners` holds no checkpoint.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        conv_template: str | None = None,
        **keywords: Any,
    ):
        super().__init__()
        ours = take_arguments(keywords)
        keywords.pop("max_batch_size", None)
        if keywords:
            raise ValueError(f"unknown model_args {sorted(keywords)}")
        if conv_template not in (None, "vicuna_v1"):
            raise ValueError(f"conv_template is {conv_template!r}; vicuna_v1, or leave it out for the model's own")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        several = self._world_size > 1 or device is None
        self.device = self.accelerator.device if several else torch.device(device)
        if self.device.type == "cpu" and dtype == "auto":
            dtype = "float32"
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model.eval().to(self.device)
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.processor.tokenizer.padding_side = "left"
        self.template = CHAT_TEMPLATE if conv_template else None
        self.kept = KeptTokens(self.model, ours, self.rank)

    def generate_until(self, requests: list) -> list[str]:
        """Answers in the order of the requests; then says how many tokens were kept."""
        sorter = Collator([request.args for request in requests], lambda args: (-len(args[0]), args[0]), grouping=True)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        answers = []
        for batch in sorter.get_batched(n=self.batch_size, batch_fn=None):
            contexts, settings, visuals_of, names, tasks, splits = zip(*batch, strict=True)
            places = zip(visuals_of, tasks, splits, names, strict=True)
            visuals = [self._images(of(self.task_dict[task][split][name])) for of, task, split, name in places]
            texts = self._answer(list(contexts), visuals, settings[0])
            for context, text in zip(contexts, texts, strict=True):
                self.cache_hook.add_partial("generate_until", (context, settings[0]), text)
            answers += texts
            bar.update(len(batch))
        bar.close()
        logger.info(self.kept.summary())
        return sorter.get_original(answers)

    @staticmethod
    def _images(visuals: list | None) -> list:
        images = [image for image in visuals or [] if image is not None]
        if any(not hasattr(image, "convert") for image in images):
            raise ValueError("this task has visuals that are no pictures: videos and audio are not pruned")
        return [image.convert("RGB") for image in images]

    def _prompt(self, context: str, images: list) -> str:
        """The conversation with `context` as its one question; its pictures come first unless it places them."""
        count = 0 if IMAGE_TOKEN in context else len(images)
        content = [{"type": "image"}] * count + [{"type": "text", "text": context}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, chat_template=self.template, add_generation_prompt=True)

    @torch.inference_mode()
    def _answer(self, contexts: list[str], visuals: list[list], settings: dict[str, Any]) -> list[str]:
        # `until` is left aside, as lmms-eval's own LLaVA does: a paragraph's end is no end of an answer
        prompts = [self._prompt(context, images) for context, images in zip(contexts, visuals, strict=True)]
        images = [image for group in visuals for image in group]
        inputs = self.processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        sampled = (settings.get("temperature") or 0) > 0
        given = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
        output = self.model.generate(
            **inputs,
            do_sample=sampled,
            max_new_tokens=settings.get("max_new_tokens", 1024),
            **(given if sampled else {name: value for name, value in given.items() if name == "num_beams"}),
        )
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def loglikelihood(self, requests: list) -> Any:
        """Not offered: pruning is measured on answers."""
        raise NotImplementedError("llava_prune_hf answers generate_until tasks, not tasks scored by likelihood")

    def generate_until_multi_round(self, requests: list) -> Any:
        """Not offered: a new round prefills a new prompt."""
        raise NotImplementedError("llava_prune_hf answers one round a sample")
