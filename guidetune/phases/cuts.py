"""Phases between fixed scores."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from guidetune.errors import BadInput
from guidetune.phases import Candidates, Phases, ascending, by_edges
from guidetune.registry import method


@method(kind="phases", name="cuts", paper="2406.04371", summary="Phases between fixed scores, from the easiest rows to the hardest.")
class Cuts(Phases):
    """Phase k holds the rows with edge_k <= score < edge_{k+1}; the published edges are 1.5 and 3.5 on scores from 1 to 5."""

    at: list[float] = Field(min_length=1, description="The edges, rising; a row with the score of an edge belongs to the phase above it.")

    @model_validator(mode="after")
    def _rising(self) -> Cuts:
        ascending(self.at, "at")
        return self

    def divide(self, candidates: Candidates) -> np.ndarray:
        low, high = candidates.scores.min(), candidates.scores.max()
        if outside := [edge for edge in self.at if not low < edge <= high]:
            raise BadInput(
                f"phases: the cut {outside[0]:g} lies outside of the scores, which go from {low:g} to {high:g}: a phase would be empty"
            )
        return by_edges(candidates.scores, self.at)
