"""AdaMerging (arXiv 2310.02575)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from guidetune.registry import method
from guidetune.weightspace.coefficients import Blend, Coefficients, Schedule, descend, losses, task_batches
from guidetune.weightspace.learning import Cost, Learned, Study, batch_loss, entropy
from guidetune.weightspace.scale import PerLayer
from guidetune.weightspace.sparsify import KeepBand
from guidetune.weightspace.stages import Sparsifier, Stages, layers


@method(
    kind="weightspace", name="adamerging", paper="2310.02575", summary="Learn each update's factors: make predictions without labels sure."
)
class AdaMerging(Learned):
    """W + Σ λ_i τ_i (`by: source`) or W^j + Σ λ_i^j τ_i^j for each tensor j (`by: tensor`), λ of least Σ_tasks mean entropy of predictions.

    The paper looks at the prediction of a class; here it is that of the next token: after the prompt (`data.unlabelled`), or at every
    supervised position of rows with answers, whose tokens are read but never asked for. `density` below 1 trims the updates as TIES
    does first (AdaMerging++). `lines` starts the coefficients by depth instead of at `init` (LiNeS, arXiv 2410.17146).
    """

    by: Literal["source", "tensor"] = Field("tensor", description="One coefficient for each source, or for each of its tensors.")
    init: float = Field(0.3, allow_inf_nan=False, description="Where all coefficients start.")
    lines: tuple[float, float] | None = Field(None, description="[α, β]: start at α + β (l − 1) / (L − 1) in block l of L, at α outside.")
    density: float = Field(1.0, gt=0, le=1, description="Share of each update that is kept, largest magnitudes first; 0.2 is AdaMerging++.")
    steps: int = Field(500, ge=1, description="Optimiser steps, each over one batch of every task.")
    batch: int = Field(16, ge=1, description="Rows of each task in a step.")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="Learning rate of Adam.")

    @model_validator(mode="after")
    def _one_start(self) -> AdaMerging:
        if self.lines is not None and self.by == "source":
            raise ValueError("lines starts coefficients by depth, which one coefficient for each source (by: source) has not")
        return self

    def _sparsify(self) -> Sparsifier:
        return KeepBand(self.density, scope="global") if self.density < 1 else Sparsifier()

    def stages_from(self, folder: Path) -> Stages:
        return Stages(Coefficients(folder), self._sparsify())

    def cost(self, study: Study) -> Cost:
        passes = self.steps * sum(min(self.batch, len(study.rows_of(task))) for task in study.tasks)
        return Cost(passes, passes, disk=0, memory=study.memory())

    def learn(self, study: Study, work: Path) -> dict[str, Any]:
        with study.composed(self._sparsify()) as composed, composed.forward() as forward:
            blend = Blend(composed, study.merged.ids, self.by == "tensor")
            blend.values.fill_(self.init)
            if self.lines is not None:
                alpha, beta = self.lines
                depth = layers(study.anchor.names.shapes)
                for j, name in enumerate(blend.blocks):
                    blend.values[:, j] = PerLayer(alpha, beta, alpha).at(depth.get(name))

            def loss(step: int) -> float:
                return sum(batch_loss(forward, task.rows, rows, entropy) for task, rows in task_batches(study, self.batch, step))

            history = descend(blend, Schedule(self.steps, self.lr), loss, self.name)
        blend.table().save(work, study.labels)
        losses(work, history)
        return {"loss_first": history[0], "loss_last": history[-1], "mean_coefficient": float(torch.mean(blend.values))}
