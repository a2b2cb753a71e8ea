"""A column of the data, such as released scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from guidetune.data.records import number_of
from guidetune.registry import method
from guidetune.scorers import NoScore, Row, Score, ScoreContext, Scorer


@method(kind="scorer", name="column", paper="2406.04371", summary="A number that the data already has, such as released difficulty scores.")
class Column(Scorer):
    """float(column) after white space is taken off: released scores are often text such as "4.5" with line ends.

    A score or a phase that an operation has given the rows is read in the same way.
    """

    column: str = Field(description="A column, or a path into one (`scores.gpt4`, `data[2]`), or what an operation has added.")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> list[Score]:
        return [self._number(row) for row in rows]

    def _number(self, row: Row) -> Score:
        value = row.columns.get(self.column)
        if value is None:
            return NoScore(f"no column {self.column!r}")
        number = number_of(value)
        if number is None:
            return NoScore(f"the column {self.column!r} is not a number")
        return number if math.isfinite(number) else NoScore(f"the column {self.column!r} is not finite")
