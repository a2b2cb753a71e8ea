"""Factors by depth: LiNeS (arXiv 2410.17146) and tables of coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from guidetune.weightspace.stages import Piece, Scale, View


@dataclass(frozen=True)
class PerLayer:
    """λ(l) = α + β · ((l − 1) / (L − 1)) for block l of L; `outside` for everything else. A single block has α + β."""

    alpha: float
    beta: float
    outside: float

    def __call__(self, view: View) -> float:
        return self.at(view.layer)

    def at(self, place: tuple[int, int] | None) -> float:
        """λ of block l of L, (l, L); None: outside the blocks."""
        if place is None:
            return self.outside
        layer, count = place
        return self.alpha + self.beta * ((layer - 1) / (count - 1) if count > 1 else 1.0)


def along(values: Sequence[float], layer: tuple[int, int] | None) -> float:
    """Values spread evenly over the blocks and interpolated between; the first one for everything outside the blocks."""
    if layer is None or len(values) == 1 or layer[1] == 1:
        return values[0]
    place = (layer[0] - 1) / (layer[1] - 1) * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (place - low)


@dataclass(frozen=True)
class Weight:
    """A source's weight by tensor: of the rules (part of a name or None for any, values over the layers) the first that fits; else 1."""

    rules: tuple[tuple[str | None, tuple[float, ...]], ...]

    def __call__(self, name: str, layer: tuple[int, int] | None) -> float:
        return next((along(values, layer) for part, values in self.rules if part is None or part in name), 1.0)


def by_norm_ratio(beta: float, outside: str) -> Callable[[Iterable[View], Callable[[View], Iterator[tuple[Piece, torch.Tensor]]]], Scale]:
    """LiNeS' α for merged tasks: (1 / N) ‖Σ τ_i‖₁ / ‖τ_merged‖₁ over all parameters, summed in fp64."""

    def scale(views: Iterable[View], combined: Callable[[View], Iterator[tuple[Piece, torch.Tensor]]]) -> Scale:
        plain = merged = 0.0
        sources: set[str] = set()
        for view in views:
            sources |= set(view.sources)
            for piece, d in combined(view):
                total = piece.taus[0].clone()
                for tau in piece.taus[1:]:
                    total += tau
                plain += float(total.abs().sum(dtype=torch.float64))
                merged += float(d.abs().sum(dtype=torch.float64))
        alpha = plain / merged / len(sources) if merged else 0.0
        return PerLayer(alpha, beta, alpha if outside == "first" else alpha + beta)

    return scale
