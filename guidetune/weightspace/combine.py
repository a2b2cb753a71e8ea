"""How the updates of several sources become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import acos, sin, sqrt
from typing import Any, Literal

import numpy as np
import torch

from guidetune.weightspace.select import largest
from guidetune.weightspace.stages import Combiner, Piece, View

Taus = Callable[[], Iterator[tuple[Piece, list[torch.Tensor]]]]


def weighted_sum(taus: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w_i τ_i, in the order of the sources."""
    total = taus[0] * weights[0]
    for tau, weight in zip(taus[1:], weights[1:], strict=True):
        total.add_(tau, alpha=weight)
    return total


@dataclass(frozen=True)
class Sum(Combiner):
    """Σ w_i τ_i, or divided by Σ w_i."""

    normalize: bool = False

    @property
    def plain(self) -> bool:  # type: ignore[override]
        return not self.normalize

    def coefficients(self, weights: Sequence[float]) -> list[float] | None:
        if not self.normalize:
            return list(weights)
        return [1.0] if len(weights) == 1 else [weight / sum(weights) for weight in weights]

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        if len(taus) == 1 and (self.normalize or weights[0] == 1.0):
            return taus[0]
        total = weighted_sum(taus, weights)
        return total.div_(sum(weights)) if self.normalize else total


@dataclass(frozen=True)
class SignElect(Combiner):
    """TIES (2306.01708): per value the sign of Σ w_i τ_i, then the mean (or sum) over the sources that agree with it.

    mean: Σ w_i τ_i / Σ w_i over those that agree; values at zero agree with nobody. A sum of exactly zero counts as +
    (`tie: majority`: as the sign that most elected values of the tensor have).
    """

    agg: Literal["mean", "sum"] = "mean"
    tie: Literal["plus", "majority"] = "plus"

    @property
    def reads(self) -> int:
        return int(self.tie == "majority")

    def prepare(self, view: View, taus: Taus) -> Any:
        if self.tie == "plus":
            return 1.0
        balance = 0
        for _, parts in taus():
            balance += int(weighted_sum(parts, view.weights).sign().sum())
        return 1.0 if balance >= 0 else -1.0

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        scaled = [tau * weight for tau, weight in zip(taus, weights, strict=True)]
        total = scaled[0]
        for part in scaled[1:]:
            total = total + part
        return agreeing(scaled, weights, elected(total, prepared > 0), self.agg == "mean")


def elected(total: torch.Tensor, zero_up: bool) -> torch.Tensor:
    """The sign of each value, 1.0 or −1.0; of zeros + or −."""
    one = total.new_ones(())
    # adding 0.0 makes −0.0 to 0.0
    return torch.copysign(one, total + 0.0) if zero_up else -torch.copysign(one, 0.0 - total)


def agreeing(scaled: Sequence[torch.Tensor], weights: Sequence[float], sign: torch.Tensor, mean: bool) -> torch.Tensor:
    """Σ of w_i τ_i (`scaled`) over the sources of the elected `sign` (1.0 or −1.0); `mean`: divided by the Σ w_i of those."""
    out, share = torch.zeros_like(sign), torch.zeros_like(sign) if mean else None
    for part, weight in zip(scaled, weights, strict=True):
        agrees = (part * sign).clamp_min(0.0)  # |w_i τ_i| of those that agree
        out += agrees
        if share is not None:
            share.add_(agrees.detach().sign(), alpha=weight)
    out = out * sign  # masks are learnt through this: nothing that a gradient needs is changed in place
    return out if share is None else out.div_(share.masked_fill_(share.abs() < 1e-8, 1.0))


@dataclass(frozen=True)
class Consensus(Combiner):
    """Consensus merging (2405.07813): Σ w_i τ_i where at least `votes` sources hold the value for their own.

    Source i holds a value when |τ_i| > λ |Σ w_j τ_j − τ_i|.
    """

    votes: int = 2
    lam: float = 0.4

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        total = weighted_sum(taus, weights)
        count = torch.zeros(total.shape, dtype=torch.int16)
        for tau in taus:
            count += tau.abs() > (total - tau).abs_().mul_(self.lam)
        return total.mul_(count >= self.votes)


