"""The 25 verifiable instructions of IFEval (arXiv 2311.07911): does a response follow one? Pure functions; tasks and rewards share them.

The rules are those of the reference implementation, with its quirks, because published scores depend on them. Two things differ. It splits
sentences with trained Punkt data that must be downloaded; here Punkt runs with a list of English abbreviations. And where a prompt counts a
character that is no letter ("#"), it draws a random letter to count instead; here the character itself is counted.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from guidetune.errors import BadInput
from guidetune.registry import nearest

CHECKS: dict[str, Callable[..., bool]] = {}
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATIONS = (
    "mr mrs ms dr prof st jr sr rev gen sen rep gov capt lt col sgt maj hon pres "
    "inc ltd co corp dept est univ vs etc e.g i.e eg ie cf al fig no vol pp ed eds approx "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun "
    "u.s u.k u.n d.c a.m p.m ph.d b.a m.a p.s p.p.s"
).split()


def follows(instruction: str, response: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a response follows an instruction to the letter (strict); an empty one follows none."""
    return bool(response.strip()) and CHECKS[instruction](response, **arguments)


def follows_loosely(instruction: str, response: str, arguments: Mapping[str, Any]) -> bool:
    """Whether one of eight variants follows it: as it is, without its first line, its last, or both; each also without asterisks."""
    lines = response.split("\n")
    variants = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(follows(instruction, variant, arguments) for one in variants for variant in (one, one.replace("*", "")))


def arguments_of(instruction: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of an instruction as data files give them; empty ones (0, "", null) do not count.

    Raises:
        BadInput: an unknown instruction, or arguments that it does not take.
    """
    if instruction not in CHECKS:
        raise BadInput(f"unknown instruction {instruction!r}{nearest(instruction, list(CHECKS))}")
    arguments = {name: value for name, value in (given or {}).items() if value}
    try:
        inspect.signature(CHECKS[instruction]).bind("", **arguments)
    except TypeError as error:
        raise BadInput(f"{instruction}: {error}") from None
    if (relation := next((value for name, value in arguments.items() if name.endswith("relation")), None)) not in (None, *_RELATIONS):
        raise BadInput(f"{instruction}: the relation is 'less than' or 'at least', not {relation!r}")
    return arguments


_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda count, threshold: count < threshold,
    "at least": lambda count, threshold: count >= threshold,
}


def _check(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = function
        return function

    return register


# Words and letters


@_check("keywords:existence")
def _has_keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


@_check("keywords:frequency")
def _keyword_count(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _RELATIONS[relation](len(re.findall(keyword.strip(), text, re.IGNORECASE)), frequency)


@_check("keywords:forbidden_words")
def _no_forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


@_check("keywords:letter_frequency")
def _letter_count(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _RELATIONS[let_relation](text.lower().count(letter.lower()), let_frequency)


@_check("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    from nltk.tokenize import word_tokenize

    # Without sentence splitting (it needs downloaded data) full stops stay on words, which changes no word's case.
    words = word_tokenize(text, preserve_line=True)
    return _RELATIONS[capital_relation](sum(word.isupper() for word in words), capital_frequency)


@_check("change_case:english_capital")
def _all_capitals(text: str) -> bool:
    return text.isupper() and language(text) in ("en", None)


@_check("change_case:english_lowercase")
def _all_lowercase(text: str) -> bool:
    return text.islower() and language(text) in ("en", None)


@_check("language:response_language")
def _in_language(text: str, language: str) -> bool:
    return _detect(text) in (language, None)


@_check("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


# Lengths


@_check("length_constraints:number_words")
def _word_count(text: str, num_words: int, relation: str) -> bool:
    return _RELATIONS[relation](len(re.findall(r"\w+", text)), num_words)


@_check("length_constraints:number_sentences")
def _sentence_count(text: str, num_sentences: int, relation: str) -> bool:
    return _RELATIONS[relation](len(sentences(text)), num_sentences)


@_check("length_constraints:number_paragraphs")
def _paragraph_count(text: str, num_paragraphs: int) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    ends = [part for part in (parts[0], *parts[1:][-1:]) if part.strip()]
    return all(part.strip() for part in inner) and len(inner) + len(ends) == num_paragraphs


@_check("length_constraints:nth_paragraph_first_word")
def _paragraph_begins(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    # Blank parts do not count, and still stand in the order that nth_paragraph counts by.
    if nth_paragraph > count or not (words := parts[nth_paragraph - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"').lower())[0]
    return count == num_paragraphs and word == first_word.lower()


# Contents and format


@_check("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_check("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    pattern = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}.get(marker, rf"\s*{marker.lower()}.*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


@_check("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE), re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@_check("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(answer in text for answer in _CONSTRAINED)


@_check("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


@_check("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) >= num_sections


@_check("detectable_format:json_format")
def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@_check("detectable_format:title")
def _titled(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


@_check("combination:two_responses")
def _two_responses(text: str) -> bool:
    parts = text.split("******")
    filled = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


@_check("combination:repeat_prompt")
def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_check("startend:end_checker")
def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_check("startend:quotation")
def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# Language tools


def sentences(text: str) -> list[str]:
    """The sentences of an English text, by Punkt with a list of abbreviations."""
    return list(_punkt().tokenize(text))


@cache
def _punkt() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    known = PunktParameters()
    known.abbrev_types = set(_ABBREVIATIONS)
    return PunktSentenceTokenizer(known)


def language(text: str) -> str | None:
    """ISO 639-1 code (zh-cn, zh-tw) of a text by langdetect with a fixed seed; None where it finds nothing to go by."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # its draws are random otherwise
    try:
        return str(detect(text))
    except LangDetectException:
        return None


_detect = language  # for the check whose argument is called language
