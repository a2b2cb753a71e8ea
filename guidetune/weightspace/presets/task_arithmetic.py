"""Task arithmetic (arXiv 2212.04089)."""

from __future__ import annotations

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="task_arithmetic", paper="2212.04089", summary="One factor for the summed updates; negative: unlearn.")
class TaskArithmetic(Preset):
    """W + λ Σ w_i τ_i."""

    scale: float = Field(1.0, allow_inf_nan=False, description="λ; the paper uses 0.3 to 0.4 for eight tasks.")
    normalize: bool = Field(False, description="Divide by Σ w_i.")

    def stages(self) -> Stages:
        return Stages(combine.Sum(self.normalize), factor=self.scale)
