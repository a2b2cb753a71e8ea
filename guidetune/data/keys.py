"""A hash table of fixed-size keys in a file: membership among any number of rows without holding them in memory.

Open addressing with linear probing, at most three quarters full, all keys of a call at once. The table is a shared mapping of a
scratch file, so what it needs of memory is page cache, which the system takes back when it wants to.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_FIRST = 1 << 14  # slots of a new table
_BLOCK = 1 << 16  # slots that are moved at a time when the table grows
_KEEP = 64 << 20  # bytes of a mapping that may stay resident
_PAGE = 4096


class KeyTable:
    """Keys of `words` × 64 bits, each with `values` 64-bit counters that start at 0.

    Keys must be uniform (hashes). `path` is a scratch file, `None` an array in memory. Disk: 11 to 22 bytes per key and word.

    Raises:
        OSError: the file cannot be written; the space is taken before the table is used, so that a full disk is an error and no signal.
    """

    def __init__(self, path: Path | None = None, words: int = 1, values: int = 0) -> None:
        self.path, self.words, self.width = path, words, words + values
        self._count = self._touched = 0
        self._map: mmap.mmap | None = None
        self._table = self._new(_FIRST)

    def __len__(self) -> int:
        return self._count

    def _new(self, slots: int) -> np.ndarray:
        if self.path is None:
            return np.zeros((slots, self.width), dtype=np.uint64)
        size = slots * self.width * 8
        part = self.path.with_name(f"{self.path.name}.new")
        with open(part, "w+b") as file:
            for start in range(0, size, 1 << 20):
                file.write(bytes(min(1 << 20, size - start)))
            file.flush()
            self._map = mmap.mmap(file.fileno(), size)
        os.replace(part, self.path)
        return np.frombuffer(self._map, dtype=np.uint64).reshape(slots, self.width)

    def insert(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add uint64 keys [n, words]; returns their slots (valid until the next call) and which are new: of equal keys only the first."""
        keys = np.array(keys, dtype=np.uint64).reshape(-1, self.words)
        keys[keys[:, 0] == 0, 0] = 1  # 0 marks an empty slot
        while 4 * (self._count + len(keys)) > 3 * len(self._table):
            self._grow()
        slots, new = self._place(keys)
        claimed = np.flatnonzero(new)
        first = claimed[np.unique(slots[claimed], return_index=True)[1]]
        new[:] = False
        new[first] = True
        self._count += len(first)
        self._touched += len(keys) * _PAGE  # each key may have brought in a page
        if self._map is not None and min(self._touched, self._table.nbytes) > _KEEP and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # the file keeps its content; only the mapping's pages leave this process
            self._touched = 0
        return slots, new

    def _place(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table, words = self._table, self.words
        mask = np.uint64(len(table) - 1)
        slots = (keys[:, 0] & mask).astype(np.int64)
        new = np.zeros(len(keys), dtype=bool)
        left = np.arange(len(keys))
        while len(left):
            there = table[slots[left], :words]
            done = (there == keys[left]).all(1)
            empty = there[:, 0] == 0
            if empty.any():
                wanted = left[empty]
                table[slots[wanted], :words] = keys[wanted]
                # of different keys that want one slot the last one written has it; equal keys have it together
                got = (table[slots[wanted], :words] == keys[wanted]).all(1)
                new[wanted[got]] = True
                done[empty] = got
            left = left[~done]
            slots[left] = (slots[left] + 1) & int(mask)
        return slots, new

    def _grow(self) -> None:
        old, mapped = self._table, self._map
        self._table = self._new(2 * len(old))
        for start in range(0, len(old), _BLOCK):
            block = np.array(old[start : start + _BLOCK])
            block = block[block[:, 0] != 0]
            slots, _ = self._place(block[:, : self.words])
            self._table[slots, self.words :] = block[:, self.words :]
        del old
        if mapped is not None:
            mapped.close()

    def count(self, keys: np.ndarray) -> np.ndarray:
        """Add 1 to the first counter of each key, in order; returns the counters after each addition, int64 [n]."""
        slots, _ = self.insert(keys)
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        sizes = np.diff(np.append(starts, len(ordered)))
        rank = np.arange(len(ordered)) - np.repeat(starts, sizes) + 1
        before = self._table[ordered[starts], self.words].astype(np.int64)
        self._table[ordered[starts], self.words] = (before + sizes).astype(np.uint64)
        out = np.empty(len(slots), dtype=np.int64)
        out[order] = rank + np.repeat(before, sizes)
        return out

    def first(self, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """For each key the number it was first given with (by this call or an earlier one), int64 [n]; `numbers`: int [n]."""
        slots, new = self.insert(keys)
        self._table[slots[new], self.words] = numbers[new].astype(np.uint64)
        return self._table[slots, self.words].astype(np.int64)

    def close(self) -> None:
        """Give the scratch file back."""
        self._table = np.zeros((0, self.width), dtype=np.uint64)
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def key_array(digests: Sequence[bytes]) -> np.ndarray:
    """Digests of 8 (or 16) bytes as keys, uint64 [n, words]."""
    if not digests:
        return np.zeros((0, 1), dtype=np.uint64)
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(len(digests), -1)
