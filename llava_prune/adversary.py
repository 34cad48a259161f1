"""The discriminator's own training: optimizer, accumulation, all-reduce, step and state.

It stays outside the DeepSpeed engine that holds the model: a plain fp32 module, broadcast once from rank 0, whose
gradients are averaged by hand. Knows torch.distributed, nothing of Hugging Face.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import PruneConfig
from .discriminator import Discriminator, standardise
from .losses import discriminator_loss, generator_loss, gradient_penalty


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Adversary:
    """A `Discriminator` with its AdamW.

    Args:
        hidden_size: width of the decoder.
        num_layers: decoder layers that the discriminator reads.
        config: discriminator fields, `gan_loss`, `disc_lr` and `disc_max_accuracy` are read.
        device: where it lives.
    """

    def __init__(self, hidden_size: int, num_layers: int, config: PruneConfig, device: torch.device):
        self.config = config
        self.discriminator = Discriminator(hidden_size, num_layers, config).to(device, torch.float32)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=config.disc_lr, weight_decay=0.0)
        self._correct: list[Tensor] = []
        if _world_size() > 1:
            for tensor in self.discriminator.state_dict().values():
                dist.broadcast(tensor, src=0)

    def generator_loss(self, real: list[Tensor], fake: list[Tensor], mask: Tensor, weights: Tensor) -> Tensor:
        """Loss of the pruners for fooling the discriminator, whose own parameters get no gradient.

        Args:
            real, fake: one (B, S, hidden_size) a layer; fake with gradient, real read by the relativistic loss alone.
            mask: (B, S) bool, text positions that count.
            weights: (B,) 1 for samples with an image.
        """
        self.discriminator.requires_grad_(False).eval()
        real_logits = None
        if self.config.gan_loss == "relativistic":
            with torch.no_grad():
                real_logits = self.discriminator(real, mask)
        loss = generator_loss(self.discriminator(fake, mask), weights, self.config.gan_loss, real_logits)
        self.discriminator.requires_grad_(True).train()
        return loss

    def accumulate(
        self, real: list[Tensor], fake: list[Tensor], mask: Tensor, weights: Tensor, accumulation: int = 1
    ) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch, of detached features.

        Args:
            accumulation: micro-batches of an optimizer step; the loss is divided by it.

        Returns:
            `d_loss` (and `d_penalty`, if there is one), `d_acc_real` and `d_acc_fake`, detached scalars; the
            accuracies are measured without noise, against 0 or, relativistic, against each other.
        """
        penalty = self.config.gradient_penalty
        inputs = [[x.detach() for x in states] for states in (real, fake)]
        if penalty > 0:  # slopes are taken where the discriminator works, not at hidden states of any norm
            inputs = [[standardise(x).requires_grad_() for x in states] for states in inputs]
        real_logits, fake_logits = (self.discriminator(states, mask) for states in inputs)
        loss = discriminator_loss(real_logits, fake_logits, weights, self.config.gan_loss)
        metrics = {"d_loss": loss.detach()}
        if penalty > 0:
            term = gradient_penalty(real_logits, inputs[0], weights) + gradient_penalty(
                fake_logits, inputs[1], weights
            )
            metrics["d_penalty"] = term.detach()
            loss = loss + penalty * term
        (loss / accumulation).backward()
        metrics |= self._accuracies(real, fake, mask, weights)
        accuracy, count = (metrics["d_acc_real"] + metrics["d_acc_fake"]) / 2, weights.sum()
        self._correct.append(torch.stack([accuracy * count, count]))
        return metrics

    @torch.no_grad()
    def _accuracies(self, real: list[Tensor], fake: list[Tensor], mask: Tensor, weights: Tensor) -> dict[str, Tensor]:
        self.discriminator.eval()
        real_logits, fake_logits = (self.discriminator(states, mask, noise=False) for states in (real, fake))
        self.discriminator.train()
        count = weights.sum().clamp(min=1)
        middle = (real_logits + fake_logits) / 2 if self.config.gan_loss == "relativistic" else 0
        return {
            "d_acc_real": ((real_logits > middle) * weights).sum() / count,
            "d_acc_fake": ((fake_logits < middle) * weights).sum() / count,
        }

    def step(self) -> bool:
        """Average the gradients over ranks and take one step, unless the discriminator is too good already.

        Every rank must call this at the end of every accumulation window, also one whose samples had no image.

        Returns:
            Whether a step was taken; none is where no rank had an image.
        """
        parameters = list(self.discriminator.parameters())
        none = torch.zeros(2, device=parameters[0].device)
        flat = torch.cat(
            [torch.stack([none, *self._correct]).sum(0)]
            + [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        )
        self._correct = []
        if _world_size() > 1:
            dist.all_reduce(flat)
            flat /= _world_size()
        correct, samples = flat[:2].tolist()
        if correct > self.config.disc_max_accuracy * samples or samples == 0:
            self.optimizer.zero_grad(set_to_none=True)
            return False
        for parameter, gradient in zip(parameters, flat[2:].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state, the same on every rank."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raises if a weight is missing or unexpected."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
