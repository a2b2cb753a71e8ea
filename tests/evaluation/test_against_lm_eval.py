"""The same questions give the same log-likelihoods and outputs as lm-evaluation-harness (where it is installed)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate.py"


@pytest.mark.slow
def test_choices_and_outputs_are_those_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    spec = importlib.util.spec_from_file_location("evaluate_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = bench.made_up_rows(40)
    bench.write_rows(rows, (40, 40, 12), tmp_path)
    bench.build_model("world", rows, tmp_path / "model")
    ours, theirs = (dict(run(tmp_path, 24, "float32", 8)) for run in (bench.run_guidetune, bench.run_lm_eval))
    for task in bench.TASKS:
        found = bench.agreement(task, ours[task], theirs[task], rows[task])
        assert found["disagreeing"] == 0
        if task != "generate":
            assert found["largest_difference"] < 1e-3  # sums of some hundred tokens
            assert ours[task]["scores"]["acc"] == theirs[task]["scores"]["acc"]


@pytest.mark.slow
def test_named_tasks_ask_what_lm_eval_asks(llama: Any, handle_of: Any, tmp_path: Path) -> None:
    """Partial scoring, choices without their question and examples before it, through lm-eval's own model class."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    from guidetune.evaluation.evaluate import evaluate, read_items
    from guidetune.registry import build

    towns = ["Paris", "the old town", "Rome", "a village by the sea"]
    rows = [{"question": f"Where is {'x' * i}?", "choices": [towns[i % 4], towns[(i + 1) % 4]], "label": i % 2} for i in range(8)]
    blanks = [{"sentence": f"Ann{'a' * i} thanked Bo since _ had come {i} times.", "option1": "Ann", "option2": "Bo"} for i in range(8)]
    blanks = [{**row, "answer": str(1 + i % 2)} for i, row in enumerate(blanks)]
    for name, made in (("arc", rows), ("winogrande", blanks)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    handle = handle_of(llama(5))
    specs = [
        {"method": "arc", "path": "arc.jsonl", "answer": "label", "options": "choices", "best_by": "acc_mutual_info", "shots": 2},
        {"method": "winogrande", "path": "winogrande.jsonl"},
    ]
    ours = evaluate(handle, [build("task", spec) for spec in specs], tmp_path / "out", root=tmp_path)
    metrics = ("acc", "acc_norm", "acc_mutual_info")
    common: dict[str, Any] = {
        "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0,
        "metadata": {"version": 1},
    }  # fmt: skip
    theirs: dict[str, Any] = {
        "arc": {
            **common, "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "label",
            "num_fewshot": 2, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"},
            "metric_list": [{"metric": metric} for metric in metrics],
        },
        "winogrande": {
            **common,
            "doc_to_text": lambda doc: int(doc["answer"]) - 1,
            "doc_to_choice": lambda doc: [doc["sentence"].split("_")[0] + doc[name] for name in ("option1", "option2")],
            "doc_to_target": lambda doc: doc["sentence"].split("_")[1].strip(),
            "metric_list": [{"metric": "acc"}],
        },
    }  # fmt: skip
    for name, config in theirs.items():
        data = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        task = ConfigurableTask(config={**config, "task": name, "dataset_kwargs": data})
        model = HFLM(pretrained=handle.model, tokenizer=handle.tokenizer, batch_size=4)
        found = lm_eval.evaluate(model, {name: task}, log_samples=True, bootstrap_iters=0)
        lines = read_items(tmp_path / "out", ours[name])
        for line, sample in zip(lines, sorted(found["samples"][name], key=lambda one: one["doc_id"]), strict=True):
            asked = [response[0] for response in sample["filtered_resps"]]
            assert [*line["choices_loglik"], *line.get("choices_prior_loglik", ())] == pytest.approx(asked, abs=1e-4)
            assert all(line[metric] == sample[metric] for metric in metrics if metric in sample)
