"""Names of folders that change with all that determines what is in them, so that nothing stale is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
_PICTURES = tuple(f"testbed/{name}.py" for name in ("pictures", "words", "questions", "mosaic"))
# sources that determine each kind of result
DATA = (*_PICTURES, "testbed/prepare.py", *(f"testbed/mini/{name}.py" for name in ("data", "wordings")))
BASE = (
    *_PICTURES,
    "testbed/base_data.py",
    "testbed/make_base.py",
    *(
        f"testbed/mini/{name}.py"
        for name in ("base", "trainee", "conversations", "assemble", "language", "vision", "pack", "data")
    ),
    "testbed/mini/wordings.py",
)
TRAINING = ("*.py",)
COMPARING = ("*.py", "baselines/*.py", "comparing/*.py", "reporting/*.py", "visualize/chat.py")


def digest(*values: Any) -> str:
    """Twelve hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def sources(*patterns: str) -> str:
    """Digest of this package's source files."""
    files = sorted(path for pattern in patterns for path in PACKAGE.glob(pattern))
    return digest([[str(path.relative_to(PACKAGE)), path.read_text(encoding="utf-8")] for path in files])


def content(path: Path) -> str:
    """Digest of a file, large ones too."""
    with path.open("rb") as file:
        hashed = hashlib.sha256()
        while block := file.read(1 << 22):
            hashed.update(block)
    return hashed.hexdigest()[:12]
