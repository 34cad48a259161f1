"""Puts the shipped base model where LLaVA can load it."""

import filecmp
import json
import os
import shutil
from pathlib import Path

MODEL_NAME = "llava-mosaic-tiny"


def install_base(directory: str | os.PathLike) -> Path:
    """Copies the shipped checkpoint to `directory/llava-mosaic-tiny`, unless it is there already.

    LLaVA wants the vision tower named by an absolute path, so this writes one into `config.json`: do not move the
    folder afterwards, install again instead.

    Returns:
        The checkpoint's absolute path, for `--model_name_or_path` or `load_pretrained_model`.
    """
    target = Path(directory).resolve() / MODEL_NAME
    source = Path(__file__).parent / "base"
    config = json.loads((source / "config.json").read_text())
    config["mm_vision_tower"] = str(target / config["mm_vision_tower"])
    if _is_installed(source, target, config):
        return target
    staging = target.with_name(f".{MODEL_NAME}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    return target


def _is_installed(source: Path, target: Path, config: dict) -> bool:
    """Whether `target` holds `config` and every other file of `source`, byte for byte."""
    if not (target / "config.json").is_file() or json.loads((target / "config.json").read_text()) != config:
        return False
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    _, different, unreadable = filecmp.cmpfiles(source, target, set(names) - {"config.json"}, shallow=False)
    return not different and not unreadable
