"""Variants of the pruner training that differ from it in one thing each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What differs.

    Attributes:
        prune: `PruneConfig` fields.
        flags: other flags of the training.
    """

    prune: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)


MAIN = "ours"
VARIANTS = {
    MAIN: Variant(),
    # alignment
    "gan": Variant({"alignment": "gan"}),
    "mse": Variant({"alignment": "mse"}),
    "mean_var": Variant({"alignment": "mean_var"}),
    "kl": Variant({"alignment": "kl"}),
    "no_alignment": Variant({"alignment": "none"}),
    # what the answer depends on, as a first guess
    "no_guidance": Variant({"guidance_weight": 0.0}),
    "guidance_half": Variant({"guidance_ratio": 0.5}),
    # the adversary
    "non_saturating": Variant({"gan_loss": "non_saturating"}),
    "hinge": Variant({"gan_loss": "hinge"}),
    "relativistic": Variant({"gan_loss": "relativistic", "gradient_penalty": 1.0, "disc_max_accuracy": 1.0}),
    "gradient_penalty": Variant({"gradient_penalty": 1.0}),
    "spectral_norm": Variant({"spectral_norm": True}),
    "no_noise": Variant({"noise_scale_start": 0.0, "noise_scale_end": 0.0}),
    # the mask
    "gumbel_soft": Variant({"estimator": "gumbel_soft", "selection": "threshold"}),
    "gumbel_st": Variant({"estimator": "gumbel_st", "selection": "threshold"}),
    "sigmoid_st": Variant({"estimator": "sigmoid_st", "selection": "threshold"}),
    "topk_st": Variant({"estimator": "topk_st", "selection": "topk"}),
    "own_budget": Variant({"estimator": "gumbel_st", "selection": "threshold", "budget_credit": "own"}),
    "no_masked_end": Variant({"final_masked_ratio": 0.0}),
    # the pruner
    "no_question": Variant({"use_question": False}),
    "attn_residual": Variant({"use_attn_residual": True}),
    "no_attn_residual": Variant({"use_attn_residual": False}),
    "layers_6_12_18": Variant({"pruning_layers": [6, 12, 18]}),
    "layers_1_13_25": Variant({"pruning_layers": [1, 13, 25]}),
    "layers_2_8_16": Variant({"pruning_layers": [2, 8, 16]}),
    # what else is trained
    "lora": Variant(flags={"lora_enable": True, "lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-4}),
    "merger": Variant({"enable_token_merger": True, "guidance_weight": 0.0}),
}


def chosen(names: str) -> list[str]:
    """Variants by name, separated by commas, or `all`; the training that they differ from comes first.

    Raises:
        ValueError: there is no such variant.
    """
    wanted = list(VARIANTS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise ValueError(f"--ablate: no variant {', '.join(unknown)}; use all, or some of {', '.join(VARIANTS)}")
    return list(dict.fromkeys([MAIN, *wanted]))
