"""Spherical interpolation of two models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="slerp", summary="Interpolate two models on the sphere, tensor by tensor.")
class Slerp(Preset):
    """[sin((1 − t) Ω) v_1 + sin(t Ω) v_2] / sin Ω with t = w_2 / (w_1 + w_2); a straight line where |cos Ω| > linear_above.

    of: the models themselves (then sources are models minus the anchor), or their updates (NuSLERP with a base).
    """

    sources_needed: ClassVar[tuple[int, int | None]] = (2, 2)

    of: Literal["models", "updates"] = Field("models", description="What is interpolated.")
    linear_above: float = Field(0.9995, gt=0, le=1, description="Cosine above which the way is straight (NuSLERP: 1).")

    def stages(self) -> Stages:
        return Stages(combine.Spherical(self.of, linear_above=self.linear_above))
