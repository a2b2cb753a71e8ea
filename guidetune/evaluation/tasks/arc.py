"""ARC: grade-school science questions (arXiv 1803.05457)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.evaluation.tasks.mcq import MultipleChoice
from guidetune.registry import method


@method(kind="task", name="arc", paper="1803.05457", summary="Grade-school science questions; the answers' texts are rated.")
class ARC(MultipleChoice):
    """`mcq` by continuation with the prompt of lm-evaluation-harness: "Question: ...\\nAnswer:" and the options' texts, in plain text."""

    files: ClassVar[tuple[str, ...]] = ("arc_challenge", "ARC-Challenge")
    layouts: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"question": "question", "options": "choices", "answer": "answerKey"},
        {"question": "query", "options": "choices", "answer": "gold"},
    )

    choose: Literal["letter", "text"] = Field("text", description="The model names an option by its letter, or by its text.")
    format: Literal["chat", "plain"] = Field("plain", description="Ask in the model's chat format, or as plain text to be continued.")
    best_by: Literal["acc", "acc_norm", "acc_bytes", "acc_mutual_info"] = Field(
        "acc_norm", description="The rule whose choice is the main score (log-likelihood)."
    )
    template: str = Field("Question: {question}\nAnswer:", description="Prompt; {question}, {choices} (lines 'A. ...') or any column.")

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = super().columns(row)
        return {**found, "question": str(found["question"]).strip().removeprefix("Question: ").removesuffix("\nAnswer:")}
