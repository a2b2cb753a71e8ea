"""Phases between the valleys of the scores' density."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from guidetune.errors import BadInput
from guidetune.phases import Candidates, Phases, by_edges
from guidetune.registry import method

GRID = 512
_CHUNK = 1 << 12


@method(kind="phases", name="valleys", paper="2406.04371", summary="Phases between the valleys of the scores' estimated density.")
class Valleys(Phases):
    """The published edges were picked by eye from a kernel density; this picks them by rule.

    Density with a Gaussian kernel of bandwidth h = 1.06 sigma n^(-1/5) on a grid of 512 points over the scores; cuts are its local
    minima, deepest first, as long as every phase keeps `min_share` of the rows and there are at most `most` phases.
    """

    min_share: float = Field(0.1, gt=0, le=0.5, description="Smallest share of the rows in a phase.")
    most: int = Field(5, ge=2, description="Largest number of phases.")

    def divide(self, candidates: Candidates) -> np.ndarray:
        edges = self.edges(candidates.scores)
        if not edges:
            raise BadInput(
                f"phases: the density of the score {self.by!r} has no valley that leaves {self.min_share:g} of the rows on both sides; "
                "divide by cuts or quantiles"
            )
        return by_edges(candidates.scores, edges)

    def edges(self, scores: np.ndarray) -> list[float]:
        """The cuts, rising; none when there is no valley that is allowed."""
        grid, density = kernel_density(scores)
        inner = np.arange(1, len(grid) - 1)
        minima = inner[(density[inner] < density[inner - 1]) & (density[inner] <= density[inner + 1])]
        chosen: list[float] = []
        for k in sorted(minima, key=lambda k: (density[k], k)):
            trial = sorted([*chosen, float(grid[k])])
            sizes = np.bincount(by_edges(scores, trial), minlength=len(trial) + 1)
            if len(trial) < self.most and sizes.min() >= self.min_share * len(scores):
                chosen = trial
        return chosen


def kernel_density(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(grid [512] from the lowest to the highest score, density [512]); h = 1.06 sigma n^(-1/5).

    Raises:
        BadInput: all scores are equal.
    """
    sigma = float(scores.std())
    if sigma == 0:
        raise BadInput(f"phases: all scores are {scores[0]:g}; they cannot be divided")
    width = 1.06 * sigma * len(scores) ** -0.2
    grid = np.linspace(scores.min(), scores.max(), GRID)
    total = np.zeros(GRID)
    values, counts = np.unique(scores, return_counts=True)
    for a in range(0, len(values), _CHUNK):
        z = (grid[:, None] - values[None, a : a + _CHUNK]) / width
        total += np.exp(-0.5 * z * z) @ counts[a : a + _CHUNK]
    return grid, total / (len(scores) * width * np.sqrt(2 * np.pi))
