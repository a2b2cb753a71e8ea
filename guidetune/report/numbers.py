"""How a number is written: one place, so that the page, the terminal table and the model card agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MISSING = "–"
MINUS = "\N{MINUS SIGN}"


def finite(value: Any) -> float | None:
    """`value` as a float, or None when it is missing, not a number, or not finite (JSON may carry NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def interval_ends(value: Any) -> tuple[float, float] | None:
    """The two ends of an interval [lo, hi], or None when either is missing."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def _plain(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and float(text) == 0 else text  # no "-0.000"


def score(value: Any, digits: int = 3) -> str:
    """A score: three decimals on the unit scale, two beyond it (percentages, perplexities)."""
    number = finite(value)
    if number is None:
        return MISSING
    return _plain(number, digits if abs(number) <= 1 else min(digits, 2)).replace("-", MINUS)


def signed(value: Any, digits: int = 3) -> str:
    """A difference with its sign, zero without one."""
    number = finite(value)
    if number is None:
        return MISSING
    text = score(number, digits)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def interval(value: Any, digits: int = 3) -> str:
    """An interval as [lo, hi]."""
    ends = interval_ends(value)
    return MISSING if ends is None else f"[{score(ends[0], digits)}, {score(ends[1], digits)}]"


def p_value(value: Any) -> str:
    """A p-value without its leading zero: `p = .012`, `p < .001`."""
    number = finite(value)
    if number is None:
        return "no p-value"
    if number < 0.001:
        return "p < .001"
    digits = 3 if number < 0.1 else 2
    text = f"{number:.{digits}f}"
    return f"p = {text[1:]}" if text.startswith("0") else "p = 1"


def stars(value: Any) -> str:
    """* p < .05, ** p < .01, *** p < .001; empty otherwise."""
    number = finite(value)
    if number is None or number >= 0.05:
        return ""
    return "***" if number < 0.001 else "**" if number < 0.01 else "*"


def percent(value: Any, digits: int = 1) -> str:
    """A share in [0, 1] as per cent."""
    number = finite(value)
    return MISSING if number is None else f"{_plain(100 * number, digits)} %".replace("-", MINUS)


def weight(value: Any) -> str:
    """A token weight as short as it stays readable: 0, .03, .5, 1."""
    number = finite(value)
    if number is None:
        return MISSING
    text = f"{number:.2f}".rstrip("0").rstrip(".")
    return "<.01" if text == "0" and number > 0 else text[1:] if text.startswith("0.") else text


def count(value: Any) -> str:
    """A whole number with thin grouping, e.g. 12,345."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}".replace("-", MINUS)


def duration(seconds: Any) -> str:
    """A time a person can read: 0.42 s, 38 s, 4 min 12 s, 3 h 05 min."""
    number = finite(seconds)
    if number is None:
        return MISSING
    if number < 10:
        return f"{number:.2g} s" if number else "0 s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(megabytes: Any) -> str:
    """A memory size given in MB."""
    number = finite(megabytes)
    if number is None:
        return MISSING
    return f"{number / 1024:.1f} GB" if number >= 1024 else f"{number:.0f} MB"


def size(bytes_: Any) -> str:
    """A size on disk given in bytes."""
    number = finite(bytes_)
    if number is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def any_value(value: Any) -> str:
    """Any JSON leaf as text; numbers in at most five significant digits."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value)
