"""Columns to conversations: one or several verbalisations of each row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from guidetune.artefacts import canonical
from guidetune.data.conditions import Condition, parse
from guidetune.data.draws import Numbers, Smallest, number
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, column_of, slots
from guidetune.errors import BadInput
from guidetune.registry import method, nearest

_SPECIAL = ("all", "random", "first")


class Verbalisation(BaseModel):
    """One way to say a row. Parts in braces are columns, or `user`, `assistant` and `system` of a conversation that is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str
    assistant: str
    system: str | None = None
    when: str | None = None

    @field_validator("user", "assistant", "system")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        try:
            slots(value or "")
        except BadInput as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("when")
    @classmethod
    def _condition(cls, value: str | None) -> str | None:
        try:
            _ = parse(value) if value is not None else None
        except BadInput as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def version(self) -> str:
        """8 hex digits that change with any of its texts."""
        return hashlib.sha256(canonical(self).encode()).hexdigest()[:8]


class _Filled(NamedTuple):
    messages: list[dict[str, Any]]
    golds: list[str] | None  # all right answers, where the row has several
    gold: int | None  # which of them is the target


class _Unfit(Exception):
    pass


@method(
    kind="operation", name="template", paper="2211.01786", summary="Render rows by templates: all verbalisations, a random one, or one."
)
class Template(Operation):
    """A template fits a row that has text in every column it names and meets its `when`. Rows that none fits are dropped.

    `choose: all` makes one row per fitting template (the first keeps the row's id, the others get `<id>~<template>`), `random` draws
    one from (seed, row id), `first` takes the first that fits, and a name that template alone. Where the answer's column is a list of
    right answers one is drawn (`golds`), and `references` and `gold` say which. The column `template` is `name@version`, and the
    version is a hash of its texts.
    """

    templates: dict[str, Verbalisation] = Field(
        min_length=1, description='Name: {user: "Q: {question}", assistant: "{answer}", system, when}; parts in braces are columns.'
    )
    choose: str = Field("random", description="all, random, first (that fits), or the name of one template.")
    cap: int | None = Field(None, gt=0, description="Most rows per source and template; which ones stay is drawn from (seed, row id).")
    golds: str = Field("random", pattern="^(random|first)$", description="Of several right answers: a random one, or the first.")
    strip: bool = Field(True, description="White space at the prompt's end and around the answer is taken off.")

    @model_validator(mode="after")
    def _names(self) -> Template:
        for name in self.templates:
            if name in _SPECIAL or not name or "~" in name or "@" in name:
                raise ValueError(f"a template cannot be called {name!r}")
        if self.choose not in (*_SPECIAL, *self.templates):
            raise ValueError(f"choose is all, random, first or a template's name{nearest(self.choose, [*_SPECIAL, *self.templates])}")
        return self

    renders = True

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return self.cap is None

    @cached_property
    def _conditions(self) -> dict[str, Condition | None]:
        return {name: parse(one.when) if one.when is not None else None for name, one in self.templates.items()}

    def columns(self) -> set[str]:
        names = {
            column_of(name)
            for one in self.templates.values()
            for text in (one.user, one.assistant, one.system or "")
            for _, name in slots(text)
            if name is not None
        }
        return names.union(*(c.columns for c in self._conditions.values() if c is not None))

    def adds(self, root: Path) -> dict[str, type]:
        return {"template": str}

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Renders each row by the templates chosen for it. Memory: with `cap`, 16 bytes per row that may stay."""
        limits: dict[tuple[str, str], Smallest] = {}
        numbers = Numbers(context.seed, "template")
        capped = {name: Numbers(context.seed, "template cap", name) for name in self.templates}
        if self.cap is not None:
            for record in rows:
                for name in self._chosen(record, context.seed, numbers)[0]:
                    limits.setdefault((record.source, name), Smallest(self.cap)).add(capped[name].of(record.id))
        most = {key: smallest.limit for key, smallest in limits.items()}
        labels = {name: f"{name}@{one.version}" for name, one in self.templates.items()}
        used: Counter[str] = Counter()
        for record in rows:
            chosen, why = self._chosen(record, context.seed, numbers)
            if not chosen:
                context.drop(record, "no template fits", why)
                continue
            if most:
                chosen = {n: filled for n, filled in chosen.items() if capped[n].of(record.id) < most[record.source, n]}
                if not chosen:
                    context.drop(record, "over the template's cap", f"{self.cap} rows per source and template")
                    continue
            for place, (name, filled) in enumerate(chosen.items()):
                fields = {**record.fields, "template": labels[name]}
                if filled.golds is not None:
                    fields |= {"references": filled.golds, "gold": filled.gold}
                used[labels[name]] += 1
                if place:
                    yield context.copy(record, name, messages=filled.messages, fields=fields)
                else:
                    yield replace(record, messages=filled.messages, fields=fields)
        context.note(templates=dict(used.most_common()))

    def _chosen(self, record: Record, seed: int, numbers: Numbers) -> tuple[dict[str, _Filled], str]:
        """The templates that render a row, with what they say; when there are none, why."""
        names = list(self.templates) if self.choose in _SPECIAL else [self.choose]
        if self.choose == "random" and len(names) > 1:
            names = _shuffled(names, numbers.of(record.id))  # the first that fits is one of those that fit, each as likely
        fitting: dict[str, _Filled] = {}
        why = ""
        for name in names:
            condition = self._conditions[name]
            if condition is not None and not condition(record):
                why = why or f"{name}: not {condition.text}"
                continue
            try:
                fitting[name] = self._fill(name, record, seed)
            except _Unfit as unfit:
                why = f"{name}: {unfit}"
                continue
            if self.choose != "all":
                break
        return fitting, why

    def _fill(self, name: str, record: Record, seed: int) -> _Filled:
        one = self.templates[name]
        user, _, _ = _rendered(one.user, record, None)
        answer, golds, gold = _rendered(one.assistant, record, (seed, self.golds))
        if self.strip:
            user, answer = user.rstrip(), answer.strip()
        if not user.strip():
            raise _Unfit("the prompt is empty")
        if not answer.strip():
            raise _Unfit("the answer is empty")
        messages: list[dict[str, Any]] = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        system = record.value("system") if one.system is None else _rendered(one.system, record, None)[0]
        if isinstance(system, str) and system.strip():
            messages.insert(0, {"role": "system", "content": system})
        return _Filled(messages, golds, gold)


def _shuffled(names: list[str], draw: int) -> list[str]:
    """An order of names from a uniform number."""
    left, out = list(names), []
    while left:
        draw, at = divmod(draw, len(left))
        out.append(left.pop(at))
    return out


def _rendered(template: str, record: Record, several: tuple[int, str] | None) -> tuple[str, list[str] | None, int | None]:
    """The text of a template; where `several` are allowed, of a list of texts one is taken."""
    out, golds, gold = [], None, None
    for literal, name in slots(template):
        out.append(literal)
        if name is None:
            continue
        value = record.value(name)
        if several is not None and isinstance(value, list) and value and all(_is_text(v) for v in value):
            seed, how = several
            golds = [str(v) for v in value]
            gold = number(seed, "gold", record.id, name) % len(value) if how == "random" else 0
            value = golds[gold]
        if value is None:
            raise _Unfit(f"no column {name!r}" if column_of(name) not in record.fields else f"{name} is missing")
        if not _is_text(value):
            raise _Unfit(f"{name} is {type(value).__name__}, not text")
        text = str(value)
        if not text.strip():
            raise _Unfit(f"{name} is empty")
        out.append(text)
    return "".join(out), golds, gold


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)
