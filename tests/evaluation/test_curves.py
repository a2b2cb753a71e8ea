"""Scores against the number of samples."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guidetune.evaluation.evaluate import EvalSettings, evaluate
from guidetune.evaluation.metrics import EXACT_SUBSETS, majority, majority_at_k, pass_at_k, same_votes
from guidetune.evaluation.results import curve_table, curves
from guidetune.evaluation.statistics import sample_intervals
from guidetune.registry import build


def same(a: str, b: str) -> bool:
    return a.lower() == b.lower()


def item(answers: str, gold: str = "a") -> tuple[list[str | None], list[float]]:
    found = [None if c == "-" else c for c in answers]
    return found, [float(c is not None and same(c, gold)) for c in found]


def test_majority_at_k_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(0)
    for _ in range(20):
        answers, correct = item("".join(rng.choice("aAbc-") for _ in range(6)))
        votes = same_votes(answers, same)
        for k in range(1, 7):
            expected = []
            for subset in combinations(range(6), k):
                best = majority([answers[i] for i in subset], same)
                expected.append(correct[subset[best]] if best is not None else 0.0)
            assert majority_at_k([votes], [correct], k)[0] == pytest.approx(np.mean(expected))


def test_majority_at_k_known_cases() -> None:
    answers, correct = item("abab")
    votes = same_votes(answers, same)
    assert votes == [0, 1, 0, 1]
    assert majority_at_k([votes], [correct], 1) == [0.5]  # maj@1 = pass@1 = avg
    assert majority_at_k([votes], [correct], 4) == [1.0]  # a tie goes to the earliest sample
    answers, correct = item("---a")
    assert majority_at_k([same_votes(answers, same)], [correct], 4) == [1.0]  # what cannot be parsed does not vote
    assert majority_at_k([same_votes([None, None], same)], [[0.0, 0.0]], 2) == [0.0]


def test_drawn_subsets_are_close_to_all_and_come_from_the_seed() -> None:
    rng = random.Random(1)
    rows = [item("".join(rng.choice("aab") for _ in range(16))) for _ in range(60)]
    votes, correct = [same_votes(a, same) for a, _ in rows], [c for _, c in rows]
    k = 8
    assert len(list(combinations(range(16), k))) > EXACT_SUBSETS
    drawn = majority_at_k(votes, correct, k, seed=3)
    assert drawn == majority_at_k(votes, correct, k, seed=3) != majority_at_k(votes, correct, k, seed=4)
    whole = []
    for v, c in zip(votes[:3], correct[:3], strict=True):
        table = []
        for subset in combinations(range(16), k):
            counts = {g: sum(v[i] == g for i in subset) for g in set(v)}
            table.append(next(c[i] for i in subset if counts[v[i]] == max(counts.values())))
        whole.append(np.mean(table))
    assert np.abs(np.array(drawn[:3]) - whole).max() < 0.1


def test_intervals_of_fewer_samples_are_wider() -> None:
    rng = np.random.default_rng(0)
    values = (rng.random((100, 16)) < rng.random((100, 1))).astype(float).tolist()
    widths = [high - low for low, high in sample_intervals(values, [1, 4, 16])]
    assert widths[0] > widths[1] > widths[2] > 0
    assert sample_intervals(values, [4], seed=1) == sample_intervals(values, [4], seed=1)
    assert sample_intervals([[1.0, 1.0]], [1, 2]) == [(1.0, 1.0), (1.0, 1.0)]


def test_curves_of_a_task() -> None:
    rng = random.Random(2)
    task = build("task", {"method": "world", "set": "arithmetic", "n": 5})
    rows = [item("".join(rng.choice("aab-") for _ in range(6))) for _ in range(40)]
    lines = [{"samples": [{"answer": a, "correct": c} for a, c in zip(*row, strict=True)]} for row in rows]
    found = curves(task, lines, 6, seed=0)
    assert found["k"] == [1, 2, 4, 6]
    average = np.mean([c for _, c in rows])
    assert found["avg"] == pytest.approx([average] * 4)
    assert found["pass"] == pytest.approx([np.mean([pass_at_k(6, int(sum(c)), k) for _, c in rows]) for k in found["k"]])
    assert found["pass"][0] == pytest.approx(found["avg"][0]) == pytest.approx(found["maj"][0])
    assert found["pass"] == sorted(found["pass"])
    for name in ("avg", "pass", "maj"):
        for value, (low, high) in zip(found[name], found["ci"][name], strict=True):
            assert low <= value <= high
    table = curve_table({"arithmetic": {"curves": found}, "greedy": {}})
    assert table is not None and table.row_count == 4
    assert curve_table({"greedy": {}}) is None


def test_an_evaluation_writes_its_curves(tmp_path: Path, llama: Any, handle_of: Any) -> None:
    name = tmp_path / "g.jsonl"
    name.write_text("".join(f'{{"question": "What is {i}?", "answer": "{i}"}}\n' for i in range(4)), encoding="utf-8")
    task = build("task", {"method": "gsm8k", "path": str(name), "max_new_tokens": 3})
    settings = EvalSettings(samples=4, temperature=1.0)
    result = evaluate(handle_of(llama()), [task], tmp_path / "out", settings)["gsm8k"]
    assert result["curves"]["k"] == [1, 2, 4]
    assert result["curves"]["avg"][-1] == result["score"]
    assert result["curves"]["maj"][-1] == pytest.approx(result["metrics"]["maj@4"])
    assert result["curves"]["pass"] == pytest.approx([result["metrics"][f"pass@{k}"] for k in (1, 2, 4)])
    assert "curves" not in evaluate(handle_of(llama()), [task], tmp_path / "greedy")["gsm8k"]
