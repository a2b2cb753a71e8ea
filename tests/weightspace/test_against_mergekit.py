"""Merges agree with mergekit's in fp32 where both mean the same; the values it gave are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from guidetune.errors import BadInput
from guidetune.weightspace.plan import MergePlan, merge, parse_plan
from tests.weightspace.mergekit import CASES, GOLDEN, STRIDE, mergekit_plan, models, read, sources


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    return models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", CASES)
def test_same_values_as_mergekit(tuned: tuple[str, list[str]], name: str, tmp_path: Path) -> None:
    base, folders = tuned
    parts = [{"model": model, "weight": weight} for model, weight in zip(folders, sources(name), strict=False)]
    plan = MergePlan.model_validate({"anchor": base, "sources": parts, "method": CASES[name][2], "out_dtype": "float32"})
    merge(plan, tmp_path / "out", verify="weights")
    ours, theirs = read(tmp_path / "out"), json.loads(GOLDEN.read_text())[name]
    assert set(ours) == set(theirs)
    tolerance = 1e-5 if name == "karcher" else 3e-7  # mergekit stops its iteration at 1e-5
    for key, values in theirs.items():
        torch.testing.assert_close(ours[key].flatten()[::STRIDE], torch.tensor(values), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name != "breadcrumbs_ties"])
def test_mergekits_own_plan_is_read(tuned: tuple[str, list[str]], name: str, tmp_path: Path) -> None:
    plan = mergekit_plan(name, *tuned)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    merge(tmp_path / "plan.yaml", tmp_path / "out", verify="none")
    ours, theirs = read(tmp_path / "out"), json.loads(GOLDEN.read_text())[name]
    tolerance = 1e-5 if name == "karcher" else 3e-7
    for key, values in theirs.items():
        torch.testing.assert_close(ours[key].flatten()[::STRIDE], torch.tensor(values), rtol=tolerance, atol=tolerance)


def test_weights_by_filter_and_along_the_layers(tuned: tuple[str, list[str]], tmp_path: Path) -> None:
    base, folders = tuned
    weight = [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "q_proj", "value": 0.5}, {"value": 0.25}]
    plan = {"merge_method": "task_arithmetic", "base_model": base, "dtype": "float32"}
    plan["models"] = [{"model": base}, {"model": folders[0], "parameters": {"weight": weight}}]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    merge(tmp_path / "plan.yaml", tmp_path / "out", verify="none")
    w, a, got = read(Path(base)), read(Path(folders[0])), read(tmp_path / "out")
    for key in w:
        factor = float("layers.1" in key) if "mlp" in key else 0.5 if "q_proj" in key else 0.25
        torch.testing.assert_close(got[key], w[key] + factor * (a[key] - w[key]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "passthrough"}, "no equal here"),
        ({"slices": []}, "whole models"),
        ({"tokenizer_source": "somebody/model"}, "tokenizer"),
        ({"parameters": {"t": 0.5}}, "parameter t of ties has no equal"),
        ({"models": [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b", "parameters": {"density": 0.2}}]}, "density differs"),
        ({"models": []}, "models must be a list"),
        ({"modles": []}, "modles is not supported"),
    ],
)
def test_what_has_no_equal_is_refused(change: dict[str, Any], words: str) -> None:
    plan = {"merge_method": "ties", "base_model": "c", "models": [{"model": "a"}, {"model": "b"}], **change}
    with pytest.raises(BadInput, match=words):
        parse_plan(yaml.safe_dump(plan))
