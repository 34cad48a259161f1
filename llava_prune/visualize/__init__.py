"""Pictures of what was kept.

`grid` says which pixels a vision token saw, `chat` asks a model, `sample` holds what came out; `png`, `page` and
`command` write it down, and `recorded` reads what `run --report` wrote.
"""

from .png import draw_kept_tokens
from .sample import Sample, recorded_sample

__all__ = ["Sample", "draw_kept_tokens", "recorded_sample"]
