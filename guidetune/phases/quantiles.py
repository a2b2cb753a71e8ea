"""Phases between quantiles of the score."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from guidetune.phases import Candidates, Phases, ascending, by_edges
from guidetune.registry import method


@method(kind="phases", name="quantiles", paper="2406.04371", summary="Phases between quantiles of the score.")
class Quantiles(Phases):
    """The edges are quantiles (linear between neighbours) of all scores; equal scores stay in one phase, so sizes may differ."""

    at: list[float] = Field(min_length=1, description="Shares of the rows, between 0 and 1 and rising, as [0.33, 0.66].")

    @model_validator(mode="after")
    def _rising(self) -> Quantiles:
        ascending(self.at, "at")
        if not (0 < self.at[0] and self.at[-1] < 1):
            raise ValueError(f"at: {self.at} must lie between 0 and 1")
        return self

    def divide(self, candidates: Candidates) -> np.ndarray:
        return by_edges(candidates.scores, np.quantile(candidates.scores, self.at).tolist())
