"""Finding the answer in a text: boxed, numeric and lettered answers. Pure functions; tasks and rewards share them."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from math import isclose, isfinite

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{])")


def boxed(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` (or `\boxed 5`); None when there is none.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    for match in reversed(list(_BOX.finditer(text))):
        if match[1] != "{":
            return match[1]
        depth = 1
        for place in range(match.end(), len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[match.end() : place]
    return None


def strict_number(text: str) -> str | None:
    """The number after the first `#### `, as in the GSM8K references."""
    match = _STRICT.search(text)
    return match[1] if match else None


def flexible_number(text: str) -> str | None:
    """The last thing in the text that looks like a number."""
    found = list(_FLEXIBLE.finditer(text))
    return found[-1][0] if found else None


def clean_number(text: str) -> str:
    """Without thousands' commas, dollar signs, everything up to `#### `, and one final full stop; lower case."""
    text = text.replace(",", "").replace("$", "")
    text = text.rsplit("#### ", 1)[-1]
    return text.removesuffix(".").strip().lower()


def to_number(text: str) -> float | None:
    """The text as a finite number (percent sign and commas allowed), else None."""
    text = clean_number(text).removesuffix("\\%").removesuffix("%").strip()
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def same_number(a: str | None, b: str | None) -> bool:
    """Equal after cleaning, or numerically equal (18 = 18.0)."""
    if a is None or b is None:
        return False
    a, b = clean_number(a), clean_number(b)
    if a == b:
        return a != ""
    x, y = to_number(a), to_number(b)
    return x is not None and y is not None and isclose(x, y, rel_tol=1e-9, abs_tol=1e-9)


def number_answer(text: str) -> str | None:
    """What a grader of numbers reads: the last boxed answer, else the number after `#### `, else the last number."""
    for found in (boxed(text), strict_number(text), flexible_number(text)):
        if found is not None:
            return clean_number(found)
    return None


def choice_answer(text: str, labels: Sequence[str], texts: Sequence[str] = ()) -> int | None:
    """Index of the label (a letter, or a word such as "yes") that a text chooses; None when it chooses none.

    Looked at in this order, the last match of each winning: a boxed label; "answer is X", "answer: X"; a bracketed label; a text
    that begins with the label, set off from what follows; a text that equals an option, or holds exactly one of them; a single
    label that stands alone. The English article "A" before a word is not a choice.

    >>> choice_answer("The answer is (B).", ["A", "B"])
    1
    """
    places = {label.lower(): i for i, label in enumerate(labels)}
    one = "(" + "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True)) + ")"
    inside = boxed(text)
    if inside is not None:
        match = re.fullmatch(rf"(?:\\text\w*\{{)?\s*\(?{one}\)?\s*(?:[.:)].*)?\}}?", inside.strip(), re.IGNORECASE | re.DOTALL)
        if match:
            return places[match[1].lower()]
    words = all(len(label) > 1 for label in labels)
    # Letters are case-sensitive where they stand in running text ("a" is a word), and "A patient ..." is not the choice A.
    flags = re.IGNORECASE if words else 0
    end = r"(?![A-Za-z0-9'’])" + ("" if words else r"(?:(?<!A)|(?!\s+(?!because\b|since\b|as\b)[a-z]))")
    said = rf"(?i:answer|choice|option)(?i:\s+is)?\s*(?::|(?i:is))?\s*(?i:option\s+)?[*(\[\s\"']*{one}{end}"
    for pattern in (said, rf"[(\[]{one}[)\]]", rf"\A\W*{one}(?=\s*(?:[.):,\n]|\Z))"):
        found = re.findall(pattern, text, flags)
        if found:
            return places[found[-1].lower()]
    plain = squeeze(text)
    for i, option in enumerate(texts):
        if plain and plain == squeeze(option):
            return i
    named = [i for i, option in enumerate(texts) if squeeze(option) and re.search(rf"(?<!\w){re.escape(squeeze(option))}(?!\w)", plain)]
    if len(named) == 1:
        return named[0]
    lone = rf"(?<![A-Za-z0-9]){one}(?![A-Za-z0-9'’])" + ("" if words else r"(?!\s+[a-z])")
    alone = {label.lower() for label in re.findall(lone, text, flags)}
    return places[alone.pop()] if len(alone) == 1 else None


def squeeze(text: str) -> str:
    """Lower case, one space between words, no final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").strip()


def first_line(text: str) -> str:
    """The first line that is not blank: base models go on with a question of their own."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def normal_text(text: str, articles: bool = True) -> str:
    """Lower case, no ASCII punctuation, one space between words; without a/an/the when `articles` is False (SQuAD)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    if not articles:
        text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())
