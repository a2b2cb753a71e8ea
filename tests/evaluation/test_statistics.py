from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidetune.evaluation.statistics import bootstrap, mcnemar, newcombe, paired, wilson


def test_wilson_known_values() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_proportion(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n))


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap(values, seed=1)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert bootstrap(values, seed=1) == (low, high) != bootstrap(values, seed=2)
    assert bootstrap([2.0, 2.0], [1, 9]) == (2.0, 2.0)


def test_mcnemar() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(3, 9) == mcnemar(9, 3) == pytest.approx(2 * (1 + 12 + 66 + 220) / 4096)
    assert mcnemar(7, 7) == 1
    assert 0 < mcnemar(900, 1100) < 1e-4


def test_newcombe_covers_as_it_claims() -> None:
    rng, inside, trials = np.random.default_rng(0), 0, 2000
    both, gained, lost = 0.5, 0.15, 0.1
    for counts in rng.multinomial(80, [both, gained, lost, 1 - both - gained - lost], size=trials):
        low, high = newcombe(*(int(c) for c in counts))
        inside += low <= gained - lost <= high
    assert 0.93 <= inside / trials <= 0.98


def test_newcombe_does_not_collapse() -> None:
    low, high = newcombe(50, 0, 0, 10)
    assert low < 0 < high
    low, high = newcombe(0, 0, 0, 0)
    assert (low, high) == (-1, 1)


def test_paired_right_or_wrong() -> None:
    a = [1, 1, 1, 1, 1, 1, 0, 0]
    b = [1, 1, 0, 0, 0, 0, 1, 0]
    found = paired(a, b)
    assert (found["kept"], found["lost"], found["gained"]) == (2, 1, 4)
    assert found["diff"] == pytest.approx(3 / 8)
    assert found["p"] == mcnemar(1, 4)
    assert found["ci"][0] < found["diff"] < found["ci"][1]
    other = paired(b, a)
    assert (other["lost"], other["gained"], other["p"]) == (4, 1, found["p"])
    assert other["ci"] == pytest.approx([-found["ci"][1], -found["ci"][0]])


def test_paired_scores_and_weights() -> None:
    rng = np.random.default_rng(0)
    b = rng.random(200)
    found = paired(b + rng.normal(0.1, 0.2, 200), b)
    assert found["test"] == "paired permutation"
    assert found["p"] < 0.001 and found["ci"][0] > 0
    assert paired(b, b)["p"] == 1 and paired(b, b)["ci"] == [0, 0]
    # Per-token scores: a long item counts for its tokens, and lower is better.
    weighted = paired([1.0, 2.0], [2.0, 1.5], weights=[30, 10], higher_is_better=False)
    assert weighted["diff"] == pytest.approx((30 * -1 + 10 * 0.5) / 40)
    assert (weighted["gained"], weighted["lost"]) == (1, 1)


def test_permutation_p_is_uniform_under_no_effect() -> None:
    rng = np.random.default_rng(3)
    values = [paired(rng.normal(size=30), rng.normal(size=30), seed=i)["p"] for i in range(60)]
    assert 0.3 < float(np.mean(values)) < 0.7
    assert min(values) > 0


def test_paired_edges() -> None:
    assert paired([], [])["test"] == "none"
    with pytest.raises(ValueError, match="same items"):
        paired([1], [1, 0])
