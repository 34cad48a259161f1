"""The sequence that LLaVA would build of a conversation about one picture, at fixed lengths, for training the base."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..mosaic import resize
from ..pictures import Pictures
from .conversations import WHOLE, Batch
from .size import MiniSize


class Tiles:
    """Pictures on the device, at the size that the cells of each grid have.

    Args:
        pictures: easy-VQA's, and after them those of words.
        mirrored: the first so many may be mirrored, which leaves their labels what they are.
        size: pixels and grids.
        device: where they go.
    """

    def __init__(self, pictures: Pictures, mirrored: int, size: MiniSize, device: torch.device):
        self.mirrored = mirrored
        self.by_grid = {}
        for grid in (size.grid, *size.other_grids, WHOLE):
            count = mirrored if grid == WHOLE else len(pictures.images)
            tiles = np.ascontiguousarray(resize(pictures.images[:count], size.cell(grid)).transpose(0, 3, 1, 2))
            self.by_grid[grid] = torch.from_numpy(tiles).to(device)


class Trainee(nn.Module):
    """A `LlavaForConditionalGeneration` that answers conversations of equal length.

    While it learns, the projector reads standardised features, since DINOv2's are small and an optimizer's steps are
    not; `fold` makes that a part of the projector's weights.

    Args:
        model: the model.
        opening: ids before the picture.
        tune_tower: whether the vision tower gets a gradient.
    """

    def __init__(self, model: nn.Module, opening: list[int], tune_tower: bool):
        super().__init__()
        self.model, self.tune_tower = model, tune_tower
        width = model.config.vision_config.hidden_size
        self.register_buffer("opening", torch.tensor(opening), persistent=False)
        self.register_buffer("mean", torch.zeros(width), persistent=False)
        self.register_buffer("deviation", torch.ones(width), persistent=False)
        for linear in self._linears():
            linear.reset_parameters()  # as in LLaVA; transformers' own start is far smaller

    def _linears(self) -> tuple[nn.Linear, nn.Linear]:
        projector = self.model.model.multi_modal_projector
        return projector.linear_1, projector.linear_2

    def forward(self, pixels: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        """Logits that predict the answers' tokens.

        Args:
            pixels: (B, 3, H, W), normalised.
            ids: (B, T) the text after the picture.
            places: (M,) positions in `ids`, flattened, none of them the first of a row.

        Returns:
            (M, vocabulary).
        """
        core = self.model.model
        features = (self._features(pixels) - self.mean) / self.deviation
        vision, embed = core.multi_modal_projector(features), self.model.get_input_embeddings()
        text = embed(torch.cat([self.opening.expand(len(ids), -1), ids], 1)).to(
            vision.dtype
        )  # autocast's, if it is on
        before, after = text.split([len(self.opening), ids.shape[1]], dim=1)
        embeds = torch.cat([before, vision, after], dim=1)
        hidden = core.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        predicting = hidden[:, -ids.shape[1] - 1 : -1].flatten(0, 1)
        return self.model.lm_head(predicting.index_select(0, places))

    def _features(self, pixels: Tensor) -> Tensor:
        """(B, N, width) of the patches."""
        with nullcontext() if self.tune_tower else torch.no_grad():
            layer = self.model.config.vision_feature_layer
            return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]

    @torch.no_grad()
    def standardise(self, pixels: Tensor) -> None:
        """Take mean and deviation of each feature from some pictures, (B, 3, H, W)."""
        features = self._features(pixels).float().flatten(0, 1)
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp(min=1e-6))

    @torch.no_grad()
    def fold(self) -> None:
        """Let the model compute alone what it computes here."""
        first, _ = self._linears()
        first.weight /= self.deviation
        first.bias -= first.weight @ self.mean
        self.mean.zero_()
        self.deviation.fill_(1)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        return functional.cross_entropy(logits.float(), batch.ids.flatten().index_select(0, batch.places))

    @staticmethod
    def right(logits: Tensor, batch: Batch) -> Tensor:
        """(turns,) bool, whether every token of a turn's answer is the likeliest."""
        hit = logits.argmax(-1) == batch.ids.flatten().index_select(0, batch.places)
        turns = torch.ones(len(batch.kinds), dtype=torch.long, device=hit.device)
        return turns.scatter_reduce(0, batch.turns, hit.long(), "amin").bool()


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of the decoder and of the tower one by one: a program for each kind, which takes seconds."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.compile(dynamic=False)
