from __future__ import annotations

import json
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch

from guidetune.errors import BadInput, RunFailed
from guidetune.evaluation import EvalSettings, paired_results, plan, table
from guidetune.evaluation.evaluate import evaluate, read_items
from guidetune.evaluation.task import Task
from guidetune.registry import build


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write(
        folder / "sums.jsonl",
        *({"question": f"What is {i} + {i * i}?", "answer": f"It is {i + i * i}.\n#### {i + i * i}"} for i in range(14)),
    )
    options = ["Paris", "the city of Rome", "Oslo"]
    write(
        folder / "quiz.jsonl",
        *({"question": f"Which town is number {'x' * i}?", "options": options, "answer_idx": i % 3, "kind": "ab"[i % 2]} for i in range(9)),
    )
    (folder / "text.txt").write_text("The capital of France is Paris. " * 40, encoding="utf-8")
    return folder


def tasks_of(*specs: dict[str, Any] | str) -> list[Task]:
    return [build("task", spec) for spec in specs]


SUMS = {"method": "gsm8k", "path": "sums.jsonl", "max_new_tokens": 12}
QUIZ = {"method": "mcq", "path": "quiz.jsonl", "category": "kind"}
ALL: list[dict[str, Any]] = [
    SUMS,
    QUIZ,
    {**QUIZ, "label": "quiz_text", "choose": "text", "format": "plain", "best_by": "acc_norm"},
    {**QUIZ, "label": "quiz_said", "mode": "generate", "max_new_tokens": 8},
    {"method": "nll", "path": "sums.jsonl"},
    {"method": "perplexity", "path": "text.txt"},
    {"method": "world", "set": "general", "n": 6, "max_new_tokens": 8, "label": "world"},
]


def test_every_kind_of_task_gives_a_result(llama: Any, handle_of: Any, data: Path, weights_hash: Any) -> None:
    model = llama(1, max_position_embeddings=256).train()
    handle, out = handle_of(model), data.parent / "out"
    before = weights_hash(model)
    results = evaluate(handle, tasks_of(*ALL), out, root=data)
    assert list(results) == ["gsm8k", "mcq", "quiz_text", "quiz_said", "nll", "perplexity", "world"]
    for result in results.values():
        assert result.keys() >= {"score", "ci", "n", "metric", "metrics", "by", "items", "cost", "higher_is_better"}
        lines = read_items(out, result)
        assert len(lines) == result["n"] == len({line["id"] for line in lines})
        assert all(line.keys() >= {"id", "prompt", "output", "reference", "correct", "meta"} for line in lines)
        low, high = result["ci"]
        assert low <= result["score"] <= high
        assert result["metrics"][result["metric"]] == pytest.approx(result["score"])
        json.dumps(results, allow_nan=False)
    assert {"accuracy", "strict", "flexible", "boxed", "finished"} <= results["gsm8k"]["metrics"].keys()
    assert {"acc", "acc_norm", "acc_bytes", "ece", "macro"} <= results["mcq"]["metrics"].keys()
    assert results["mcq"]["metrics"]["acc"] == results["mcq"]["metrics"]["acc_norm"]  # letters have one length
    assert results["mcq"]["by"]["category"]["a"]["n"] == 5
    assert {"skill", "difficulty"} <= results["world"]["by"].keys()
    assert results["perplexity"]["score"] == pytest.approx(exp(results["perplexity"]["metrics"]["nll_per_token"]))
    assert results["nll"]["score"] == pytest.approx(log(results["nll"]["metrics"]["perplexity"]))
    assert weights_hash(model) == before and model.training
    assert not [path for path in out.rglob("*") if path.name.startswith(".") or path.name == "outputs.jsonl"]


