"""Records on disk that are taken by their number, in any order. Memory: 8 bytes per record."""

from __future__ import annotations

import marshal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from guidetune.data.records import Record


class Shelf:
    """Records kept in a scratch file `path` (None: in memory), each read where it is asked for."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = open(path, "w+b") if path is not None else None  # noqa: SIM115 (closed in __exit__)
        self._offsets = np.zeros(1024, dtype=np.int64)
        self._held: list[Record] = []
        self._count = self._end = 0

    def add(self, record: Record) -> None:
        """One record more; it gets the next number."""
        if self._file is None:
            self._held.append(record)
        else:
            if self._count == len(self._offsets):
                self._offsets = np.concatenate([self._offsets, np.zeros_like(self._offsets)])
            data = marshal.dumps(record.kept())  # our own scratch file, read by the process that wrote it
            self._offsets[self._count] = self._end
            self._file.write(data)
            self._end += len(data)
        self._count += 1

    def extend(self, records: Iterable[Record]) -> None:
        """Several records more."""
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: int) -> Record:
        if not 0 <= k < self._count:
            raise IndexError(k)
        if self._file is None:
            return self._held[k]
        self._file.seek(int(self._offsets[k]))
        return Record(*marshal.load(self._file))

    def __iter__(self) -> Iterator[Record]:
        return (self[k] for k in range(self._count))

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held = []
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
