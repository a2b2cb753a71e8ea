"""MATH-500: competition problems with a LaTeX answer (arXiv 2103.03874, 2305.20050)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.evaluation.answers import boxed
from guidetune.evaluation.maths import gift_equal, hendrycks_equal, hendrycks_form, verified
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill
from guidetune.registry import method

GRADERS: dict[str, Callable[[str, str], bool]] = {
    "math_verify": lambda gold, output: verified(f"${gold}$", output),
    "exact": hendrycks_equal,
    "gift": gift_equal,
}


@method(kind="task", name="math500", paper="2305.20050", summary="Competition maths with LaTeX answers, judged by math-verify.")
class Math500(RowTask):
    r"""A problem and its answer. `exact` (Hendrycks' string rule on the last box) and `boxed` (a box was written) are reported beside."""

    mode: ClassVar[str] = "generate"
    default_new_tokens: ClassVar[int] = 2048

    template: str = Field(
        "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        description="Prompt; {column} is replaced. Keep it the prompt of training.",
    )
    system: str | None = Field(None, description="System message, when training had one.")
    answer: str = Field("answer", description="Column of the LaTeX answer.")
    solution: str | None = Field("solution", description="Column of the reference solution, if there is one.")
    category: str | None = Field("subject", description="Column to break the score down by.")
    difficulty: str | None = Field("level", description="Column to break the score down by.")
    grader: Literal["math_verify", "exact", "gift"] = Field("math_verify", description="Judge of the main score; gift: the GIFT release's.")

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        answer = str(column(row, self.answer))
        gold = row.get(self.solution) if self.solution else None
        prompt = ask(fill(self.template, row), self.system)
        meta = breakdown(row, category=self.category, difficulty=self.difficulty)
        identity = row.get("unique_id", row.get("id", number))
        return Item(str(identity), prompt, reference=answer, gold=str(gold) if gold else f"\\boxed{{{answer}}}", meta=meta)

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        gold, found = str(item.reference), boxed(output.text)
        return {
            "correct": int(GRADERS[self.grader](gold, output.text)),
            "exact": int(hendrycks_equal(gold, output.text)),
            "boxed": int(found is not None),
            "answer": hendrycks_form(found) if found is not None else None,
        }

    def same_answer(self, a: str, b: str) -> bool:
        return verified(f"${a}$", f"\\boxed{{{b}}}")
