"""SCE (arXiv 2408.07990)."""

from __future__ import annotations

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="sce", paper="2408.07990", summary="Select by variance, weigh by energy, erase minority signs.")
class Sce(Preset):
    """Of each tensor the values that vary most over the sources; the sources weighted by their energy there. Weights are not used."""

    select_topk: float = Field(0.1, gt=0, le=1, description="Share kept of the values whose variance is not zero (mergekit's default: 1).")
    scale: float = Field(1.0, allow_inf_nan=False, description="λ.")

    def stages(self) -> Stages:
        return Stages(combine.VarianceSelect(self.select_topk), factor=self.scale)
