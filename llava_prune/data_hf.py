"""LLaVA's training data through a Hugging Face processor: the JSON that LLaVA trains on, any model's own conversation.

A batch always holds an image, if need be a blank one behind a masked placeholder: under ZeRO-3 every rank has to run
the vision tower in every step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .layout import IGNORE_INDEX

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


class ConversationDataset(Dataset):
    """Samples of LLaVA's conversation format, tokenized by a processor with a chat template.

    Args:
        data_path: a JSON list of `{"id", "image" (optional), "conversations": [{"from", "value"}, ..]}`.
        image_folder: what image paths are relative to.
        processor: an `AutoProcessor` of the model.
        max_length: positions of a sample, vision tokens included; what is longer is cut at the end.
    """

    def __init__(self, data_path: str, image_folder: str | None, processor: Any, max_length: int):
        self.list_data_dict = json.loads(Path(data_path).read_text())
        self.image_folder = Path(image_folder or "")
        self.processor = processor
        self.max_length = max_length
        self.end = end_of_answers(processor)

    def __len__(self) -> int:
        return len(self.list_data_dict)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` (T,) and, with an image, `pixel_values` (and `image_sizes`), of one image first.

        Raises:
            OSError: the image can not be read.
            ValueError: the sample does not fit into `max_length` with its image, or the chat template answers a
                question with other text than it asks it with.
        """
        sample = self.list_data_dict[index]
        messages = as_messages(sample["conversations"], self.end)
        text = self.processor.apply_chat_template(messages)
        images = [self._image(sample["image"])] if "image" in sample else None
        inputs = self.processor(text=text, images=images, return_tensors="pt")
        inputs = {name: value[0] if name == "input_ids" else value for name, value in inputs.items()}
        labels = self._labels(messages, text, inputs["input_ids"], sample)
        kept = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
        ids = inputs["input_ids"]
        if (ids[self.max_length :] == self.processor.image_token_id).any():
            raise ValueError(
                f"sample {sample.get('id')!r} has vision tokens behind position {self.max_length}: raise "
                "--model_max_length"
            )
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length], **kept}

    def _image(self, name: str) -> Any:
        from PIL import Image

        with Image.open(self.image_folder / name) as image:
            return image.convert("RGB")

    def _labels(self, messages: list[dict[str, Any]], text: str, ids: Tensor, sample: dict[str, Any]) -> Tensor:
        """(T,) the ids of the answers, IGNORE_INDEX elsewhere.

        Tokenizing is done once more without images, in which an image is one token; the other tokens are the same.
        """
        template = self.processor.apply_chat_template
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        asked = [template(messages[:turn], add_generation_prompt=True) for turn in turns]
        answered = [text if turn + 1 == len(messages) else template(messages[: turn + 1]) for turn in turns]
        # one call: the tokenizer takes longer to start than to run
        whole, *prefixes = self.processor.tokenizer([text, *asked, *answered]).input_ids
        answers = torch.zeros(len(whole), dtype=torch.bool)
        for start, end in zip(prefixes[: len(turns)], prefixes[len(turns) :], strict=True):
            stop = len(end)
            if self.end:  # behind which the template goes on with a space
                stop = end.index(self.processor.tokenizer.eos_token_id, len(start)) + 1
            if whole[: len(start)] != start or whole[:stop] != end[:stop]:
                raise ValueError(
                    f"sample {sample.get('id')!r}: this model's chat template or tokenizer writes a turn differently "
                    "once it is answered, so the answer can not be found; use a model whose template does not"
                )
            answers[len(start) : stop] = True
        labels = torch.full_like(ids, IGNORE_INDEX)
        is_text = ids != self.processor.image_token_id
        text_answers = answers[torch.tensor(whole) != self.processor.image_token_id]
        labels[is_text] = torch.where(text_answers, ids[is_text], IGNORE_INDEX)
        return labels


def end_of_answers(processor: Any) -> str:
    """What has to be added to an answer for the model to learn that it ends: nothing where the chat template does so.

    The template of `llava-hf/llava-1.5-7b-hf` writes a space.
    """
    turns = as_messages([{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}], "")
    answered = processor.apply_chat_template(turns).rpartition("!")[2]
    end = processor.tokenizer.eos_token or ""
    return "" if end in answered else end


def as_messages(conversations: list[dict[str, str]], end: str) -> list[dict[str, Any]]:
    """LLaVA's turns as chat messages, the image of a turn before its text, `end` behind each answer."""
    messages = []
    for turn in conversations:
        text = turn["value"].replace(IMAGE_MARK, "").strip() + (end if ROLES[turn["from"]] == "assistant" else "")
        parts = [{"type": "image"}] * turn["value"].count(IMAGE_MARK)
        messages.append({"role": ROLES[turn["from"]], "content": [*parts, {"type": "text", "text": text}]})
    return messages


class Collator:
    """Samples of `ConversationDataset` as a batch, padded on the right."""

    def __init__(self, processor: Any):
        self.pad = processor.tokenizer.pad_token_id
        blank = _blank_image()
        inputs = processor(text=processor.image_token, images=[blank], return_tensors="pt")
        self.blank = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
        self.placeholder = inputs["input_ids"][0][inputs["input_ids"][0] == processor.image_token_id]

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `attention_mask` (B, T), `pixel_values` and, for anyres models, `image_sizes`."""
        images = [sample for sample in samples if "pixel_values" in sample] or [self.blank]
        width = max(len(sample["input_ids"]) for sample in samples)
        if images[0] is self.blank:
            width = max(width, len(samples[0]["input_ids"]) + len(self.placeholder))
        ids = torch.full((len(samples), width), self.pad)
        labels = torch.full((len(samples), width), IGNORE_INDEX)
        mask = torch.zeros(len(samples), width, dtype=torch.long)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            ids[row, :length], labels[row, :length], mask[row, :length] = sample["input_ids"], sample["labels"], 1
        if images[0] is self.blank:
            start = len(samples[0]["input_ids"])
            ids[0, start : start + len(self.placeholder)] = self.placeholder
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        batch["pixel_values"] = _stack([sample["pixel_values"] for sample in images])
        if "image_sizes" in images[0]:
            batch["image_sizes"] = torch.cat([sample["image_sizes"] for sample in images])
        return batch


def _blank_image() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64))


def _stack(pixels: list[Tensor]) -> Tensor:
    """Along the first dimension; anyres images (1, crops, 3, H, W) padded to the most crops, as processors do."""
    if pixels[0].dim() == 5:
        most = max(value.shape[1] for value in pixels)
        pixels = [torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 0, 0, most - v.shape[1])) for v in pixels]
    return torch.cat(pixels)
