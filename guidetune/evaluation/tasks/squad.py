"""SQuAD: short answers found in a passage, by exact match and F1 (arXiv 1606.05250)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.evaluation.answers import first_line
from guidetune.evaluation.metrics import squad_exact, squad_f1, squad_words
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill, texts
from guidetune.registry import method


@method(kind="task", name="squad", paper="1606.05250", summary="Short answers from a passage, by exact match and F1.")
class Squad(RowTask):
    """The first line of the output is compared with each right answer in lower case, without ASCII punctuation and a, an, the.

    `em`: equal to one of them; `f1`: `2 |shared| / (|output| + |answer|)` over the multisets of words, the largest over the answers;
    `contains`: one of them stands in the whole output as whole words, which is fairer to models that answer in sentences.
    """

    mode: ClassVar[str] = "generate"
    default_new_tokens: ClassVar[int] = 64

    template: str = Field("{context}\nQuestion: {question}\nAnswer:", description="Prompt; {column} is replaced.")
    system: str | None = Field(None, description="System message.")
    format: Literal["chat", "plain"] = Field("chat", description="Ask in the model's chat format, or as plain text to be continued.")
    score_by: Literal["em", "f1", "contains"] = Field("f1", description="The main score.")
    question: str = Field("question", description="Column of the question.")
    answers: str = Field("answers", description="Column of the right answers: a list, one text, or {text: [...]}; none: unanswerable.")
    id: str | None = Field("id", description="Column of a unique id (where there is none: the row's number).")
    category: str | None = Field(None, description="Column to break the score down by.")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.score_by

    def asked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the template may name."""
        return {**row, "question": column(row, self.question)}

    def right(self, row: Mapping[str, Any]) -> list[str]:
        """The right answers; `[""]` of an unanswerable question."""
        found = column(row, self.answers)
        if isinstance(found, Mapping):
            found = found.get("text")
        return texts(found, self.answers) if found != [] else [""]

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        right = self.right(row)
        prompt = fill(self.template, self.asked(row))
        where: dict[str, Any] = {"text": prompt} if self.format == "plain" else {"messages": ask(prompt, self.system)}
        return Item(self.identity(row, number), **where, reference=right, gold=right[0], meta=breakdown(row, category=self.category))

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        short = first_line(output.text)
        golds = [" ".join(words) for answer in item.reference if (words := squad_words(answer))]
        whole = f" {' '.join(squad_words(output.text))} "
        found: dict[str, float] = {
            "em": squad_exact(short, item.reference),
            "f1": squad_f1(short, item.reference),
            "contains": float(any(f" {gold} " in whole for gold in golds) if golds else not whole.strip()),
        }
        return {"correct": found[self.score_by], **found, "answer": " ".join(squad_words(short)) or None}
