"""Several tasks in one recipe: each tuned by itself, joined by the transfer; arms share the tunings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guidetune import pipeline
from guidetune.errors import BadInput
from guidetune.recipe import arms, from_mapping, load
from tests.pipeline.conftest import write_rows
from tests.pipeline.test_pipeline import equal, results, tensors

RECIPE = """
name: several
models: {base: base, instruct: instruct}
tasks:
  one: {data.train: [train.jsonl]}
  two: {data.train: [other.jsonl], tune.lr: 5e-3}
tune: {params: {rank: 4, alpha: 8}, lr: 1e-2, epochs: 1, batch: 8, max_length: 128}
evaluate:
  task: [{method: nll, path: test.jsonl, label: loss}]
arms:
  sum: {from: graft}
  only: {from: graft, transfer.tasks: [one]}
  ties: {from: graft, transfer.method: {method: ties, density: 0.5}}
  weighted: {from: graft, transfer.tasks: {one: 0.5, two: -1.0}}
  joint: {from: graft, tasks: null}
"""


@pytest.fixture
def several(place: Path) -> Path:
    write_rows(place / "other.jsonl", 16, 3)
    (place / "several.yaml").write_text(RECIPE)
    return place


def test_tasks_are_tuned_once_and_joined_by_every_arm(several: Path) -> None:
    recipe = load(several / "several.yaml")
    again = load_text(recipe.resolved_yaml(), several)
    assert again.parts["two"].tune.lr == 5e-3 and again.parts["one"].data.train == recipe.parts["one"].data.train
    names = ["instruct", "sum", "only", "ties", "weighted", "joint"]
    out = pipeline.compare(recipe, names, several / "runs/s", seeds=2, unequal_budget=True)
    found = results(out)
    assert all(found["arms"][name]["status"] == "ok" for name in names)
    adapters = {name: [tensors(out / f"arms/{name}/tasks/{task}/adapter") for task in ("one", "two")] for name in ("sum", "ties")}
    assert equal(adapters["sum"][0], adapters["ties"][0]) and not equal(*adapters["sum"])
    # tuned once, copied for the others: the same manifest, with the same seconds
    manifests = {(out / f"arms/{name}/tasks/one/adapter/manifest.json").read_text() for name in ("sum", "only", "ties", "weighted")}
    assert len(manifests) == 1
    assert not equal(tensors(out / "arms/sum/seeds/1/tasks/one/adapter"), adapters["sum"][0])
    # what is written is the instruct model and both changes
    instruct, summed, only, weighted = (
        tensors(p) for p in (several / "instruct", *(out / f"arms/{n}/model" for n in names[1:3] + ["weighted"]))
    )
    for name in instruct:
        one = only[name] - instruct[name]
        two = summed[name] - only[name]
        torch.testing.assert_close(weighted[name] - instruct[name], 0.5 * one - two, rtol=0, atol=1e-6)
    entry = found["arms"]["sum"]
    assert entry["cost"]["steps"] == sum(task["tune"]["steps"] for task in entry["tasks"].values()) == 3 + 2
    assert found["ledger"]["read"] == 24 + 16 and set(found["ledger"]["sources"]) == {"train", "other"}
    assert found["budget"]["joint"]["rows"] == found["budget"]["sum"]["rows"] == 40
    assert (out / "report.html").is_file()


def load_text(text: str, root: Path):
    import yaml

    return from_mapping(yaml.safe_load(text), root / "elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tasks.two.tune.seed=3", "a task changes keys of data, guide, tune"),
        ("tasks.two.transfer.scale=2", "a task changes keys of data, guide, tune"),
        ("tasks.two.tune.lrr=3", r"did you mean 'lr'.*\(task two\)"),
        ("tasks.two.data.train=[nothing.jsonl]", "yaml:6: data.train.2 = .nothing.jsonl"),
        ("transfer.tasks=[one, twi]", "no such task.*did you mean 'two'"),
        ("transfer.tasks={}", "names no task"),
        ("transfer=null", "are joined by transfer"),
        ("tasks.three={}", None),  # the rows of the first two together
    ],
)
def test_faults_of_tasks(several: Path, change: str, words: str | None) -> None:
    text = (several / "several.yaml").read_text().split("arms:")[0]
    (several / "several.yaml").write_text(text)
    if words is None:
        assert len(load(several / "several.yaml", [change]).parts["three"].data.train) == 2
        return
    with pytest.raises(BadInput, match=words):
        load(several / "several.yaml", [change])


def test_methods_for_a_number_of_tasks(several: Path) -> None:
    (several / "several.yaml").write_text((several / "several.yaml").read_text().split("arms:")[0])
    recipe = load(several / "several.yaml", ["transfer.method=slerp"])
    assert arms(recipe, ["sft"])["sft"].transfer.method.name == "slerp"
    with pytest.raises(BadInput, match="joins several models, and here is one change"):
        load(several / "several.yaml", ["transfer.method=slerp", "transfer.tasks=[one]"])
    with pytest.raises(BadInput, match="slerp joins 2 models, and there are 3 tasks"):
        load(several / "several.yaml", ["transfer.method=slerp", "tasks.three.data.train=[other.jsonl]"])
