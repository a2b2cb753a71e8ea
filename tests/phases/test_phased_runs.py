"""Phases through the pipeline: each is one run of the one loop from the weights before it, and a kill changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guidetune import pipeline, registry
from guidetune.data.rows import EncodedRows
from guidetune.engine import Objective, fit
from guidetune.engine.settings import rate
from guidetune.errors import BadInput
from guidetune.guidance.store import Guidance
from guidetune.models.loading import load_model
from guidetune.recipe import Recipe, load
from tests.pipeline.conftest import _pair, place  # noqa: F401
from tests.pipeline.test_interruptions import DRIVER, ENVIRONMENT
from tests.pipeline.test_kill import dying_at
from tests.pipeline.test_pipeline import equal, results, tensors

SHORT = ["evaluate=null", "transfer=null", "data.validation=[]", "tune.epochs=1", "tune.params.dropout=0.0"]  # 24 rows, batch 8


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(place: Path, name: str, *overrides: str) -> Path:  # noqa: F811
    return pipeline.run(load(place / "recipe.yaml", [*SHORT, *overrides]), place / "runs" / name)


@pytest.mark.parametrize(
    "params, weights",
    [
        pytest.param(params, weights, marks=[] if (params, weights) in (("lora", "[gift]"), ("full", "[]")) else pytest.mark.slow)
        for params in registry.names("params")
        for weights in ("[]", "[gift]")
    ],
)
def test_one_phase_of_all_rows_is_the_one_off_run(place: Path, params: str, weights: str) -> None:  # noqa: F811
    options = [f"tune.params={{method: {params}}}", f"tune.weights={weights}"]
    whole = run(place, "whole", *options)
    phased = run(place, "phased", *options, "tune.phases={method: sources, phases: [[train]]}")
    assert equal(tensors(whole / "adapter"), tensors(phased / "adapter"))
    drop = ("tokens_per_s", "seconds", "phase")
    assert [{k: v for k, v in row.items() if k not in drop} for row in metrics(phased)] == [
        {k: v for k, v in row.items() if k not in drop} for row in metrics(whole)
    ]


def by_hand(recipe: Recipe, out: Path, number: int, rows: EncodedRows, store: Guidance, members: np.ndarray, work: Path) -> dict:
    """Phase `number`: its rows and their guidance as copies, the adapter of the phase before, a new optimiser."""
    from guidetune.artefacts import derive_seed

    settings = recipe.tune.settings()
    settings = settings.model_copy(
        update={"epochs": 2, "seed": derive_seed(settings.seed, "phase", number - 1), "gradient_checkpointing": False}
    )
    attached = recipe.tune.params.attach(load_model(recipe.models.base, dtype="float32"), seed=1)
    attached.load(out / f"phases/{number - 1}/adapter")
    own = EncodedRows.from_rows([rows[int(k)] for k in members])
    values = [store.row(int(k)) for k in members]
    guidance = Guidance(np.concatenate(values), np.concatenate([[0], np.cumsum([len(v) for v in values])]))
    folder = work / str(number)
    folder.mkdir()
    from guidetune.data.chat import Chat
    from guidetune.models.loading import load_tokenizer

    stops = frozenset(Chat(load_tokenizer(recipe.models.instruct)).stop_token_ids)
    fit(attached, own, settings, Objective(recipe.tune.weights, recipe.tune.reducer, {"instruct": guidance}, stops), work=folder)
    attached.save(folder / "adapter")
    return tensors(folder / "adapter")


def test_phases_by_hand_without_ties(place: Path, tmp_path: Path) -> None:  # noqa: F811
    """Each phase is the loop from the weights before it with a new optimiser and course: three phases in another order, done by hand."""
    text = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(0)
    scores = rng.permutation(24)
    (place / "train.jsonl").write_text("".join(json.dumps({**row, "hard": int(s)}) + "\n" for row, s in zip(text, scores, strict=True)))
    phases = "tune.phases={method: cuts, by: hard, at: [8, 16], order: [2, 3, 1], epochs: 2}"
    options = ["data.scores={hard: {method: column, column: hard}}", phases]
    out = run(place, "a", *options)
    recipe = load(place / "recipe.yaml", [*SHORT, *options])
    rows, store = EncodedRows.open(out / "data"), Guidance.open(out / "guidance/instruct")
    for number, low in ((2, 16), (3, 0)):
        members = np.flatnonzero((scores >= low) & (scores < low + 8))
        assert equal(by_hand(recipe, out, number, rows, store, members, tmp_path), tensors(out / f"phases/{number}/adapter"))
    assert equal(tensors(out / "adapter"), tensors(out / "phases/3/adapter"))
    assert [p["number"] for p in results(out)["arms"]["gift"]["phases"]] == [2, 3, 1]
    lr = [row["lr"] for row in metrics(out)]
    assert lr[0] == lr[2] == lr[4] == 0 and min(lr[1], lr[3], lr[5]) > 0  # warm-up starts again with each


def test_a_carried_optimiser_goes_on(place: Path) -> None:  # noqa: F811
    """Equal rows: then phases with the optimiser carried over are the one-off run, to the last bit, and fresh ones are not."""
    row = json.loads((place / "train.jsonl").read_text().splitlines()[0])
    for name in "ab":
        (place / f"{name}.jsonl").write_text("".join(json.dumps({**row, "id": f"{name}{k}"}) + "\n" for k in range(8)))
    options = ["data.train=[a.jsonl, b.jsonl]", "tune.batch=2", "tune.clip=0.1", "tune.weight_decay=0.1"]
    options = [o.replace("a.jsonl", str(place / "a.jsonl")).replace("b.jsonl", str(place / "b.jsonl")) for o in options]
    phases = "method: sources, phases: [[a], [b]]"
    whole = run(place, "whole", *options)
    carried = run(place, "carried", *options, f"tune.phases={{{phases}, optimiser: carried}}")
    fresh = run(place, "fresh", *options, f"tune.phases={{{phases}}}")
    assert equal(tensors(whole / "adapter"), tensors(carried / "adapter"))
    assert not equal(tensors(whole / "adapter"), tensors(fresh / "adapter"))
    settings = load(place / "recipe.yaml", [*SHORT, *options]).tune.settings()
    assert [r["lr"] for r in metrics(carried)] == [rate(settings, step, 8) for step in range(8)] == [r["lr"] for r in metrics(whole)]
    assert [r["lr"] for r in metrics(fresh)] == [rate(settings, step, 4) for step in range(4)] * 2
    steps = metrics(carried)
    assert [r["step"] for r in steps] == list(range(1, 9)) and [r["phase"] for r in steps] == [1] * 4 + [2] * 4
    assert (np.diff([r["tokens"] for r in steps]) > 0).all() and steps[-1]["tokens"] == results(carried)["arms"]["gift"]["cost"]["tokens"]
    assert not (carried / "adapter/checkpoint.safetensors").exists()


def contents(path: Path) -> bytes:
    """The bytes of a safetensors file without its metadata, where a checkpoint keeps the time it took."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return json.dumps(header).encode() + data[8 + size :]


