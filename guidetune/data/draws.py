"""Random draws that belong to a row: from (seed, purpose, row id), so that no other row changes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from guidetune.artefacts import derive_seed

TOP = 1 << 63


def number(seed: int, purpose: str, *what: Any) -> int:
    """A whole number in [0, 2^63), uniform over ids."""
    return derive_seed(seed, purpose, *what)


class Numbers:
    """`number(seed, purpose, text)` for very many texts: the seed and purpose are hashed once.

    It draws other numbers than `number` does.
    """

    def __init__(self, seed: int, *purpose: Any) -> None:
        self._key = derive_seed(seed, *purpose).to_bytes(8, "little")

    def of(self, text: str) -> int:
        """A whole number in [0, 2^63) of a text such as an id."""
        data = text.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "big") >> 1

    def share(self, text: str) -> float:
        """A number in [0, 1) of a text."""
        return self.of(text) / TOP


class Smallest:
    """The n + 1 smallest of any number of numbers below 2^63. Memory: at most 16 (n + 1) bytes."""

    def __init__(self, n: int, numbers: Iterable[int] = ()) -> None:
        self.n, self.seen = n, 0
        self._room = np.empty(min(2 * (n + 1), 256), dtype=np.int64)
        self._count = 0
        for value in numbers:
            self.add(value)

    def add(self, value: int) -> None:
        self.seen += 1
        if self._count == len(self._room):
            if self._count < 2 * (self.n + 1):
                grown = np.empty(min(2 * self._count, 2 * (self.n + 1)), dtype=np.int64)
                grown[: self._count] = self._room
                self._room = grown
            else:
                self._room.partition(self.n)
                self._count = self.n + 1
        self._room[self._count] = value
        self._count += 1

    @property
    def limit(self) -> int:
        """Numbers below it are the n smallest: the (n + 1)-th, or 2^63 when there are not as many."""
        return int(np.partition(self._room[: self._count], self.n)[self.n]) if self.n < self._count else TOP
