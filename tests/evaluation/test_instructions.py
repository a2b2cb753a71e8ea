"""IFEval's checkers, against the rules of the reference implementation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune.errors import BadInput
from guidetune.evaluation.evaluate import plan
from guidetune.evaluation.instructions import CHECKS, arguments_of, follows, follows_loosely, language, sentences
from guidetune.evaluation.task import Output
from guidetune.registry import build

# instruction, arguments, a response that follows it, one that does not
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, "A CAT and a dog", "a cat"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat, concatenate", "one cat"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "The CAT."),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": "less than"}, "eE", "eeE"),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "at least"}, "no! no!", "no!"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG. dog", "Big dog"),
    ("change_case:english_capital", {}, "THE WEATHER IS FINE AND THE SUN SHINES.", "The weather is fine."),
    ("change_case:english_lowercase", {}, "the weather is fine and the sun shines.", "The weather is fine."),
    ("language:response_language", {"language": "de"}, "Das Wetter ist heute sehr schön und warm.", "The weather is very fine today."),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's one", "one two"),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"},
     "Dr. Fox came at 3 p.m. on foot. He left.", "One. Two? Three!"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo\n***", "one\n***\n***\ntwo"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
     "One.\n\n\"so, then", "So\n\nthen"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\np. p.s. more", "Bye\nP.S. more"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP. S. more", "Bye\nPS more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n** two"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one* and ** **"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1 a SECTION 2 b", "SECTION 1 a Section 2 b"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Song of joy>>\nText", "<< >>"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one ****** one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, " say IT. It.", "It. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So. the END."', "The end. Or not"),
    ("startend:quotation", {}, ' "quoted" ', '"quoted'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_every_instruction(name: str, arguments: dict[str, Any], right: str, wrong: str) -> None:
    arguments = arguments_of(name, arguments)
    assert follows(name, right, arguments) and follows_loosely(name, right, arguments)
    assert not follows(name, wrong, arguments)
    assert not follows(name, " \n", arguments) and not follows_loosely(name, "", arguments)


def test_every_instruction_has_a_case() -> None:
    assert len(CHECKS) == 25 and {case[0] for case in CASES} == CHECKS.keys()


def test_loose_variants() -> None:
    title = ("detectable_format:title", {})
    end = ("startend:end_checker", {"end_phrase": "Bye."})
    assert not follows(end[0], "Text. Bye.\nI hope that helps!", end[1]) and follows_loosely(
        end[0], "Text. Bye.\nI hope that helps!", end[1]
    )
    assert follows_loosely("startend:quotation", 'Sure:\n"*quoted*"\nDone', {}) and not follows("startend:quotation", 'Sure:\n"quoted"', {})
    assert not follows_loosely(title[0], "<\n<x>>", title[1])


@given(st.text(max_size=200), st.sampled_from(CASES))
@settings(max_examples=120, deadline=None)
def test_strict_implies_loose_for_any_text(text: str, case: tuple[str, dict[str, Any], str, str]) -> None:
    for response in (text, case[2] + text):
        assert not follows(case[0], response, case[1]) or follows_loosely(case[0], response, case[1])


def test_language_is_the_same_every_time() -> None:
    assert {language("Otec matka syn.") for _ in range(10)} == {language("Otec matka syn.")} and language("12 34") is None
    assert sentences("Mr. Fox met Dr. Hare, e.g. at noon. They talked! Why?") == [
        "Mr. Fox met Dr. Hare, e.g. at noon.",
        "They talked!",
        "Why?",
    ]


def test_bad_instructions_are_told_with_their_line(tmp_path: Path) -> None:
    good = {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"unused": None}]}
    for change, message in [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "did you mean 'punctuation:no_comma'"),
        ({"kwargs": [{"words": 3}]}, "unexpected keyword argument 'words'"),
        ({"kwargs": []}, "two lists of the same length"),
        ({"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3, "relation": "over"}]}, "not 'over'"),
    ]:
        (tmp_path / "i.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
        with pytest.raises(BadInput, match="i.jsonl, line 2: ") as caught:
            plan([build("task", {"method": "ifeval", "path": "i.jsonl"})], root=tmp_path)
        assert message in str(caught.value)


def test_levels(tmp_path: Path) -> None:
    row = {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    (tmp_path / "i.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "key": 2}) + "\n")
    task = build("task", {"method": "ifeval", "path": "i.jsonl"})
    items = plan([task], root=tmp_path)[0].items
    lines = [task.score(item, Output(text=text)) for item, text in zip(items, ['"a b"', 'Sure\n"a b"'], strict=True)]
    assert [(line["prompt_strict"], line["prompt_loose"]) for line in lines] == [(1, 1), (0, 1)]
    assert task.overall(lines) == {"inst_strict": 0.75, "inst_loose": 1.0}


def test_the_whole_file_is_read(shared_data: Path) -> None:
    items = plan([build("task", {"method": "ifeval", "path": "ifeval/input_data.jsonl"})], root=shared_data)[0].items
    kinds = Counter(kind for item in items for kind, _ in item.reference)
    assert (len(items), len(kinds), sum(kinds.values())) == (541, 25, 834)
