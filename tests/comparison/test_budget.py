"""Equal budgets: what counts, what is refused, what runs once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guidetune import pipeline
from guidetune.comparison.budget import Budget, differences, total
from guidetune.errors import BadInput
from guidetune.recipe import load
from tests.pipeline.conftest import _pair, place  # noqa: F401
from tests.pipeline.test_pipeline import results


def test_what_makes_budgets_differ() -> None:
    budgets = {"a": Budget(1000, 24, 3), "b": Budget(1009, 24, 3), "c": Budget(1011, 24, 3), "d": Budget(1000, 12, 6)}
    assert differences(budgets) == [
        "the budgets differ: arm c has 1,011 supervised tokens instead of 1,000 (arm a)",
        "the budgets differ: arm d has 12 rows instead of 24, 6 steps instead of 3 (arm a)",
    ]
    assert differences({}) == differences({"a": Budget(1, 1, 1)}) == []
    # batches that end a phase early are steps more on the same rows, as long as they are few
    assert differences({"a": Budget(1000, 1200, 60, 0), "b": Budget(1000, 1200, 62, 6), "c": Budget(1000, 1200, 66, 6)}) == []
    assert differences({"a": Budget(1000, 1200, 60, 0), "b": Budget(1000, 1200, 67, 8), "c": Budget(1000, 1200, 61, 0)}) == [
        "the budgets differ: arm b has 67 steps instead of 60 (arm a)",
        "the budgets differ: arm c has 61 steps instead of 60 (arm a)",
    ]
    assert total([Budget(10, 4, 2, 1), Budget(5, 2, 1, 0)]) == Budget(15, 6, 3, 1) and total([]) == Budget(0, 0, 0)


def test_unequal_budgets_are_refused_or_marked(place: Path) -> None:  # noqa: F811
    longer = "arms: {long: {from: sft, tune.epochs: 4}}\n"
    (place / "recipe.yaml").write_text((place / "recipe.yaml").read_text() + longer)
    quick = ["evaluate.task=[]", "evaluate.general=[{method: nll, path: test.jsonl, limit: 2}]", "tune.epochs=2", "transfer=null"]
    recipe = load(place / "recipe.yaml", quick)
    with pytest.raises(BadInput, match="(?s)arm long has 96 rows instead of 48, 12 steps instead of 6, .*--unequal-budget"):
        pipeline.compare(recipe, ["sft", "long"], place / "runs/u")
    assert not list(place.glob("runs/u/arms/*"))  # nothing was tuned for it
    found = results(pipeline.compare(recipe, ["sft", "long"], place / "runs/u", unequal_budget=True))
    assert not found["budget_equal"] and found["comparison"]["verdict"][-1].startswith("the budgets differ: arm long")
    # the budget is what the loop then goes through
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    assert (
        found["budget"]["sft"]["rows"] == 2 * len(rows) and found["budget"]["long"]["steps"] == found["arms"]["long"]["tune"]["steps"] == 12
    )
    assert found["budget"]["sft"]["supervised_tokens"] == 2 * found["ledger"]["supervised_tokens"]


def test_what_arms_share_is_done_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One teacher pass and one evaluation of the untouched model, however many arms, seeds and runs."""
    import guidetune.engine as engine
    import guidetune.guidance as guidance
    from guidetune.evaluation import evaluate

    counts = {"teacher": 0, "tuned": 0, "evaluated": []}

    def counting(name: str, real):
        def call(*args, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(guidance, "teach", counting("teacher", guidance.teach))
    monkeypatch.setattr(engine, "fit", counting("tuned", engine.fit))
    real = evaluate._nll
    monkeypatch.setitem(evaluate.ANSWER, "nll", lambda handle, *a, **k: (counts["evaluated"].append(handle.spec), real(handle, *a, **k))[1])
    quick = ["evaluate.task=[]", "evaluate.general=[{method: nll, path: test.jsonl, limit: 2}]", "tune.max_steps=1"]
    recipe = load(place / "recipe.yaml", quick)
    names = ["instruct", "gift", "stm"]
    out = pipeline.compare(recipe, names, place / "runs/o", seeds=2)
    assert counts["teacher"] == 1 and counts["tuned"] == 2 * 2
    assert counts["evaluated"].count(str(place / "instruct")) == 1 and len(counts["evaluated"]) == 1 + 2 * 2
    assert all(arm["status"] == "ok" for arm in results(out)["arms"].values())
    pipeline.run(recipe, place / "runs/beside")  # another run finds the teacher pass and the evaluation of the untouched model
    assert counts["teacher"] == 1 and counts["evaluated"].count(str(place / "instruct")) == 1
