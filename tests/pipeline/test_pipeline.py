"""The whole pipeline on a tiny pair: results, sharing, continuing, failing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from guidetune import pipeline
from guidetune.data.rows import EncodedRows
from guidetune.errors import BadInput, RunFailed
from guidetune.recipe import load
from guidetune.weightspace.stages import layers


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_compare_gives_every_arm_and_shares_its_stages(place: Path) -> None:
    recipe = load(place / "recipe.yaml")
    out = pipeline.compare(recipe, ["instruct", "sft", "graft", "gift"], place / "runs/a", seeds=2)
    found = results(out)
    assert list(found["arms"]) == ["instruct", "sft", "graft", "gift"]
    for name, arm in found["arms"].items():
        assert arm["status"] == "ok"
        assert set(arm["task"]) == {"echo"} and set(arm["general"]) == {"loss"}
        assert arm["task"]["echo"]["n"] == 8 and len(arm["task"]["echo"]["ci"]) == 2
        if name != "instruct":
            assert arm["task"]["echo"]["vs_instruct"]["diff"] == pytest.approx(
                arm["task"]["echo"]["score"] - found["arms"]["instruct"]["task"]["echo"]["score"]
            )
            assert sum(b["signal"] for b in arm["signal"]) == pytest.approx(1)
            assert arm["over_seeds"]["n"] == 2 and len(arm["seeds"]) == 1
            assert arm["cost"]["tokens"] > 0 and arm["cost"]["steps"] == 9
            assert (out / arm["paths"]["model"] / "README.md").is_file()
            # tuning lowered the loss on rows of the same kind
            assert arm["tune"]["validation"][-1]["validation_loss"] < arm["tune"]["validation"][0]["validation_loss"]
    ledger = found["ledger"]
    assert ledger["read"] == 24 == ledger["used"] + sum(ledger["dropped"].values())
    assert found["guidance"]["supervised_tokens"] == ledger["supervised_tokens"]
    assert (out / "report.html").stat().st_size > 10_000 and (out / "recipe.yaml").is_file()
    # what gift wrote is not what graft wrote, and another seed is another adapter
    gift = tensors(out / "arms/gift/adapter")
    assert not equal(gift, tensors(out / "arms/graft/adapter"))
    assert not equal(gift, tensors(out / "arms/gift/seeds/1/adapter"))
    # the merged model is instruct + adapter, for plain transformers
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(out / "arms/gift/model")
    from peft import PeftModel

    grafted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "instruct"), out / "arms/gift/adapter").eval()
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        assert (merged.eval()(ids).logits - grafted(ids).logits).abs().max() <= 1e-5
    # nothing is done twice: the same command only reads
    stamps = {p: p.stat().st_mtime_ns for p in (out / "arms").rglob("*.safetensors")}
    pipeline.compare(recipe, ["instruct", "sft", "graft", "gift"], out, seeds=2)
    assert stamps == {p: p.stat().st_mtime_ns for p in (out / "arms").rglob("*.safetensors")}


def test_a_sweep_over_power_never_repeats_the_teacher_pass(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import guidetune.guidance as guidance

    passes = []
    real = guidance.teach
    monkeypatch.setattr(guidance, "teach", lambda *a, **k: (passes.append(1), real(*a, **k))[1])
    first = pipeline.run(load(place / "recipe.yaml"), place / "runs/one")
    second = pipeline.run(load(place / "recipe.yaml", ["tune.weights.0={method: gift, power: 2.0}"]), place / "runs/two")
    assert len(passes) == 1
    a, b = results(first), results(second)
    assert a["guidance"]["mean_confidence"] == b["guidance"]["mean_confidence"]
    assert list(a["arms"]) == ["instruct", "gift"]
    assert not equal(tensors(first / "adapter"), tensors(second / "adapter"))
    assert (first / "model/config.json").is_file() and (first / "metrics.jsonl").is_file()


def test_guidance_export_is_what_transformers_says(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = pipeline.guide(load(place / "recipe.yaml"), place / "runs/g", export=place / "scores.jsonl")
    assert "mean confidence" in text and "0.95–1.00" in text
    rows = [json.loads(line) for line in (place / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    model = AutoModelForCausalLM.from_pretrained(place / "instruct").eval()
    from guidetune.data.rows import EncodedRows

    encoded = {row.id: row for row in EncodedRows.open(place / "runs/g/data")}
    end = 2
    for row in rows[:5]:
        ids = torch.from_numpy(encoded[row["id"]].input_ids.astype(np.int64))[None]
        with torch.no_grad():
            lp = model(ids).logits[0].log_softmax(-1)
        at = torch.tensor(row["positions"])
        assert ids[0, at].tolist() == row["target_ids"] and row["target_ids"][-1] == end  # the stop token is a target
        torch.testing.assert_close(torch.tensor(row["log_prob"]), lp[at - 1, ids[0, at]], rtol=2e-3, atol=1e-3)


def test_one_failing_arm_leaves_the_others(place: Path) -> None:
    text = (place / "recipe.yaml").read_text() + "arms: {broken: {tune.params: {method: lora, targets: [nothing_here]}}}\n"
    (place / "recipe.yaml").write_text(text)
    with pytest.raises(RunFailed, match="nothing_here"):
        pipeline.compare(load(place / "recipe.yaml"), ["instruct", "broken", "sft"], place / "runs/f", seeds=2)
    found = results(place / "runs/f")
    assert found["arms"]["broken"]["status"] == "failed" and "nothing_here" in found["arms"]["broken"]["error"]
    assert "seeds" not in found["arms"]["broken"]  # another seed would fail for the same reason
    assert found["arms"]["sft"]["status"] == "ok" and len(found["arms"]["sft"]["seeds"]) == 1
    assert "nothing_here" in (place / "runs/f/report.html").read_text()


def test_full_fine_tuning_is_grafted_as_a_difference(place: Path) -> None:
    out = pipeline.run(
        load(place / "recipe.yaml", ["tune.params=full", "tune.weights=[]", "tune.lr=1e-3", "evaluate=null"]), place / "runs/full"
    )
    base, instruct, tuned, model = (tensors(p) for p in (place / "base", place / "instruct", out / "adapter", out / "model"))
    for name in model:
        torch.testing.assert_close(model[name], instruct[name] + (tuned[name] - base[name]), rtol=0, atol=2e-7)
    assert any(not torch.equal(tuned[n], base[n]) for n in tuned)


def test_a_merge_method_on_the_way_to_the_instruct_model(place: Path) -> None:
    plain = pipeline.run(load(place / "recipe.yaml", ["evaluate=null"]), place / "runs/plain")
    lines = pipeline.run(
        load(place / "recipe.yaml", ["evaluate=null", "transfer.method={method: lines, alpha: 0.25}"]), place / "runs/lines"
    )
    assert equal(tensors(plain / "adapter"), tensors(lines / "adapter"))
    instruct, a, b = (tensors(p) for p in (place / "instruct", plain / "model", lines / "model"))
    depth = layers(instruct)
    for name in instruct:
        factor = 0.25 + 0.75 * ((depth[name][0] - 1) / (depth[name][1] - 1)) if name in depth else 0.25
        torch.testing.assert_close(b[name] - instruct[name], factor * (a[name] - instruct[name]), rtol=1e-4, atol=2e-7)
    # one that learns does so from the validation rows, once, beside the adapter
    atlas = ["evaluate=null", "transfer.method={method: atlas, steps: 3, batch: 4}"]
    learnt = pipeline.run(load(place / "recipe.yaml", atlas), place / "runs/atlas")
    table = json.loads((learnt / "learnt/coefficients.json").read_text())
    manifest = json.loads((learnt / "learnt/manifest.json").read_text())
    c, found = tensors(learnt / "model"), results(learnt)["arms"]["gift"]
    assert manifest["key"]["rows"] == [EncodedRows.open(learnt / "validation").digest]
    assert found["paths"]["learnt"] == "learnt"
    for name, factor in table["sources"][0]["coefficients"].items():
        torch.testing.assert_close(c[name] - instruct[name], factor * (a[name] - instruct[name]), rtol=1e-3, atol=3e-7)
    pipeline.run(load(place / "recipe.yaml", atlas), place / "runs/atlas")
    assert json.loads((learnt / "learnt/manifest.json").read_text()) == manifest
    for wrong, words in (("slerp", "joins several models"), ("fisher", "joins several models"), ("line", "did you mean 'lines'")):
        with pytest.raises(BadInput, match=words):
            load(place / "recipe.yaml", [f"transfer.method={wrong}"])


def test_bad_input_is_found_before_work_and_all_at_once(place: Path) -> None:
    from tests.pipeline.conftest import write_pair

    recipe = load(place / "recipe.yaml")
    shutil.rmtree(place / "instruct")
    write_pair(place / "other", "llama", hidden_size=64)
    shutil.copytree(place / "other/instruct", place / "instruct")
    with pytest.raises(BadInput, match="do not fit"):
        pipeline.run(recipe, place / "runs/x")
    assert not (place / "runs/x/data").exists()
    readonly = place / "file"
    readonly.write_text("x")
    with pytest.raises(BadInput, match="cannot write"):
        pipeline.run(recipe, readonly / "runs")


@pytest.mark.slow
def test_every_architecture_runs_and_transfers(family_place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = pipeline.compare(load(family_place / "recipe.yaml"), ["instruct", "gift"], family_place / "runs/a")
    arm = results(out)["arms"]["gift"]
    assert arm["status"] == "ok"
    merged = AutoModelForCausalLM.from_pretrained(out / "arms/gift/model").eval()
    grafted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family_place / "instruct"), out / "arms/gift/adapter").eval()
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        assert (merged(ids).logits - grafted(ids).logits).abs().max() <= 1e-5


def test_training_rows_that_the_evaluation_asks_are_named(place: Path, capsys: pytest.CaptureFixture) -> None:
    lines = (place / "train.jsonl").read_text().splitlines() + (place / "test.jsonl").read_text().splitlines()[:3]
    (place / "train.jsonl").write_text("\n".join(lines) + "\n")
    out = pipeline.run(load(place / "recipe.yaml", ["tune.max_steps=1"]), place / "runs/leak")
    asked = {json.loads(line)["prompt"] for line in (place / "test.jsonl").read_text().splitlines()}
    expected = sum(json.loads(line)["prompt"] in asked for line in lines)
    assert expected >= 3
    assert f"{expected} training rows have a prompt that the evaluation asks" in capsys.readouterr().err
    assert results(out)["ledger"]["leaks"] == expected


def test_arms_of_other_rows_are_not_sorted_by_foreign_confidence(place: Path) -> None:
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    longer = [{**row, "completion": row["completion"] + " and the result"} for row in lines]
    (place / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    recipe = (place / "recipe.yaml").read_text() + "arms: {other: {data.train: [other.jsonl], tune.weights: []}}\n"
    (place / "recipe.yaml").write_text(recipe)
    found = results(
        pipeline.compare(load(place / "recipe.yaml", ["tune.max_steps=1"]), ["gift", "other"], place / "runs/o", unequal_budget=True)
    )
    assert found["arms"]["other"]["status"] == "ok" and found["arms"]["other"]["signal"] == []
    assert found["arms"]["gift"]["signal"]


def test_a_memory_limit_changes_how_and_not_what(place: Path, capsys: pytest.CaptureFixture) -> None:
    quick = ["evaluate=null", "transfer=null", "tune.params.dropout=0.0", "tune.max_steps=2"]
    whole = pipeline.run(load(place / "recipe.yaml", quick), place / "runs/whole")
    with pytest.raises(BadInput, match=r"needs about .* \(the process itself .*10 MB is allowed.*--max-memory"):
        pipeline.run(load(place / "recipe.yaml", [*quick, "max_memory=10MB"]), place / "runs/none")
    assert not (place / "runs/none/guidance").exists() and not (place / "runs/none/.adapter.partial").exists()
    # the same key: a limit on a finished run finds everything done
    stamp = (whole / "adapter/manifest.json").stat().st_mtime_ns
    pipeline.run(load(place / "recipe.yaml", [*quick, "max_memory=64GB"]), whole)
    assert (whole / "adapter/manifest.json").stat().st_mtime_ns == stamp
    limited = pipeline.run(load(place / "recipe.yaml", [*quick, "max_memory=64GB"]), place / "runs/limited")
    tuned = results(limited)["arms"]["gift"]["tune"]
    assert equal(tensors(whole / "adapter"), tensors(limited / "adapter"))
    assert sum(tuned["memory_estimate"]["parts"].values()) == tuned["memory_estimate"]["bytes"] < 64e9


def test_settings_chosen_for_memory_reach_the_loop(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from guidetune.engine import memory

    quick = ["evaluate=null", "transfer=null", "tune.params.dropout=0.0", "tune.max_steps=2", "tune.lr=1e-3"]
    whole = pipeline.run(load(place / "recipe.yaml", quick), place / "runs/whole")
    monkeypatch.setattr(memory, "plainly_fits", lambda *a: False)
    # room for the process and for little besides
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 10 * 2**20)
    monkeypatch.setattr(memory, "HEAD_SCRATCH", 0)
    monkeypatch.setattr(memory, "SCRATCH", 0)
    monkeypatch.setattr(memory, "KEEPING", (2.0, 0))
    tight = pipeline.run(load(place / "recipe.yaml", quick), place / "runs/tight")
    said = capsys.readouterr().err
    assert "gradient checkpointing is on" in said and "tokens instead of 4,096" in said
    estimate = results(tight)["arms"]["gift"]["tune"]["memory_estimate"]
    assert estimate["gradient_checkpointing"] is True and estimate["tokens"] < 4096
    a, b = tensors(whole / "adapter"), tensors(tight / "adapter")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6
    # the released code's reducer makes micro-batches part of the result: they are not touched
    micro = pipeline.run(load(place / "recipe.yaml", [*quick, "tune.reducer=micro"]), place / "runs/micro")
    assert results(micro)["arms"]["gift"]["tune"]["memory_estimate"]["tokens"] == 4096
    assert "warning: training may need" in capsys.readouterr().err


def test_bits_that_the_machine_cannot_hold_are_refused_first(place: Path) -> None:
    with pytest.raises(BadInput, match="tune.quantize: 4bit needs"):
        pipeline.run(load(place / "recipe.yaml", ["tune.quantize=4bit"]), place / "runs/q")
    assert not (place / "runs/q/data").exists()
