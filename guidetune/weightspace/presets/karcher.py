"""The Karcher mean: the point on the sphere with the least squared angle to several models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="karcher", summary="The spherical mean of several models, tensor by tensor.")
class Karcher(Preset):
    """The mean of the directions v_i / ‖v_i‖ on the sphere, times Σ a_i ‖v_i‖, a the weights over their sum.

    Found by iteration on the Gram matrix of the tensors alone. Of two sources it is SLERP at t = w_2 / (w_1 + w_2) with the mean norm.
    """

    sources_needed: ClassVar[tuple[int, int | None]] = (2, None)

    of: Literal["models", "updates"] = Field("models", description="What is averaged.")
    iterations: int = Field(100, ge=1, description="Most iterations.")
    tolerance: float = Field(1e-10, gt=0, description="Length of a step at which it is done.")

    def stages(self) -> Stages:
        return Stages(combine.Spherical(self.of, self.iterations, self.tolerance, always_mean=True))
