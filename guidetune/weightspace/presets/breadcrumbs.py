"""Model Breadcrumbs (arXiv 2312.06795)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.sparsify import KeepBand, Scope
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="breadcrumbs", paper="2312.06795", summary="Drop the largest and the smallest values, sum the rest.")
class Breadcrumbs(Preset):
    """W + α Σ w_i m_i τ_i, m_i = 1 for magnitudes that rank from drop_top · n + 1 to (drop_top + keep) · n.

    The paper's code ranks within each row, mergekit within each tensor (`scope: tensor, order: fit`: there the share that is kept
    counts first, and keeping everything drops nothing).
    """

    keep: float = Field(0.15, ge=0, le=1, description="Share of values kept.")
    drop_top: float = Field(0.006, ge=0, le=1, description="Share of the largest magnitudes that is dropped.")
    scope: Scope = Field("row", description="What the shares are taken of.")
    order: Literal["first", "last", "fit"] = Field(
        "first", description="first: drop the largest, then keep; last: keep the largest, then drop of those; fit: mergekit's rule."
    )
    sign: Literal["sum", "elect"] = Field("sum", description="elect: TIES' sign election on what is kept (breadcrumbs_ties).")
    agg: Literal["mean", "sum"] = Field("mean", description="How values that have the elected sign are joined (mergekit: sum).")
    scale: float = Field(0.3, allow_inf_nan=False, description="α.")

    @model_validator(mode="after")
    def _band(self) -> Breadcrumbs:
        if self.order == "first" and self.keep + self.drop_top > 1 + 1e-9:
            raise ValueError(f"keep + drop_top is {self.keep + self.drop_top:g}, more than there is; lower one, or use order: fit")
        return self

    def stages(self) -> Stages:
        band = KeepBand(self.keep, self.drop_top, self.scope, "last" if self.order == "last" else "first", self.order == "fit")
        return Stages(combine.SignElect(self.agg) if self.sign == "elect" else combine.Sum(), band, factor=self.scale)
