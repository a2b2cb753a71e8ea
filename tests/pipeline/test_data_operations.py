"""Operations on the data inside a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guidetune import pipeline
from guidetune.data.prepare import read_records
from guidetune.errors import BadInput
from guidetune.recipe import load

OPERATIONS = (
    "data.operations=[{method: template, templates: {t: {user: 'Say {prompt}', assistant: '{completion}'}}}, {method: mix, rows: 30}]"
)


def test_validation_rows_are_rendered_as_training_rows_are(place: Path) -> None:
    recipe = load(place / "recipe.yaml", [OPERATIONS, "tune.max_steps=1"])
    out = pipeline.run(recipe, place / "runs/a")
    train, validation = list(read_records(out / "data")), list(read_records(out / "validation"))
    assert len(train) == 30 and len(validation) == 8  # mixed, and not mixed
    assert all(row["messages"][0]["content"].startswith("Say sum of") for row in [*train, *validation])
    ledger = json.loads((out / "results.json").read_text())["ledger"]
    assert ledger["made"] == 6 and [part["method"] for part in ledger["operations"]] == ["template", "mix"]


def test_leaks_are_refused_when_asked(place: Path) -> None:
    lines = (place / "train.jsonl").read_text().splitlines() + (place / "test.jsonl").read_text().splitlines()[:3]
    (place / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(BadInput, match="training rows have a prompt that the evaluation asks .*set data.leaks: warn"):
        pipeline.run(load(place / "recipe.yaml", ["data.leaks=refuse", "tune.max_steps=1"]), place / "runs/leak")
