"""Multiple choice from any file: by log-likelihood of a letter or of the answer's text, or by generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.evaluation.answers import choice_answer, squeeze
from guidetune.evaluation.metrics import calibration_error, choice_scores, softmax
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill
from guidetune.registry import method


@method(kind="task", name="mcq", summary="Multiple choice from any file, by log-likelihood or by generation.")
class MultipleChoice(RowTask):
    """Each row has a question, its options and the right one.

    By log-likelihood, `acc` takes the likeliest choice, `acc_norm` the likeliest per character and `acc_bytes` per UTF-8 byte; ties go
    to the first. With letters all three agree. `ece` is the calibration error of softmax(log-likelihoods), `macro` the mean over
    categories. In a chat the choice follows the assistant header ("A"); in plain text it follows a space (" A").
    """

    default_new_tokens: ClassVar[int] = 512

    mode: Literal["loglik", "generate"] = Field("loglik", description="Rate the choices, or generate and read the chosen one.")
    choose: Literal["letter", "text"] = Field("letter", description="The model names an option by its letter, or by its text.")
    format: Literal["chat", "plain"] = Field("chat", description="Ask in the model's chat format, or as plain text to be continued.")
    best_by: Literal["acc", "acc_norm", "acc_bytes"] = Field("acc", description="The rule whose choice is the main score (log-likelihood).")
    template: str = Field("{question}\n{choices}\nAnswer:", description="Prompt; {question} and {choices} (lines 'A. ...') or any column.")
    system: str | None = Field(None, description="System message of the chat format.")
    question: str = Field("question", description="Column of the question.")
    options: str | list[str] = Field("options", description="Column of the options (a list, or {letter: text}), or one column for each.")
    answer: str = Field("answer_idx", description="Column of the right option: its letter, its number from 0, or its text.")
    id: str | None = Field(None, description="Column of a unique id (default: the row's number).")
    category: str | None = Field(None, description="Column to break the score down by, such as the subject.")

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the template may name: the row's own columns and `question`."""
        return {**row, "question": column(row, self.question)}

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        texts, labels = self._options(row)
        right = self._right(row, texts, labels)
        listed = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
        prompt = fill(self.template, {**self.columns(row), "choices": listed})
        identity = str(column(row, self.id)) if self.id else str(number)
        meta = breakdown(row, category=self.category)
        choices = tuple(labels if self.choose == "letter" else texts)
        where: dict[str, Any] = {"text": prompt} if self.format == "plain" else {"messages": ask(prompt, self.system)}
        return Item(
            identity, **where, reference=right, choices=choices, gold=f"Answer: {choices[right]}", meta=meta, payload=(labels, texts)
        )

    def _options(self, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        if isinstance(self.options, str):
            found = column(row, self.options)
        else:
            found = [column(row, name) for name in self.options]
        if isinstance(found, Mapping):
            found = {key: value for key, value in found.items() if value is not None}  # columnar files fill absent letters with null
            labels, texts = [str(key) for key in found], [str(value) for value in found.values()]
        elif isinstance(found, Sequence) and not isinstance(found, str):
            labels, texts = list(ascii_uppercase[: len(found)]), [str(value) for value in found]
        else:
            raise BadInput(f"{self.options} = {str(found)[:60]!r} is neither a list of options nor {{letter: text}}")
        if not 2 <= len(texts) <= len(ascii_uppercase) or any(not text.strip() for text in texts) or len(labels) != len(texts):
            raise BadInput(f"{self.options}: needs 2 to 26 options with text, has {texts}")
        return texts, labels

    def _right(self, row: Mapping[str, Any], texts: list[str], labels: list[str]) -> int:
        value = column(row, self.answer)
        if isinstance(value, bool) or value is None:
            raise BadInput(f"{self.answer} = {value!r} names no option")
        if isinstance(value, int) and 0 <= value < len(texts):
            return value
        word = str(value).strip()
        if word in labels:
            return labels.index(word)
        same = [i for i, text in enumerate(texts) if squeeze(text) == squeeze(word)]
        if len(same) == 1:
            return same[0]
        if word.isdigit() and int(word) < len(texts):
            return int(word)
        raise BadInput(f"{self.answer} = {value!r} is neither a letter nor the text of one of {dict(zip(labels, texts, strict=True))}")

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        labels, texts = item.payload
        choices = item.choices or ()
        if self.mode == "generate":
            if self.choose == "letter":
                found = choice_answer(output.text, labels, texts)
            else:
                found = choice_answer(output.text, texts, texts)
            answer = choices[found] if found is not None else None
            return {"correct": int(found == item.reference), "parsed": int(found is not None), "answer": answer}
        if output.loglik is None:
            return {"correct": 0, "acc": 0, "acc_norm": 0, "acc_bytes": 0, "answer": None}
        best = choice_scores(output.loglik, choices)
        right = {rule: int(place == item.reference) for rule, place in best.items()}
        shares = softmax(output.loglik)
        return {
            "correct": right[self.best_by],
            **right,
            "confidence": max(shares),
            "probability": shares[item.reference],
            "answer": choices[best[self.best_by]],
        }

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.mode == "loglik" and lines:
            found["ece"] = calibration_error([line["confidence"] for line in lines], [line["acc"] for line in lines])
        groups: dict[str, list[float]] = {}
        for line in lines:
            if "category" in line["meta"]:
                groups.setdefault(str(line["meta"]["category"]), []).append(line["correct"])
        if len(groups) > 1:
            found["macro"] = sum(sum(group) / len(group) for group in groups.values()) / len(groups)
        return found

    def perfect(self, item: Item) -> Output | None:
        if self.mode == "generate":
            return super().perfect(item)
        return Output(loglik=tuple(0.0 if i == item.reference else -100.0 for i in range(len(item.choices or ()))))
