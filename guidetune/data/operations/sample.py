"""A seeded random part of the rows, chosen by id: adding or removing other rows hardly changes the choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from pydantic import Field, model_validator

from guidetune.artefacts import derive_seed
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record
from guidetune.registry import method


@method(kind="operation", name="sample", summary="Keep a seeded random sample: n rows, or a fraction of them.")
class Sample(Operation):
    """Row i stays if its own number, drawn from (seed, id), is among the n smallest, or below the fraction."""

    n: int | None = Field(None, gt=0, description="Number of rows to keep (all, when there are fewer).")
    fraction: float | None = Field(None, gt=0, le=1, description="Share of the rows to keep; each row is drawn on its own.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Sample:
        if (self.n is None) == (self.fraction is None):
            raise ValueError("give either n or fraction")
        return self

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Each id gets a number from (seed, id); the smallest n, or those below the fraction, stay in their order.

        Memory: 16 bytes for each of the n rows that stay, none for the others.
        """
        if self.fraction is not None:
            limit = int(self.fraction * 2**63)
        else:
            assert self.n is not None
            limit = _nth((_number(context.seed, record) for record in rows), self.n)
        for record in rows:
            if _number(context.seed, record) < limit:
                yield record
            else:
                context.drop(record, "not sampled", f"sample {self.n if self.n is not None else self.fraction}")


def _nth(numbers: Iterable[int], n: int) -> int:
    """The (n + 1)-th smallest number; 2^63 when there are not as many."""
    room = max(2 * (n + 1), 1 << 16)
    held, count = np.empty(room, dtype=np.int64), 0
    for number in numbers:
        if count == room:
            held.partition(n)
            count = n + 1
        held[count] = number
        count += 1
    return int(np.partition(held[:count], n)[n]) if n < count else 2**63


def _number(seed: int, record: Record) -> int:
    return derive_seed(seed, "sample", record.id)
