"""MedMCQA: Indian medical entrance questions with lettered options (arXiv 2203.14371)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from guidetune.evaluation.tasks.mcq import MultipleChoice
from guidetune.registry import method


@method(kind="task", name="medmcqa", paper="2203.14371", summary="Indian medical entrance questions with lettered options.")
class MedMCQA(MultipleChoice):
    """`mcq` with the prompt of lm-evaluation-harness. Use the validation questions: the answers of the test set are not published."""

    layouts: ClassVar[tuple[Mapping[str, Any], ...]] = ({"question": "question", "options": ["opa", "opb", "opc", "opd"], "answer": "cop"},)

    template: str = Field("Question: {question}\nChoices:\n{choices}\nAnswer:", description="Prompt; {column} is replaced.")
