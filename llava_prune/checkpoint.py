"""Pruner-only checkpoints: `pruners.safetensors` and `prune_config.json`, for one base model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from . import compat
from .budget import check_average
from .config import PruneConfig
from .patch import PruneHandle, attach_pruners, check_mode, find_handle, require_handle, set_mode

WEIGHTS = "pruners.safetensors"
CONFIG = "prune_config.json"
FORMAT_VERSION = 4  # of 4, vision tokens look at each other
# settings that say which weights there are, and of what shape
SHAPING = (
    "pruning_layers",
    "pruner_rank",
    "pruner_dim",
    "pruner_heads",
    "pruner_qk_norm",
    "use_question",
    "use_attn_residual",
    "enable_token_merger",
    "merger_tokens",
    "merger_heads",
)


def base_identity(model: nn.Module) -> dict[str, Any]:
    """What pruners must match to fit a model: name, decoder width and depth."""
    decoder = compat.find_decoder(model)
    # the decoder's config is the whole model's for LLaVA, a nested one for Hugging Face classes
    name = getattr(model.config, "llava_prune_base", None) or getattr(model.config, "_name_or_path", "")
    parts = [part for part in str(name).replace("\\", "/").split("/") if part]
    if parts and re.fullmatch(r"checkpoint-\d+", parts[-1]) and len(parts) > 1:
        parts.pop()
    return {
        "name": parts[-1] if parts else "",
        "hidden_size": decoder.config.hidden_size,
        "num_layers": len(decoder.layers),
    }


def _comparable(name: str) -> str:
    """`liuhaotian/llava-v1.5-7b` and `llava-hf/llava-1.5-7b-hf` are one base."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("hf").replace("llavav", "llava")


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Full parameters under ZeRO-3, on every rank; without ZeRO-3 nothing happens."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        context = deepspeed.zero.GatheredParameters(parameters)
    else:
        context = nullcontext()
    with context:
        yield


