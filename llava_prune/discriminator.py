"""`Discriminator`: do these text hidden states come from the pruned or the unpruned pass?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .config import PruneConfig
from .modules import init_weights


def positions_of(mask: Tensor) -> Tensor:
    """Relative place of each valid token among its sample's valid tokens: (B, S) bool -> (B, S) fp32 in [0, 1]."""
    rank = mask.cumsum(-1) - 1
    last = rank[:, -1:].clamp(min=1)
    return (rank.float() / last).clamp(0, 1)


def standardise(hidden: Tensor) -> Tensor:
    """(..., D) fp32 with mean 0 and RMS 1 in each token, so that scales are relative to it."""
    return F.layer_norm(hidden.float(), hidden.shape[-1:])


class Discriminator(nn.Module):
    """Weighted pooling and an MLP per decoder layer, then one MLP over all of them.

    Hidden states are standardised per token, since norms grow with depth and would give the layer away; Gaussian
    noise, larger on early tokens, keeps the discriminator from reading single values; pooling weighs late tokens,
    the answer's, more.

    Args:
        hidden_size: width of the decoder.
        num_layers: decoder layers read.
        config: `disc_dim`, pooling, noise and `spectral_norm` fields are read.
    """

    def __init__(self, hidden_size: int, num_layers: int, config: PruneConfig):
        super().__init__()
        self.config = config
        dim = config.disc_dim

        def mlp(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, dim), nn.GELU(), nn.Linear(dim, outputs))

        self.layers = nn.ModuleList(mlp(hidden_size, dim) for _ in range(num_layers))
        self.head = mlp(num_layers * dim, 1)
        init_weights(self)
        if config.spectral_norm:
            for module in [m for m in self.modules() if isinstance(m, nn.Linear)]:
                spectral_norm(module)

    def forward(self, hidden_states: list[Tensor], mask: Tensor, noise: bool = True) -> Tensor:
        """Logit per sample, positive for real.

        Args:
            hidden_states: one (B, S, hidden_size) per layer, text positions only.
            mask: (B, S) bool, False at padding.
            noise: add the position-aware noise; off when the discriminator only reports.

        Returns:
            (B,) fp32.
        """
        config = self.config
        position = positions_of(mask)
        weight = (
            torch.lerp(
                torch.full_like(position, config.pool_start_weight),
                torch.full_like(position, config.pool_end_weight),
                position,
            )
            * mask
        )
        weight = (weight / weight.sum(-1, keepdim=True).clamp(min=1e-6))[..., None]
        scale = torch.lerp(
            torch.full_like(position, config.noise_scale_start),
            torch.full_like(position, config.noise_scale_end),
            position,
        )[..., None]
        features = []
        for layer, hidden in zip(self.layers, hidden_states, strict=True):
            hidden = standardise(hidden)
            if noise:
                hidden = hidden + torch.randn_like(hidden) * scale
            features.append(layer((hidden * weight).sum(1)))
        return self.head(torch.cat(features, -1)).squeeze(-1)
