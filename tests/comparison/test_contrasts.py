"""Tests between arms, from item files alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guidetune.comparison.contrasts import Contrast, compare_arms, compare_group_of, compare_two
from guidetune.errors import BadInput
from guidetune.evaluation.statistics import holm


def arm(out: Path, name: str, scores: dict[str, dict[str, Any]], seed: int | None = None, repeat: int = 0) -> dict[str, Any]:
    """An arm's entry and its item files; task "loss" is a likelihood."""
    place = Path("arms") / name / (f"seeds/{repeat}" if repeat else "") / "evaluation"
    entry: dict[str, Any] = {"status": "ok", "paths": {"evaluation": str(place)}, "recipe": {"tune": {"seed": 42} if seed else None}}
    if repeat:
        entry["seed"] = seed
    for group in ("task", "general"):
        entry[group] = {}
        for label, values in scores.get(group, {}).items():
            folder = out / place / group / label
            folder.mkdir(parents=True)
            more = {"nll": 1.0, "tokens": 3} if label == "loss" else {}
            lines = [json.dumps({"id": f"i{i}", "correct": float(v), **more}) for i, v in enumerate(values)]
            (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
            metric = "nll_per_token" if label == "loss" else "accuracy"
            entry[group][label] = {"score": float(np.mean(values)), "n": len(values), "metric": metric, "items": f"{label}/items.jsonl"}
            entry[group][label]["higher_is_better"] = label != "loss"
    return entry


def rights(n: int, share: float, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(n) < share).astype(int)


def test_every_arm_is_tested_corrected_and_put_into_words(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = rights(200, 0.5, rng)
    better = np.maximum(before, rights(200, 0.5, rng))
    same = before.copy()
    same[:4] = 1 - same[:4]
    loss = rng.normal(2, 0.3, 60)
    arms = {
        "instruct": arm(tmp_path, "instruct", {"task": {"sums": before}, "general": {"loss": loss}}),
        "up": arm(tmp_path, "up", {"task": {"sums": better}, "general": {"loss": loss + 0.5}}, 42),
        "even": arm(tmp_path, "even", {"task": {"sums": same}, "general": {"loss": loss + rng.normal(0, 0.2, 60)}}, 42),
        "broken": {"status": "failed", "task": {}, "general": {}},
    }
    found = compare_arms(tmp_path, arms)
    pairs = {name: arms[name]["task"]["sums"]["vs_instruct"] for name in ("up", "even")}
    assert {name: pair["p_adjusted"] for name, pair in pairs.items()} == holm({name: pair["p"] for name, pair in pairs.items()})
    assert pairs["up"]["verdict"].startswith("up is better than instruct on sums by ") and "One training seed" in pairs["up"]["verdict"]
    said = pairs["even"]["verdict"]
    points = f"{100 * pairs['even']['mde_adjusted']:.1f} points"
    assert pairs["even"]["mde"] < pairs["even"]["mde_adjusted"]  # what two tests can show is less than what one could
    assert (
        said.startswith("No difference between even and instruct on sums was detected")
        and f"with 200 items only differences above {points}" in said
    )
    # a loss is better when it is smaller, and is told in its own unit
    assert (
        found["groups"]["general"]["up"]["diff"] == pytest.approx(-0.5)
        and "is worse than instruct" in found["groups"]["general"]["up"]["verdict"]
    )
    assert "by 0.5 (" in arms["up"]["general"]["loss"]["vs_instruct"]["verdict"]
    assert found["verdict"][:2] == [
        "Shown to be better than instruct on the task: up.",
        "Shown to be worse than instruct on general skills: up.",
    ]
    assert [(p["a"], p["b"], p["task"]) for p in found["pairs"]] == [("up", "even", "sums"), ("up", "even", "loss")]
    assert compare_two(tmp_path, arms, "even", "up")[0]["diff"] == -found["pairs"][0]["diff"]
    assert found["correction"] == "holm" and json.dumps(found, allow_nan=False)
    with pytest.raises(BadInput, match="no finished arm 'broken'"):
        compare_two(tmp_path, arms, "up", "broken")


def test_with_several_seeds_the_seeds_count(tmp_path: Path) -> None:
    """One lucky seed is significant over its items; over seeds nothing is claimed."""
    rng = np.random.default_rng(1)
    before = rights(150, 0.5, rng)
    draws = [np.maximum(before, rights(150, 0.5, rng)), np.minimum(before, rights(150, 0.6, rng)), before]
    lucky = arm(tmp_path, "lucky", {"task": {"sums": draws[0]}}, 42)
    lucky["seeds"] = [arm(tmp_path, "lucky", {"task": {"sums": scores}}, 42 + k, k) for k, scores in enumerate(draws[1:], 1)]
    lucky["over_seeds"] = {"n": 3, "task": {"sums": {}}, "general": {}}
    arms = {"instruct": arm(tmp_path, "instruct", {"task": {"sums": before}}), "lucky": lucky}
    found = compare_arms(tmp_path, arms)
    assert lucky["task"]["sums"]["vs_instruct"]["p"] < 0.001  # the first seed by itself
    over = lucky["over_seeds"]["task"]["sums"]["vs_instruct"]
    assert over["seeds"] == 3 and over["p"] > 0.3 and "3 seeds" in over["verdict"] and over["verdict"].startswith("No difference")
    assert found["groups"]["task"]["lucky"]["p"] == over["p"]
    assert found["verdict"][0] == "Shown to be better than instruct on the task: no arm."
    assert lucky["seeds"][0]["task"]["sums"]["vs_instruct"]["diff"] < 0
    assert compare_group_of(tmp_path, lucky, arms["instruct"], "task")["diff"] == pytest.approx(over["diff"])


def test_nothing_changed_is_no_proof_that_nothing_can(tmp_path: Path) -> None:
    same = [1, 0] * 10
    one = arm(tmp_path, "a", {"task": {"sums": same}}, 42)
    one["seeds"] = [arm(tmp_path, "a", {"task": {"sums": same}}, 43, 1)]
    found = compare_group_of(tmp_path, one, arm(tmp_path, "instruct", {"task": {"sums": same}}), "task")
    assert found["ci"][0] < -0.1 < 0 == found["diff"] and found["p"] == pytest.approx(1)


@pytest.mark.parametrize("p, adjusted, ci", itertools.product([0.001, 0.03, 0.4], [0.004, 0.2], [(-0.05, 0.1), (0.01, 0.1)]))
def test_words_claim_no_more_than_the_test(p: float, adjusted: float, ci: tuple[float, float]) -> None:
    test = Contrast("a", "b", "t", 0.04, ci, p, 200, paired={"ci": ci})
    said = test.words(max(p, adjusted), 3)
    assert (" is better than " in said) == (max(p, adjusted) < 0.05)
    if p < 0.05 <= max(p, adjusted):
        assert "no difference was established" in said
    if p >= 0.05:
        least = (2.394 + 0.842) * (ci[1] - ci[0]) / 3.92  # z at .05 / 3, z of power .8
        assert f"only differences above {100 * least:.1f} points" in said and ("A loss of up to 5.0 points" in said) == (ci[0] < 0)
