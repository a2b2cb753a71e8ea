from __future__ import annotations

from itertools import combinations
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidetune.evaluation import metrics
from guidetune.evaluation.answers import same_number


def test_pass_at_k_oracle() -> None:
    assert [metrics.pass_at_k(5, 2, k) for k in (1, 2, 3, 4)] == pytest.approx([0.4, 0.7, 0.9, 1.0])


@given(st.integers(1, 8), st.data())
def test_pass_at_k_counts_subsets(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    groups = list(combinations([i < c for i in range(n)], k))
    assert metrics.pass_at_k(n, c, k) == pytest.approx(sum(any(group) for group in groups) / len(groups))
    assert metrics.pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_pass_at_k_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="n=3"):
        metrics.pass_at_k(3, 4, 1)


def test_majority() -> None:
    assert metrics.majority(["a", "b", "b"], str.__eq__) == 1
    assert metrics.majority(["a", "b", "b", "a"], str.__eq__) == 0  # tie: the earliest sample's group
    assert metrics.majority([None, None, "7"], str.__eq__) == 2  # what could not be parsed never votes
    assert metrics.majority([None], str.__eq__) is None
    assert metrics.majority(["3", "18", "18.0"], same_number) == 1  # by equivalence


def test_calibration_oracle() -> None:
    confidence, correct = [0.95, 0.85, 0.75, 0.65, 0.55, 0.55], [1, 1, 0, 1, 0, 1]
    assert metrics.calibration_error(confidence, correct, 10) == pytest.approx(0.233333, abs=1e-6)
    assert metrics.calibration_error([1.0, 0.0], [1, 0]) == 0


def test_choice_oracle() -> None:
    assert metrics.choice_scores([-4, -5], ["No", "Certainly not"]) == {"acc": 0, "acc_norm": 1, "acc_bytes": 1}
    assert metrics.choice_scores([-3, -3], ["A", "B"])["acc"] == 0  # ties go to the first
    assert metrics.choice_scores([-4, -5], ["ää", "abc"]) == {"acc": 0, "acc_norm": 1, "acc_bytes": 0}


@given(st.lists(st.floats(-50, 0), min_size=2, max_size=6))
def test_equal_lengths_make_all_choice_rules_agree(loglik: list[float]) -> None:
    assert len(set(metrics.choice_scores(loglik, "ABCDEF"[: len(loglik)]).values())) == 1


def test_truthful_mass() -> None:
    assert metrics.truthful_mass([log(0.1), log(0.3), log(0.2)], [True, False, True]) == pytest.approx(0.5)


def test_perplexity_and_bits() -> None:
    assert metrics.perplexity(10 * log(7), 10) == pytest.approx(7)
    assert metrics.perplexity(1e6, 1) == float("inf")
    assert metrics.bits_per_byte(123.0, 45) * log(2) * 45 == pytest.approx(123.0)


def test_rouge_oracles() -> None:
    assert metrics.rouge_l("the cat is on the mat", ["the cat sat on the mat"]) == pytest.approx(0.8333, abs=1e-4)
    assert metrics.rouge_l("the dogs were running", ["the dog was running"]) == pytest.approx(0.75)
    assert metrics.rouge_l("你好 世界", ["你好 世界"]) == 0.0  # the default tokenizer keeps only a-z and 0-9
    assert metrics.rouge_l("你好 世界", ["x", "你好 世界"], tokenize=str.split) == 1.0


def test_translation_oracles() -> None:
    found = metrics.translation(["the cat sat on the mat", "there is a dog"], ["the cat is on the mat", "there is a small dog"])
    expected = {"bleu": 35.4037, "chrf": 57.5806, "chrf++": 60.7097, "ter": 18.1818}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert "tok:13a" in found["signatures"]["bleu"]


def test_text_matches() -> None:
    assert metrics.squad_f1("the Eiffel Tower in Paris", ["Eiffel Tower"]) == pytest.approx(2 / 3)
    assert metrics.exact_match("The cat.", ["a dog", "the cat"]) == 1.0
    assert metrics.exact_match("cat", ["the cat"]) == 0.0  # articles are kept


def test_forgetting_oracle() -> None:
    assert metrics.forgetting([[80, 0], [70, 90]]) == {"average": 80, "backward_transfer": -10, "forgetting": 10}
    three = metrics.forgetting([[50, 0, 0], [60, 70, 0], [40, 75, 80]])
    assert three == {"average": 65, "backward_transfer": -2.5, "forgetting": 7.5}
    assert metrics.forgetting([[5]]) == {"average": 5, "backward_transfer": 0, "forgetting": 0}
