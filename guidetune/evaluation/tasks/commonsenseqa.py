"""CommonsenseQA: five-way questions about everyday concepts (arXiv 1811.00937)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from guidetune.evaluation.task import column
from guidetune.evaluation.tasks.mcq import MultipleChoice
from guidetune.registry import method

_LISTED = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


@method(kind="task", name="commonsenseqa", paper="1811.00937", summary="Everyday concepts, with lettered options.")
class CommonsenseQA(MultipleChoice):
    """`mcq` by letters with the prompt of lm-evaluation-harness.

    Copies that come as finished prompts (`query` with its lettered lines, `gold`) are taken apart again.
    """

    files: ClassVar[tuple[str, ...]] = ("commonsense_qa",)
    layouts: ClassVar[tuple[Mapping[str, Any], ...]] = ({"question": "question", "options": "choices", "answer": "answerKey"},)

    template: str = Field(
        "Question: {question}\n{choices}\nAnswer:", description="Prompt; {question}, {choices} (lines 'A. ...') or any column."
    )

    def unified(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if "query" not in row or "question" in row:
            return row
        query = str(row["query"])
        question = _LISTED.split(query)[0].strip().removeprefix("Question:").removesuffix("Choices:").strip()
        return {**row, "question": question, "options": dict(_LISTED.findall(query)), "answer_idx": column(row, "gold")}
