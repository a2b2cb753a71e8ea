"""TruthfulQA: questions that people often answer with a misconception (arXiv 2109.07958)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.evaluation.metrics import truthful_mass
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill, texts
from guidetune.registry import method


@method(kind="task", name="truthfulqa", paper="2109.07958", summary="Common misconceptions: are true answers likelier? MC1, MC2.")
class TruthfulQA(RowTask):
    """Every true and false answer is rated as a continuation of "Q: question\\nA:".

    `mc1`: the best answer is likelier than every false one; `mc2`: the share of probability on true answers, `Σ_true p / Σ p` with
    `p = exp(ll)` and no length norm. Reads the columns of the published CSV (answers apart by semicolons) and of the `mc1_targets` and
    `mc2_targets` form. Published figures stand behind a fixed text of six other questions: give it as `header`.
    """

    mode: ClassVar[str] = "loglik"

    best_by: Literal["mc1", "mc2"] = Field("mc2", description="The main score.")
    format: Literal["chat", "plain"] = Field("plain", description="Ask in the model's chat format, or as plain text to be continued.")
    template: str = Field("Q: {question}\nA:", description="Prompt; {question} or any column.")
    system: str | None = Field(None, description="System message of the chat format.")
    category: str | None = Field("Category", description="Column to break the score down by.")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.best_by

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        if "mc2_targets" in row:
            first, second = column(row, "mc1_targets"), column(row, "mc2_targets")
            question = column(row, "question")
            best = [text for text, true in _labelled(first) if true]
            wrong = [text for text, true in _labelled(first) if not true]
            mc2 = dict(_labelled(second))
        else:
            question = column(row, "Question")
            best, wrong = _answers(str(column(row, "Best Answer"))), _answers(str(column(row, "Incorrect Answers")))
            mc2 = {**dict.fromkeys(wrong, False), **dict.fromkeys([*best, *_answers(str(column(row, "Correct Answers")))], True)}
        if len(best) != 1 or not wrong or all(mc2.values()) or not any(mc2.values()):
            raise BadInput(f"needs one best answer, and true and false ones; has best {best} and {mc2}")
        choices = tuple(dict.fromkeys([best[0], *wrong, *mc2]))
        prompt = fill(self.template, {**row, "question": question})
        where: dict[str, Any] = {"text": prompt} if self.format == "plain" else {"messages": ask(prompt, self.system)}
        return Item(
            str(number),
            **where,
            choices=choices,
            reference=best[0],
            gold=best[0],
            meta=breakdown(row, category=self.category),
            payload=([choices.index(text) for text in (best[0], *wrong)], [(choices.index(text), true) for text, true in mc2.items()]),
        )

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        ll = output.loglik
        if ll is None:
            return {"correct": 0.0, "mc1": 0, "mc2": 0.0}
        rivals, truths = item.payload
        best, *wrong = rivals
        found: dict[str, float] = {
            "mc1": int(all(ll[best] > ll[place] for place in wrong)),
            "mc2": truthful_mass([ll[place] for place, _ in truths], [true for _, true in truths]),
        }
        return {"correct": found[self.best_by], **found}

    def perfect(self, item: Item) -> Output | None:
        true = {place for place, true in item.payload[1] if true}
        return Output(loglik=tuple(1.0 if i == 0 else 0.0 if i in true else -100.0 for i in range(len(item.choices or ()))))


def _labelled(targets: Any) -> list[tuple[str, bool]]:
    choices, labels = texts(column(targets, "choices"), "choices"), column(targets, "labels")
    if not isinstance(labels, list) or len(labels) != len(choices):
        raise BadInput("choices and labels are two lists of the same length")
    return list(zip(choices, map(bool, labels), strict=True))


def _answers(text: str) -> list[str]:
    """The answers of a CSV field, each ended by a full stop as in the published multiple-choice file."""
    parts: Sequence[str] = [part.strip() for part in text.split(";")]
    return [part if part.endswith(".") else f"{part}." for part in parts if part]
