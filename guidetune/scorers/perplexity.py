"""Perplexity of the answer or the prompt under any model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.scorers import NoScore, Row, Score, ScoreContext, Scorer
from guidetune.scorers._nll import mean_nll, tokens


@method(kind="scorer", name="perplexity", summary="Perplexity of the answer or the prompt under any model.")
class Perplexity(Scorer):
    """exp(mean -log p) over the answer's tokens after the prompt, or over the prompt's own tokens; `nll` is its logarithm."""

    model: str = Field("base", description="The model that scores: `base`, `instruct`, or any model or adapter.")
    of: Literal["answer", "prompt"] = Field("answer", description="Which tokens: the answer's, or the rendered prompt's.")
    form: Literal["perplexity", "nll"] = Field("perplexity", description="exp of the mean loss, or the mean loss itself.")

    uses_chat: ClassVar[bool] = True

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> list[Score]:
        handle = context.open_model(self.model)
        found: list[Score] = []
        places, parts = [], []
        for k, one in enumerate(tokens(rows, self.model, handle, context)):
            if isinstance(one, NoScore):
                found.append(one)
                continue
            targets = one.targets if self.of == "answer" else one.prompt
            found.append(NoScore("no prompt token"))
            if targets:
                places.append(k)
                parts.append((one.ids, targets))
        for k, nll in zip(places, mean_nll(handle.model, parts, context.batch_tokens) if parts else [], strict=True):
            found[k] = nll if self.form == "nll" else math.exp(min(nll, 700.0))  # a double holds no more
        return found
