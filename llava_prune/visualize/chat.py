"""A loaded model of either stack: its answer to a question, and where its tokens lie in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..reporting.samples import HfInputs, LlavaInputs, Sample, make_batches
from ..stacks import stack_of
from .grid import Grid, Tower, anyres_grids, single_grid

GREEDY = {"do_sample": False, "num_beams": 1, "use_cache": True}


class Chat(Protocol):
    """A model that can be asked about pictures. `size` is a picture's width and height."""

    model: nn.Module
    inputs: LlavaInputs | HfInputs

    def batch(self, samples: list[Sample]) -> dict[str, Any]:
        """Arguments of `generate` that ask questions about pictures as one batch, on the model's device."""
        (batch,) = make_batches(self.inputs, samples, len(samples), 0)
        return batch

    def answers_to(self, batch: dict[str, Any], max_new_tokens: int) -> list[str]:
        """The greedy answers to a batch; the settings are those of LLaVA's evaluation at temperature 0."""

    def answers(self, samples: list[Sample], max_new_tokens: int) -> list[str]:
        """The greedy answers to questions about pictures, asked as one batch."""
        return self.answers_to(self.batch(samples), max_new_tokens)

    def grids(self, size: tuple[int, int], vision_tokens: int) -> tuple[Grid, ...]:
        """Where the vision tokens of one picture lie; ValueError where that is not known."""


def load_chat(directory: str, stack: str | None, base: str | None, template: str) -> Chat:
    """Load a checkpoint folder or hub name, in half precision on a GPU and in fp32 on a CPU.

    Args:
        stack: `llava`, `hf` or None for the checkpoint's, or else the one that is installed.
        base: the model under a LoRA checkpoint of the llava stack, or None.
        template: LLaVA's name of the conversation template (llava stack).

    Raises:
        ValueError: the checkpoint, the stack or the template do not fit together.
        OSError: there is no such checkpoint.
    """
    folder = Path(directory)
    looked_into = folder if folder.is_dir() and not base else None  # a LoRA checkpoint may be the adapter alone
    if stack_of(looked_into, stack) == "llava":
        return LlavaChat(directory, base, template)
    if base:
        raise ValueError("--model_base is for the llava stack: give the adapter's folder as --model alone")
    return HfChat(directory)


class LlavaChat(Chat):
    """LLaVA's own code base, loaded by its own loader; arguments and errors as `load_chat`."""

    def __init__(self, directory: str, base: str | None, template: str):
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        name = get_model_name_from_path(directory)
        if "llava" not in name.lower():
            raise ValueError(f"LLaVA tells its models by 'llava' in their folder's name, and {name!r} has none")
        on_cpu = not torch.cuda.is_available()
        device = {"device": "cpu"} if on_cpu else {}
        tokenizer, self.model, self.processor, _ = load_pretrained_model(directory, base, name, **device)
        if on_cpu:
            self.model.float()
        self.tokenizer = tokenizer
        self.inputs = LlavaInputs(self.model, tokenizer, self.processor, template)

    def answers_to(self, batch: dict[str, Any], max_new_tokens: int) -> list[str]:
        """See `Chat`."""
        output = self.model.generate(**batch, **GREEDY, max_new_tokens=max_new_tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]

    def grids(self, size: tuple[int, int], vision_tokens: int) -> tuple[Grid, ...]:
        """See `Chat`."""
        config, vision = self.model.config, self.model.get_vision_tower().config
        tower = Tower(vision.image_size, vision.patch_size)
        ratio = getattr(config, "image_aspect_ratio", None)
        if ratio != "anyres":
            return (single_grid(size, tower, self.processor.to_dict(), ratio == "pad", vision_tokens),)
        merge = getattr(config, "mm_patch_merge_type", "flat")
        if merge != "spatial_unpad":
            raise ValueError(
                f"tokens of image_aspect_ratio 'anyres' with mm_patch_merge_type {merge!r} can not be drawn: "
                "supported are 'anyres' with 'spatial_unpad', and one square of tokens a picture"
            )
        import ast

        from llava.mm_utils import select_best_resolution
        from llava.model.llava_arch import unpad_image

        points = config.image_grid_pinpoints
        canvas = select_best_resolution(size, ast.literal_eval(points) if isinstance(points, str) else points)
        rows, columns = _unpadded(canvas, tower, lambda places: unpad_image(places, size))
        return _complete(anyres_grids(size, tower, canvas, rows, columns), vision_tokens)


