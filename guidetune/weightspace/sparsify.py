"""Which values of an update are kept, by magnitude or at random, and how the rest is rescaled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from guidetune.weightspace.select import Largest, largest, magnitude_bits
from guidetune.weightspace.stages import Piece, Sparsifier, View, ranges

Scope = Literal["row", "tensor", "global"]
BLOCK = 1 << 16  # values that share a random generator


@dataclass(frozen=True)
class _Band:
    """The selections of one source: kept are those in `outer` and not in `inner`; and how many ties lie before each piece."""

    outer: Largest
    inner: Largest | None
    ties: dict[Any, tuple[int, int]]

    def mask(self, tau: torch.Tensor, key: Any) -> torch.Tensor:
        before = self.ties.get(key, (0, 0))
        keep = self.outer.mask(tau, before[0])
        if self.inner is not None:
            keep &= ~self.inner.mask(tau, before[1])
        return keep

    def kept(self, tau: torch.Tensor, key: Any) -> torch.Tensor:
        """τ where it is kept, 0 elsewhere."""
        before = self.ties.get(key, (0, 0))
        kept = self.outer.kept(tau, before[0])
        return kept if self.inner is None else kept.sub_(self.inner.kept(tau, before[1]))


@dataclass(frozen=True)
class KeepBand(Sparsifier):
    """Keep the values whose magnitude ranks from `drop`·n + 1 to (drop + keep)·n; counts are int(share · n), as in the codes of the papers.

    scope: n values of a row, of the tensor, or of a source's whole update. Ties go to the first. Zeros are never kept.
    TIES' trimming (2306.01708) is drop = 0, scope global; Breadcrumbs (2312.06795) drops the largest as well.
    rows: "first" drops the largest of all and keeps the next ones; "last" keeps the largest and drops some of those.
    fit_drop: fewer are dropped where drop + keep > 1 (mergekit), and nothing is dropped where everything is kept.
    """

    keep: float
    drop: float = 0.0
    scope: Scope = "tensor"
    order: Literal["first", "last"] = "first"
    fit_drop: bool = False

    @property
    def reads(self) -> int:
        return 0 if self.scope == "row" else 3  # histogram, one bin of it, ties

    def counts(self, n: int) -> tuple[int, int]:
        """(outer, inner): the outer-most ranks that are kept, and how many of them are dropped again."""
        kept, dropped = int(self.keep * n), int(self.drop * n)
        if self.fit_drop:
            if self.keep >= 1:
                return n, 0
            dropped = min(dropped, n - kept)
        if self.order == "last":
            return kept, min(dropped, kept)
        return min(n, kept + dropped), dropped

    def _bands(self, n: int, read: Any) -> tuple[Largest, Largest | None]:
        outer, inner = self.counts(n)
        found = largest([outer, inner] if inner else [outer], read)
        return found[0], found[1] if inner else None

    def survey(self, views: Iterable[View]) -> Any:
        if self.scope != "global":
            return None
        views = list(views)
        names = sorted({source for view in views for source in view.sources})
        bands: dict[str, _Band] = {}
        for source in names:
            mine = [view for view in views if source in view.sources]

            def read(mine: list[View] = mine, source: str = source) -> Iterator[torch.Tensor]:
                for view in mine:
                    at = view.sources.index(source)
                    for piece in view.pieces():
                        yield piece.taus[at]
                    view.release()  # the next one may be needed as much: a model is never held

            outer, inner = self._bands(sum(view.numel for view in mine), read)
            keys = [(view.name, start) for view in mine for start in _starts(view)]
            bands[source] = _Band(outer, inner, _ties(outer, inner, keys, read()))
        return bands

    def prepare(self, view: View, survey: Any) -> Any:
        if self.scope == "global":
            return [survey[source] for source in view.sources]
        if self.scope == "row":
            return None
        found = []
        for i in range(len(view.sources)):

            def read(i: int = i) -> Iterator[torch.Tensor]:
                for piece in view.pieces():
                    yield piece.taus[i]

            outer, inner = self._bands(view.numel, read)
            found.append(_Band(outer, inner, _ties(outer, inner, [(view.name, s) for s in _starts(view)], read())))
        return found

    def apply(self, i: int, tau: torch.Tensor, piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        if self.scope != "row":
            return prepared[i].kept(tau, (view.name, piece.start))
        rows = tau.reshape(-1, tau.shape[-1]) if tau.dim() else tau.reshape(1, 1)
        if tau.dim() == 0:
            return tau
        outer, inner = self.counts(rows.shape[1])
        keep = _top(rows, outer)
        if inner:
            keep &= ~_top(rows, inner)
        return (rows * keep).view(tau.shape)


def _starts(view: View) -> list[int]:
    return [start for start, _ in ranges(view.shape)]


def _ties(outer: Largest, inner: Largest | None, keys: list[Any], taus: Iterable[torch.Tensor]) -> dict[Any, tuple[int, int]]:
    """How many values equal to each threshold come before each piece; empty where no tie is to be broken."""
    if not outer.ties and not (inner and inner.ties):
        return {}
    found: dict[Any, tuple[int, int]] = {}
    a = b = 0
    for key, tau in zip(keys, taus, strict=True):
        found[key] = a, b
        a += outer.equal(tau)
        b += inner.equal(tau) if inner else 0
    return found


def _top(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row in magnitude, ties to the first, zeros never: bool like rows."""
    if k <= 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    bits = magnitude_bits(rows.contiguous())
    n = rows.shape[1]
    if k >= n:
        return bits > 0
    at = n - k
    threshold = torch.from_numpy(np.partition(bits.numpy(), at, axis=1)[:, at : at + 1])
    keep = bits > threshold
    left = k - keep.sum(1, keepdim=True)
    equal = bits == threshold
    some = (equal.sum(1, keepdim=True) > left).squeeze(1)
    if bool(some.any()):
        part = equal[some]
        equal[some] = part & (part.cumsum(1) <= left[some])
    keep |= equal
    return keep & (bits > 0)


