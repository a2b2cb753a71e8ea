"""Scale sweeps: which items, which weights, which scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guidetune import pipeline
from guidetune.comparison.scales import Selection, parse_scales, pick, plan_sweep
from guidetune.errors import BadInput
from guidetune.evaluation.evaluate import Planned
from guidetune.evaluation.task import Item, ask
from guidetune.recipe import load
from tests.pipeline.conftest import _pair, place, write_rows  # noqa: F401
from tests.pipeline.test_pipeline import results


def test_scales_as_they_are_written() -> None:
    assert parse_scales("0:1.5:0.25") == (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
    assert parse_scales("1, 0.5,1,-0.5") == (-0.5, 0.5, 1)
    for wrong in ("", "a", "0:1", "0:1:0", "nan", "0:100:1", "1:2:3:4"):
        with pytest.raises(BadInput, match="--scales"):
            parse_scales(wrong)


def points(*levels: tuple[float, float, float | None]) -> list[dict]:
    return [{"scale": scale, "validation": {"task": task, "general": general}} for scale, task, general in levels]


def test_the_choice_follows_its_criterion() -> None:
    sweep = points((0, 0.5, 0.90), (0.5, 0.6, 0.89), (1, 0.8, 0.88), (1.5, 0.9, 0.70))
    assert pick(sweep, Selection()) == 1  # the largest gain within two points
    assert pick(sweep, Selection(max_loss=0.015)) == 0.5
    assert pick(sweep, Selection(max_loss=0.5)) == 1.5
    assert pick(sweep, Selection(rule="mean")) == 1
    assert pick(points((0, 0.5, None), (0.5, 0.7, None), (1, 0.7, None)), Selection()) == 0.5  # of equal ones the smaller change
    with pytest.raises(BadInput, match="scale 0"):
        pick(points((1, 0.5, 0.5)), Selection())


def planned(label: str, texts: list[str]) -> Planned:
    return Planned(label, None, tuple(Item(f"{label}-{i}", ask(text)) for i, text in enumerate(texts)))  # type: ignore[arg-type]


def test_validation_items_are_never_test_items() -> None:
    texts = [f"q{i % 150}" for i in range(200)]  # some prompts twice: they stay on one side
    sweep = plan_sweep({"task": [planned("t", texts)], "general": []}, {"task": [], "general": []}, Selection(), 1)
    kept = {texts[int(name.split("-")[1])] for name in sweep.kept["task", "t"]}
    rest = {text for i, text in enumerate(texts) if f"t-{i}" not in sweep.kept["task", "t"]}
    assert not kept & rest and 30 <= len(kept) <= 60
    again = plan_sweep({"task": [planned("t", texts[::-1])], "general": []}, {"task": [], "general": []}, Selection(), 1)
    assert {texts[::-1][int(name.split("-")[1])] for name in again.kept["task", "t"]} == kept  # by what is asked, not by its place
    with pytest.raises(BadInput, match="1 items of v are asked by the test too"):
        plan_sweep({"task": [planned("t", texts)]}, {"task": [planned("v", ["q7", "new"])]}, Selection(), 1)
    with pytest.raises(BadInput, match="too few to keep some"):
        plan_sweep({"task": [planned("t", ["only"])]}, {}, Selection(), 1)


def test_a_sweep_evaluates_what_transfer_would_write(place: Path) -> None:  # noqa: F811
    write_rows(place / "test.jsonl", 12, 2)
    write_rows(place / "held.jsonl", 6, 5)
    held = "{task: [{method: nll, path: held.jsonl, label: v}]}"
    changes = ["evaluate.task=[{method: nll, path: test.jsonl, label: loss}]", "evaluate.general=[]", f"evaluate.validation={held}"]
    recipe = load(place / "recipe.yaml", [*changes, "tune.max_steps=3"])
    out = pipeline.compare(recipe, ["instruct", "graft", "re-adapt"], place / "runs/s", scales=(0.5, 1.0))
    found = results(out)
    graft, half = found["scales"]["graft"], found["scales"]["re-adapt"]
    scores = {point["scale"]: point["test"]["task"]["loss"]["score"] for point in graft["points"]}
    assert list(scores) == [0, 0.5, 1]
    assert scores[0] == found["arms"]["instruct"]["task"]["loss"]["score"] and scores[1] == found["arms"]["graft"]["task"]["loss"]["score"]
    # half of the graft in memory is what re-adapt wrote to disk, to the last bit
    assert scores[0.5] == found["arms"]["re-adapt"]["task"]["loss"]["score"]
    assert {p["scale"]: p["test"]["task"]["loss"]["score"] for p in half["points"]} == scores
    levels = {point["scale"]: point["validation"]["task"] for point in graft["points"]}
    assert graft["chosen"] == max(levels, key=lambda scale: levels[scale]) and graft["chosen_on"] == "validation"
    assert graft["chosen_vs_0"]["task"]["loss"]["diff"] == pytest.approx(scores[graft["chosen"]] - scores[0])
    assert not list(out.rglob("scales/*/model*")) and not list(out.rglob(".scaled"))
    # one adapter, trained once
    assert (out / "arms/re-adapt/adapter/adapter_model.safetensors").samefile(out / "arms/graft/adapter/adapter_model.safetensors")
    assert json.dumps(found, allow_nan=False)


def test_scaling_down_the_instruct_model_too(place: Path) -> None:  # noqa: F811
    """RE-Adapt with both scales: base + a (instruct - base) + b learnt."""
    import torch
    from safetensors.torch import load_file

    quick = ["evaluate=null", "tune.weights=[]", "tune.max_steps=2", "transfer.scale=0.5", "transfer.into_scale=0.75"]
    out = pipeline.run(load(place / "recipe.yaml", quick), place / "runs/a")
    base, instruct, model = (load_file(p / "model.safetensors") for p in (place / "base", place / "instruct", out / "model"))
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    for name in model:
        expected = base[name] + 0.75 * (instruct[name] - base[name])
        if (a := adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")) is not None:
            b = adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            expected = expected + 0.5 * 2 * (b @ a)  # alpha / rank = 2
        torch.testing.assert_close(model[name], expected, rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="nothing separates transfer.into from tune.on"):
        load(place / "recipe.yaml", [*quick, "tune.on=instruct"])
