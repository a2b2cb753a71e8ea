"""TIES merging (arXiv 2306.01708)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace.combine import SignElect
from guidetune.weightspace.sparsify import KeepBand, Scope
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="ties", paper="2306.01708", summary="Trim small values, elect a sign, average what agrees with it.")
class Ties(Preset):
    """W + λ · mean of the trimmed updates that have the elected sign.

    The paper trims over a source's whole update and gives undecided values the sign of the majority; mergekit trims each tensor
    and lets them count as positive (`scope: tensor, tie: plus`).
    """

    density: float = Field(0.2, ge=0, le=1, description="Share of values kept, largest magnitudes first.")
    scope: Scope = Field("global", description="What the share is taken of: a source's whole update, each tensor, or each row.")
    agg: Literal["mean", "sum"] = Field("mean", description="How values that agree are joined.")
    tie: Literal["majority", "plus"] = Field("majority", description="The sign of values whose weighted sum is zero.")
    scale: float = Field(1.0, allow_inf_nan=False, description="λ.")

    def stages(self) -> Stages:
        return Stages(SignElect(self.agg, self.tie), KeepBand(self.density, scope=self.scope), factor=self.scale)
