"""DELLA (arXiv 2406.11617)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.sparsify import RankBernoulli
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="della", paper="2406.11617", summary="Drop values at random, the smaller of a row the likelier.")
class Della(Preset):
    """The probability of staying rises linearly with the rank in the row from density − epsilon to density + epsilon.

    What stays is divided by its own probability. The paper's window is 2 · epsilon.
    """

    density: float = Field(0.5, gt=0, lt=1, description="Mean probability of keeping a value.")
    epsilon: float = Field(0.1, ge=0, description="Half the width of the window of probabilities.")
    sign: Literal["sum", "elect"] = Field("elect", description="Sum the updates, or keep what agrees with the elected sign.")
    agg: Literal["mean", "sum"] = Field("mean", description="How values that have the elected sign are joined (mergekit: sum).")
    scale: float = Field(1.0, allow_inf_nan=False, description="λ.")

    @model_validator(mode="after")
    def _inside(self) -> Della:
        if not 0 < self.density - self.epsilon <= self.density + self.epsilon < 1:
            raise ValueError(f"density ± epsilon must lie between 0 and 1, not {self.density} ± {self.epsilon}")
        return self

    def stages(self) -> Stages:
        chosen = combine.SignElect(self.agg) if self.sign == "elect" else combine.Sum()
        return Stages(chosen, RankBernoulli(self.density, self.epsilon), factor=self.scale)
