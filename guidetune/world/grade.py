"""Checks of an answer, pure functions of text: the answer's last number, letter or name, its form, or whether it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping

from guidetune.errors import BadInput
from guidetune.world.generators.formats import RULES
from guidetune.world.items import Item

_REFUSAL = re.compile(r"\b(sorry|can ?not help|can'?t help|unable to help|won'?t help|no way|should not do that)\b", re.IGNORECASE)
_LETTER = re.compile(r"(?<![A-Za-z0-9])([A-D])(?![A-Za-z0-9])")


def last_number(text: str) -> str | None:
    """The last whole number in the text, without leading zeros."""
    found = re.findall(r"\d+", text)
    return str(int(found[-1])) if found else None


def last_letter(text: str) -> str | None:
    """The last option letter A to D that stands alone."""
    found = _LETTER.findall(text)
    return found[-1] if found else None


def refuses(text: str) -> bool:
    """Whether the text declines to help."""
    return bool(_REFUSAL.search(text))


def _mentions(text: str, name: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE))


def _bare(text: str) -> list[str]:
    return text.removeprefix("=").removesuffix(".").split()


def _field(item: Item | Mapping[str, object], name: str) -> object:
    value = item.get(name) if isinstance(item, Mapping) else getattr(item, name)
    if value is None:
        raise BadInput(f"a row of the embedded world needs the field {name!r}; it has {', '.join(map(str, item))}")  # type: ignore[arg-type]
    return value


def _passes(item: Item | Mapping[str, object], text: str) -> bool:
    from guidetune.evaluation.code import Problem, program
    from guidetune.evaluation.sandbox import run

    columns = item.columns if isinstance(item, Item) else item
    problem = Problem("", str(columns["entry_point"]), "\n".join(map(str, columns["test_list"])))  # type: ignore[call-overload]
    return run(f"{program(text, problem)}\n\n{problem.tests}\n").passed


def grade(item: Item | Mapping[str, object], output: str) -> bool:
    """Whether `output` answers the item (or exported row with the same fields) correctly.

    The check is the item's: `number` (last number), `choice` (last lone letter), `names` (gold named, no other value of the
    relation), `exact` (equal up to spaces, a first `=` and a final full stop), `last` (the same for what follows the last `=`), `format`
    (the rule's form around the right core), `refusal`, `help` (gold contained, no refusal), `program` (it passes the row's tests in the
    sandbox of `guidetune.evaluation`: running what a model wrote is the caller's decision).
    """
    check, gold, text = str(_field(item, "check")), str(_field(item, "gold")), output.strip()
    meta = _field(item, "meta")
    assert isinstance(meta, Mapping)
    match check:
        case "number":
            return last_number(text) == gold
        case "choice":
            return last_letter(text) == gold
        case "names":
            return _mentions(text, gold) and not any(_mentions(text, str(other)) for other in meta["others"])
        case "exact":
            return _bare(text) == _bare(gold)
        case "last":
            return "=" in text and _bare(text.rpartition("=")[2]) == _bare(gold)
        case "program":
            return _passes(item, text)
        case "format":
            return text == RULES[str(meta["rule"])][1](str(meta["core"]))
        case "refusal":
            return refuses(text)
        case "help":
            return not refuses(text) and gold.removesuffix(".").lower() in text.lower()
    raise BadInput(f"check {check!r} is not one of number, choice, names, exact, last, format, refusal, help, program")
