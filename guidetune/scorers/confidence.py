"""Difficulty from guidance: how improbable a teacher finds the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from guidetune.registry import method
from guidetune.scorers import NoScore, Row, Score, ScoreContext, Scorer


@method(kind="scorer", name="confidence", summary="From the guidance store: how unsure the teacher is of the answer's tokens.")
class Confidence(Scorer):
    """Over the supervised tokens of a row, q_t the teacher's probability of each.

    nll: mean -log q_t; doubt: 1 - mean q_t; low_share: share of tokens with q_t below `below`. Higher is harder. Costs nothing where
    the guidance is computed anyway, as for `gift`.
    """

    teacher: str = Field("instruct", description="`instruct`, `base`, or any model of the pair's tokenizer.")
    measure: Literal["nll", "doubt", "low_share"] = Field("nll", description="What is made of the probabilities.")
    below: float = Field(0.05, gt=0, lt=1, description="Of low_share: the probability below which a token counts.")

    unit: ClassVar[str] = "per token"

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,)

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> list[Score]:
        store = context.guidance(self.teacher)
        return [self._one(store.row(row.place).astype(np.float64)) for row in rows]

    def _one(self, log_prob: np.ndarray) -> Score:
        if not len(log_prob):
            return NoScore("no supervised token")
        q = np.exp(log_prob)
        return float({"nll": -log_prob.mean(), "doubt": 1 - q.mean(), "low_share": (q < self.below).mean()}[self.measure])