def test_twice_is_identical_and_a_finished_task_is_not_run_again(llama: Any, handle_of: Any, data: Path) -> None:
    handle, calls = handle_of(llama(1)), []
    first = evaluate(handle, tasks_of(*ALL), data / "one", root=data)
    second = evaluate(handle, tasks_of(*ALL), data / "two", EvalSettings(batch_tokens=300), root=data)
    for label in first:
        if label in ("gsm8k", "world", "quiz_said"):  # greedy: the same bytes in batches of any size
            a, b = ((data / name / first[label]["items"]).read_bytes() for name in ("one", "two"))
            assert a == b
        assert first[label]["score"] == pytest.approx(second[label]["score"], abs=1e-5)
    third = evaluate(handle, tasks_of(*ALL), data / "three", root=data)
    drop = {"cost"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in third.values()] == [
        {k: v for k, v in r.items() if k not in drop} for r in first.values()
    ]
    hook = handle.model.model.register_forward_hook(lambda *_: calls.append(1))
    assert evaluate(handle, tasks_of(*ALL), data / "one", root=data) == first
    hook.remove()
    assert not calls


def test_what_changes_a_result_makes_it_new(llama: Any, handle_of: Any, data: Path) -> None:
    calls: list[int] = []

    def runs(model: Any, spec: dict[str, Any], **settings: Any) -> bool:
        calls.clear()
        hook = model.model.register_forward_hook(lambda *_: calls.append(1))
        evaluate(handle_of(model), tasks_of(spec), data / "out", EvalSettings(**settings), data)
        hook.remove()
        return bool(calls)

    model = llama(1)
    assert runs(model, SUMS)
    assert not runs(model, SUMS)
    assert not runs(model, SUMS, batch_tokens=999)  # only speed
    assert not runs(model, SUMS, top_p=0.5)  # greedy does not read it
    assert runs(model, {**SUMS, "template": "{question} "})
    assert runs(model, SUMS, limit=3)
    assert runs(model, {**SUMS, "max_new_tokens": 5})
    assert runs(llama(2), {**SUMS, "max_new_tokens": 5})
    assert not runs(model, SUMS)  # earlier results are kept
    assert not runs(llama(2), {**SUMS, "max_new_tokens": 5})
    text = (data / "sums.jsonl").read_text().replace("What is 3", "What was 3")
    (data / "sums.jsonl").write_text(text)
    assert runs(llama(2), {**SUMS, "max_new_tokens": 5})


@pytest.mark.parametrize("spec", [SUMS, QUIZ, {"method": "nll", "path": "sums.jsonl"}], ids=["generate", "loglik", "nll"])
def test_a_killed_evaluation_goes_on(llama: Any, handle_of: Any, data: Path, spec: dict[str, Any], monkeypatch: Any) -> None:
    from guidetune.evaluation import evaluate as module

    monkeypatch.setattr(module._slices, "__defaults__", (4,))
    model, task = llama(1), tasks_of(spec)
    settings = EvalSettings(batch_tokens=160)
    label = spec["method"]
    whole = evaluate(handle_of(model), task, data / "whole", settings, data)[label]
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    hook = model.model.register_forward_hook(interrupt)
    stop = 10**9
    evaluate(handle_of(model), task, data / "count", settings, data)
    total = len(calls)
    calls.clear()
    stop = total // 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(handle_of(model), task, data / "killed", settings, data)
    partial = data / "killed" / f".{label}.partial" / "outputs.jsonl"
    done = partial.read_bytes().count(b"\n")
    assert 0 < done < whole["n"] and not (data / "killed" / label).exists()
    with partial.open("ab") as file:
        file.write(b'{"id": "0", "sam')  # a line that the kill cut
    calls.clear()
    stop = 10**9
    resumed = evaluate(handle_of(model), task, data / "killed", settings, data)[label]
    hook.remove()
    assert 0 < len(calls) < total
    pairs = zip(read_items(data / "whole", whole), read_items(data / "killed", resumed), strict=True)
    assert all(a["correct"] == pytest.approx(b["correct"], abs=1e-5) and a["output"] == b["output"] for a, b in pairs)


