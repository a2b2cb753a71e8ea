"""Text from models and files made safe to show: nothing invisible, nothing that reorders the page, nothing endless."""

from __future__ import annotations

import re

# Characters that HTML forbids, that hide, or that reorder their neighbours: C0/C1 controls, bidi controls,
# zero-width characters, byte order mark, lone surrogates, non-characters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: ␀ ␛ ␍ ...
    if code == 0x7F:
        return "\u2421"
    return f"\u27e8U+{code:04X}\u27e9"


def clean(text: str) -> str:
    """`text` with every hidden or forbidden character written out, so that it can be encoded and be seen.

    >>> clean("a\\x00b\\ud800")
    'a␀b⟨U+D800⟩'
    """
    return _HIDDEN.sub(_picture, text.replace("\r\n", "\n"))


def clip(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters of `text`, and how many were left out."""
    return (text, 0) if len(text) <= limit else (text[:limit], len(text) - limit)


def escaped_size(text: str) -> int:
    """Bytes that `text` takes in an HTML page, its escapes included."""
    return len(text.encode("utf-8", "replace")) + 4 * sum(text.count(mark) for mark in "&<>\"'")
