"""The language of a text, roughly: by its script, and by common words where several languages share one.

Meant for the mix of a data set, not for single rows: short texts in Latin letters often have no common word and count as `Latin`.
"""

from __future__ import annotations

import re
from collections import Counter

_SCRIPTS: dict[str, str] = {  # name: ranges of letters
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Telugu": "\u0c00-\u0c7f",
    "Thai": "\u0e00-\u0e7f",
    "Georgian": "\u10a0-\u10ff",
    "ko": "\u1100-\u11ff\uac00-\ud7af",
    "ja": "\u3040-\u30ff",
    "zh": "\u3400-\u4dbf\u4e00-\u9fff",
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
}
_LETTERS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
_COMMON: dict[str, frozenset[str]] = {
    "en": frozenset("the of and to is in that it for was with are this be as on not have you what which from how".split()),
    "es": frozenset("el la los las de que y en un una es por con para del se no como más su al qué".split()),
    "pt": frozenset("o os as de que e em um uma é por com para do da dos das não como mais se ao".split()),
    "fr": frozenset("le la les de des et un une est en que pour dans qui sur pas par avec du ce au".split()),
    "it": frozenset("il lo la gli le di che e un una è in per con non del della sono si dei al".split()),
    "de": frozenset("der die das und ist nicht ein eine zu mit den von auf für im dem es sich wie was".split()),
    "nl": frozenset("de het een en van is dat niet op te met voor zijn die aan er door als om".split()),
}
_WORD = re.compile(r"[^\W\d_]+")
_CUT = 2000  # characters that are looked at


def language_of(text: str) -> str:
    """A language code, a script where its languages are not told apart, `none` for a text without letters.

    Kana anywhere mean `ja`; Han without them `zh`. Of the languages in Latin letters the one with most common words, `Latin` when
    two are level or none has two.
    """
    text = text[:_CUT]
    if text.isascii():
        counts = Counter({"Latin": sum(map(str.isalpha, text))})
    else:
        counts = Counter({name: len(letters.findall(text)) for name, letters in _LETTERS.items()})
    script, most = counts.most_common(1)[0]
    if not most:
        return "none"
    if script == "zh" and counts["ja"]:
        return "ja"
    if script != "Latin":
        return script
    found = Counter(word.lower() for word in _WORD.findall(text))
    votes = sorted(((sum(found[word] for word in common), name) for name, common in _COMMON.items()), reverse=True)
    return votes[0][1] if votes[0][0] > max(1, votes[1][0]) else "Latin"
