"""The six medical subjects of MMLU (arXiv 2009.03300)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from guidetune.evaluation.tasks.mmlu import MMLU
from guidetune.registry import method

SUBJECTS = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "professional_medicine")


@method(kind="task", name="mmlu_medical", paper="2009.03300", summary="The six medical subjects of MMLU.")
class MedicalMMLU(MMLU):
    """`mmlu` on the rows of anatomy, clinical knowledge, college biology, college medicine, medical genetics and professional medicine."""

    files: ClassVar[tuple[str, ...]] = ("mmlu",)

    where: dict[str, Any] = Field(
        {"subject": [*SUBJECTS, *(name.replace("_", " ") for name in SUBJECTS if "_" in name)]},
        description="Only rows whose columns have these values (of a list: one of them).",
    )
