"""How much more of an answer the instruct model knows than the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from guidetune.registry import method
from guidetune.scorers import NoScore, Row, Score, ScoreContext, Scorer


@method(kind="scorer", name="learnability", summary="Loss of the base model less that of the instruct model, from two guidance stores.")
class Learnability(Scorer):
    """s_base(A|Q) - s_instruct(A|Q), s the mean -log p of the answer's tokens; both passes are kept and shared like any guidance."""

    weak: str = Field("base", description="The model that is to learn.")
    strong: str = Field("instruct", description="The model that may know the answer.")

    unit: ClassVar[str] = "nats per token"

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.weak, self.strong)

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> list[Score]:
        weak, strong = (context.guidance(name) for name in self.teachers)
        found: list[Score] = []
        for row in rows:
            a, b = (store.row(row.place).astype(np.float64) for store in (weak, strong))
            found.append(float(b.mean() - a.mean()) if len(a) else NoScore("no supervised token"))
        return found
