"""Merges agree with mergekit's in fp32 where both mean the same; the values it gave are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from guidetune.weightspace.plan import MergePlan, merge
from tests.weightspace.mergekit import CASES, GOLDEN, STRIDE, models, read, sources


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
