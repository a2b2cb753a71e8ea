from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidetune.evaluation.statistics import (
    bootstrap,
    detectable,
    detectable_accuracy,
    holm,
    mcnemar,
    newcombe,
    over_seeds,
    paired,
    sequence,
    student_quantile,
    student_tail,
    wilson,
)


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


def test_holm_known_values() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({}) == {} and holm({"x": 0.2}) == {"x": 0.2} and max(holm(dict.fromkeys(range(5), 0.5)).values()) == 1


@pytest.mark.parametrize("n, changed", [(60, 6), (200, 40), (800, 240)])
def test_the_detectable_difference_is_found_four_times_in_five(n: int, changed: int) -> None:
    """At the stated difference the real test finds it with about the stated power, and at half of it much less often."""
    rng, found = np.random.default_rng(0), []
    for diff in (detectable_accuracy(n, changed), detectable_accuracy(n, changed) / 2):
        share = max(changed / n, diff)
        draws = rng.multinomial(n, [(share + diff) / 2, (share - diff) / 2, 1 - share], size=1500)
        found.append(np.mean([mcnemar(int(lost), int(gained)) < 0.05 for gained, lost, _ in draws]))
    assert 0.76 <= found[0] <= 0.85 and found[1] < 0.5
    assert detectable_accuracy(5, 0) is None  # five items: even five losses in a row have p = .06


def test_detectable_of_other_scores_is_that_of_their_standard_error() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=400), rng.normal(size=400)
    assert detectable(paired(a, b), 400) == pytest.approx(2.8 * (a - b).std() / 20, rel=0.05)
    assert detectable(paired([0.5, 0.25], [0.5, 0.25]), 2) is None


def test_students_distribution() -> None:
    # Abramowitz and Stegun, table 26.10
    for q, df, t in [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.995, 10, 3.169), (0.95, 120, 1.658), (0.9995, 2, 31.599)]:
        assert student_quantile(q, df) == pytest.approx(t, abs=6e-4)
        assert student_tail(t, df) == pytest.approx(1 - q, rel=2e-3)
    assert student_tail(1.0, 2.5) + 0 == pytest.approx((student_tail(1.0, 2.4) + student_tail(1.0, 2.6)) / 2, rel=1e-3)


@pytest.mark.parametrize("seeds, spread", [(2, 0.1), (3, 0.1), (5, 0.0), (5, 0.1)])
def test_over_seeds_holds_its_level(seeds: int, spread: float) -> None:
    """No true difference: luck of seeds and of items is called a difference in no more than about one of twenty cases."""
    rng = np.random.default_rng(7)
    false_seeds = false_items = 0
    trials = 400
    for _ in range(trials):
        level = rng.normal(0, spread, (seeds, 1))
        difficulty = rng.normal(0, 0.3, (1, 100))
        a = level + difficulty + rng.normal(0, 0.3, (seeds, 100))
        b = difficulty + rng.normal(0, 0.3, (1, 100))
        false_seeds += over_seeds(a, b)["p"] < 0.05
        pooled = (a - b).ravel()
        false_items += abs(pooled.mean()) / (pooled.std(ddof=1) / np.sqrt(pooled.size)) > 1.96
    assert false_seeds / trials <= 0.075
    assert false_items / trials > (0.2 if spread else 0.1)  # what pooling all seeds' items would have claimed


def test_over_seeds_sees_what_is_there_and_pairs_by_seed() -> None:
    rng = np.random.default_rng(2)
    luck = rng.normal(0, 0.2, (5, 1))  # of the seed: the same for both arms
    b = luck + rng.normal(0, 0.1, (5, 80))
    a = luck + 0.1 + rng.normal(0, 0.1, (5, 80))
    found = over_seeds(a, b)
    assert found["p"] < 1e-3 and found["ci"][0] < found["diff"] < found["ci"][1] and found["diff"] == pytest.approx((a - b).mean())
    assert over_seeds(a, b[[1, 2, 3, 4, 0]])["p"] > found["p"]
    assert over_seeds(b, a)["diff"] == pytest.approx(-found["diff"])
    assert over_seeds(b, b)["p"] == 1
    weights = np.arange(1, 81)
    assert over_seeds(a, b, weights)["diff"] == pytest.approx(((a - b) @ weights / weights.sum()).mean())
    with pytest.raises(ValueError, match="same seeds"):
        over_seeds(a, b[:3])


def test_sequences_of_tasks() -> None:
    found = sequence([[80, None], [70, 90]])
    assert found == {"average": 80, "backward": -10, "forgetting": 10, "forward": None}
    three = sequence([[0.5, 0.1, 0.2], [0.9, 0.6, 0.3], [0.4, 0.7, 0.8]], untrained=[0.0, 0.0, 0.1])
    assert three["backward"] == pytest.approx((-0.1 + 0.1) / 2)
    assert three["forgetting"] == pytest.approx(
        ((0.9 - 0.4) + (0.6 - 0.7)) / 2
    )  # the best score before the last stage, from its own stage on
    assert three["forward"] == pytest.approx((0.1 + 0.2) / 2)
    with pytest.raises(ValueError, match="task 1 after stage 2 is missing"):
        sequence([[80, None], [None, 90]])
