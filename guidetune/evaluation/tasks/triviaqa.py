"""TriviaQA: trivia questions from memory, each with the aliases of its answer (arXiv 1705.03551)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from guidetune.evaluation.task import column, texts
from guidetune.evaluation.tasks.squad import Squad
from guidetune.registry import method


@method(kind="task", name="triviaqa", paper="1705.03551", summary="Trivia questions from memory, by exact match and F1 over all aliases.")
class TriviaQA(Squad):
    """`squad` without a passage; every alias of the answer is right, and `em` is the main score.

    Reads the published columns (`question`, `answer: {value, aliases}`) and finished prompts (`context`, `answer`, `aliases`).
    """

    template: str = Field("Question: {question}\nAnswer:", description="Prompt; {column} is replaced.")
    score_by: Literal["em", "f1", "contains"] = Field("em", description="The main score.")
    answers: str = Field("aliases", description="Column of the right answers; of the published form: answer.")
    id: str | None = Field("question_id", description="Column of a unique id (where there is none: the row's number).")

    def asked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.question not in row and "context" in row:
            return {**row, "question": str(row["context"]).removeprefix("Question: ").removesuffix("Answer:").strip()}
        return super().asked(row)

    def right(self, row: Mapping[str, Any]) -> list[str]:
        answer = row.get("answer")
        if isinstance(answer, Mapping) and not self.chosen("answers"):
            aliases = column(answer, "aliases")
            return list(dict.fromkeys([*texts(column(answer, "value"), "value"), *(texts(aliases, "aliases") if aliases != [] else [])]))
        found = super().right(row)
        return list(dict.fromkeys([answer, *found])) if isinstance(answer, str) and not self.chosen("answers") else found
