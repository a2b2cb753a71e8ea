"""PIQA: which of two ways reaches a goal? (arXiv 1911.11641)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from guidetune.evaluation.tasks.arc import ARC
from guidetune.registry import method


@method(kind="task", name="piqa", paper="1911.11641", summary="Everyday goals, each with two ways to reach it.")
class PIQA(ARC):
    """`mcq` by continuation with the prompt of lm-evaluation-harness: "Question: goal\\nAnswer:" and the two ways."""

    files: ClassVar[tuple[str, ...]] = ()
    layouts: ClassVar[tuple[Mapping[str, Any], ...]] = ({"question": "query", "options": "choices", "answer": "gold"},)

    question: str = Field("goal", description="Column of the goal.")
    options: str | list[str] = Field(["sol1", "sol2"], description="Columns of the two ways.")
    answer: str = Field("label", description="Column of the right way: its number from 0, or its text.")