def test_samples(llama: Any, handle_of: Any, data: Path) -> None:
    handle, task = handle_of(llama(1)), tasks_of({**SUMS, "max_new_tokens": 16, "template": "{question} 1 2 3"})
    settings = EvalSettings(samples=4, temperature=1.0, seed=3)
    result = evaluate(handle, task, data / "out", settings, data)["gsm8k"]
    lines = read_items(data / "out", result)
    metrics = result["metrics"]
    assert result["metric"] == "avg@4" and result["score"] == metrics["avg@4"] == pytest.approx(metrics["pass@1"])
    assert {"pass@1", "pass@2", "pass@3", "pass@4", "maj@4", "strict", "flexible"} <= metrics.keys()
    assert metrics["pass@1"] <= metrics["pass@2"] <= metrics["pass@4"]
    assert all(len(line["samples"]) == 4 for line in lines)
    assert all(line["correct"] == sum(s["correct"] for s in line["samples"]) / 4 for line in lines)
    assert len({sample["output"] for sample in lines[0]["samples"]}) > 1
    again = evaluate(handle, task, data / "again", EvalSettings(samples=4, temperature=1.0, seed=3, batch_tokens=200), data)["gsm8k"]
    assert read_items(data / "again", again) == lines
    # A sample depends on (seed, item, number): fewer samples are the first of more.
    two = evaluate(handle, task, data / "two", EvalSettings(samples=2, temperature=1.0, seed=3), data)["gsm8k"]
    assert [line["samples"] for line in read_items(data / "two", two)] == [line["samples"][:2] for line in lines]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="all be the same at temperature 0"):
        EvalSettings(samples=4)
    with pytest.raises(ValueError):
        EvalSettings(batch_token=5)  # type: ignore[call-arg]


@torch.inference_mode()
def log_probs(model: Any, ids: list[int]) -> list[float]:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return [0.0, *(float(logits[t - 1, ids[t]]) for t in range(1, len(ids)))]


def test_choices_in_a_chat_follow_the_assistant_header(llama: Any, handle_of: Any, data: Path) -> None:
    handle = handle_of(llama(1))
    task = tasks_of(QUIZ)
    lines = read_items(data / "out", evaluate(handle, task, data / "out", root=data)["mcq"])
    for line, item in zip(lines, plan(task, root=data)[0].items, strict=True):
        prompt = handle.chat.prompt(item.messages)
        for letter, found in zip("ABC", line["choices_loglik"], strict=True):
            ids = [*prompt, *handle.tokenizer(letter, add_special_tokens=False)["input_ids"]]
            assert found == pytest.approx(sum(log_probs(handle.model, ids)[len(prompt) :]), abs=1e-4)
            # What is rated is a prefix of the row that training would see.
            row = handle.chat.encode([*item.messages, {"role": "assistant", "content": letter}])
            assert row.input_ids[: len(ids)] == ids


def test_choices_in_plain_text_are_tokenised_with_their_context(llama: Any, handle_of: Any, data: Path) -> None:
    handle = handle_of(llama(1), with_chat=False)  # a base model needs no chat template here
    task = tasks_of({**QUIZ, "choose": "text", "format": "plain"})
    lines = read_items(data / "out", evaluate(handle, task, data / "out", root=data)["mcq"])
    for line, item in zip(lines, plan(task, root=data)[0].items, strict=True):
        start = len(handle.tokenizer(item.text)["input_ids"])
        for choice, found in zip(item.choices or (), line["choices_loglik"], strict=True):
            ids = handle.tokenizer(f"{item.text} {choice}")["input_ids"]
            assert found == pytest.approx(sum(log_probs(handle.model, ids)[start:]), abs=1e-4)
    with pytest.raises(BadInput, match="no chat template"):
        evaluate(handle, tasks_of(SUMS), data / "out", root=data)


def test_nll_is_that_of_the_training_rows(llama: Any, handle_of: Any, data: Path) -> None:
    handle = handle_of(llama(1))
    result = evaluate(handle, tasks_of({"method": "nll", "path": "sums.jsonl"}), data / "out", root=data)["nll"]
    nll = tokens = size = 0.0
    rows = [json.loads(line) for line in (data / "sums.jsonl").open()]
    for row, line in zip(rows, read_items(data / "out", result), strict=True):
        encoded = handle.chat.encode([{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}])
        values = [v for v, target in zip(log_probs(handle.model, encoded.input_ids), encoded.target, strict=True) if target]
        assert (line["nll"], line["tokens"]) == (pytest.approx(-sum(values), abs=1e-3), len(values))
        nll, tokens, size = nll - sum(values), tokens + len(values), size + len(row["answer"].encode())
    assert encoded.input_ids[-2] in handle.chat.stop_token_ids  # the stop token counts: it is trained
    assert result["score"] == pytest.approx(nll / tokens, abs=1e-5)
    assert result["metrics"]["bits_per_byte"] * log(2) * size == pytest.approx(nll, rel=1e-5)
    assert not result["higher_is_better"]


