"""Model Stock (arXiv 2403.19522)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="model_stock", paper="2403.19522", summary="Average the updates, shrunk by the angle between them.")
class ModelStock(Preset):
    """W + t · mean(τ_i), t = N c / (1 + (N − 1) c) for each tensor, c the mean cosine between its updates. Weights are not used."""

    sources_needed: ClassVar[tuple[int, int | None]] = (2, None)

    clamp: bool = Field(True, description="Keep t in [0, 1]; mergekit does not.")

    def stages(self) -> Stages:
        return Stages(combine.ModelStock(self.clamp))
