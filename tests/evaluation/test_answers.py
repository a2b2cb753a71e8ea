from __future__ import annotations

import pytest

from guidetune.evaluation.answers import (
    boxed,
    choice_answer,
    clean_number,
    flexible_number,
    number_answer,
    same_number,
    strict_number,
    to_number,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{14}.", "14"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{(A)}}", r"\text{(A)}"),
        (r"\boxed 5", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{3} and \boxed{unbalanced", "3"),
        ("no box", None),
        ("", None),
    ],
)
def test_boxed(text: str, expected: str | None) -> None:
    assert boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "answer"),
    [
        ("9 * 2 = $<<9*2=18>>18\n#### 18", "18", "18", "18"),
        ("#### 1,200.", "1,200.", "1,200.", "1200"),
        ("#### -3", "-3", "-3", "-3"),
        ("The total is $1,234.50.", None, "$1,234.50.", "1234.50"),
        ("It takes 3 bolts", None, "3", "3"),
        (r"#### 7 but \boxed{8} of 9", "7", "9", "8"),
        ("none", None, None, None),
        ("", None, None, None),
    ],
)
def test_number_filters(text: str, strict: str | None, flexible: str | None, answer: str | None) -> None:
    assert (strict_number(text), flexible_number(text), number_answer(text)) == (strict, flexible, answer)


def test_numbers_are_compared_as_numbers() -> None:
    assert same_number("$1,000.", "1000")
    assert same_number("18", "18.0")
    assert same_number("#### 5", "5")
    assert not same_number("18", "19")
    assert not same_number(None, "18")
    assert not same_number("", "")
    assert not same_number("nan", "nan5")
    assert to_number("inf") is None
    assert to_number("12\\%") == 12
    assert clean_number("a #### 7.") == "7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1),
        ("B.", 1),
        ("(C)", 2),
        ("D. refuse to dictate", 3),
        ("The answer is B", 1),
        ("The answer is (B).", 1),
        ("**Answer:** C", 2),
        ("Answer: **C**", 2),
        ("A is wrong. So the correct answer is: D", 3),
        ("The correct option is A because it fits.", 0),
        (r"\boxed{B}", 1),
        (r"\boxed{\text{C}}", 2),
        (r"\boxed{\text{(C) maybe}}", 2),
        ("A patient with a fever", None),
        ("A and B are both possible", None),
        ("I would say yes", 0),
        ("certainly not", 3),
        ("yes or no", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_chosen_letter(text: str, expected: int | None) -> None:
    assert choice_answer(text, "ABCD", ["yes", "no", "maybe", "certainly not"]) == expected


def test_chosen_word() -> None:
    words = ["yes", "no", "maybe"]
    assert [choice_answer(text, words, words) for text in ("Yes.", "Answer: no", "maybe", "It is yes, clearly", "nothing", "")] == [
        0, 1, 2, 0, None, None,
    ]  # fmt: skip