def test_perplexity_scores_every_token_once(llama: Any, handle_of: Any, data: Path) -> None:
    model = llama(1, max_position_embeddings=64)
    handle = handle_of(model)
    spec = {"method": "perplexity", "path": "text.txt"}
    whole = evaluate(handle, tasks_of(spec), data / "out", root=data)["perplexity"]
    text = (data / "text.txt").read_text()
    tokens = handle.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole["metrics"]["tokens"] == len(tokens) > 128
    assert whole["n"] == 1 and whole["ci"][0] < whole["score"] < whole["ci"][1]  # over its windows
    ids, nll, done = [handle.tokenizer.bos_token_id, *tokens], 0.0, 0
    while done < len(tokens):  # an independent loop over the same windows
        count = min(64, len(tokens) - done)
        end = done + count + 1
        nll -= sum(log_probs(model, ids[max(0, end - 65) : end])[-count:])
        done += count
    assert whole["metrics"]["nll_per_token"] == pytest.approx(nll / len(tokens), abs=1e-5)
    write(data / "docs.jsonl", {"body": text[:100]}, {"body": text[:50]})
    rows = evaluate(handle, tasks_of({**spec, "path": "docs.jsonl", "column": "body"}), data / "out", root=data)["perplexity"]
    assert rows["n"] == 2


def test_long_items_are_cut_and_counted(llama: Any, handle_of: Any, data: Path) -> None:
    handle = handle_of(llama(1, max_position_embeddings=24))
    results = evaluate(
        handle, tasks_of({**SUMS, "max_new_tokens": 4}, QUIZ, {"method": "nll", "path": "sums.jsonl"}), data / "out", root=data
    )
    assert all(result["cost"]["cut"] > 0 for result in results.values())
    assert any(line.get("cut") for line in read_items(data / "out", results["mcq"]))


def test_a_damaged_model_fails_the_run(llama: Any, handle_of: Any, data: Path) -> None:
    model = llama(1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for spec in (SUMS, QUIZ, {"method": "nll", "path": "sums.jsonl"}):
        with pytest.raises(RunFailed, match="NaN"):
            evaluate(handle_of(model), tasks_of(spec), data / "out", root=data)
    assert not [path for path in (data / "out").iterdir() if not path.name.startswith(".")]


def test_two_models_are_compared_item_by_item(llama: Any, handle_of: Any, data: Path) -> None:
    tasks = tasks_of(QUIZ, {"method": "nll", "path": "sums.jsonl"})
    a, b = (evaluate(handle_of(llama(seed)), tasks, data / str(seed), root=data) for seed in (1, 2))
    quiz = paired_results(data / "1", a["mcq"], data / "2", b["mcq"])
    assert quiz["diff"] == pytest.approx(a["mcq"]["score"] - b["mcq"]["score"])
    assert quiz["test"] == "McNemar, exact"
    nll = paired_results(data / "1", a["nll"], data / "2", b["nll"])
    assert nll["diff"] == pytest.approx(a["nll"]["score"] - b["nll"]["score"])
    assert nll["lost"] + nll["gained"] == 14
    with pytest.raises(BadInput, match="not results of the same items"):
        paired_results(data / "1", a["mcq"], data / "2", b["nll"])


def test_table(llama: Any, handle_of: Any, data: Path) -> None:
    from rich.console import Console

    results = evaluate(handle_of(llama(1)), tasks_of(QUIZ, {"method": "perplexity", "path": "text.txt"}), data / "out", root=data)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(results, "tiny"))
    text = shown.get()
    assert "tiny" in text and "mcq" in text and "accuracy" in text and f"{results['mcq']['score']:.3f}" in text
