"""PubMedQA: is the question answered yes, no or maybe by the abstract? (arXiv 1909.06146)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.evaluation.task import column, texts
from guidetune.evaluation.tasks.mcq import MultipleChoice
from guidetune.registry import method

WORDS = ("yes", "no", "maybe")


@method(kind="task", name="pubmedqa", paper="1909.06146", summary="Yes, no or maybe, from a biomedical abstract.")
class PubMedQA(MultipleChoice):
    """`mcq` with the prompt of lm-evaluation-harness; the choices are the words themselves."""

    choose: Literal["letter", "text"] = Field("text", description="The model names an option by its letter, or by its word.")
    template: str = Field(
        "Abstract: {context}\nQuestion: {question}\nAnswer:", description="Prompt; {context} and {question} are replaced."
    )
    context: str | None = Field(None, description="Column of the abstract (default: what stands before the last line of the question).")
    id: str | None = Field("realidx", description="Column of a unique id (null: the row's number).")

    def unified(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if "options" in row or self.chosen("question", "options", "answer", "context"):
            return row
        made = {**row, "options": dict(zip("ABC", WORDS, strict=True))}
        if "final_decision" in row:  # the original release
            context = column(row, "context.contexts") if isinstance(row.get("context"), Mapping) else column(row, "CONTEXTS")
            question = row["question"] if "question" in row else column(row, "QUESTION")
            parts = [*texts(context, "contexts"), *texts(question, "question")]
            return {**made, "question": "\n".join(parts), "answer_idx": row["final_decision"]}
        if "continuation" in row:  # finished prompts
            abstract, _, asked = str(column(row, "context")).removeprefix("Context: ").rpartition("\nQuestion: ")
            question = asked.partition("\n")[0]
            return {**made, "question": f"{abstract}\n{question}", "answer_idx": row["continuation"]}
        return row

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        question = str(column(row, self.question)).strip()
        if self.context is not None:
            context = column(row, self.context)
            # The original release keeps the abstract as a list of paragraphs.
            return {**row, "question": question, "context": "\n".join(context) if isinstance(context, list) else context}
        context, newline, last = question.rpartition("\n")
        if not newline:
            raise BadInput(f"{self.question} = {question[:60]!r} has no abstract before its last line; give context: <column>")
        return {**row, "question": last, "context": context}
