"""Exact order statistics of |τ| in a stream: histograms of the bit patterns, then the one bin that matters. No sort, no copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F

BINS = 1 << 16  # exponent and the first 8 bits of the mantissa of |τ|; its last 15 bits are looked at in one bin only
REST = 15
INFINITY = 0x7F800000


def magnitude_bits(tau: torch.Tensor) -> torch.Tensor:
    """|τ| as integers in the same order: int32, like τ."""
    return tau.detach().view(torch.int32) & 0x7FFFFFFF


def histogram(tau: torch.Tensor) -> np.ndarray:
    """How many values fall in each bin: int64 [BINS]."""
    return np.bincount((magnitude_bits(tau).flatten() >> REST).numpy(), minlength=BINS)


class Largest:
    """Which of a stream's values are its k largest in magnitude: those above `bits`, and the first `ties` that equal it.

    Ties are taken in the order of the stream. Zeros are never kept.
    """

    def __init__(self, k: int, counts: np.ndarray) -> None:
        above = np.cumsum(counts[::-1])[::-1]
        self.k = k
        self.bin = -1
        if k > 0 and above[0] > k:
            # the bin in which the k-th largest lies
            self.bin = int(np.searchsorted(-above, -k, side="right")) - 1
            self.before = int(above[self.bin] - counts[self.bin])
        self.bits, self.ties = (0, 0) if k > 0 else (0x7FFFFFFF, 0)
        self._rest: list[np.ndarray] = []

    @property
    def needs_bin(self) -> bool:
        return self.bin >= 0

    def look(self, tau: torch.Tensor) -> None:
        """Second pass: collect the values of the bin."""
        bits = magnitude_bits(tau).flatten()
        self._rest.append(bits[(bits >> REST) == self.bin].numpy())

    def settle(self) -> None:
        rest = np.concatenate(self._rest) if self._rest else np.zeros(0, np.int32)
        self._rest = []
        want = self.k - self.before
        threshold = int(np.partition(rest, len(rest) - want)[len(rest) - want])
        self.bits = threshold
        self.ties = want - int((rest > threshold).sum())
        if threshold == 0:
            self.ties = 0

    def mask(self, tau: torch.Tensor, ties_before: int) -> torch.Tensor:
        """Whether each value is one of the k. ties_before: values equal to the threshold earlier in the stream."""
        bits = magnitude_bits(tau)
        keep = bits > self.bits
        if self.ties:
            equal = bits == self.bits
            left = self.ties - ties_before
            count = int(equal.sum())
            if 0 < left < count:
                flat = equal.flatten()
                flat &= flat.cumsum(0) <= left
            if left > 0:
                keep |= equal
        return keep

    def kept(self, tau: torch.Tensor, ties_before: int) -> torch.Tensor:
        """τ where it is one of the k, 0 elsewhere: in one pass, but for the piece in which the ties run out."""
        left, bits = self.ties - ties_before, self.bits
        if bits >= INFINITY or 0 < left < tau.numel():
            return tau * self.mask(tau, ties_before)
        # with all of this piece's ties the threshold is the next smaller number
        return F.hardshrink(tau, float(np.int32(bits - (left > 0)).view(np.float32)))

    def equal(self, tau: torch.Tensor) -> int:
        return int((magnitude_bits(tau) == self.bits).sum()) if self.ties else 0


def largest(ks: Iterable[int], read: Callable[[], Iterable[torch.Tensor]]) -> list[Largest]:
    """For each k the selection of the k largest of a stream that `read()` gives, once or twice."""
    counts = np.zeros(BINS, dtype=np.int64)
    for tau in read():
        counts += histogram(tau)
    found = [Largest(k, counts) for k in ks]
    if any(one.needs_bin for one in found):
        for tau in read():
            for one in found:
                if one.needs_bin:
                    one.look(tau)
        for one in found:
            if one.needs_bin:
                one.settle()
    return found
