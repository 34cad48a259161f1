"""A trained base as its difference to the parts it was made of, in 4 bits: small enough to be sent about.

Matrices that changed are stored as differences, in groups of 64 with a scale each; other weights that changed are
stored as they are; what did not change is left out. A base that is packed is what is unpacked again: the rounding is
a part of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

GROUP = 64  # weights that share a scale
LEVELS = 7  # steps to either side of 0
SMALL = 100_000  # weights of a matrix that is stored as it is
FILE_BYTES = 15 * 2**20  # of a file, unless one tensor is larger

Weights = dict[str, Tensor]


def pack(before: Weights, after: Weights, whole: str = "multi_modal_projector") -> Weights:
    """What `unpack` needs to make `after` of `before`, nearly.

    Args:
        before, after: state dicts of one model, fp32.
        whole: in the names of weights that started at random, and are stored as they are.

    Returns:
        `<name>:codes` uint8 and `<name>:scales` fp16 of a difference, `<name>` of a whole tensor.
    """
    packed: Weights = {}
    for name, weight in after.items():
        weight, old = weight.detach().cpu().float(), before[name].cpu().float()
        if torch.equal(weight, old) and whole not in name:
            continue
        if whole in name or weight.dim() != 2 or weight.numel() < SMALL or weight.numel() % (2 * GROUP):
            packed[name] = weight.half().contiguous()
            continue
        difference = (weight - old).reshape(-1, GROUP)
        scales = (difference.abs().amax(1) / LEVELS).clamp(min=2.0**-24).half()
        levels = (difference / scales[:, None].float()).round().clamp(-LEVELS, LEVELS).to(torch.int8) + LEVELS
        low, high = levels.flatten().view(-1, 2).to(torch.uint8).unbind(1)
        packed[f"{name}:codes"], packed[f"{name}:scales"] = low | high << 4, scales
    return packed


def unpack(before: Weights, packed: Weights) -> Weights:
    """The weights of `pack`'s `after`, fp32 on the CPU.

    Raises:
        ValueError: `packed` is of another model.
    """
    if foreign := sorted({name.split(":")[0] for name in packed} - before.keys()):
        raise ValueError(f"the packed base has weights that this model has not: {foreign[:3]}")
    after: Weights = {}
    for name, old in before.items():
        old = old.detach().cpu().float()
        if f"{name}:codes" in packed:
            codes, scales = packed[f"{name}:codes"], packed[f"{name}:scales"].float()
            levels = torch.stack([codes & 15, codes >> 4], 1).flatten().float() - LEVELS
            after[name] = old + (levels.view(-1, GROUP) * scales[:, None]).view_as(old)
        else:
            after[name] = packed.get(name, old).float()
    return after


def write_packed(packed: Weights, folder: Path) -> None:
    """Several files `packed-N.safetensors` of at most `FILE_BYTES`; `folder` is made if need be."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("packed-*.safetensors"):
        path.unlink()
    files: list[Weights] = []
    free = 0
    for name, value in sorted(packed.items()):
        if value.nbytes > free:
            files.append({})
            free = FILE_BYTES
        files[-1][name] = value
        free -= value.nbytes
    for number, part in enumerate(files):
        save_file(part, folder / f"packed-{number}.safetensors")


def packed_files(folder: Path) -> list[Path]:
    """The files in their order; raises FileNotFoundError if there are none."""
    files = sorted(folder.glob("packed-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no packed-*.safetensors in {folder}: give the folder that --pack wrote")
    return files


def read_packed(folder: Path) -> Weights:
    """What `write_packed` wrote; raises FileNotFoundError if there is nothing."""
    from safetensors.torch import load_file

    return {name: value for path in packed_files(folder) for name, value in load_file(path).items()}