class HfChat(Chat):
    """Hugging Face's classes; arguments and errors as `load_chat`."""

    def __init__(self, directory: str):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        settings = {"dtype": "auto", "device_map": "auto"} if torch.cuda.is_available() else {"dtype": torch.float32}
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = AutoModelForImageTextToText.from_pretrained(directory, **settings).eval()
        self.inputs = HfInputs(self.model, self.processor)

    def answers_to(self, batch: dict[str, Any], max_new_tokens: int) -> list[str]:
        """See `Chat`."""
        output = self.model.generate(**batch, **GREEDY, max_new_tokens=max_new_tokens)
        answers = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]

    def grids(self, size: tuple[int, int], vision_tokens: int) -> tuple[Grid, ...]:
        """See `Chat`."""
        config, settings = self.model.config, self.processor.image_processor.to_dict()
        vision = config.vision_config
        if not isinstance(vision.image_size, int) or vision.model_type == "pixtral":
            raise ValueError(
                f"tokens of the vision tower {vision.model_type!r} can not be drawn: supported are towers with a "
                "square input (CLIP, SigLIP, DINOv2)"
            )
        tower = Tower(vision.image_size, vision.patch_size)
        if config.model_type == "llava":
            return (single_grid(size, tower, settings, bool(settings.get("do_pad")), vision_tokens),)
        from transformers.image_processing_utils import select_best_resolution
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        height, width = select_best_resolution(size[::-1], config.image_grid_pinpoints)
        canvas = width, height
        rows, columns = _unpadded(canvas, tower, lambda places: unpad_image(places, size[::-1]))
        shape = _resampled_shape(config, tower, len(rows), len(columns))
        return _complete(anyres_grids(size, tower, canvas, rows, columns, shape), vision_tokens)


def _unpadded(canvas: tuple[int, int], tower: Tower, unpad: Any) -> tuple[range, range]:
    """Rows and columns of the canvas's patches that the host leaves, which it is asked with a map of numbers."""
    columns, rows = (pixels // tower.pixels * tower.side for pixels in canvas)
    left = unpad(torch.arange(rows * columns).view(1, rows, columns))[0]
    if not left.numel():
        raise ValueError("the picture is so narrow that none of its patches is left in the tiles: take another")
    (top, start), (bottom, end) = divmod(int(left[0, 0]), columns), divmod(int(left[-1, -1]), columns)
    return range(top, bottom + 1), range(start, end + 1)


def _resampled_shape(config: Any, tower: Tower, rows: int, columns: int) -> tuple[int, int] | None:
    """LLaVA-OneVision's `anyres_max_N` shrinks a grid of over 1.1^2 N tiles' worth of patches to N tiles' worth."""
    ratio = getattr(config, "vision_aspect_ratio", None)
    if ratio is None:
        return None
    shrink = (rows * columns / (int(ratio.removeprefix("anyres_max_")) * tower.side**2)) ** 0.5
    return (int(rows // shrink), int(columns // shrink)) if shrink > 1.1 else None


def _complete(grids: tuple[Grid, ...], vision_tokens: int) -> tuple[Grid, ...]:
    if grids[-1].end != vision_tokens:
        raise ValueError(
            f"{vision_tokens} vision tokens where the picture's tiles make {grids[-1].end}: the prompt was cut off, "
            "or the tokens were merged, and they have no place in the picture"
        )
    return grids
