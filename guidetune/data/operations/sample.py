"""A seeded random part of the rows, chosen by id: adding or removing other rows hardly changes the choice."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, model_validator

from guidetune.data.draws import TOP, Smallest, number
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record
from guidetune.registry import method


@method(kind="operation", name="sample", summary="Keep a seeded random sample: n rows, or a fraction of them.")
class Sample(Operation):
    """Row i stays if its own number, drawn from (seed, id), is among the n smallest, or below the fraction."""

    n: int | None = Field(None, gt=0, description="Number of rows to keep (all, when there are fewer).")
    fraction: float | None = Field(None, gt=0, le=1, description="Share of the rows to keep; each row is drawn on its own.")

    chooses = True

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
            limit = int(self.fraction * TOP)
        else:
            assert self.n is not None
            limit = Smallest(self.n, (_number(context.seed, record) for record in rows)).limit
        for record in rows:
            if _number(context.seed, record) < limit:
                yield record
            else:
                context.drop(record, "not sampled", f"sample {self.n if self.n is not None else self.fraction}")


def _number(seed: int, record: Record) -> int:
    return number(seed, "sample", record.id)
