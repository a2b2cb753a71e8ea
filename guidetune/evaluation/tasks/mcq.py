"""Multiple choice from any file: by log-likelihood of a letter or of the answer's text, or by generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any, ClassVar, Literal

from pydantic import Field

from guidetune.errors import BadInput
from guidetune.evaluation.answers import choice_answer, squeeze
from guidetune.evaluation.metrics import calibration_error, choice_scores, softmax
from guidetune.evaluation.task import Item, Output, RowTask, ask, breakdown, column, fill, texts
from guidetune.registry import method


@method(kind="task", name="mcq", summary="Multiple choice from any file, by log-likelihood or by generation.")
class MultipleChoice(RowTask):
    """Each row has a question, its options and the right one.

    By log-likelihood, `acc` takes the likeliest choice, `acc_norm` the likeliest per character and `acc_bytes` per UTF-8 byte; ties go
    to the first. With letters all three agree. `acc_mutual_info` takes the choice that gains most over its log-likelihood without the
    question (in plain text after BOS alone, in a chat after the user's "Answer:"). `ece` is the calibration error of
    softmax(log-likelihoods), `macro` the mean over categories. In a chat the choice follows the assistant header ("A"); in plain text it
    follows a space (" A").
    """

    default_new_tokens: ClassVar[int] = 512
    # Columns of other published copies of the data; those that the user names count for every copy.
    layouts: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    mode: Literal["loglik", "generate"] = Field("loglik", description="Rate the choices, or generate and read the chosen one.")
    choose: Literal["letter", "text"] = Field("letter", description="The model names an option by its letter, or by its text.")
    format: Literal["chat", "plain"] = Field("chat", description="Ask in the model's chat format, or as plain text to be continued.")
    best_by: Literal["acc", "acc_norm", "acc_bytes", "acc_mutual_info"] = Field(
        "acc", description="The rule whose choice is the main score (log-likelihood)."
    )
    mutual_info: bool = Field(False, description="Also rate the choices without their question (acc_mutual_info); best_by may ask for it.")
    template: str = Field("{question}\n{choices}\nAnswer:", description="Prompt; {question} and {choices} (lines 'A. ...') or any column.")
    system: str | None = Field(None, description="System message of the chat format.")
    question: str = Field("question", description="Column of the question.")
    options: str | list[str] = Field("options", description="Column of the options (a list, or {letter: text}), or one column for each.")
    answer: str = Field("answer_idx", description="Column of the right option: its letter, its number from 0, or its text.")
    id: str | None = Field(None, description="Column of a unique id (default: the row's number).")
    category: str | None = Field(None, description="Column to break the score down by, such as the subject.")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "accuracy" if self.mode == "generate" or self.best_by == "acc" else self.best_by

    def unified(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row in the form that the options expect; for data sets with copies in another one."""
        return row

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the template may name: the row's own columns and `question`."""
        return {**row, "question": column(row, self.layout(row)["question"])}

    def layout(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The names of the columns `question`, `options` and `answer`: of the known forms the one that fits the row best."""
        own = {"question": self.question, "options": self.options, "answer": self.answer}
        given = {name: value for name, value in own.items() if self.chosen(name)}
        return max(({**names, **given} for names in (own, *self.layouts)), key=lambda names: _present(row, names))

    def parts(self, row: Mapping[str, Any]) -> tuple[list[str], list[str], int]:
        """The options' texts, their letters and the place of the right one.

        Raises:
            BadInput: no such options, or an answer that is none of them.
        """
        names = self.layout(row)
        texts, labels = _options(row, names["options"])
        return texts, labels, _right(column(row, names["answer"]), names["answer"], texts, labels)

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        row = self.unified(row)
        texts, labels, right = self.parts(row)
        listed = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
        prompt = fill(self.template, {**self.columns(row), "choices": listed})
        meta = breakdown(row, category=self.category)
        choices = tuple(labels if self.choose == "letter" else texts)
        item = Item(
            self.identity(row, number),
            reference=right,
            choices=choices,
            gold=f"Answer: {choices[right]}",
            meta=meta,
            payload=(labels, texts),
        )
        if self.format == "plain":
            return replace(item, text=prompt, prior=self.without_question(item, text=""))
        return replace(item, messages=ask(prompt, self.system), prior=self.without_question(item, messages=ask("Answer:", self.system)))

    def without_question(self, item: Item, **where: Any) -> Item | None:
        """The item's choices without its question, when mutual information is asked for."""
        wanted = self.mode == "loglik" and (self.mutual_info or self.best_by == "acc_mutual_info")
        return Item(item.id, choices=item.choices, **where) if wanted else None

    def demonstration(self, item: Item) -> str | None:
        return item.choices[item.reference] if item.choices else None

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
            rules = ("correct", "acc", "acc_norm", "acc_bytes", *(("acc_mutual_info",) if item.prior is not None else ()))
            return {**dict.fromkeys(rules, 0), "confidence": 0.0, "probability": 0.0, "answer": None}
        best = choice_scores(output.loglik, choices, output.prior_loglik)
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
        loglik = tuple(0.0 if i == item.reference else -100.0 for i in range(len(item.choices or ())))
        return Output(loglik=loglik, prior_loglik=(0.0,) * len(loglik) if item.prior is not None else None)


def _present(row: Mapping[str, Any], names: Mapping[str, Any]) -> int:
    """How many of the three the row has."""
    lists = [[value] if isinstance(value, str) else value for value in names.values()]
    return sum(all(name.split(".")[0] in row for name in one) for one in lists)


def _options(row: Mapping[str, Any], names: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts and letters: of a list, of `{letter: text}`, of `{text: [...], label: [...]}`, or of several columns."""
    found = column(row, names) if isinstance(names, str) else [column(row, name) for name in names]
    if isinstance(found, Mapping) and found.keys() == {"text", "label"}:
        letters, listed = texts(found["label"], "label"), texts(found["text"], "text")
        if len({*letters}) != len(letters) or len(letters) != len(listed):
            raise BadInput(f"{names}: {len(listed)} texts need as many different labels, not {letters}")
        found = dict(zip(letters, listed, strict=True))
    if isinstance(found, Mapping):
        found = {key: value for key, value in found.items() if value is not None}  # columnar files fill absent letters with null
        labels, listed = [str(key) for key in found], texts([*found.values()], str(names))
    elif isinstance(found, Sequence) and not isinstance(found, str):
        labels, listed = list(ascii_uppercase[: len(found)]), texts([*found], str(names))
    else:
        raise BadInput(f"{names} = {str(found)[:60]!r} is neither a list of options nor {{letter: text}}")
    if not 2 <= len(listed) <= len(ascii_uppercase) or any(not text.strip() for text in listed) or len(labels) != len(listed):
        raise BadInput(f"{names}: needs 2 to 26 options with text, has {listed}")
    return listed, labels


def _right(value: Any, name: str, texts: list[str], labels: list[str]) -> int:
    """The place of the answer: a number from 0, a letter, or an option's text."""
    if isinstance(value, bool) or value is None:
        raise BadInput(f"{name} = {value!r} names no option")
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
    raise BadInput(f"{name} = {value!r} is neither a letter nor the text of one of {dict(zip(labels, texts, strict=True))}")
