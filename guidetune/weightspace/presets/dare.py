"""DARE (arXiv 2311.03099)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.sparsify import Bernoulli
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="dare", paper="2311.03099", summary="Drop values at random, rescale the rest, join them.")
class Dare(Preset):
    """τ̂ = m τ / density with m ~ Bernoulli(density); then Σ w_i τ̂_i, or TIES' sign election (`sign: elect`, DARE-TIES)."""

    density: float = Field(0.1, gt=0, le=1, description="Probability of keeping a value (1 minus the paper's drop rate).")
    sign: Literal["sum", "elect"] = Field("sum", description="Sum the updates, or keep what agrees with the elected sign.")
    agg: Literal["mean", "sum"] = Field("mean", description="How values that have the elected sign are joined (mergekit: sum).")
    rescale: Literal["expected", "l1", "none"] = Field("expected", description="1 / density, or the tensor's own L1 norm (mergekit).")
    scale: float = Field(1.0, allow_inf_nan=False, description="λ.")

    def stages(self) -> Stages:
        chosen = combine.SignElect(self.agg) if self.sign == "elect" else combine.Sum()
        return Stages(chosen, Bernoulli(self.density, self.rescale), factor=self.scale)
