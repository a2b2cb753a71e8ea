"""Instruction-following difficulty: how little the instruction helps with the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.scorers import NoScore, Row, Score, ScoreContext, Scorer
from guidetune.scorers._nll import Tokens, mean_nll, tokens


@method(
    kind="scorer",
    name="ifd",
    paper="2308.12032",
    summary="Instruction-following difficulty: how little the instruction helps with the answer.",
)
class Ifd(Scorer):
    """s(A|Q) and s(A): mean -log p of the answer's tokens after the instruction, and after the bare header of an answer.

    form loss: s(A|Q) / s(A) (arXiv 2308.12032); form perplexity: exp(s(A|Q) - s(A)) (arXiv 2402.00530). Above 1 the instruction does
    not help. Both passes score the same tokens. The two forms rank rows differently: never use the thresholds of one with the other.
    """

    model: str = Field("base", description="The model that scores: `base`, `instruct`, or any model or adapter.")
    form: Literal["loss", "perplexity"] = Field("loss", description="Ratio of losses (Cherry LLM) or of perplexities (Superfiltering).")

    uses_chat: ClassVar[bool] = True

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> list[Score]:
        handle = context.open_model(self.model)
        read = tokens(rows, self.model, handle, context)
        usable = [one for one in read if isinstance(one, Tokens)]
        given = mean_nll(handle.model, [(one.ids, one.targets) for one in usable], context.batch_tokens) if usable else []
        pieces = [one.answers_alone() for one in usable]
        flat = mean_nll(handle.model, [part for alone in pieces for part in alone], context.batch_tokens) if usable else []
        of_piece, of_row = iter(flat), iter(given)
        found: list[Score] = []
        for one in read:
            if isinstance(one, NoScore):
                found.append(one)
                continue
            total = sum(len(targets) * next(of_piece) for _, targets in one.answers_alone())
            found.append(ifd(next(of_row), total / len(one.targets), self.form))
        return found


def ifd(given: float, alone: float, form: Literal["loss", "perplexity"]) -> Score:
    """IFD from s(A|Q) and s(A), both mean -log p per token.

    >>> ifd(1.0, 2.0, "loss"), round(ifd(1.0, 2.0, "perplexity"), 6)
    (0.5, 0.367879)
    """
    if form == "perplexity":
        return math.exp(given - alone)
    return given / alone if alone > 0 else NoScore("the answer alone has no loss")
