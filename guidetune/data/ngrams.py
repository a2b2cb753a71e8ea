"""Texts as they are compared: words, hashes of runs of words, and MinHash signatures of them."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from guidetune.data.keys import KeyTable

# Scripts that are written without spaces count by character.
_DENSE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_DENSE}]|[^\W{_DENSE}]+")
_MIX = np.uint64(0x9E3779B97F4A7C15)
PERMUTATIONS = 128
_BLOCK = 8192  # n-grams whose 128 hashes are held at a time


def normal_text(text: str) -> str:
    """A text as it is compared: compatibility forms unified, case folded, white space single."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a text, case folded: runs of letters, digits and underscores; single characters of scripts without spaces."""
    return _WORD.findall(normal_text(text))


def ngrams(text: str, n: int) -> np.ndarray:
    """Hashes of the runs of n words, uint64; of a shorter text one hash of all of it, which no run of a longer text has."""
    found = words(text)
    if not found:
        return np.zeros(0, dtype=np.uint64)
    codes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found], dtype=np.uint64)
    size = min(n, len(codes))
    runs = np.lib.stride_tricks.sliding_window_view(codes, size)
    out = np.full(len(runs), size, dtype=np.uint64)
    for k in range(size):
        out = (out ^ runs[:, k]) * _MIX
        out ^= out >> np.uint64(29)
    return out


def signatures(grams: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash of sets of hashes: uint32 [sets, 128]; the share of equal places estimates |A ∩ B| / |A ∪ B|, error ≤ 3/√128.

    An empty set has the largest values everywhere.
    """
    rng = np.random.default_rng(5)
    a = rng.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    b = rng.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)
    out = np.full((len(grams), PERMUTATIONS), 0xFFFFFFFF, dtype=np.uint32)
    for row, hashes in enumerate(grams):
        for start in range(0, len(hashes), _BLOCK):
            part = (hashes[start : start + _BLOCK, None] * a + b) >> np.uint64(32)
            out[row] = np.minimum(out[row], part.min(0).astype(np.uint32))
    return out


def bands(threshold: float) -> tuple[int, int]:
    """(bands, places in each) of a signature: the fewest bands in which pairs at the threshold meet with a probability of 0.95.

    Sets of likeness J are compared when they agree in all r places of one of b bands: with probability 1 − (1 − J^r)^b.
    """
    for rows in range(PERMUTATIONS, 0, -1):
        count = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** count >= 0.95:
            return count, rows
    return PERMUTATIONS, 1


class NearDuplicates:
    """Finds texts whose sets of word n-grams are alike: MinHash with banding, then the estimate from all 128 places.

    Signatures and band tables are scratch files in `folder` (None: in memory): 512 bytes and 16 to 43 per band for each text.

    Args:
        n: words in an n-gram.
        threshold: least |A ∩ B| / |A ∪ B| of near-duplicates.
    """

    def __init__(self, n: int = 5, threshold: float = 0.7, folder: Path | None = None) -> None:
        self.n, self.threshold = n, threshold
        self._bands, self._places = bands(threshold)
        self._path = folder / ".signatures" if folder is not None else None
        self._file = open(self._path, "w+b") if self._path is not None else None  # noqa: SIM115 (closed in close)
        self._held: list[np.ndarray] = []
        self._table = KeyTable(folder / ".bands" if folder is not None else None, values=1)
        self._count = 0

    def add(self, texts: Sequence[str]) -> list[int | None]:
        """For each text the number (from 0, over all calls) of an earlier one that it nearly repeats; texts without words have none."""
        grams = [np.unique(ngrams(text, self.n)) for text in texts]
        signed = signatures(grams)
        if self._file is not None:
            self._file.seek(0, 2)
            self._file.write(signed.tobytes())
        else:
            self._held.append(signed)
        first = self._count
        self._count += len(texts)
        keys = self._keys(signed)
        numbers = np.repeat(np.arange(first, self._count), self._bands)
        met = self._table.first(keys.reshape(-1, 1), numbers).reshape(len(texts), self._bands)
        out: list[int | None] = []
        for row, others in enumerate(met):
            best, like = None, self.threshold
            for other in np.unique(others[others < first + row]).tolist() if len(grams[row]) else []:
                likeness = float((self._signature(other) == signed[row]).mean())
                if likeness >= like and (best is None or likeness > like):
                    best, like = other, likeness
            out.append(best)
        return out

    def _keys(self, signed: np.ndarray) -> np.ndarray:
        """uint64 [texts, bands]: a hash of the band's number and values."""
        used = signed[:, : self._bands * self._places].reshape(len(signed), self._bands, self._places).astype(np.uint64)
        out = np.broadcast_to(np.arange(1, self._bands + 1, dtype=np.uint64) * _MIX, used.shape[:2]).copy()
        for place in range(self._places):
            out = (out ^ used[:, :, place]) * _MIX
            out ^= out >> np.uint64(31)
        return out

    def _signature(self, number: int) -> np.ndarray:
        if self._file is not None:
            self._file.seek(number * PERMUTATIONS * 4)
            return np.frombuffer(self._file.read(PERMUTATIONS * 4), dtype=np.uint32)
        for part in self._held:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(number)

    def close(self) -> None:
        """Give the scratch files back."""
        self._table.close()
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
