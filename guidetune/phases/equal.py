"""Phases of equal size."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from guidetune.errors import BadInput
from guidetune.phases import Candidates, Phases
from guidetune.registry import method


@method(kind="phases", name="equal", paper="2406.04371", summary="Phases of equal size in rows or tokens, in the order of the score.")
class Equal(Phases):
    """Rows in the order of their scores, equal scores in a random order of the seed and their ids, dealt out in equal parts.

    The lowest score of a phase is at least the highest of the one before; rows of equal score may lie in two phases.
    """

    phases: int = Field(3, ge=2, description="Number of phases.")
    size: Literal["rows", "tokens"] = Field("rows", description="What is equal: the number of rows, or of tokens.")

    def divide(self, candidates: Candidates) -> np.ndarray:
        n = len(candidates.scores)
        if n < self.phases:
            raise BadInput(f"phases: {n} rows cannot fill {self.phases} phases")
        order = np.lexsort((candidates.draw, candidates.scores))
        size = np.ones(n) if self.size == "rows" else candidates.tokens[order].astype(np.float64)
        before = np.cumsum(size) - size  # what lies before each row decides, so that the first phase begins with the first row
        found = np.empty(n, dtype=np.int64)
        found[order] = np.minimum((before * self.phases / size.sum()).astype(np.int64), self.phases - 1)
        return found
