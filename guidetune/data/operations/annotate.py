"""Edits of the rows that meet a condition: text added, options permuted, columns set."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from guidetune.data.conditions import Condition, parse
from guidetune.data.draws import number
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record
from guidetune.errors import BadInput
from guidetune.registry import method

_LETTERS = string.ascii_uppercase


@method(kind="operation", name="annotate", summary="Edit rows that meet a condition: add text, permute options, set columns.")
class Annotate(Operation):
    """Rows that do not meet `when` go through unchanged.

    `permute` shuffles a list of options, or the texts of {A: …, B: …}, by (seed, row id), and moves the label with its text; it
    changes columns only, so it comes before `template`. A label is an option's number from 0, its letter, or its text.
    """

    when: str | None = Field(None, description="Which rows: a condition such as `context_score > 0.6` (default: all).")
    prepend: str | None = Field(None, description="Text put before the content of the turn, exactly as written.")
    append: str | None = Field(None, description="Text put after the content of the turn, exactly as written.")
    to: Literal["user", "assistant", "system"] = Field("user", description="The turn: the last of the role; the system prompt.")
    permute: str | None = Field(None, description="Column of options to permute.")
    label: str | None = Field(None, description="Column of the right option; needed with permute.")
    put: dict[str, str | int | float] = Field(default_factory=dict, description="Columns to set, such as {language: es}.")
    weight: float | None = Field(None, gt=0, description="The rows' loss weight is multiplied by this.")

    @field_validator("when")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        try:
            _ = parse(value) if value is not None else None
        except BadInput as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _something(self) -> Annotate:
        if not (self.prepend or self.append or self.permute or self.put or self.weight):
            raise ValueError("says no edit; give prepend, append, permute, put or weight")
        if (self.permute is None) != (self.label is None):
            raise ValueError("permute and label go together")
        return self

    streams = True
    renders = True

    @cached_property
    def _when(self) -> Condition | None:
        return parse(self.when) if self.when is not None else None

    def columns(self) -> set[str]:
        return (self._when.columns if self._when else set()) | {name for name in (self.permute, self.label) if name}

    def adds(self, root: Path) -> dict[str, type]:
        return {name: str if isinstance(value, str) else float for name, value in self.put.items()}

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Edits the rows that meet the condition, one at a time."""
        counts: Counter[str] = Counter()
        for record in rows:
            if self._when is not None and not self._when(record):
                yield record
                continue
            edited = record
            if self.permute is not None and self.label is not None:
                permuted = self._permuted(record, context.seed)
                if isinstance(permuted, str):
                    context.drop(record, "options cannot be permuted", permuted)
                    continue
                edited = replace(edited, fields={**record.fields, **permuted})
            if self.prepend or self.append:
                messages = self._edited(edited.messages)
                if messages is None:
                    context.drop(record, "no turn to annotate", f"no {self.to} turn")
                    continue
                edited = replace(edited, messages=messages)
            if self.put:
                edited = replace(edited, fields={**edited.fields, **self.put})
            if self.weight is not None:
                edited = replace(edited, weight=edited.weight * self.weight)
            counts["edited"] += 1
            yield edited
        context.note(edited=counts["edited"])

    def _edited(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        places = [k for k, m in enumerate(messages) if m["role"] == self.to]
        if not places and self.to == "system" and messages:
            return [{"role": "system", "content": f"{self.prepend or ''}{self.append or ''}"}, *messages]
        if not places:
            return None
        k = places[0] if self.to == "system" else places[-1]
        content = f"{self.prepend or ''}{messages[k]['content']}{self.append or ''}"
        return [*messages[:k], {**messages[k], "content": content}, *messages[k + 1 :]]

    def _permuted(self, record: Record, seed: int) -> dict[str, Any] | str:
        """The options in another order and the label that goes with it; or why not."""
        assert self.permute is not None and self.label is not None
        options, label = record.fields.get(self.permute), record.fields.get(self.label)
        if not isinstance(options, (list, dict)) or len(options) < 2:
            return f"{self.permute} is not a list of options"
        names = list(options) if isinstance(options, dict) else list(_LETTERS[: len(options)])
        texts = list(options.values()) if isinstance(options, dict) else options
        at = _place_of(label, names, texts)
        if at is None:
            return f"{self.label} = {label!r} is none of the options"
        order = np.random.default_rng(number(seed, "permute", record.id)).permutation(len(texts)).tolist()
        moved = [texts[k] for k in order]
        new = order.index(at)
        if isinstance(label, int):
            label = new
        elif label in names:
            label = names[new]
        return {self.permute: dict(zip(names, moved, strict=True)) if isinstance(options, dict) else moved, self.label: label}


def _place_of(label: Any, names: list[str], texts: list[Any]) -> int | None:
    if isinstance(label, int) and not isinstance(label, bool):
        return label if 0 <= label < len(texts) else None
    if label in names:
        return names.index(label)
    return texts.index(label) if label in texts else None
