"""LiNeS (arXiv 2410.17146): scale the update by depth, alone or on top of any other preset."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator

from guidetune import registry
from guidetune.registry import method
from guidetune.weightspace.scale import PerLayer, by_norm_ratio
from guidetune.weightspace.stages import On, Preset, Stages


@method(kind="weightspace", name="lines", paper="2410.17146", summary="Scale the update by depth: little below, all of it above.")
class Lines(Preset):
    """D(l) = (α + β · (l − 1) / (L − 1)) · τ(l) for block l of L, τ the update that `on` gives, with its own factor left out.

    One task: alpha from 0 to 1 on validation data, β = 1 − α. Several tasks: `alpha: norm`, (1 / N) ‖Σ τ_i‖₁ / ‖τ‖₁ (one more pass).
    """

    alpha: float | Literal["norm"] = Field(0.1, description="Factor of the first block; norm: from the norms of the updates.")
    beta: float | None = Field(None, allow_inf_nan=False, description="What the last block has more; default: 1 − alpha.")
    outside: Literal["first", "last"] = Field("first", description="Embeddings, final norm and head: as the first block, or as the last.")
    on: On = Field("sum", validate_default=True, description="The method that joins the sources.")

    @field_validator("on")
    @classmethod
    def _plain(cls, on: registry.Method) -> registry.Method:
        assert isinstance(on, Preset)
        if on.stages().scale is not None or on.stages().scale_from is not None:
            raise ValueError(f"{on.name} scales by depth itself")
        return on

    def stages(self) -> Stages:
        assert isinstance(self.on, Preset)
        inner = self.on.stages()
        if self.alpha == "norm":
            beta = 1.0 if self.beta is None else self.beta
            return replace(inner, factor=1.0, scale_from=by_norm_ratio(beta, self.outside))
        alpha = float(self.alpha)
        beta = 1.0 - alpha if self.beta is None else self.beta
        return replace(inner, factor=1.0, scale=PerLayer(alpha, beta, alpha if self.outside == "first" else alpha + beta))
