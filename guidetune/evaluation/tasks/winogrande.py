"""WinoGrande: which of two names fills the blank? (arXiv 1907.10641)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.evaluation.task import Item, breakdown, column
from guidetune.evaluation.tasks.mcq import MultipleChoice
from guidetune.registry import method


@method(kind="task", name="winogrande", paper="1907.10641", summary="Fill the blank with the right one of two names, by partial scoring.")
class WinoGrande(MultipleChoice):
    """Partial scoring in plain text: the sentence up to the blank with each name filled in is the context, and the rest of the sentence,
    equal for both, is rated: `log p(rest | beginning + name)`. With `format: chat` the two whole sentences are lettered options.
    """

    # Contexts with the names filled in, and what follows.
    layouts: ClassVar[tuple[Mapping[str, Any], ...]] = ({"question": "continuation", "options": "context_options", "answer": "gold"},)

    format: Literal["chat", "plain"] = Field("plain", description="Partial scoring in plain text, or two lettered sentences in a chat.")
    template: str = Field("Which sentence makes sense?\n{choices}\nAnswer:", description="Prompt of the chat; {choices} or any column.")
    question: str = Field("sentence", description="Column of the sentence with its blank `_`.")
    options: str | list[str] = Field(["option1", "option2"], description="Columns of the two names.")
    answer: str = Field("answer", description="Column of the right name: 1 or 2, or the name itself.")

    def parts(self, row: Mapping[str, Any]) -> tuple[list[str], list[str], int]:
        contexts, rest, right = self._sentence(row)
        return [f"{context} {rest}" for context in contexts], ["A", "B"], right

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        if self.format == "chat" or self.mode == "generate":
            return super().item(row, number)
        contexts, rest, right = self._sentence(row)
        sentences, labels, _ = self.parts(row)
        item = Item(
            self.identity(row, number),
            text="\n".join(f"{context} ..." for context in contexts),
            contexts=tuple(contexts),
            choices=(rest, rest),
            reference=right,
            gold=sentences[right],
            meta=breakdown(row, category=self.category),
            payload=(labels, sentences),
        )
        return replace(item, prior=self.without_question(item, text=""))

    def _sentence(self, row: Mapping[str, Any]) -> tuple[list[str], str, int]:
        """The two beginnings, the rest and the place of the right one."""
        names = self.layout(row)
        value = column(row, names["answer"])
        if names["options"] == "context_options":
            contexts, rest = [str(one).strip() for one in column(row, "context_options")], str(column(row, "continuation")).strip()
            right = int(value) if str(value) in ("0", "1") else None
        else:
            sentence = str(column(row, names["question"]))
            fillers = [str(column(row, name)) for name in names["options"]]
            before, blank, rest = sentence.partition("_")
            if not blank or not rest.strip():
                raise BadInput(f"{names['question']} = {sentence[:60]!r} has no blank `_` with text after it")
            contexts, rest = [before + filler for filler in fillers], rest.strip()
            places = {"1": 0, "2": 1, **{filler: i for i, filler in enumerate(fillers)}}
            right = places.get(str(value).strip())
        if right is None or len(contexts) != 2:
            raise BadInput(f"{names['answer']} = {value!r} names neither of {contexts}")
        return contexts, rest, right
