"""Intervals and paired tests over items and seeds, correction for several tests, what a test could have detected, forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import comb, exp, lgamma, log, sqrt
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

from guidetune.artefacts import derive_seed

Z = 1.959963984540054  # 95 %, two-sided
DRAWS = 2000
ALPHA, POWER = 0.05, 0.8
EXACT_CHANGES = 400  # changed items up to which the power of McNemar's test is summed exactly

K = TypeVar("K")


def wilson(successes: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) when n = 0.

    `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exactly 0 and 1 at the ends, whatever the rounding.
    return (max(0.0, (centre - half) / scale) if successes > 0 else 0.0), (min(1.0, (centre + half) / scale) if successes < n else 1.0)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """95 % percentile interval of `Σwx/Σw` over items drawn with replacement (w = 1: the mean)."""
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.size == 0:
        return float("nan"), float("nan")
    return _percentiles(_resample(x * w, w, seed, draws))


def _resample(top: np.ndarray, bottom: np.ndarray, seed: int, draws: int) -> np.ndarray:
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    ratios = []
    for start in range(0, draws, 100):  # 100 draws at a time bound the memory
        picks = rng.integers(0, top.size, size=(min(100, draws - start), top.size))
        ratios.append(top[picks].sum(1) / bottom[picks].sum(1))
    return np.concatenate(ratios)


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def sample_intervals(values: Sequence[Sequence[float]], ks: Sequence[int], seed: int = 0, draws: int = 1000) -> list[tuple[float, float]]:
    """95 % interval of the mean over items of the mean of k samples, for each k: items are drawn with, their k samples without replacement.

    values: [items, n] with every k <= n. For k = n this is `bootstrap` of the items' means; smaller k adds the spread of sampling.
    """
    table = np.asarray(values, dtype=np.float64)
    places = np.asarray(ks) - 1
    rng = np.random.default_rng(derive_seed(seed, "samples"))
    means = np.empty((draws, len(ks)))
    for draw in range(draws):
        drawn = rng.permuted(table[rng.integers(0, len(table), len(table))], axis=1)
        means[draw] = drawn.cumsum(axis=1)[:, places].mean(axis=0) / (places + 1)
    return [_percentiles(means[:, i]) for i in range(len(ks))]


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar p-value: the changed items against a fair coin; 1 when nothing changed."""
    n = lost + gained
    if n == 0:
        return 1.0
    tail = sum(comb(n, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**n)  # exact integers, one division


def newcombe(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions (Newcombe 1998, method 10): Wilson limits joined by their correlation.

    Unlike a bootstrap it does not collapse to a point when no item changed.
    """
    n = both + gained + lost + neither
    if n == 0:
        return -1.0, 1.0
    p_a, p_b = (both + gained) / n, (both + lost) / n
    low_a, high_a = wilson(both + gained, n)
    low_b, high_b = wilson(both + lost, n)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    cross = both * neither - gained * lost
    cross = max(cross - n / 2, 0.0) if cross > 0 else cross  # continuity correction
    phi = cross / sqrt(margins) if margins else 0.0
    diff = p_a - p_b
    below = (p_a - low_a) ** 2 - 2 * phi * (p_a - low_a) * (high_b - p_b) + (high_b - p_b) ** 2
    above = (high_a - p_a) ** 2 - 2 * phi * (high_a - p_a) * (p_b - low_b) + (p_b - low_b) ** 2
    return max(-1.0, diff - sqrt(max(below, 0.0))), min(1.0, diff + sqrt(max(above, 0.0)))


def paired(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    higher_is_better: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two models on the same items, in the same order: `diff = score(a) - score(b)`.

    Right-or-wrong scores: exact McNemar test and Newcombe's interval. Others (Avg@k, NLL per token with `weights` = tokens): paired
    bootstrap of the interval and a sign-flip permutation test. `kept`: items that both have right (unchanged ones where scores
    are not right-or-wrong); `lost`: items on which a is worse than b; `gained`: on which it is better.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired scores need the same items: {x.size} against {y.size}")
    if x.size == 0:
        return {"diff": None, "ci": None, "p": None, "test": "none", "kept": 0, "lost": 0, "gained": 0}
    better, worse = (x > y, x < y) if higher_is_better else (x < y, x > y)
    gained, lost = int(better.sum()), int(worse.sum())
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights is None and set(np.unique(np.concatenate([x, y]))) <= {0.0, 1.0}:
        kept = int(((x == 1) & (y == 1)).sum())
        up, down = int((x > y).sum()), int((x < y).sum())
        interval, p, test = newcombe(kept, up, down, x.size - kept - up - down), mcnemar(down, up), "McNemar, exact"
    else:
        kept = int((x == y).sum())
        interval = _percentiles(_resample((x - y) * w, w, seed, DRAWS))
        p, test = _sign_flip((x - y) * w, seed), "paired permutation"
    diff = float(((x - y) * w).sum() / w.sum())
    return {"diff": diff, "ci": list(interval), "p": p, "test": test, "kept": kept, "lost": lost, "gained": gained}


def _sign_flip(differences: np.ndarray, seed: int, draws: int = 10_000) -> float:
    """Two-sided p-value of Σd under random signs; (hits + 1) / (draws + 1), so never 0."""
    d = differences[differences != 0]
    if d.size == 0:
        return 1.0
    rng = np.random.default_rng(derive_seed(seed, "permutation"))
    observed = abs(d.sum()) * (1 - 1e-12)  # equal sums in another order of addition count as hits
    hits = 0
    for start in range(0, draws, 500):
        signs = rng.integers(0, 2, size=(min(500, draws - start), d.size), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ d) >= observed).sum())
    return (hits + 1) / (draws + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Several tests, and what one could have detected


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Holm's step-down adjustment: p_(i) -> max_{j<=i} min(1, (m-j+1) p_(j)) over the m sorted p-values (Holm 1979)."""
    adjusted: dict[K, float] = {}
    running = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[key] = running
    return adjusted


def mcnemar_power(n: int, changed: float, diff: float, alpha: float = ALPHA) -> float:
    """Chance that the exact McNemar test on n items finds a true difference `diff` of two accuracies, p < alpha.

    `changed` is the true share of items on which the two models disagree, at least |diff|: D ~ Bin(n, changed) items change, and each of
    them is a gain with probability (changed + diff) / (2 changed). Beyond `EXACT_CHANGES` changed items the normal form (Connor 1987).
    """
    diff = abs(diff)
    if n == 0 or changed <= 0:
        return 0.0
    if n * changed > EXACT_CHANGES:
        z = NormalDist().inv_cdf(1 - alpha / 2)
        spread = changed - diff * diff
        return NormalDist().cdf((diff * sqrt(n) - z * sqrt(changed)) / sqrt(spread)) if spread > 0 else 1.0
    up = min(1.0, (changed + diff) / (2 * changed))
    half = 8 * sqrt(n * changed * (1 - changed)) + 8
    total = 0.0
    for d in range(max(0, int(n * changed - half)), min(n, int(n * changed + half)) + 1):
        critical = _critical(d, alpha)
        if critical < 0:
            continue
        total += float(_binomial(n, changed, np.array([d]))[0]) * float(
            _binomial(d, up, np.arange(0, critical + 1)).sum() + _binomial(d, up, np.arange(d - critical, d + 1)).sum()
        )
    return min(1.0, total)


@lru_cache(maxsize=EXACT_CHANGES * 2)
def _critical(changes: int, alpha: float) -> int:
    """The largest k such that k losses among so many changes are significant; -1 when none are."""
    if changes == 0:
        return -1
    tails = np.cumsum(_binomial(changes, 0.5, np.arange(0, changes // 2 + 1)))
    return int(np.searchsorted(2 * tails, alpha, side="left")) - 1


def _binomial(n: int, p: float, k: np.ndarray) -> np.ndarray:
    if p <= 0 or p >= 1:
        return (k == (0 if p <= 0 else n)).astype(np.float64)
    table = _log_factorials(n.bit_length())
    return np.exp(table[n] - table[k] - table[n - k] + k * log(p) + (n - k) * log(1 - p))


@lru_cache(maxsize=32)
def _log_factorials(bits: int) -> np.ndarray:
    """log k! for k < 2^bits."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, 2**bits)))])


@lru_cache(maxsize=4096)
def detectable_accuracy(n: int, changed: int, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """The smallest true difference of two accuracies that McNemar's test on n items would find with this power.

    `changed` items of the n were seen to change; the true share is taken as that, or as the difference itself where that is larger (a
    difference cannot be larger than the share of changed items). None where no difference would be found.
    """
    if n == 0 or mcnemar_power(n, 1.0, 1.0, alpha) < power:
        return None
    low, high = 0.0, 1.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        if mcnemar_power(n, max(changed / n, middle), middle, alpha) >= power:
            high = middle
        else:
            low = middle
    return high


def detectable(test: Mapping[str, Any], n: int, alpha: float = ALPHA) -> float | None:
    """The minimum detectable difference (power .8) of a result of `paired` or `over_seeds` on n items, in the score's unit.

    McNemar: `detectable_accuracy`. Others: (q + z_.8) · standard error, with q the two-sided quantile of the test at `alpha` and the error
    that their 95 % interval is made of. None where the data show no spread to work with.
    """
    if str(test.get("test", "")).startswith("McNemar"):
        return detectable_accuracy(n, int(test["lost"]) + int(test["gained"]), alpha)
    if not test.get("ci"):
        return None
    error = (test["ci"][1] - test["ci"][0]) / (2 * Z)
    quantile = NormalDist().inv_cdf(1 - alpha / 2)
    if "seed_share" in test:
        error = (test["ci"][1] - test["ci"][0]) / (2 * _crossed_quantile(ALPHA, test["seed_share"], test["seeds"], n))
        quantile = _crossed_quantile(alpha, test["seed_share"], test["seeds"], n)
    return (quantile + NormalDist().inv_cdf(POWER)) * error if error > 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds


def over_seeds(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Compare two arms over training seeds *and* items: `diff = mean score(a) - mean score(b)`.

    Args:
        a, b: scores [seeds, items], the same items in the same order. Row k of both had the same seed; an arm that is not trained has
            one row, which stands for all.
        weights: of the items (for scores per token: their tokens).

    Both seeds and items are samples. With d the [S, n] differences, row means r and column means c,

        V = s²(r) / S,    W = s²(c) / n,    |diff| <= sqrt(V + W) (V t(S-1) + W t(n-1)) / (V + W)

    where t(df) is Student's quantile: what the test and its interval are made of (Cochran and Cox's weighting, which keeps its level with
    two seeds, where Welch's degrees of freedom do not). What seeds and items do to each other is in both V and W, so the test errs on the
    careful side; two seeds can show only what is very clear. A test over the items of one seed takes its luck for the method's merit.

    Raises:
        ValueError: fewer than two seeds or two items, or rows that do not match.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    seeds = max(len(x), len(y))
    if seeds < 2 or x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or {len(x), len(y)} - {1, seeds} or x.shape[1] < 2:
        raise ValueError(f"scores over seeds need the same seeds and items, two of each: {x.shape} against {y.shape}")
    d = np.broadcast_to(x - y, (seeds, x.shape[1]))
    w = np.ones(x.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    n = x.shape[1]
    part = w / w.sum()
    rows = d @ part
    diff = float(rows.mean())
    by_seed = float(rows.var(ddof=1)) / seeds
    # the mean is a ratio Σwd / Σw: its linear form has the item terms n · part · (d - diff)
    squares = float(((n * part * (d.mean(0) - diff)) ** 2).sum())
    if weights is None and set(np.unique(np.concatenate([x.ravel(), y.ravel()]))) <= {0.0, 1.0}:
        # one gain and one loss more than were seen (Bonett and Price 2012): that nothing changed in n items is no proof that nothing can
        by_item = (squares + 2) / (n + 1) / (n + 2)
    else:
        by_item = squares / (n - 1) / n
    error = sqrt(by_seed + by_item)
    found = {"diff": diff, "seeds": seeds, "sd": float(rows.std(ddof=1)), "test": "t over seeds and items"}
    if error <= 1e-15:
        return {**found, "ci": [diff, diff], "p": 1.0 if abs(diff) < 1e-15 else None}
    share = by_seed / (by_seed + by_item)
    # p is the level at which the interval would just reach 0; between the levels of a fine table
    reach = share * _quantiles(seeds - 1) + (1 - share) * _quantiles(n - 1)
    p = float(np.exp(np.interp(abs(diff) / error, reach[::-1], np.log(_LEVELS[::-1]))))
    half = _crossed_quantile(ALPHA, share, seeds, n) * error
    return {**found, "ci": [diff - half, diff + half], "p": p, "seed_share": share}


def _crossed_quantile(level: float, seed_share: float, seeds: int, items: int) -> float:
    """The critical value of `over_seeds`; `seed_share` of the variance comes from the seeds."""
    by_seed, by_item = student_quantile(1 - level / 2, seeds - 1), student_quantile(1 - level / 2, items - 1)
    return seed_share * by_seed + (1 - seed_share) * by_item


_LEVELS = np.logspace(-8, 0, 161)


@lru_cache(maxsize=64)
def _quantiles(df: int) -> np.ndarray:
    """Student's two-sided quantiles of `_LEVELS`, falling."""
    return np.array([student_quantile(1 - level / 2, df) for level in _LEVELS.tolist()])


def student_tail(t: float, df: float) -> float:
    """P(T > t) of Student's distribution, t >= 0: I_x(df/2, 1/2) / 2 at x = df / (df + t²)."""
    return 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def student_quantile(q: float, df: float) -> float:
    """The t >= 0 with P(T <= t) = q, for q in [1/2, 1)."""
    if q <= 0.5:
        return 0.0
    low, high = 0.0, 1.0
    while 1 - student_tail(high, df) < q:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - student_tail(middle, df) < q else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), by its continued fraction (Abramowitz and Stegun 26.5.8) evaluated with Lentz's method."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(1 - x)) / a
    tiny = 1e-300
    value = c = 1.0
    d = 0.0
    for i in range(400):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Sequences of tasks


def sequence(scores: Sequence[Sequence[float | None]], untrained: Sequence[float] | None = None) -> dict[str, float | None]:
    """What a sequence of T stages learnt and forgot. `scores[i][j]`: on task j after stage i (None for tasks that were not measured).

        average    mean_j R[T,j]
        backward   mean over j < T of R[T,j] - R[j,j]                             (backward transfer)
        forgetting mean over j < T of max_{j <= i < T} R[i,j] - R[T,j]
        forward    mean over j > 1 of R[j-1,j] - untrained[j], where the scores of the untrained model are given

    Higher scores are better. `backward`, `forgetting` and `forward` are None for a single task.

    Raises:
        ValueError: the table is not square, or lacks a score that the formulas use.
    """
    count = len(scores)
    if count == 0 or any(len(row) != count for row in scores):
        raise ValueError("a sequence has as many tasks as stages: scores[stage][task]")

    def at(i: int, j: int) -> float:
        if (value := scores[i][j]) is None:
            raise ValueError(f"the score on task {j + 1} after stage {i + 1} is missing")
        return float(value)

    final = [at(count - 1, j) for j in range(count)]
    found: dict[str, float | None] = {"average": sum(final) / count, "backward": None, "forgetting": None, "forward": None}
    if count > 1:
        earlier = range(count - 1)
        found["backward"] = sum(final[j] - at(j, j) for j in earlier) / (count - 1)
        found["forgetting"] = sum(max(at(i, j) for i in range(j, count - 1)) - final[j] for j in earlier) / (count - 1)
        if untrained is not None:
            found["forward"] = sum(at(j - 1, j) - untrained[j] for j in range(1, count)) / (count - 1)
    return found
