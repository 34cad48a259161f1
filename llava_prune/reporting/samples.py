"""Questions about pictures as arguments of `generate`, on both stacks; synthetic ones for want of words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..evaluation.questions import read_lines

IMAGE_MARK = "<image>"
PICTURE_SIZE = (640, 480)  # of synthetic pictures, width and height
FIRST_WORD = 3  # token ids below it are special in Llama's vocabulary


@dataclass(frozen=True)
class Sample:
    """A picture, and a question or None for random tokens in its place."""

    picture: Any
    question: str | None


def synthetic_samples(number: int, seed: int = 0) -> list[Sample]:
    """Pictures of noise with random tokens for a text."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    width, height = PICTURE_SIZE
    shape = (number, height, width, 3)
    noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()
    return [Sample(Image.fromarray(pixels), None) for pixels in noise]


def read_samples(question_file: str | Path, image_folder: str | Path, number: int) -> list[Sample]:
    """The first `number` lines of a LLaVA question file.

    Raises:
        FileNotFoundError: the file or a picture is missing.
        ValueError: a line is not JSON, one of the first lacks `image` or `text`, or there are too few.
    """
    from PIL import Image

    path, folder = Path(question_file), Path(image_folder)
    if not path.is_file():
        raise FileNotFoundError(f"no question file {path}: give LLaVA's JSON lines with question_id, image and text")
    lines = read_lines(path)[:number]
    if len(lines) < number:
        raise ValueError(f"{path} holds {len(lines)} questions, --number asks for {number}")
    samples = []
    for place, line in enumerate(lines, start=1):
        try:
            image, question = folder / line["image"], line["text"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, question {place}: expected JSON with image and text ({error!r})") from error
        if not image.is_file():
            raise FileNotFoundError(f"{path}, question {place}: no picture {image}; check --image-folder")
        with Image.open(image) as picture:
            samples.append(Sample(picture.convert("RGB"), question))
    return samples


class LlavaInputs:
    """Arguments of `generate` of a haotian-liu LLaVA.

    Args:
        model: the LLaVA model; its `tokenizer_padding_side` is set to left, which generation in batches needs.
        tokenizer: may be None where all samples are synthetic.
        image_processor: the vision tower's.
        template: LLaVA's name of a conversation template.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any, template: str):
        from llava.conversation import conv_templates

        if template not in conv_templates:
            raise ValueError(f"no conversation template {template!r}: one of {', '.join(conv_templates)}")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.conversation = conv_templates[template]
        model.config.tokenizer_padding_side = "left"

    def rows(self, samples: list[Sample]) -> tuple[list[Tensor], dict[str, Any]]:
        """Token ids of each sample, of a synthetic one the image placeholders alone, and the pictures' arguments."""
        from llava.mm_utils import process_images

        images = process_images([sample.picture for sample in samples], self.image_processor, self.model.config)
        sizes = [sample.picture.size for sample in samples]
        return [self._ids(sample) for sample in samples], {"images": images, "image_sizes": sizes}

    def _ids(self, sample: Sample) -> Tensor:
        from llava.mm_utils import tokenizer_image_token

        if sample.question is None:
            return torch.tensor([compat.IMAGE_TOKEN_INDEX])
        mark = IMAGE_MARK
        if getattr(self.model.config, "mm_use_im_start_end", False):
            mark = f"<im_start>{IMAGE_MARK}<im_end>"
        conversation = self.conversation.copy()
        conversation.append_message(conversation.roles[0], f"{mark}\n{sample.question}")
        conversation.append_message(conversation.roles[1], None)
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")

    def arguments(self, ids: Tensor, mask: Tensor, pictures: dict[str, Any]) -> dict[str, Any]:
        """Of `generate`; a mask of ones is left out, as in LLaVA's own evaluation."""
        return {"inputs": ids, "attention_mask": None if mask.all() else mask, **pictures}


class HfInputs:
    """Arguments of `generate` of a Hugging Face LLaVA, made by its processor."""

    def __init__(self, model: nn.Module, processor: Any):
        self.model, self.processor = model, processor

    def rows(self, samples: list[Sample]) -> tuple[list[Tensor], dict[str, Any]]:
        """As `LlavaInputs.rows`; an image is as many placeholders as it has vision tokens."""
        inputs = self.processor(
            text=[self._prompt(sample) for sample in samples],
            images=[sample.picture for sample in samples],
            padding=True,
            return_tensors="pt",
        )
        rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        rows = [
            row[row == self.model.config.image_token_id] if sample.question is None else row
            for row, sample in zip(rows, samples, strict=True)
        ]
        return rows, {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}

    def _prompt(self, sample: Sample) -> str:
        if sample.question is None:
            return self.processor.image_token
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def arguments(self, ids: Tensor, mask: Tensor, pictures: dict[str, Any]) -> dict[str, Any]:
        """Of `generate`."""
        return {"input_ids": ids, "attention_mask": mask, **pictures}


def make_batches(
    inputs: LlavaInputs | HfInputs, samples: list[Sample], batch_size: int, text_tokens: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Arguments of `generate` for all samples, padded on the left, on the model's device and in its dtype.

    Args:
        text_tokens: length of a synthetic text, half of it (rounded down) before the picture, as in LLaVA's prompt.
    """
    model = inputs.model
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    image_token = compat.image_token(model)
    # a placeholder lies behind the words of a vocabulary, if it is part of it at all
    end = image_token if image_token > FIRST_WORD else len(embeddings)

    def with_text(placeholders: Tensor) -> Tensor:
        words = torch.randint(FIRST_WORD, end, (text_tokens,), generator=generator)
        return torch.cat([words[: text_tokens // 2], placeholders, words[text_tokens // 2 :]])

    batches = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        rows, pictures = inputs.rows(chosen)
        rows = [with_text(row) if sample.question is None else row for row, sample in zip(rows, chosen, strict=True)]
        ids, mask = _padded_left(rows)
        batches.append(placed(inputs.arguments(ids, mask, pictures), embeddings.device, embeddings.dtype))
    return batches


def placed(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A batch (or a list or a value of one) with its tensors on `device`, and floating ones in `dtype` if given."""
    if isinstance(batch, dict):
        return {name: placed(value, device, dtype) for name, value in batch.items()}
    if isinstance(batch, list):
        return [placed(value, device, dtype) for value in batch]
    if not isinstance(batch, Tensor):
        return batch
    return batch.to(device, dtype if batch.is_floating_point() else None)


def _padded_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) ids, 0 at padding, and mask of rows of different lengths."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) >= width - lengths[:, None]).long()
