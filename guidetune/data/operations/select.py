"""Which rows stay, by a score or by their order: overall or in each group."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from guidetune.data.draws import Numbers
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, column_of, number_of
from guidetune.errors import BadInput
from guidetune.registry import method


@method(kind="operation", name="select", summary="Keep rows by score or order: top n, threshold, fraction or prefix, also per group.")
class Select(Operation):
    """`top`, `fraction` and `threshold` go by the score `by`; `prefix` by the rows' order, so that sizes are nested.

    With `descending` (the default) the largest scores are the best. Equal scores: the earlier row first. A fraction keeps at least one
    row of each group, and a size above a group's keeps all of it. Rows without the score are `missing`; a score that is not a number
    (NaN, or text) cannot be ranked and is dropped whatever `missing` says, or refused.
    """

    by: str | None = Field(None, description="Score or column to rank by.")
    top: int | None = Field(None, gt=0, description="The n best.")
    threshold: float | None = Field(None, description="Scores of at least this (at most, when ascending).")
    fraction: float | None = Field(None, gt=0, le=1, description="This share of the rows, the best.")
    prefix: int | float | None = Field(None, gt=0, description="The first n rows, or a share of them when it has a decimal point.")
    per: str | None = Field(None, description="In each group of rows that are equal in this column: source, task, category, …")
    descending: bool = Field(True, description="The largest scores are the best.")
    shuffled: bool = Field(False, description="prefix goes by an order drawn from (seed, row id) in place of the rows' own.")
    missing: Literal["drop", "keep", "refuse"] = Field("drop", description="What to do with rows that have no score.")

    chooses = True

    @model_validator(mode="after")
    def _one_of_them(self) -> Select:
        given = [name for name in ("top", "threshold", "fraction", "prefix") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of top, threshold, fraction and prefix" + (f", not {' and '.join(given)}" if given else ""))
        if (self.prefix is None) != (self.by is not None):
            raise ValueError("prefix goes by the rows' order and has no `by`" if self.prefix is not None else "`by` names the score")
        if isinstance(self.prefix, float) and self.prefix > 1:
            raise ValueError("prefix with a decimal point is a share, at most 1.0")
        return self

    def columns(self) -> set[str]:
        return {column_of(name) for name in (self.by, self.per) if name is not None}

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Two passes: scores and groups of all rows, then the rows that stay, in their order. Memory: 30 bytes per row while it ranks."""
        scores, groups = array("d"), array("i")
        names: dict[str, int] = {}
        state = bytearray()  # of each row: 1 ranked, 2 no score, 3 not a number
        drawn = Numbers(context.seed, "select")
        for record in rows:
            groups.append(names.setdefault("" if self.per is None else str(record.value(self.per)), len(names)))
            if self.by is None:
                score: float | None = -float(drawn.of(record.id)) if self.shuffled else -float(len(scores))
                state.append(1)
            else:
                value = record.value(self.by)
                score = number_of(value)
                state.append(2 if value is None else 3 if score is None or math.isnan(score) else 1)
                if state[-1] != 1 and self.missing == "refuse":
                    what = "has no" if value is None else f"has {value!r} as"
                    raise BadInput(f"select: row {record.id!r} ({record.source} line {record.line}) {what} {self.by}")
            scores.append(score if score is not None and state[-1] == 1 else 0.0)
        if self.by is not None and state and 1 not in state:
            raise BadInput(f"select: no row has a number as {self.by!r}; score the rows or join their scores first")
        keep = self._kept(np.frombuffer(scores, np.float64), np.frombuffer(groups, np.int32), np.frombuffer(bytes(state), np.uint8))
        kept = 0
        for k, record in enumerate(rows):
            if state[k] == 3:
                context.drop(record, "score is not a number", f"{self.by} = {record.value(self.by or '')!r}")
            elif state[k] == 2 and self.missing == "drop":
                context.drop(record, "no score", f"no {self.by}")
            elif state[k] == 2 or keep[k]:
                kept += 1
                yield record
            else:
                context.drop(record, "not selected", self._said(scores[k]))
        context.note(groups=len(names), selected=kept)

    def _said(self, score: float) -> str:
        return "after the prefix" if self.by is None else f"{self.by} = {score:g}"

    def _kept(self, scores: np.ndarray, groups: np.ndarray, state: np.ndarray) -> np.ndarray:
        """bool [rows]."""
        if not len(scores):
            return np.zeros(0, dtype=bool)
        ranked = state == 1
        if self.threshold is not None:
            return ranked & (scores >= self.threshold if self.descending else scores <= self.threshold)
        best = -scores if self.descending or self.by is None else scores
        keep = np.zeros(len(scores), dtype=bool)
        places = np.flatnonzero(ranked)
        order = places[np.lexsort((places, best[places], groups[places]))]
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        ends = np.append(starts[1:], len(order))
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True):
            keep[order[a : a + self._size(b - a)]] = True
        return keep

    def _size(self, rows: int) -> int:
        share = self.fraction if self.fraction is not None else self.prefix if isinstance(self.prefix, float) else None
        if share is not None:
            return max(1, int(share * rows + 1e-9))
        return int(self.top if self.top is not None else self.prefix or 0)