def pruner_state_dict(handle: PruneHandle) -> dict[str, Tensor]:
    """Full pruner weights on the CPU; under ZeRO-3 every rank must call this."""
    with gathered(list(handle.pruners.parameters())):
        return {name: value.detach().cpu().clone().contiguous() for name, value in handle.pruners.state_dict().items()}


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary_path)`, flush to disk, then rename over `path`: a kill leaves the old file or the new.

    Of several writers of one file the last to end has it; a failure leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # of this call alone
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pruners(model: nn.Module, directory: str | Path, write: bool = True) -> None:
    """Save the pruners of `model` as `pruners.safetensors` and `prune_config.json`.

    Args:
        model: a model with pruners attached.
        directory: made if it does not exist.
        write: False on ranks that only take part in gathering ZeRO-3 parameters.

    Raises:
        ValueError: no pruners attached, or a baseline, or a weight that is not finite.
    """
    from safetensors.torch import save

    handle = require_handle(model)
    if not handle.pruners.layers:
        raise ValueError("a baseline has no weights to save: attach pruners with attach_pruners(model, config)")
    weights = pruner_state_dict(handle)
    if lost := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{lost[0]} is not finite, nor are {len(lost) - 1} other weights: such pruners are not saved. Go on from "
            "an earlier checkpoint with a lower pruner_lr"
        )
    if not write:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        "format_version": FORMAT_VERSION,
        "base_model": base_identity(model),
        "vision_tokens": handle.vision_tokens,
        "prune_config": handle.config.to_dict(),
        "keep_fractions": handle.state.keep_fractions,
    }
    metadata = {"format": "pt"}  # one entry: the order of several is not fixed, and equal weights are equal files
    write_atomically(directory / WEIGHTS, lambda path: path.write_bytes(save(weights, metadata)))
    write_atomically(directory / CONFIG, lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))


def read_description(directory: str | Path) -> dict[str, Any]:
    """`prune_config.json` of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: missing or damaged, with what to do.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {directory}: give the output directory of a finished training")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        _check_shape(description)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again from where it was trained") from error
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is of format {version}, this llava_prune reads format {FORMAT_VERSION}: use the version that "
            "wrote it, or train again"
        )
    description["prune_config"].setdefault("pruner_qk_norm", False)  # of files from before there was such a thing
    return description


def _check_shape(description: Any) -> None:
    """Raises KeyError or TypeError where a description lacks what every one has."""
    config, base = description["prune_config"], description["base_model"]
    for name, value, kind in (
        ("prune_config", config, dict),
        ("base_model.name", base["name"], str),
        ("base_model.hidden_size", base["hidden_size"], int),
        ("base_model.num_layers", base["num_layers"], int),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")
    fractions = description.get("keep_fractions")
    if fractions is not None and len(fractions) != len(config["pruning_layers"]):
        raise TypeError(f"{len(fractions)} keep_fractions for {len(config['pruning_layers'])} pruning layers")


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """`pruners.safetensors` of a checkpoint; errors as `read_description`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"no {WEIGHTS} in {directory}: give the output directory of a finished pruner training"
        )
    advice = "copy it again from where it was trained, or train again"
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): {advice}") from error
    if lost := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{path} is damaged, since {lost[0]} is not finite: {advice}")
    return weights


def check_base(
    description: dict[str, Any],
    model: nn.Module,
    allow_other_base: bool,
    advice: str = "pass allow_other_base=True (--allow_other_base)",
) -> None:
    """Raises ValueError when pruners were trained on another base model than `model`.

    Args:
        advice: what to do where it is the same base under another name.
    """
    trained, here = description["base_model"], base_identity(model)
    for key, what in (("hidden_size", "hidden size"), ("num_layers", "decoder layers")):
        if trained[key] != here[key]:
            raise ValueError(
                f"these pruners were trained on {trained['name'] or 'a model'} with {what} {trained[key]}, this model "
                f"has {here[key]}: load the base model they were trained on, or train pruners for this one"
            )
    names = _comparable(trained["name"]), _comparable(here["name"])
    if all(names) and names[0] != names[1] and not allow_other_base:
        raise ValueError(
            f"these pruners were trained on {trained['name']!r}, this model is {here['name']!r}: pruners fit only the "
            f"weights they were trained on. If it is the same model under another name, {advice}"
        )


def load_pruners(
    model: nn.Module,
    directory: str | Path,
    mode: str = "hard",
    allow_other_base: bool = False,
    average_tokens: float | None = None,
) -> PruneHandle:
    """Load pruners onto `model`, attaching them if needed, and set the mode. Every weight must match.

    Args:
        model: the base model that the pruners were trained on.
        directory: holds `pruners.safetensors` and `prune_config.json`.
        mode: `origin`, `soft`, `masked` or `hard`.
        allow_other_base: accept a base model of the same shape under another name.
        average_tokens: keep exactly this many tokens per image, averaged over the decoder layers (or, where integer
            counts can not make it, less than one token fewer), whatever budget the pruners were trained for. The
            layers share it as they did in training. None selects as the pruners' own configuration says.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: average_tokens is under its floor or more than an image has, a file is damaged, the base model
            differs, weights do not match, or pruners of another configuration (or budget) are attached. The model is
            left as it was.
    """
    check_mode(mode)
    description = read_description(directory)
    weights = read_weights(directory)
    check_base(description, model, allow_other_base)
    config = PruneConfig.from_dict(description["prune_config"])
    if average_tokens is not None:
        check_average(average_tokens, description.get("vision_tokens"))
        config = config.with_budget(average_tokens)
    handle = find_handle(model)
    attached_here = handle is None
    if attached_here:
        handle = attach_pruners(model, config)
    elif handle.config != config:
        raise ValueError(
            f"the attached pruners have another configuration or budget than {directory}: call detach_pruners(model) "
            "first"
        )
    try:
        _copy_weights(handle.pruners, weights, directory)
    except ValueError:
        if attached_here:
            handle.remove()
        raise
    fractions = description.get("keep_fractions")
    handle.state.keep_fractions = None if fractions is None else tuple(fractions)
    set_mode(model, mode)
    return handle


def start_from(model: nn.Module, directory: str | Path) -> dict[str, Any]:
    """Give attached pruners the weights of others, whose budget, losses and estimator may have been others.

    Returns:
        The others' description, as `read_description`.

    Raises:
        FileNotFoundError, ValueError: as `load_pruners`, or pruners of other layers or sizes than those attached.
    """
    description, weights = read_description(directory), read_weights(directory)
    check_base(description, model, False, advice="give its folder that name")
    handle, theirs = require_handle(model), PruneConfig.from_dict(description["prune_config"])
    differing = [name for name in SHAPING if getattr(theirs, name) != getattr(handle.config, name)]
    if differing:
        raise ValueError(
            f"the pruners in {directory} have other {', '.join(differing)}: start from pruners of the same, or train "
            "without prune_start"
        )
    _copy_weights(handle.pruners, weights, directory)
    return description


def _copy_weights(pruners: nn.Module, weights: dict[str, Tensor], directory: str | Path) -> None:
    parameters = list(pruners.parameters())
    partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)
    with gathered(parameters), torch.no_grad():
        own = pruners.state_dict()
        missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        mismatched = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
        if missing or unexpected or mismatched:
            raise ValueError(
                f"{Path(directory) / WEIGHTS} does not fit its {CONFIG}: missing {missing}, unexpected {unexpected}, "
                f"of another shape {mismatched}; the two files must come from one training run"
            )
        if partitioned:
            raise ValueError("load pruners before deepspeed.initialize: under ZeRO-3 the weights are already split")
        pruners.load_state_dict(weights)
