"""Consensus merging with TALL masks (arXiv 2405.07813)."""

from __future__ import annotations

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="consensus", paper="2405.07813", summary="Keep of the sum what several sources hold for their own.")
class Consensus(Preset):
    """W + λ C ⊙ Σ w_i τ_i with C = 1 where at least `votes` sources have |τ_i| > threshold · |Σ w_j τ_j − τ_i|.

    votes 0 keeps everything; more votes than sources nothing.
    """

    votes: int = Field(2, ge=0, description="Sources that must hold a value for it to stay.")
    threshold: float = Field(0.4, ge=0, allow_inf_nan=False, description="λ_t of the masks; the paper tries 0.2 to 0.6.")
    scale: float = Field(1.0, allow_inf_nan=False, description="λ.")

    def stages(self) -> Stages:
        return Stages(combine.Consensus(self.votes, self.threshold), factor=self.scale)
