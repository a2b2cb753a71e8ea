"""MedQA: USMLE questions with lettered options (arXiv 2009.13081)."""

from __future__ import annotations

from pydantic import Field

from guidetune.evaluation.tasks.mcq import MultipleChoice
from guidetune.registry import method


@method(kind="task", name="medqa", paper="2009.13081", summary="USMLE questions with lettered options.")
class MedQA(MultipleChoice):
    """`mcq` with the prompt of lm-evaluation-harness."""

    template: str = Field("Question: {question}\n{choices}\nAnswer:", description="Prompt; {column} is replaced.")
