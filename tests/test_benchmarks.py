"""The benchmarks: what they count, what they compare, and what their JSON holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guidetune.data.rows import EncodedRow, EncodedRows
from tests.conftest import ROOT
from tests.tiny import tiny_model

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_generated_rows_have_the_lengths_of_an_instruction_set(tmp_path: Path) -> None:
    import data

    pairs = data.generate(1000)
    assert pairs == data.generate(1000) != data.generate(1000, seed=1)
    data.encode(pairs, data.build_tokenizer(pairs, 32_000), tmp_path)
    rows = EncodedRows.open(tmp_path)
    assert data.faults(data.statistics(rows.lengths, rows.supervised)) == []
    assert len(data.faults(data.statistics(rows.lengths * 2, rows.supervised))) == 3
    assert {int(row.input_ids[-1]) for row in rows} == {0} and all(row.loss_weight[-1] == 1 for row in rows)


def test_flops_of_a_token_by_hand() -> None:
    from shapes import SHAPES

    # S: 8 blocks of 4 products 256 x 256 and 3 of 256 x 768; head 32,000 x 256; LoRA r 16 on 4 (256 + 256) + 3 (256 + 768)
    body, head, pairs = 8 * (4 * 65_536 + 3 * 196_608), 8_192_000, 8 * 5_120
    assert SHAPES["S"].student_flops(0.5) == 4 * body + 2 * head + 96 * pairs
    assert SHAPES["S"].teacher_flops(0.5) == 2 * body + head
    # grouped keys and values: M has 3 of 9 heads there
    assert SHAPES["M"].body == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)


@pytest.mark.parametrize(("name", "billions"), [("S", 0.0232), ("M", 0.1345), ("1b", 1.236), ("8b", 8.030)])
def test_shapes_are_the_models_they_are_named_for(name: str, billions: float) -> None:
    from shapes import SHAPES
    from transformers import AutoModelForCausalLM

    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert shape.parameters == sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * billions, rel=2e-3)
    assert linears.pop("lm_head") == shape.head and sum(linears.values()) == shape.body


def test_naive_guidance_computes_the_loss_that_the_engine_computes() -> None:
    """What is compared in speed must be the same thing: Σ w ℓ / Σ w with the teacher's confidence."""
    from engines import _guided

    from guidetune.engine.batching import assemble
    from guidetune.engine.forward import opened

    rng = np.random.default_rng(0)
    documents = [(rng.integers(3, 128, n), rng.integers(2, n - 2)) for n in (9, 30, 17)]
    rows = EncodedRows.from_rows(
        [
            EncodedRow(f"r{k}", "s", ids.astype(np.int32), (np.arange(len(ids)) >= prompt).astype(np.float32))
            for k, (ids, prompt) in enumerate(documents)
        ]
    )
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    nll = []
    for model in (student, teacher):
        with torch.no_grad(), opened(model) as forward:
            batch = assemble(rows, np.arange(3), forward.layout)
            with forward.documents(batch):
                nll.append(forward.nll(batch))
    weight = (-nll[1]).exp()
    expected = (weight * nll[0]).sum() / weight.sum()

    padded = assemble(rows, np.arange(3), "padded")
    labels = torch.full_like(padded.input_ids, -100)
    for k, (ids, prompt) in enumerate(documents):
        labels[k, prompt : len(ids)] = torch.from_numpy(ids[prompt:])
    inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask, "labels": labels}
    found = _guided(object, teacher)().compute_loss(student, inputs)
    assert float(found) == pytest.approx(float(expected), rel=5e-3)  # the teacher's logits are bf16 there
    assert float(nll[0].mean()) != pytest.approx(float(expected), rel=2e-2)  # and the weights do matter


def measurement(number: int, engine: str, cpu: float, **more: Any) -> dict[str, Any]:
    common = {"round": number, "shape": "S", "engine": engine, "tokens": 3000, "cpu_s": cpu, "wall_s": cpu / 2, "real_per_slot": 1.0}
    return {**common, "peak_rss_mb": 1000, "supervised_share": 0.5, "limit": {"bf16_cpu": 400.0}, **more}


