"""Intervals and paired tests: Wilson, Newcombe, bootstrap, exact McNemar, sign-flip permutation."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from typing import Any

import numpy as np

from guidetune.artefacts import derive_seed

Z = 1.959963984540054  # 95 %, two-sided
DRAWS = 2000


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
