"""Operations on records, between reading and encoding: one file each, found by file name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from guidetune.data.records import Record
from guidetune.registry import Method

Rows = Iterable[Record]
"""Records that can be gone through more than once, in the same order each time, without being held in memory."""


@dataclass(frozen=True)
class OperationContext:
    """What an operation may use: the seed of the run, `drop(record, reason, why)` for the ledger, and a folder for scratch files."""

    seed: int
    drop: Callable[[Record, str, str], None]
    scratch: Path | None = None


class Operation(Method):
    """Base of operations.

    `apply` yields the records to go on with, and calls `context.drop` for each one that it leaves out. The same rows, options and
    seed give the same records; what happens to one row must not depend on rows of another source unless that is the point.
    """

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """The records to go on with."""
        raise TypeError(f"operation {self.name!r} does not define apply")
