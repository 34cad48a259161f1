"""Going on from a checkpoint: which one, whether it is of this training, and what the host does not save in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from .checkpoint import write_atomically

STATE_FILE = "trainer_state.json"  # the host's, written last
TRAINING_FILE = "prune_training.json"
BESIDE_LORA_FILE = "non_lora_trainables.bin"  # by LLaVA's name, though with the names of this very model's weights


def newest_complete(output_dir: str) -> str | None:
    """The newest `checkpoint-N` of a training that holds the file that is written last, or None."""
    complete = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}")]
    steps = {int(path.name.rsplit("-", 1)[1]): path for path in complete if path.name.rsplit("-", 1)[1].isdigit()}
    return str(steps[max(steps)]) if steps else None


def is_finished(checkpoint: str, args: Any) -> bool:
    """Whether a checkpoint is of the last step that training arguments ask for."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs


def save_training(directory: str, training: dict[str, Any]) -> None:
    """Say in a checkpoint which training it is of, in `prune_training.json`."""
    text = json.dumps(training) + "\n"
    write_atomically(Path(directory) / TRAINING_FILE, lambda path: path.write_text(text))


def check_same_training(checkpoint: str, training: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint is of a training with another seed, base or number of samples."""
    path, advice = Path(checkpoint) / TRAINING_FILE, "use another output_dir, or remove the checkpoints to train anew"
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {TRAINING_FILE}, which says of what training it is: {advice}")
    written = json.loads(path.read_text())
    for name, now in training.items():
        if written.get(name) != now:
            raise ValueError(
                f"{checkpoint} is of another training, with {name} {written.get(name)!r} and not {now!r}: {advice}"
            )


def save_beside_lora(model: nn.Module, directory: str) -> None:
    """What is trained beside LoRA, which PEFT leaves out of its files: LLaVA trains its projector."""
    weights = {name: parameter.detach().cpu() for name, parameter in _beside_lora(model).items()}
    if weights:
        write_atomically(Path(directory) / BESIDE_LORA_FILE, lambda path: torch.save(weights, path))


def load_beside_lora(model: nn.Module, checkpoint: str) -> None:
    """Back into the model that `save_beside_lora` was given."""
    parameters = _beside_lora(model)
    if not parameters:
        return
    weights = torch.load(Path(checkpoint) / BESIDE_LORA_FILE, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _beside_lora(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name and ".llava_pruners." not in name
    }