@dataclass(frozen=True)
class VarianceSelect(Combiner):
    """SCE (2408.07990): keep the `topk` share of values whose variance over the sources is largest, weigh the sources by their energy
    there, drop the minority sign.

    η_i = mean τ_i² / Σ_j mean τ_j² over the kept values of the tensor; Σ η_i m_i τ_i / Σ η_i m_i.
    """

    topk: float = 1.0

    @property
    def reads(self) -> int:
        return 5 if self.topk < 1 else 1

    @staticmethod
    def _variance(taus: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(taus).var(0, unbiased=False)

    def prepare(self, view: View, taus: Taus) -> Any:
        if len(view.sources) == 1:
            return None
        kept = ties = None
        if self.topk < 1.0:
            nonzero = sum(int(torch.count_nonzero(self._variance(parts))) for _, parts in taus())
            kept = largest([int(nonzero * self.topk)], lambda: (self._variance(parts) for _, parts in taus()))[0]
            ties, before = {}, 0
            for piece, parts in taus():
                ties[piece.start] = before
                before += kept.equal(self._variance(parts))
        energy = np.zeros(len(view.sources))
        for piece, parts in taus():
            mask = None if kept is None else kept.mask(self._variance(parts), ties[piece.start])
            for i, tau in enumerate(parts):
                energy[i] += float(((tau if mask is None else tau * mask).double() ** 2).sum())
        total = energy.sum()
        shares = (energy / total).tolist() if total else [1 / len(energy)] * len(energy)
        return shares, kept, ties

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        if prepared is None:
            return taus[0] if self.topk >= 1.0 else torch.zeros_like(taus[0])
        shares, kept, ties = prepared
        if kept is not None:
            mask = kept.mask(self._variance(taus), ties[piece.start])
            taus = [tau * mask for tau in taus]
        sign = elected(weighted_sum(taus, [1.0] * len(taus)), True)
        return agreeing([tau * share for tau, share in zip(taus, shares, strict=True)], shares, sign, mean=True)


@dataclass(frozen=True)
class ModelStock(Combiner):
    """Model Stock (2403.19522): t · mean(τ_i) with t = N c / (1 + (N − 1) c), c the mean cosine between updates of the tensor.

    t is kept in [0, 1] (`clamp`): it has a pole at c = −1/(N − 1).
    """

    clamp: bool = True

    @property
    def reads(self) -> int:
        return 1

    def prepare(self, view: View, taus: Taus) -> Any:
        gram = _gram(len(view.sources), taus)
        n = len(gram)
        norms = np.sqrt(np.diag(gram))
        cosines = [
            float(np.clip(gram[i, j] / (norms[i] * norms[j]), -1, 1)) if norms[i] * norms[j] > 0 else 0.0
            for i in range(n)
            for j in range(i)
        ]
        c = sum(cosines) / len(cosines) if cosines else 1.0
        bottom = 1 + (n - 1) * c
        t = n * c / bottom if abs(bottom) > 1e-12 else 0.0
        return min(1.0, max(0.0, t)) if self.clamp else t

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        return weighted_sum(taus, [prepared / len(taus)] * len(taus))


def _gram(n: int, taus: Taus) -> np.ndarray:
    """⟨x_i, x_j⟩ over a tensor, in fp64."""
    gram = np.zeros((n, n))
    for _, parts in taus():
        flat = [part.flatten().double() for part in parts]
        for i in range(n):
            for j in range(i + 1):
                gram[i, j] += float(flat[i].dot(flat[j]))
    return np.tril(gram) + np.tril(gram, -1).T


def slerp_weights(t: float, cosine: float, linear_above: float = 0.9995) -> tuple[float, float]:
    """Coefficients of the two vectors: sin((1 − t) Ω) / sin Ω and sin(t Ω) / sin Ω; a straight line where they point alike."""
    if abs(cosine) > linear_above:
        return 1 - t, t
    angle = acos(max(-1.0, min(1.0, cosine)))
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)


@dataclass(frozen=True)
class Spherical(Combiner):
    """Interpolation on the sphere: of the models themselves (`of: models`) or of their updates.

    Two sources: SLERP with t from the weights (w_2 / (w_1 + w_2)). More: the Karcher mean of the directions, times Σ a_i ‖v_i‖.
    Every iterate of it lies in the span of the vectors, so all that is needed of a tensor is their Gram matrix.
    """

    of: Literal["models", "updates"] = "models"
    iterations: int = 100
    tolerance: float = 1e-10
    linear_above: float = 0.9995
    always_mean: bool = False

    @property
    def reads(self) -> int:
        return 1

    def _vectors(self, parts: list[torch.Tensor], piece: Piece) -> list[torch.Tensor]:
        return [part + piece.anchor() for part in parts] if self.of == "models" else parts

    def prepare(self, view: View, taus: Taus) -> Any:
        def vectors() -> Iterator[tuple[Piece, list[torch.Tensor]]]:
            for piece, parts in taus():
                yield piece, self._vectors(parts, piece)

        gram = _gram(len(view.sources), vectors)
        weights = np.asarray(view.weights, dtype=np.float64)
        weights = weights / weights.sum()
        norms = np.sqrt(np.diag(gram))
        if len(weights) == 2 and not self.always_mean:
            cosine = gram[0, 1] / (norms[0] * norms[1]) if norms.min() > 0 else 1.0
            return list(slerp_weights(float(weights[1]), float(cosine), self.linear_above))
        if (norms == 0).any():
            return weights.tolist()
        return self._karcher(gram / np.outer(norms, norms), weights, norms)

    def _karcher(self, cosines: np.ndarray, weights: np.ndarray, norms: np.ndarray) -> list[float]:
        """Coefficients of v_i in the mean, from the cosines between them."""
        c = weights.copy()
        c /= sqrt(c @ cosines @ c)
        for _ in range(self.iterations):
            along = np.clip(cosines @ c, -1, 1)  # ⟨u_i, mean⟩
            angles = np.arccos(along)
            size = np.sqrt(np.maximum(1 - along**2, 0))
            factor = np.where(size > 1e-12, angles / np.where(size > 1e-12, size, 1), 1.0)
            step = weights * factor  # Σ w_i θ_i (u_i − ⟨u_i, m⟩ m) / sin θ_i
            inside = -(step * along).sum()
            tangent = step + inside * c
            length = sqrt(max(tangent @ cosines @ tangent, 0.0))
            if length < self.tolerance:
                break
            c = np.cos(length) * c + np.sin(length) / length * tangent
            c /= sqrt(c @ cosines @ c)
        return (c * (weights * norms).sum() / norms).tolist()

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        if self.of == "updates":
            return weighted_sum(taus, prepared)
        return weighted_sum(self._vectors(taus, piece), prepared) - piece.anchor()