def test_ratios_are_taken_within_a_round_and_gift_counts_its_teacher_pass() -> None:
    import train
    from shapes import SHAPES

    spells = {"teacher": {"tokens": 1000, "cpu_s": 1.0, "wall_s": 0.5}, "first_epoch": {"tokens": 1000, "cpu_s": 3.0, "wall_s": 1.5}}
    measured = [
        measurement(0, "sft", 9.0),
        measurement(0, "trl", 36.0, peak_rss_mb=4000),
        measurement(0, "gift", 10.0, **spells),
        measurement(1, "sft", 12.0),  # no other engine in this round: no ratio from it
    ]
    figures = [f for m in measured for f in train.expand(m, threads=2)]
    assert train.ratios(figures, "S") == {
        "sft_vs_trl": [pytest.approx(4.0)],
        "gift3_vs_sft": [pytest.approx(10 / 9)],
        "rss_vs_trl": [0.25],
    }
    rates = {f["figure"]: f["rate"] for f in figures if f["round"] == 0}
    assert rates == pytest.approx({"sft": 2000 / 3, "trl": 500 / 3, "teacher": 2000.0, "gift1": 500.0, "gift3": 600.0})
    share = next(f["share_of_limit"] for f in figures if f["figure"] == "sft")
    assert share == pytest.approx(2000 / 3 * SHAPES["S"].student_flops(0.5) / 400e9)


def test_every_round_has_all_engines_in_another_order() -> None:
    import train

    orders = [train._order(["S", "M"], ["a", "b", "c"], number) for number in range(4)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import json; print('noise'); print(json.dumps({'tokens': 3}))", {"tokens": 3}),
        ("raise MemoryError('out of memory')", {"error": "exit status 1: MemoryError: out of memory"}),
        ("pass", {"error": "printed no result"}),
        ("import time; time.sleep(60)", {"error": "took longer than 2 s"}),
    ],
)
def test_a_measuring_process_that_fails_is_reported_as_such(tmp_path: Path, script: str, expected: dict[str, Any]) -> None:
    from measure import run

    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    out = run(tmp_path / "script.py", [], threads=1, timeout=2.0, lock=tmp_path / "lock")
    assert out.pop("process_s") >= 0 and out == expected


def call(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments], check=True, cwd=ROOT, capture_output=True, timeout=900)


@pytest.mark.slow
def test_train_measures_and_writes_what_it_promises(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    options = ["--shapes", "tiny", "--rounds", "2", "--rows", "64", "--threads", "1", "--work", str(tmp_path), "--json", str(file)]
    call("train.py", *options, "--only", "trl", "trainer", "naive", "sft", "gift")
    found = json.loads(file.read_text())
    names = {"sft_vs_trl", "sft_vs_trainer", "gift3_vs_naive", "gift3_vs_sft", "rss_vs_trl", "share_of_limit_tiny"}
    assert set(found["ratios"]) == names
    assert found["ratios"] == {name: spread["median"] for name, spread in found["spread"].items()}
    assert all(spread["n"] == 2 for spread in found["spread"].values())
    assert {"cpu", "cores", "flags", "memory_gb"} <= set(found["machine"]) and "trl" in found["versions"]
    measured = found["measurements"]
    assert len(measured) == 10 and not any("error" in m for m in measured)
    # the incumbents were measured on the same rows, guidetune on more of them, three times over
    once = {m["engine"]: m["tokens"] // m.get("epochs", 1) for m in measured}
    assert once["trl"] == once["trainer"] == once["naive"] < once["sft"] == once["gift"]
    steps = {m["engine"]: m["steps"] for m in measured}
    assert steps["sft"] == steps["gift"] == 3 * steps["trl"] == 3 * steps["trainer"] == 3 * steps["naive"]
    assert all(m["real_per_slot"] < 1 for m in measured if m["engine"] in ("trl", "trainer", "naive"))
    assert str(tmp_path) not in file.read_text()


@pytest.mark.slow
def test_gpu_script_runs_through_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    options = ["--tiny", "--device", "cpu", "--rounds", "1", "--steps", "1", "2", "--rows", "128", "--threads", "1", "--json", str(file)]
    call("gpu.py", *options, "--only", "sft", "gift", "trl_padded", "trl_packed")
    found = json.loads(file.read_text())
    entries = {m["engine"]: m for m in found["measurements"]}
    assert all(0 < entries[name]["mfu"] < 1 and entries[name]["frozen_dtype"] == "bfloat16" for name in ("sft", "gift", "trl_padded"))
    assert "error" in entries["trl_packed"] or entries["trl_packed"]["real_per_slot"] == 1.0
    assert found["summary"]["tiny"]["sft_vs_best_trl"]["n"] == 1
