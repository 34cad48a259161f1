"""llava_prune: learn which vision tokens a LLaVA can do without, and remove them."""

from .checkpoint import load_pruners, save_pruners
from .config import PruneConfig
from .fast import FastHandle, accelerate
from .patch import PruneHandle, attach_pruners, detach_pruners, prune_mode
from .report import Report, last_report
from .version import __version__

__all__ = [
    "FastHandle",
    "PruneConfig",
    "PruneHandle",
    "Report",
    "__version__",
    "accelerate",
    "attach_pruners",
    "detach_pruners",
    "last_report",
    "load_pruners",
    "prune_mode",
    "save_pruners",
]
