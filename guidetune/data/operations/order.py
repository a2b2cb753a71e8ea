"""The order of the rows and the phases they are learnt in."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator, model_validator

from guidetune.data.conditions import parse
from guidetune.data.draws import Numbers
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, column_of, number_of
from guidetune.data.shelf import Shelf
from guidetune.errors import BadInput
from guidetune.registry import method


@method(kind="operation", name="order", summary="Sort or shuffle the rows, and cut them into phases by score or condition.")
class Order(Operation):
    """Every row stays; only its place and its `phase` change.

    Phases are numbered from 0: with `cuts` c1 < c2 < … phase k holds the scores of [c_k, c_k+1), with `quantiles` the cuts are those
    quantiles of the scores, and with `phases` a row is in the phase of the first condition it meets. Rows come phase by phase; in a
    phase they are sorted by the score (`sort`), shuffled by (seed, row id), or stay in their order. Equal scores keep their order.
    What order an epoch of tuning takes is the schedule's own matter: without phases it draws its own.
    """

    by: str | None = Field(None, description="Score or column to sort or cut by.")
    sort: bool | None = Field(None, description="Sort by the score (default: yes, unless there are phases).")
    descending: bool = Field(False, description="The largest score first.")
    shuffle: bool = Field(False, description="Shuffle; with phases inside each phase.")
    cuts: list[float] | None = Field(None, min_length=1, description="Edges between phases, rising: [1.5, 3.5] makes three.")
    quantiles: list[float] | None = Field(None, min_length=1, description="The same as shares of the rows: [0.33, 0.66].")
    phases: list[str] | None = Field(None, min_length=1, description="A condition for each phase: [`source == pretext`, `source == task`].")

    @field_validator("phases")
    @classmethod
    def _readable(cls, value: list[str] | None) -> list[str] | None:
        try:
            _ = [parse(text) for text in value or []]
        except BadInput as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> Order:
        cutting = [name for name in ("cuts", "quantiles", "phases") if getattr(self, name) is not None]
        if len(cutting) > 1:
            raise ValueError(f"give one of {' and '.join(cutting)}")
        for edges in (self.cuts, self.quantiles):
            if edges is not None and any(not a < b for a, b in zip(edges, edges[1:], strict=False)):
                raise ValueError(f"edges between phases must rise: {edges}")
        if self.quantiles is not None and not all(0 < q < 1 for q in self.quantiles):
            raise ValueError(f"quantiles lie between 0 and 1: {self.quantiles}")
        if (self.cuts or self.quantiles or self.sort) and self.by is None:
            raise ValueError("`by` names the score")
        if self.by is None and not (self.shuffle or self.phases):
            raise ValueError("give by, shuffle or phases")
        if self.shuffle and (self.sort or (self.by is not None and not (self.cuts or self.quantiles))):
            raise ValueError("rows are sorted by a score or shuffled, not both")
        return self

    def columns(self) -> set[str]:
        out = {column_of(self.by)} if self.by is not None else set()
        return out.union(*(parse(text).columns for text in self.phases or []))

    def adds(self, root: Path) -> dict[str, type]:
        return {"phase": int} if self.cuts or self.quantiles or self.phases else {}

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Rows in their new order. Memory: 40 bytes per row; the rows themselves wait in a scratch file."""
        scores, drawn, phases = array("d"), array("q"), array("i")
        numbers = Numbers(context.seed, "order")
        conditions = [parse(text) for text in self.phases or []]
        with Shelf(context.scratch / ".ordered" if context.scratch else None) as shelf:
            for record in rows:
                score = 0.0 if self.by is None else number_of(record.value(self.by))
                if score is None or math.isnan(score):
                    said = record.value(self.by or "")
                    why = f"no {self.by}" if said is None else f"{self.by} = {said!r}"
                    context.drop(record, "no score" if said is None else "score is not a number", why)
                    continue
                phase = next((k for k, condition in enumerate(conditions) if condition(record)), 0 if not conditions else -1)
                if phase < 0:
                    context.drop(record, "in no phase", f"meets none of {self.phases}")
                    continue
                scores.append(score)
                phases.append(phase)
                drawn.append(numbers.of(record.id) if self.shuffle else 0)
                shelf.add(record)
            order, phase_of, edges = self._order(
                np.frombuffer(scores, np.float64), np.frombuffer(drawn, np.int64), np.frombuffer(phases, np.int32)
            )
            for k in order.tolist():
                record = shelf[k]
                yield replace(record, phase=int(phase_of[k])) if self.adds(context.root) else record
        if self.adds(context.root):
            count = np.bincount(phase_of, minlength=len(edges) + 1 if edges else len(conditions))
            context.note(phases=count.tolist(), **({"edges": edges} if edges else {}))

    def _order(self, scores: np.ndarray, drawn: np.ndarray, phases: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Places in their new order, the phase of each row, and the edges between phases."""
        edges = list(self.cuts or [])
        if self.quantiles is not None and len(scores):
            edges = np.quantile(scores, self.quantiles).tolist()
        if edges:
            phases = np.searchsorted(np.array(edges), scores, side="right").astype(np.int32)
        sort = self.sort if self.sort is not None else self.by is not None and not edges
        key = (-scores if self.descending else scores) if sort else np.zeros(len(scores))
        return np.lexsort((np.arange(len(scores)), drawn, key, phases)), phases, edges
