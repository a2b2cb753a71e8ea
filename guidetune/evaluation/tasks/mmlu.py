"""MMLU: examination questions of 57 subjects with lettered options (arXiv 2009.03300)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from guidetune.evaluation.tasks.mcq import MultipleChoice
from guidetune.registry import method


@method(kind="task", name="mmlu", paper="2009.03300", summary="Examination questions of many subjects with lettered options.")
class MMLU(MultipleChoice):
    """`mcq` by letters. The score is the mean over questions (micro), `macro` the mean over subjects.

    Published with the first 5 questions of the subject's dev set as examples: `shots_path: dev.jsonl`.
    """

    layouts: ClassVar[tuple[Mapping[str, Any], ...]] = ({"question": "question", "options": "choices", "answer": "answer"},)

    category: str | None = Field("subject", description="Column of the subject, to break the score down by.")
    shots_by: str | None = Field("subject", description="Column in which examples equal their question.")
