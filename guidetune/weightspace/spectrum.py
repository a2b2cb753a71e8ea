"""Singular values of a matrix that is read in pieces: its effective rank, and its best factors of low rank.

Both come from the Gram matrix over the smaller side n, summed in fp64: 2 n² m operations and 8 n² bytes (a few times that for the
eigenvectors) for a matrix of n by m. So the matrix itself is never held, and singular values down to 1e-8 of the largest are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log
from typing import NamedTuple

import torch

from guidetune.weightspace.stages import PIECE_VALUES, ranges

Rows = Callable[[int, int], torch.Tensor]  # rows [start, stop) of the matrix, float32


def gram(rows: Rows, shape: Sequence[int]) -> torch.Tensor:
    """Dᵀ D of a matrix D that is at least as high as wide, else D Dᵀ; [n, n], fp64."""
    high, wide = shape
    side = min(shape)
    found = torch.zeros(side, side, dtype=torch.float64)
    if wide <= high:
        for start, stop in ranges(shape):
            piece = rows(start, stop).double()
            found.addmm_(piece.T, piece)
        return found
    block = max(side, PIECE_VALUES // high, 1)  # a block of columns at a time: the matrix is read once for each
    for left in range(0, wide, block):
        columns = torch.cat([rows(start, stop)[:, left : left + block].double() for start, stop in ranges(shape)])
        found.addmm_(columns, columns.T)
    return found


def effective_rank(rows: Rows, shape: Sequence[int]) -> float:
    """exp(−Σ p_i ln p_i), p_i = σ_i / Σ σ: the entropy of the singular values as a number of equal ones (Roy and Vetterli, EUSIPCO 2007).

    A zero matrix has rank 0.
    """
    values = torch.linalg.eigvalsh(gram(rows, shape)).clamp_min_(0)
    values = values[values > values.max() * 1e-16].sqrt()
    total = float(values.sum())
    return exp(-sum(p * log(p) for p in (values / total).tolist() if p > 0)) if total else 0.0


class Factors(NamedTuple):
    """D ≈ b a: a [r, wide], b [high, r], float32, each with the root of the singular values; `kept`: their share of Σ σ²."""

    a: torch.Tensor
    b: torch.Tensor
    kept: float


def low_rank(rows: Rows, shape: Sequence[int], rank: int | None, energy: float | None) -> Factors:
    """The best approximation of rank r in the Frobenius norm (Eckart and Young 1936).

    Args:
        rank: r, or the largest r when `energy` is given too.
        energy: the smallest r whose singular values hold this share of Σ σ². A zero matrix has r = 0 then.
    """
    values, vectors = torch.linalg.eigh(gram(rows, shape))
    values = values.flip(0).clamp_min_(0)
    total = float(values.sum())
    r = len(values)
    if energy is not None:
        r = int((values.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1 if total else 0
    r = min(r, len(values), r if rank is None else rank)
    basis = vectors.flip(1)[:, :r]  # [n, r]
    if shape[1] <= shape[0]:
        b = torch.cat([rows(start, stop).double() @ basis for start, stop in ranges(shape)])  # [high, r] = U Σ
        root = _roots(b.norm(dim=0))
        return Factors((basis * root).T.float(), (b / root.clamp_min(1e-300)).float(), _share(values, r, total))
    a = torch.zeros(r, shape[1], dtype=torch.float64)  # Σ Vᵀ
    for start, stop in ranges(shape):
        a.addmm_(basis[start:stop].T, rows(start, stop).double())
    root = _roots(a.norm(dim=1))
    return Factors((a / root.clamp_min(1e-300)[:, None]).float(), (basis * root).float(), _share(values, r, total))


def _roots(sigma: torch.Tensor) -> torch.Tensor:
    """√σ; what is only rounding of the largest counts as 0."""
    largest = float(sigma.max()) if len(sigma) else 0.0
    return torch.where(sigma > 1e-12 * largest, sigma, torch.zeros(())).sqrt()


def _share(values: torch.Tensor, r: int, total: float) -> float:
    return float(values[:r].sum()) / total if total else 1.0