def outcome(out: Path) -> dict:
    files = {str(p.relative_to(out)): contents(p) for p in sorted(out.rglob("*.safetensors"))}
    return {"files": files, "losses": [(r["step"], r.get("loss"), r["phase"]) for r in metrics(out)]}


@pytest.mark.parametrize(
    "params, optimiser, steps",
    [
        ("lora", "fresh", [3, 4]),
        *(
            pytest.param(params, optimiser, [1, 2, 3, 4, 6], marks=pytest.mark.slow)
            for params in registry.names("params")
            for optimiser in ("fresh", "carried")
        ),
    ],
)
def test_an_end_anywhere_continues_bit_equal(
    place: Path,  # noqa: F811
    params: str,
    optimiser: str,
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any clean-up: at the first step, in the first phase, at the border, in the second and in the last phase."""
    options = [f"tune.params={{method: {params}}}", "tune.epochs=2", f"tune.phases={{method: equal, by: length, optimiser: {optimiser}}}"]
    whole = outcome(run(place, "whole", *options))
    for step in steps:
        with dying_at(monkeypatch, step):
            run(place, "broken", *options)
        if step == 3:  # the first phase is there, the second has not begun
            assert (place / "runs/broken/phases/1/adapter/manifest.json").is_file() and not (
                place / "runs/broken/phases/2/adapter"
            ).exists()
        assert outcome(run(place, "broken", *options)) == whole
        shutil.rmtree(place / "runs/broken")


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, count",
    [
        ("guidetune.engine.loop:_accumulate", 5),  # in the second phase
        ("guidetune.artefacts:publish", 6),  # the first phase is done and not yet published
        ("guidetune.params.lora:LoraAttached.load", 1),  # at the border
    ],
)
def test_kill_9_in_a_phase(place: Path, target: str, count: int) -> None:  # noqa: F811
    sets = [part for text in [*SHORT, "tune.epochs=2", "tune.phases={method: equal, by: length}"] for part in ("--set", text)]
    command = ["run", "recipe.yaml", *sets, "--out"]

    def start(*before: str, out: str) -> int:
        done = subprocess.run([sys.executable, *before, *command, out], cwd=place, env=ENVIRONMENT, capture_output=True, timeout=300)
        return done.returncode

    broken = start("-c", DRIVER, target, str(count), str(int(signal.SIGKILL)), out="runs/broken")
    assert broken == -signal.SIGKILL, f"{target} was not reached"
    os.sync()
    assert pipeline.run(load(place / "recipe.yaml", sets[1::2]), place / "runs/broken")
    assert outcome(place / "runs/broken") == outcome(run(place, "whole", "tune.epochs=2", "tune.phases={method: equal, by: length}"))


def test_compare_has_the_controls_on_equal_budget_and_scores_after_each_phase(place: Path) -> None:  # noqa: F811
    arms = """
arms:
  phased: {tune.phases: {method: equal, by: length}}
  one-off: {}
  reversed: {from: phased, tune.phases.order: descending}
  longer: {from: phased, tune.phases.epochs: [1, 1, 2]}
"""
    (place / "recipe.yaml").write_text((place / "recipe.yaml").read_text() + arms)
    recipe = load(place / "recipe.yaml", ["tune.epochs=1", "tune.batch=4", "data.validation=[]"])
    out = pipeline.compare(recipe, ["phased", "one-off", "reversed"], place / "runs/c")
    found = results(out)
    assert found["budget_equal"] and [b["steps"] for b in found["budget"].values()] == [6, 6, 6]
    assert {(b["rows"], b["supervised_tokens"]) for b in found["budget"].values()} == {(24, found["ledger"]["supervised_tokens"])}
    for name, arm in found["arms"].items():
        assert arm["status"] == "ok" and found["budget"][name]["steps"] == arm["tune"]["steps"] == arm["cost"]["steps"]
        phases = arm.get("phases")
        assert (phases is None) == (name == "one-off")
        for phase in phases or []:
            assert set(phase["task"]) == {"echo"} and set(phase["general"]) == {"loss"}
        if phases:
            assert phases[-1]["general"]["loss"] == arm["general"]["loss"]["score"] != phases[0]["general"]["loss"]
            assert sum(p["supervised_tokens"] for p in phases) == found["ledger"]["supervised_tokens"]
            assert sum(b["signal"] for b in arm["signal"]) == pytest.approx(1) and sum(b["tokens"] for b in arm["signal"]) == pytest.approx(
                1
            )
    highest = [p["score_high"] for p in found["arms"]["reversed"]["phases"]]
    assert highest == sorted(highest, reverse=True)
    assert [p["rows"] for p in found["arms"]["phased"]["phases"]] == [8, 8, 8]
    other = {
        tuple(tensors(out / f"arms/{name}/adapter")[k].flatten()[:3].tolist())
        for name in found["arms"]
        for k in list(tensors(out / f"arms/{name}/adapter"))[-1:]
    }
    assert len(other) == 3
    assert "<h3>Phases</h3>" in (out / "report.html").read_text()
    # nothing is done twice
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    pipeline.compare(recipe, ["phased", "one-off", "reversed"], out)
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    with pytest.raises(BadInput, match="arm longer has 32 rows instead of 24, 8 steps instead of 6"):
        pipeline.compare(recipe, ["phased", "longer"], place / "runs/d")


@pytest.mark.parametrize(
    "phases, expected",
    [
        ("{method: cuts, by: length, at: [1000]}", "the cut 1000 lies outside of the scores, which go from"),
        ("{method: cuts, by: none, at: [1]}", "24 of 24 rows|no row has the score 'none'"),
        ("{method: cuts, by: length, at: [2], order: [1, 2, 1]}", "tune.phases = .*goes in a circle: phase 1 comes twice"),
    ],
)
def test_a_run_that_cannot_be_divided_ends_before_tuning(place: Path, phases: str, expected: str) -> None:  # noqa: F811
    with pytest.raises(BadInput, match=expected):
        run(place, "a", "data.scores={none: {method: column, column: nowhere}}", f"tune.phases={phases}")
    assert not list((place / "runs").rglob("adapter_model.safetensors"))
