"""From weighted token losses to one number: Σ c ℓ / D, with D summed over the whole optimiser batch (and all ranks).

Every mode gives a coefficient c per supervised token of a micro-batch and its share of the denominator D; both are without
gradient. All modes but `micro` are invariant to how the optimiser batch is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Share = tuple[torch.Tensor, float]


def _per_row(values: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=values.dtype, device=values.device).index_add_(0, row, values)


def tokens(w: torch.Tensor, row: torch.Tensor, rows: int) -> Share:
    """Σ w ℓ / N, N = supervised tokens, also those of weight 0."""
    return w, float(len(w))


def weights(w: torch.Tensor, row: torch.Tensor, rows: int) -> Share:
    """Σ w ℓ / Σ w."""
    return w, float(w.double().sum())


def micro(w: torch.Tensor, row: torch.Tensor, rows: int) -> Share:
    """Mean over micro-batches of Σ w ℓ / Σ w: what the released GIFT code does. Depends on the micro-batches."""
    total = w.double().sum()
    return (w / total.to(w.dtype) if total > 0 else torch.zeros_like(w)), 1.0


def sequence(w: torch.Tensor, row: torch.Tensor, rows: int) -> Share:
    """Mean over rows of Σ w ℓ / Σ w; rows without weight are left out."""
    total = _per_row(w, row, rows)
    return torch.where(total[row] > 0, w / total[row].clamp_min(1e-30), 0.0), float((total > 0).sum())


def rows(w: torch.Tensor, row: torch.Tensor, rows: int) -> Share:
    """Mean over rows of Σ w ℓ / N_row; every row counts."""
    count = _per_row(torch.ones_like(w), row, rows)
    return w / count[row], float(rows)


def sum_(w: torch.Tensor, row: torch.Tensor, rows: int) -> Share:
    """Σ w ℓ: the gradient grows with the batch."""
    return w, 0.0


def paper(w: torch.Tensor, row: torch.Tensor, rows: int) -> Share:
    """Mean over rows of Σ w ℓ: the expectation in the GIFT paper's equation, without normalisation."""
    return w, float(rows)


REDUCERS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], Share]] = {
    "tokens": tokens,
    "weights": weights,
    "micro": micro,
    "sequence": sequence,
    "rows": rows,
    "sum": sum_,
    "paper": paper,
}


def scale(mode: str, denominator: float) -> float:
    """1 / D; a batch without any weight gives 0, not an infinity."""
    if mode == "sum":
        return 1.0
    return 1.0 / denominator if denominator > 0 else 0.0
