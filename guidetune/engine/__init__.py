"""The training engine. `fit` is the one loop; the rest are its parts."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Loaded when first used: a recipe needs the settings, not torch.
_PUBLIC = {"fit": "loop", "FitResult": "loop", "Objective": "loop", "Part": "loop", "TuneSettings": "settings"}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"guidetune.engine.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'guidetune.engine' has no attribute {name!r}")
