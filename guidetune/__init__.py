"""guidetune: specialise an instruction-tuned language model on a task without breaking it, and prove it.

The main job is GIFT (arXiv 2605.01256). Start reading at `guidetune/pipeline.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names, loaded when first used: `import guidetune` must not import torch.
_PUBLIC = {
    "run": "guidetune.pipeline",
    "compare": "guidetune.pipeline",
    "Recipe": "guidetune.recipe",
    "transfer": "guidetune.weightspace.apply",
    "evaluate": "guidetune.evaluation.evaluate",
    "BadInput": "guidetune.errors",
    "RunFailed": "guidetune.errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'guidetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
