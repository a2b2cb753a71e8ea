"""The training engine. `fit` is the one loop; the rest are its parts."""

from __future__ import annotations

from guidetune.engine.loop import FitResult, Objective, fit
from guidetune.engine.settings import TuneSettings

__all__ = ["FitResult", "Objective", "TuneSettings", "fit"]
