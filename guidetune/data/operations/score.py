"""A score for each row, before rows are selected or ordered by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field, PlainSerializer

from guidetune import registry
from guidetune.data.chat import Refused
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, column_of
from guidetune.errors import BadInput
from guidetune.registry import method
from guidetune.scorers import WINDOW, NoScore, Row, ScoreContext, Scorer


def _scorer(value: Any) -> Any:
    try:
        return registry.build("scorer", value)
    except BadInput as error:
        raise ValueError("; ".join(error.problems)) from None


@method(kind="operation", name="score", summary="Give each row a number by a scorer, for select, order and tune.phases.")
class ScoreRows(Operation):
    """The score `name` of each row, by any scorer that does not read guidance (which comes after the rows are prepared).

    Rows without a score stay; the ledger's account says how many and why. Scores of the rows as prepared, which several recipes share,
    are better asked for in data.scores.
    """

    streams: ClassVar[bool] = True

    scorer: Annotated[Scorer, BeforeValidator(_scorer), PlainSerializer(lambda one: one.spec())] = Field(
        description="The scorer: its name, or {method: name, option: value}."
    )
    to: str = Field("score", min_length=1, description="Name of the score.")

    def columns(self) -> set[str]:
        return {column_of(name) for name in self.scorer.columns}

    def adds(self, root: Path) -> dict[str, type]:
        return {self.to: float}

    def models(self) -> tuple[str, ...]:
        return self.scorer.models

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """The same rows with the score.

        Raises:
            BadInput: the scorer reads guidance.
        """
        if self.scorer.teachers:
            raise BadInput(f"score: {self.scorer.name} reads guidance, which is computed from prepared rows; name it in data.scores")
        assert context.chat is not None
        why: Counter[str] = Counter()
        count = 0
        with ExitStack() as held:
            tools = ScoreContext(context.chat, _opener(context, held), _no_guidance)
            stream = iter(rows)
            while window := list(islice(stream, WINDOW)):
                encoded = context.chat.encode_many([record.messages for record in window])
                known = [k for k, one in enumerate(encoded) if not isinstance(one, Refused)]
                asked = [self._row(count + k, window[k], encoded[k]) for k in known]
                found = dict(zip(known, self.scorer.scores(asked, tools) if asked else [], strict=True))
                for k, record in enumerate(window):
                    score = found.get(k, NoScore("refused by the chat template"))
                    if isinstance(score, NoScore):
                        why[score.why] += 1
                        yield record
                    else:
                        yield replace(record, scores={**record.scores, self.to: float(score)})
                count += len(window)
        context.note(scored=count - why.total(), without=dict(why), told=self.scorer.notes())

    def _row(self, place: int, record: Record, encoded: Any) -> Row:
        columns = {name: record.value(name) for name in self.scorer.columns}
        weights = np.array(encoded.target, dtype=np.float32)
        return Row(place, record.id, record.messages, np.array(encoded.input_ids, dtype=np.int32), weights, columns)


def _opener(context: OperationContext, held: ExitStack) -> Any:
    from guidetune.models.handle import open_handle

    opened: dict[str, Any] = {}
    held.callback(opened.clear)

    def open_model(name: str) -> Any:
        if name not in opened:
            opened[name] = open_handle(context.models.get(name, name))
        return opened[name]

    return open_model


def _no_guidance(teacher: str) -> Any:
    raise BadInput(f"there is no guidance of {teacher} before the rows are prepared")
