"""Model soups (arXiv 2203.05482): the weighted average of models."""

from __future__ import annotations

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="linear", paper="2203.05482", summary="The weighted average of the models (soup).")
class Linear(Preset):
    """W + Σ w_i τ_i / Σ w_i, which is Σ w_i θ_i / Σ w_i where the sources are models minus the anchor."""

    def stages(self) -> Stages:
        return Stages(combine.Sum(normalize=True))
