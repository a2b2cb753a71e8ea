"""Difficulty as a judge model rates it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from guidetune.artefacts import fingerprint
from guidetune.evaluation.judge import Judge, JudgeSettings, bracketed
from guidetune.registry import method
from guidetune.scorers import NoScore, Row, Score, ScoreContext, Scorer, texts

PROMPT = """Rate how difficult the task below is for a language model, in two whole numbers from {low} (trivial) to {high} (very hard):
first, how hard the instruction itself is to understand and carry out; second, how hard it is to get from the instruction to this response.

Instruction:
{instruction}

Response:
{response}

Give your reasons in one or two sentences. Then end with the two numbers in double square brackets, like [[{low}, {high}]]."""


@method(
    kind="scorer",
    name="judge",
    paper="2406.04371",
    summary="Difficulty as a judge model rates it: of the instruction, and of the way to the answer.",
)
class DifficultyJudge(Scorer):
    """The mean of two whole numbers from `low` to `high` by a model behind an API (docs/judge.md): remembered, retried, within a budget.

    A row without a readable verdict has no score, never a guess. The published prompt is not available; this one is ours.
    """

    judge: JudgeSettings = Field(description="The judge: {model, base_url, ...}; docs/judge.md lists its options.")
    prompt: str = Field(PROMPT, description="What is asked; {instruction}, {response}, {low} and {high} are replaced.")
    low: int = Field(1, description="The easiest.")
    high: int = Field(5, description="The hardest.")

    unit: ClassVar[str] = "rating"
    _judges: list[Judge] = PrivateAttr(default_factory=list)  # one for all windows: its cost is that of all
    _counts: Counter[str] = PrivateAttr(default_factory=Counter)

    def deciding(self) -> dict[str, Any]:
        return {**self.spec(), "judge": self.judge.deciding(), "prompt": fingerprint(self.prompt)}

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> list[Score]:
        if not self._judges:
            self._judges.append(Judge(self.judge))
        judge = self._judges[0]
        prompts = []
        for row in rows:
            asked, answer = texts(row)
            prompts.append(self._fill(asked, answer))
        verdicts = judge.verdicts(prompts, lambda text: read_ratings(text, self.low, self.high))
        self._counts.update(judge.counts)
        return [v.value if v.value is not None else NoScore(_short(v.why)) for v in verdicts]

    def _fill(self, instruction: str, response: str) -> str:
        parts = {"instruction": instruction, "response": response, "low": str(self.low), "high": str(self.high)}
        return re.sub(r"\{(instruction|response|low|high)\}", lambda found: parts[found[1]], self.prompt)

    def notes(self) -> list[str]:
        if not self._counts:
            return []
        c = self._counts
        missing = f"{c['unreadable']} unreadable, {c['failed']} failed"
        return [f"judged by {self.judge.model}: {c['asked']} verdicts asked for, {missing}; {self._judges[0].client.cost_text()}"]


def _short(why: str | None) -> str:
    """The kind of failure, without what differs from row to row."""
    return (why or "no verdict").split(":")[0][:60]


def read_ratings(text: str, low: int, high: int) -> float | None:
    """The mean of the numbers in the last `[[a, b]]`; None unless there are one or two, all on the scale.

    >>> read_ratings("Hard to read, easy to do. [[4, 3]]", 1, 5)
    3.5
    """
    inside = bracketed(text)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*[,;/ ]\s*(\d+(?:\.\d+)?))?", inside) if inside is not None else None
    values = [float(value) for value in found.groups() if value is not None] if found else []
    return sum(values) / len(values) if values and all(low <= value <= high for value in values) else None
