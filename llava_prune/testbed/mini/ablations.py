"""Variants of what follows the main training: a second one with masks and all other losses, and adaptations.

What the pruners themselves are made of is compared in `fits`, in seconds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What differs.

    Attributes:
        prune: `PruneConfig` fields.
        flags: other flags of the training.
        start: whether it starts from pruners of the main training.
    """

    prune: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    start: bool = True


MAIN = "ours"
ADAPTED = "adapted"
# of a second training, on masks and every loss but guidance, that starts from the pruners of the main one
SECOND = {"guidance_only_ratio": 0.0, "guidance_weight": 0.0, "pruner_lr": 1e-5, "target_warmup_ratio": 0.1}
# of one from fresh pruners, which has further to go; with `--steps 1000`
SCRATCH = {"guidance_only_ratio": 0.0, "guidance_weight": 0.0, "pruner_lr": 1e-3}


def _second(flags: dict[str, Any] | None = None, **prune: Any) -> Variant:
    return Variant({**SECOND, **prune}, flags or {})


def _scratch(**prune: Any) -> Variant:
    return Variant({**SCRATCH, **prune}, start=False)


def _adapted(**prune: Any) -> Variant:
    flags = {"lora_enable": True, "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0, "learning_rate": 6e-4}
    return Variant({"train_pruners": False, "alignment": "kl", **prune}, flags)


VARIANTS = {
    MAIN: Variant(),
    # a second training; those below differ from it in one thing
    "gan": _second(),
    "gan_faster": _second(pruner_lr=1e-4),
    "guidance_kept": _second(guidance_weight=1000.0, guidance_ratio=1.0),
    # alignment
    "mse": _second(alignment="mse"),
    "mean_var": _second(alignment="mean_var"),
    "kl": _second(alignment="kl"),
    "no_alignment": _second(alignment="none"),
    # the adversary
    "non_saturating": _second(gan_loss="non_saturating"),
    "hinge": _second(gan_loss="hinge"),
    "no_gradient_penalty": _second(gradient_penalty=0.0),
    "spectral_norm": _second(spectral_norm=True),
    "no_noise": _second(noise_scale_start=0.0, noise_scale_end=0.0),
    "no_masked_end": _second(final_masked_ratio=0.0),
    # the estimator, instead of a differentiable top-k
    "gumbel_soft": _second(estimator="gumbel_soft"),
    "gumbel_st": _second(estimator="gumbel_st"),
    "sigmoid_st": _second(estimator="sigmoid_st"),
    # from fresh pruners
    "scratch": _scratch(),
    "scratch_no_alignment": _scratch(alignment="none"),
    "scratch_no_qk_norm": _scratch(pruner_qk_norm=False),
    "scratch_merger": _scratch(enable_token_merger=True),
    # and how many tokens, learned by a threshold, which guidance alone knows nothing of
    "scratch_gumbel_soft": _scratch(estimator="gumbel_soft", selection="threshold"),
    "scratch_gumbel_st": _scratch(estimator="gumbel_st", selection="threshold"),
    "scratch_sigmoid_st": _scratch(estimator="sigmoid_st", selection="threshold"),
    # pruners stay as the main training made them, and LoRA learns to answer from what they keep, at every budget
    ADAPTED: _adapted(),
    "adapted_no_alignment": _adapted(alignment="none"),
    "adapted_mse": _adapted(alignment="mse"),
    "adapted_gan": _adapted(alignment="gan"),
    # what else is trained
    "lora": _second({"lora_enable": True, "lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-4}),
}


def chosen(names: str) -> list[str]:
    """Variants by name, see `named`; the training that they differ from comes first."""
    return list(dict.fromkeys([MAIN, *named(names, VARIANTS, "--ablate: no variant")]))


def named(names: str, known: Collection[str], complaint: str) -> list[str]:
    """What a flag lists, separated by commas, or `all`; raises ValueError with `complaint` about unknown names."""
    wanted = list(known) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{complaint} {', '.join(unknown)}; use all, or some of {', '.join(known)}")
    return wanted
