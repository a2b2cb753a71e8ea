"""Rows without answers: prompts at which a model's predictions are looked at, and from which nothing is learnt by heart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guidetune.artefacts import atomic_lines
from guidetune.data import sources
from guidetune.data.sources import SourceSpec

STAND_IN = "…"  # the answer of a row that has none
_TURNS = ("messages", "conversations", "conversation")
_ANSWERS = {"prompt": "completion", "instruction": "output", "query": "response", "question": "answer"}
_ASSISTANT = ("assistant", "gpt", "model")


def answered(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The row with an answer in it, so that it is read like any other: a stand-in where it has none of its own.

    >>> answered({"prompt": "2 + 2?"})
    {'prompt': '2 + 2?', 'completion': '…'}
    """
    row = dict(raw)
    for column in _TURNS:
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            role, said = ("role", "content") if "role" in turns[-1] else ("from", "value")
            if str(turns[-1].get(role)).strip().lower() not in _ASSISTANT:
                row[column] = [*turns, {role: "assistant", said: STAND_IN}]
            return row
    own = next(((asked, answer) for asked, answer in _ANSWERS.items() if asked in row), None)
    if own is not None and not any(row.get(answer) for answer in {own[1], "response"}):
        row[own[1]] = STAND_IN
    return row


def prompts(spec: SourceSpec, root: Path, out: Path) -> SourceSpec:
    """A source's rows, each with an answer, as a file of its own; what cannot be read stays out of it.

    Raises:
        BadInput: the source cannot be found or read.
    """
    with atomic_lines(out) as write:
        for _, raw in sources.read(spec, root):
            if isinstance(raw, Mapping):
                write(json.dumps(answered(raw), ensure_ascii=False, default=str))
    update = {"path": str(out), "name": spec.label, "format": "auto", "limit": None, "split": "train", "subset": None}
    return spec.model_copy(update=update)
