"""GSM8K: grade-school word problems whose answer is one number (arXiv 2110.14168)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.evaluation.answers import boxed, clean_number, flexible_number, number_answer, same_number, strict_number
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill
from guidetune.registry import method


@method(kind="task", name="gsm8k", paper="2110.14168", summary="Grade-school maths; strict, flexible and boxed filters.")
class GSM8K(RowTask):
    r"""A problem and its reference solution, whose number stands after `####`.

    `correct` reads the last `\boxed{}`, else the number after `####`, else the last number of the output: chat models rarely use the
    reference's own form. The harness's `strict` and `flexible` filters and `boxed` alone are reported beside it.
    """

    mode: ClassVar[str] = "generate"

    template: str = Field("{question}", description="Prompt; {column} is replaced. Keep it the prompt of training.")
    system: str | None = Field(None, description="System message, when training had one.")
    answer: str = Field("answer", description="Column of the reference solution (its number after ####, or the bare number).")
    skill: str | None = Field(None, description="Column to break the score down by.")
    difficulty: str | None = Field(None, description="Column to break the score down by.")

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        solution = str(column(row, self.answer))
        gold = clean_number(solution.rsplit("####", 1)[-1].strip())
        if not any(c.isdigit() for c in gold):
            raise BadInput(f"{self.answer} = {solution[-60:]!r} has no number after ####")
        prompt = ask(fill(self.template, row), self.system)
        meta = breakdown(row, skill=self.skill, difficulty=self.difficulty)
        return Item(str(row.get("id", number)), prompt, reference=gold, gold=solution, meta=meta)

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        gold, found = str(item.reference), number_answer(output.text)
        # The harness compares strings; 18 and 18.0 are the same number here.
        return {
            "correct": int(same_number(found, gold)),
            "strict": int(same_number(strict_number(output.text), gold)),
            "flexible": int(same_number(flexible_number(output.text), gold)),
            "boxed": int(same_number(boxed(output.text), gold)),
            "answer": found,
        }

    def same_answer(self, a: str, b: str) -> bool:
        return same_number(a, b)
