"""Conditions on a row, as one writes them in a recipe: `context_score > 0.6 and language in [es, pt]`.

| written | holds when |
|---|---|
| `a == x`, `a != x` | the value is (is not) x; numbers are compared as numbers |
| `a < x`, `<=`, `>`, `>=` | both are numbers, and in that order |
| `a in [x, y]`, `a not in [x, y]` | the value is (is not) one of the list |
| `a contains x` | x is part of the text |
| `a is missing`, `a is present` | the row has no (has a) value of that name |

Several are joined by `and`. `a` is a score, a column, or one of id, source, phase, user, assistant, system. A row without the value
meets only `is missing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guidetune.data.records import Record, column_of, number_of
from guidetune.errors import BadInput

_CLAUSE = re.compile(r"^\s*(\S+?)\s*(==|!=|<=|>=|<|>|\bnot in\b|\bin\b|\bcontains\b|\bis\b)\s*(.+?)\s*$", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """A parsed condition; `text` is how it was written."""

    text: str
    clauses: tuple[tuple[str, str, Any], ...]

    @property
    def columns(self) -> set[str]:
        """The columns that it reads."""
        return {column_of(name) for name, _, _ in self.clauses}

    def __call__(self, record: Record) -> bool:
        return all(_OPERATORS[how](record.value(name), wanted) for name, how, wanted in self.clauses)


def parse(text: str) -> Condition:
    """A condition from its text.

    Raises:
        BadInput: it is not one.
    """
    clauses = []
    for part in re.split(r"\s+and\s+", text.strip()):
        found = _CLAUSE.match(part)
        if found is None:
            raise BadInput(f"{part!r} is not a condition; write e.g. `score > 0.6`, `language in [es, pt]`, `category is missing`")
        name, how, wanted = found.groups()
        if how == "is" and wanted not in ("missing", "present"):
            raise BadInput(f"{part!r}: write `is missing` or `is present`, and == for a value")
        if how in ("in", "not in"):
            if not (wanted.startswith("[") and wanted.endswith("]")):
                raise BadInput(f"{part!r}: a list is written [a, b]")
            wanted = [_bare(item) for item in wanted[1:-1].split(",") if item.strip()]
        else:
            wanted = _bare(wanted)
        if how in ("<", "<=", ">", ">=") and number_of(wanted) is None:
            raise BadInput(f"{part!r}: {wanted!r} is not a number")
        clauses.append((name, how, wanted))
    return Condition(text, tuple(clauses))


def _bare(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _same(value: Any, wanted: str) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == number_of(wanted)
    return str(value) == wanted


def _ordered(compare: Callable[[float, float], bool]) -> Callable[[Any, str], bool]:
    def holds(value: Any, wanted: str) -> bool:
        a, b = number_of(value), number_of(wanted)
        return a is not None and b is not None and compare(a, b)

    return holds


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda value, wanted: value is not None and _same(value, wanted),
    "!=": lambda value, wanted: value is not None and not _same(value, wanted),
    "<": _ordered(lambda a, b: a < b),
    "<=": _ordered(lambda a, b: a <= b),
    ">": _ordered(lambda a, b: a > b),
    ">=": _ordered(lambda a, b: a >= b),
    "in": lambda value, wanted: value is not None and any(_same(value, item) for item in wanted),
    "not in": lambda value, wanted: value is not None and not any(_same(value, item) for item in wanted),
    "contains": lambda value, wanted: isinstance(value, str) and wanted in value,
    "is": lambda value, wanted: (value is None) == (wanted == "missing"),
}
