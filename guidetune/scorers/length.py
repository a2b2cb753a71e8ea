"""Length in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.scorers import Row, Score, ScoreContext, Scorer


@method(kind="scorer", name="length", summary="Tokens of the answer, the prompt or the whole row.")
class Length(Scorer):
    """Number of tokens; of the answers it ranks rows much as GPT-4's difficulty does (arXiv 2406.04371, table of stages)."""

    unit: ClassVar[str] = "tokens"

    of: Literal["answer", "prompt", "row"] = Field("answer", description="answer: the supervised tokens; prompt: the others; row: all.")

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> list[Score]:
        found: list[Score] = []
        for row in rows:
            answer = int((row.loss_weight > 0).sum())
            found.append(float({"answer": answer, "prompt": len(row.input_ids) - answer, "row": len(row.input_ids)}[self.of]))
        return found
