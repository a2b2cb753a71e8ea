"""A user's own generation task, in one recipe entry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from guidetune.evaluation.answers import boxed, clean_number, normal_text, number_answer, same_number
from guidetune.evaluation.maths import hendrycks_form, verified
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill, texts
from guidetune.registry import method


def _plain(text: str) -> str | None:
    return normal_text(text) or None


# match -> (what is read from an output, whether it equals a reference)
MATCHES: dict[str, tuple[Callable[[str], str | None], Callable[[str, str], bool]]] = {
    "exact": (_plain, lambda found, gold: found == normal_text(gold)),
    "contains": (_plain, lambda found, gold: bool(normal_text(gold)) and f" {normal_text(gold)} " in f" {found} "),
    "number": (number_answer, lambda found, gold: same_number(found, number_answer(gold) or clean_number(gold))),
    "boxed": (boxed, lambda found, gold: hendrycks_form(found) == hendrycks_form(gold) or verified(f"${gold}$", f"\\boxed{{{found}}}")),
    "regex": (_plain, lambda found, gold: found == normal_text(gold)),
}


@method(kind="task", name="generate", summary="Your own generation task: a file, a prompt, a reference column and a way to compare.")
class Generate(RowTask):
    r"""Generate an answer for each row and compare it with the row's reference (or any of a list of them).

    `exact`: equal in lower case, without punctuation; `contains`: the reference stands in the output as whole words; `number`: the last
    boxed, marked or plain number; `boxed`: the last `\boxed{}`, by string or math-verify; `regex`: the last match of `pattern`
    (its first group, if it has one), compared as `exact`.
    """

    mode: ClassVar[str] = "generate"

    prompt: str = Field(description="Prompt; {column} is replaced, {{ and }} are braces.")
    reference: str = Field(description="Column of the right answer, or of a list of right answers.")
    match: Literal["exact", "contains", "number", "boxed", "regex"] = Field("exact", description="How an output is compared.")
    pattern: str | None = Field(None, description="Regular expression of the answer, for match: regex.")
    system: str | None = Field(None, description="System message.")
    id: str | None = Field(None, description="Column of a unique id (default: the row's number).")
    skill: str | None = Field(None, description="Column to break the score down by.")
    difficulty: str | None = Field(None, description="Column to break the score down by.")
    category: str | None = Field(None, description="Column to break the score down by.")

    @field_validator("pattern")
    @classmethod
    def _valid(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _pattern_goes_with_regex(self) -> Generate:
        if (self.match == "regex") != (self.pattern is not None):
            raise ValueError("pattern and match: regex go together")
        return self

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        references = texts(column(row, self.reference), self.reference)
        meta = breakdown(row, skill=self.skill, difficulty=self.difficulty, category=self.category)
        gold: str | None = f"\\boxed{{{references[0]}}}" if self.match == "boxed" else references[0]
        if self.match == "regex":
            gold = None  # what an output that fits the pattern looks like, only its author knows
        return Item(self.identity(row, number), ask(fill(self.prompt, row), self.system), reference=references, gold=gold, meta=meta)

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        text: str | None = output.text
        if self.pattern is not None:
            found = list(re.finditer(self.pattern, output.text))
            text = (found[-1][1] if found[-1].re.groups else found[-1][0]) if found else None
        read, equal = MATCHES[self.match]
        answer = read(text) if text is not None else None
        right = answer is not None and any(equal(answer, gold) for gold in item.reference)
        return {"correct": int(right), "answer": answer}