@dataclass(frozen=True)
class Bernoulli(Sparsifier):
    """DARE (2311.03099): keep each value with probability `keep` and divide what is kept by it, so that the mean stays.

    `keep` counts in 1/65,536; the draw of an element depends on the seed, the source, the tensor and its place alone.
    norm: "expected" divides by `keep`; "l1" rescales to the tensor's own sum of magnitudes (mergekit).
    """

    keep: float
    rescale: Literal["expected", "l1", "none"] = "expected"

    @property
    def reads(self) -> int:
        return int(self.rescale == "l1")

    def prepare(self, view: View, survey: Any) -> Any:
        if self.rescale != "l1":
            return None
        before, after = np.zeros(len(view.sources)), np.zeros(len(view.sources))
        for piece in view.pieces():
            for i, tau in enumerate(piece.taus):
                before[i] += float(tau.abs().sum(dtype=torch.float64))
                after[i] += float((tau * self._mask(i, tau, piece, view)).abs().sum(dtype=torch.float64))
        return [b / a if a > 1e-7 and b > 1e-7 else 1.0 for b, a in zip(before, after, strict=True)]

    def _mask(self, i: int, tau: torch.Tensor, piece: Piece, view: View) -> torch.Tensor:
        limit = round(self.keep * 65536)
        return draws(view.seed, view.sources[i], view.name, piece.first, tau.numel()).view(tau.shape) < limit - 32768

    def apply(self, i: int, tau: torch.Tensor, piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        limit = round(self.keep * 65536)
        if limit >= 65536:
            return tau
        kept = tau * self._mask(i, tau, piece, view)
        if self.rescale == "none" or limit == 0:
            return kept
        return kept.mul_(prepared[i] if prepared is not None else 65536 / limit)


@dataclass(frozen=True)
class RankBernoulli(Sparsifier):
    """DELLA (2406.11617): the larger a value is in its row, the likelier it stays: keep ± half_width, linear in the rank."""

    keep: float
    half_width: float
    rescale: bool = True

    def apply(self, i: int, tau: torch.Tensor, piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        rows = tau.reshape(-1, tau.shape[-1]) if tau.dim() else tau.reshape(1, 1)
        n = rows.shape[1]
        order = magnitude_bits(rows.contiguous()).argsort(dim=1, stable=True)
        places = torch.empty_like(order).scatter_(1, order, torch.arange(n).expand_as(order)).float()
        span = places / (n - 1) if n > 1 else torch.full_like(places, 0.5)
        limit = ((self.keep - self.half_width + 2 * self.half_width * span) * 65536).round_()
        drawn = draws(view.seed, view.sources[i], view.name, piece.first, tau.numel()).view(rows.shape)
        kept = rows * (drawn.int() + 32768 < limit)
        if self.rescale:
            kept *= 65536 / limit.clamp_min(1)
        return kept.view(tau.shape)


def draws(seed: int, source: str, name: str, first: int, count: int) -> torch.Tensor:
    """`count` uniform int16 numbers for the values first, first + 1, … of a tensor; the same however the tensor is cut."""
    parts = []
    for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
        key = hashlib.blake2b(f"{seed}/{source}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        bits = torch.empty(BLOCK // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator).view(torch.int16)
        a, b = max(first - block * BLOCK, 0), min(first + count - block * BLOCK, BLOCK)
        parts.append(bits[a:b])
    return parts[0] if len(parts) == 1 else torch.cat(parts)
