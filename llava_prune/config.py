"""The one description of a pruning run: what is pruned, how it is trained, where it stops.

A `PruneConfig` is read from YAML, JSON or a preset name, every field is also a command line flag
(`--prune_<field>`), and it travels with the trained weights as `prune_config.json`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .budget import UnreachableBudget, layer_counts

ESTIMATORS = ("gumbel_soft", "gumbel_st", "sigmoid_st", "topk_st")
ALIGNMENTS = ("gan", "mse", "mean_var", "kl", "none")
SELECTIONS = ("threshold", "topk")
CREDITS = ("all", "own")
GAN_LOSSES = ("non_saturating", "hinge", "relativistic")


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PruneConfig:
    """Settings of the pruners, the discriminator, the losses and the schedules.

    Raises:
        ValueError: a value is out of range, or not exactly one of `target_token_num` and `target_sparsity` is set.
    """

    # what is pruned
    pruning_layers: tuple[int, ...] = _field(
        (6, 12, 18), "0-based decoder layers; the hidden states that enter one of them are pruned first"
    )
    target_token_num: float | None = _field(
        None, "average vision tokens per decoder layer and image; set this or target_sparsity"
    )
    target_sparsity: float | None = _field(
        None, "1 - average tokens / vision tokens, in (0, 1); set this or target_token_num"
    )
    selection: str = _field(
        "threshold",
        "tokens to keep in masked and hard mode: by threshold, or topk, exactly the target for each sample",
    )
    layer_shares: tuple[float, ...] | None = _field(
        None,
        "tokens of pruning layers relative to each other at exact budgets, unless a threshold learned others; "
        "default equal",
    )
    threshold: float = _field(0.5, "keep probability above which a token is kept in masked and hard mode")
    min_keep: int = _field(1, "vision tokens that every pruning layer keeps at least, per sample")
    max_keep: int | None = _field(None, "vision tokens that a pruning layer keeps at most, per sample")

    # pruners
    pruner_rank: int = _field(128, "width that a pruner compresses the hidden states to before it attends")
    pruner_dim: int = _field(512, "width of a pruner's attention and MLP")
    pruner_heads: int = _field(8, "attention heads of a pruner")
    pruner_qk_norm: bool = _field(
        True, "normalise the queries and keys of a pruner, so that the scores of its attention stay small"
    )
    use_question: bool = _field(True, "pruners read the question; if not, they see the picture alone")
    init_keep_logit: float = _field(4.0, "keep logit at the start; 4 keeps 98 % of the tokens at each layer")
    logit_cap: float = _field(6.0, "keep logits lie within plus and minus this, by a tanh that lets them come back")
    use_attn_residual: bool = _field(False, "add the layer's own question-to-vision attention to the keep logit")
    attn_residual_weight: float = _field(1.0, "weight of the attention residual (its start, if learnable)")
    learn_attn_residual: bool = _field(True, "learn the weight of the attention residual")

    # token merger
    enable_token_merger: bool = _field(False, "merge the vision features into merger_tokens before the projector")
    merger_tokens: int = _field(144, "tokens per image after the merger")
    merger_heads: int = _field(8, "attention heads of the merger")

    # mask estimator
    estimator: str = _field("gumbel_soft", f"gradient estimator of the mask: {', '.join(ESTIMATORS)}")
    temperature_start: float = _field(0.99, "Gumbel-Softmax temperature at the start")
    temperature_end: float = _field(0.4, "Gumbel-Softmax temperature at the end")
    temperature_anneal_ratio: float = _field(0.8, "share of training over which the temperature falls")
    final_masked_ratio: float = _field(0.2, "last share of training that runs on binary masks without noise")
    target_warmup_ratio: float = _field(0.5, "share of training over which the target eases in from 100 %")

    # alignment with the unpruned model
    alignment: str = _field("gan", f"how pruned text hidden states follow the unpruned: {', '.join(ALIGNMENTS)}")
    gan_loss: str = _field("non_saturating", f"adversarial loss: {', '.join(GAN_LOSSES)}")
    disc_layers: tuple[int, ...] = _field((-2, -5, -8), "decoder layers whose outputs the discriminator reads")
    disc_dim: int = _field(128, "width of the discriminator")
    spectral_norm: bool = _field(False, "spectral normalisation of the discriminator")
    pool_start_weight: float = _field(0.3, "pooling weight of the first text token")
    pool_end_weight: float = _field(1.0, "pooling weight of the last text token")
    noise_scale_start: float = _field(0.05, "noise on the first text token, relative to its RMS")
    noise_scale_end: float = _field(0.01, "noise on the last text token, relative to its RMS")
    gradient_penalty: float = _field(0.0, "weight of the discriminator's squared gradient at real and fake inputs")
    disc_max_accuracy: float = _field(0.9, "the discriminator rests while its accuracy is above this")

    # losses
    task_weight_start: float = _field(10.0, "weight of the answer's cross-entropy at the start")
    task_weight_end: float = _field(10.0, "weight of the answer's cross-entropy after the warm-up")
    adversarial_weight_start: float = _field(1.0, "weight of the alignment term at the start")
    adversarial_weight_end: float = _field(10.0, "weight of the alignment term after the warm-up")
    loss_weight_warmup_ratio: float = _field(0.3, "share of training over which the two weights move, by cosine")
    guidance_weight: float = _field(
        0.0, "weight of the cross-entropy of keep logits to what the unpruned answer depends on, at the start"
    )
    guidance_weight_end: float = _field(0.0, "weight of guidance once it has fallen")
    guidance_ratio: float = _field(0.5, "share of training over which guidance falls to its end, by cosine")
    guidance_only_ratio: float = _field(
        0.0,
        "first share of training by guidance alone, without masks; 1 trains pruners for prune_start",
    )
    guidance_replays: int = _field(
        0, "samples of earlier steps that a step of guidance alone learns from again, on each device"
    )
    guidance_memory: int = _field(512, "the last so many samples are remembered for guidance_replays, on each device")
    sparsity_weight: float = _field(1000.0, "weight of (kept fraction - target)^2, over the batch")
    budget_credit: str = _field(
        "all",
        "whom the budget losses move for the tokens of a layer: all pruners before it, or own, the last one alone",
    )
    sparsity_only_on_excess: bool = _field(False, "do not punish keeping less than the target")
    token_count_weight: float = _field(0.0, "weight of |average tokens - target| / vision tokens, per sample")
    binarization_weight: float = _field(1.0, "weight of 4 m (1 - m), which pushes masks to 0 or 1")

    # optimisation
    pruner_lr: float = _field(1e-4, "learning rate of pruners and merger")
    pruner_weight_decay: float = _field(0.0, "weight decay of pruners and merger")
    disc_lr: float = _field(1e-4, "learning rate of the discriminator")
    train_base: bool = _field(False, "train the language model and projector too (LoRA trains its own either way)")
    train_pruners: bool = _field(
        True, "train the pruners; if not, LoRA or the base learns to answer from what pruners of prune_start keep"
    )
    token_num_range: tuple[float, ...] | None = _field(
        None, "average tokens per image of a step without train_pruners, drawn between these two; default: the target"
    )
    compile_layers: bool = _field(
        False, "compile decoder layers, and pruners under guidance alone, for training; not under ZeRO-3"
    )
    guard_patience: int = _field(10, "logs in a row that must lie outside a guard's band before training stops")
    guard_task_loss: float = _field(4.0, "stop when the task loss stays this far above where it started")
    guard_keep_ratio: float = _field(
        0.1, "stop when average tokens above the floor, or dropped ones, stay below this share of the target's"
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.type.startswith(("int", "float")):
                object.__setattr__(self, each.name, _number(each.name, each.type, getattr(self, each.name)))
        for name in ("pruning_layers", "disc_layers"):
            try:
                value = tuple(int(layer) for layer in getattr(self, name))
            except TypeError:
                raise ValueError(f"{name} must be a list of layer numbers, got {getattr(self, name)!r}") from None
            object.__setattr__(self, name, value)
        layers = self.pruning_layers
        if not layers:
            raise ValueError("pruning_layers is empty: name at least one decoder layer, e.g. [6, 12, 18]")
        if list(layers) != sorted(set(layers)):
            raise ValueError(
                f"pruning_layers {list(layers)} must be in ascending order without repeats: {sorted(set(layers))}"
            )
        if layers[0] < 0:
            raise ValueError(f"pruning_layers {list(layers)}: layers are counted from 0")
        if (self.target_token_num is None) == (self.target_sparsity is None):
            state = "neither is" if self.target_token_num is None else "both are"
            raise ValueError(f"set exactly one of target_token_num and target_sparsity ({state} set)")
        if self.target_token_num is not None and not 0 < self.target_token_num < float("inf"):
            raise ValueError(f"target_token_num must be positive, got {self.target_token_num}")
        if self.target_sparsity is not None and not 0 < self.target_sparsity < 1:
            raise ValueError(f"target_sparsity must lie in (0, 1), got {self.target_sparsity}")
        for name, allowed in (
            ("selection", SELECTIONS),
            ("estimator", ESTIMATORS),
            ("alignment", ALIGNMENTS),
            ("gan_loss", GAN_LOSSES),
            ("budget_credit", CREDITS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not abs(self.init_keep_logit) < self.logit_cap:
            raise ValueError(
                f"init_keep_logit must lie between minus and plus logit_cap, {self.logit_cap:g}, got "
                f"{self.init_keep_logit:g}"
            )
        for name in ("gradient_penalty", "guidance_weight", "guidance_weight_end", "guidance_replays"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.guidance_weight and self.enable_token_merger:
            raise ValueError(
                "guidance_weight: the unpruned answer depends on tokens that the merger makes others of; set one of "
                "guidance_weight and enable_token_merger"
            )
        if self.guidance_weight_end > self.guidance_weight:
            raise ValueError(
                f"guidance_weight_end {self.guidance_weight_end:g} must be at most guidance_weight, "
                f"{self.guidance_weight:g}: guidance falls"
            )
        if self.guidance_only_ratio and (not self.guidance_weight or self.selection != "topk"):
            raise ValueError(
                "guidance_only_ratio needs a guidance_weight above 0 and selection 'topk': guidance ranks tokens and "
                "does not say how many to keep, which a threshold would have to know"
            )
        for name in (
            "temperature_anneal_ratio",
            "final_masked_ratio",
            "target_warmup_ratio",
            "loss_weight_warmup_ratio",
            "guidance_ratio",
            "guidance_only_ratio",
            "disc_max_accuracy",
            "threshold",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("temperature_start", "temperature_end", "pruner_lr", "disc_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "pruner_rank",
            "pruner_dim",
            "pruner_heads",
            "merger_tokens",
            "merger_heads",
            "disc_dim",
            "min_keep",
            "guidance_memory",
            "guard_patience",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("pruner_dim", "pruner_rank"):
            if getattr(self, name) % self.pruner_heads:
                raise ValueError(f"{name} {getattr(self, name)} must be divisible by pruner_heads {self.pruner_heads}")
        if self.token_num_range is not None:
            ends = tuple(float(end) for end in self.token_num_range)
            object.__setattr__(self, "token_num_range", ends)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                raise ValueError(f"token_num_range {list(ends)}: name the fewest and the most average tokens, above 0")
            if self.selection != "topk" and not self.train_pruners:
                raise ValueError("token_num_range is of exact budgets: set selection to 'topk', or leave it out")
        if self.estimator == "topk_st" and self.selection != "topk":
            raise ValueError("estimator 'topk_st' keeps exact counts: set selection to 'topk'")
        if self.layer_shares is not None:
            shares = tuple(float(share) for share in self.layer_shares)
            object.__setattr__(self, "layer_shares", shares)
            if len(shares) != len(layers) or min(shares) <= 0 or list(shares) != sorted(shares, reverse=True):
                raise ValueError(
                    f"layer_shares {list(shares)}: name a positive one for each of the {len(layers)} pruning layers, "
                    "none larger than the one before, since a dropped token does not come back"
                )
        if self.max_keep is not None and self.selection == "topk":
            raise ValueError("max_keep bounds selection 'threshold'; with 'topk' the target alone sets the counts")
        if self.max_keep is not None and self.max_keep < self.min_keep:
            raise ValueError(f"max_keep {self.max_keep} must be at least min_keep {self.min_keep}")

    # ---- what the targets mean

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError when a pruning or discriminator layer does not exist in a decoder of `num_layers`."""
        if self.pruning_layers[-1] >= num_layers:
            raise ValueError(
                f"pruning_layers {list(self.pruning_layers)} are out of range: this decoder has {num_layers} layers, "
                f"so they must lie in 0..{num_layers - 1}"
            )

    def disc_layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """Discriminator layers counted from 0.

        Raises:
            ValueError: a layer does not exist, or lies before the first pruning layer, where nothing differs.
        """
        indices = tuple(layer + num_layers if layer < 0 else layer for layer in self.disc_layers)
        first = self.pruning_layers[0]
        bad = [layer for layer, i in zip(self.disc_layers, indices, strict=True) if not first <= i < num_layers]
        if bad or not indices:
            raise ValueError(
                f"disc_layers {list(self.disc_layers)}: {bad} lie outside {first}..{num_layers - 1}, the layers that "
                f"see pruned tokens in a decoder of {num_layers} layers pruned from layer {first}"
            )
        return tuple(sorted(indices))

    def floor(self, vision_tokens: int, num_layers: int) -> float:
        """Average tokens that no pruner can go below: the layers before the first pruning layer see everything."""
        return self.pruning_layers[0] * vision_tokens / num_layers

    def with_budget(self, average_tokens: float) -> PruneConfig:
        """The same pruners at exactly `average_tokens` average tokens per image."""
        return dataclasses.replace(
            self, selection="topk", target_token_num=average_tokens, target_sparsity=None, max_keep=None
        )

    def check_budget(self, vision_tokens: int, num_layers: int) -> None:
        """Raises UnreachableBudget, with the floor in the message, when the target can not be reached."""
        floor = self.floor(vision_tokens, num_layers)
        target = self.target_token_num
        asked = f"target_token_num {target:g}" if target is not None else f"target_sparsity {self.target_sparsity:g}"
        if target is None:
            target = (1 - self.target_sparsity) * vision_tokens
        if target < floor:
            raise UnreachableBudget(
                f"{asked} is under the floor of {floor:g} average tokens ({floor / vision_tokens:.1%} of "
                f"{vision_tokens}): the {self.pruning_layers[0]} layers before the first pruning layer see all "
                "vision tokens. Raise the target or prune at an earlier layer"
            )
        if self.selection == "topk":  # every pruning layer keeps min_keep on top
            least = target if self.train_pruners else min([target, *(self.token_num_range or ())])
            layer_counts(vision_tokens, least, self.pruning_layers, num_layers, self.layer_shares, self.min_keep)

    def check_prunes(self, vision_tokens: int) -> None:
        """Raises ValueError when the target leaves nothing to prune."""
        if self.target_token_num is not None and self.target_token_num >= vision_tokens:
            raise ValueError(
                f"target_token_num {self.target_token_num:g} leaves nothing to prune of {vision_tokens} vision "
                "tokens: set fewer"
            )

    # ---- reading and writing

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of all fields, in order."""
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruneConfig:
        """Build from a dict; raises ValueError that names an unknown key and the nearest known one."""
        known = cls.field_names()
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown prune config key {key!r}; did you mean {near!r}?")
        return cls(**values)

    @classmethod
    def load(cls, source: str | Path, overrides: dict[str, Any] | None = None) -> PruneConfig:
        """Read a YAML or JSON file, or a preset by name, then apply `overrides`.

        An override of one of the two targets replaces the other.

        Raises:
            ValueError: no such file or preset, not a mapping, or a bad key or value (the source is named).
        """
        import yaml

        path = Path(source)
        if not path.is_file() and str(source) in preset_names():
            path = resources.files("llava_prune") / "presets" / f"{source}.yaml"
        if not path.is_file():
            raise ValueError(f"no prune config {str(source)!r}: give a YAML or JSON file or one of {preset_names()}")
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold 'key: value' lines, one per prune config field")
        overrides = dict(overrides or {})
        if "target_token_num" in overrides and "target_sparsity" not in overrides:
            values.pop("target_sparsity", None)
        if "target_sparsity" in overrides and "target_token_num" not in overrides:
            values.pop("target_token_num", None)
        try:
            return cls.from_dict({**values, **overrides})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists, ready for JSON or YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def dumps(self) -> str:
        """The config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def _number(name: str, kind: str, value: Any) -> float | None:
    """`value`, as a number where it is text: YAML takes 1e-5, without a dot, for text."""
    if value is None and kind.endswith("None"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not kind.startswith("int"):
        return number if isinstance(value, str) else value
    if not number.is_integer():
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(number)


def preset_names() -> list[str]:
    """Names accepted by `PruneConfig.load` instead of a file."""
    folder = resources.files("llava_prune") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
