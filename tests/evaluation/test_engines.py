from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from guidetune.errors import BadInput
from guidetune.evaluation import engines
from guidetune.evaluation.evaluate import EvalSettings, evaluate, plan
from guidetune.evaluation.generation import Sampling
from guidetune.registry import build


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_vllm_is_chosen_where_it_can_work(installed: bool, gpu: bool, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (object() if installed else None) if name == "vllm" else found(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    possible = installed and gpu and whole
    assert engines.choose("auto", whole) == ("vllm" if possible else "hf")
    assert engines.choose("hf", whole) == "hf"
    if possible:
        assert engines.choose("vllm", whole) == "vllm"
    else:
        with pytest.raises(BadInput, match="not installed" if not installed else "needs a GPU" if not gpu else "merge it first"):
            engines.choose("vllm", whole)


def test_asking_for_vllm_without_it_is_told_before_anything_starts(tmp_path: Path) -> None:
    if engines.vllm_obstacle() is None:
        pytest.skip("vLLM can be used here")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    task = build("task", {"method": "gsm8k", "path": "rows.jsonl"})
    with pytest.raises(BadInput, match="evaluate.engine: vLLM"):
        plan([task], EvalSettings(engine="vllm"), tmp_path)
    assert plan([task], EvalSettings(engine="auto"), tmp_path)


def test_sampling_options_say_everything() -> None:
    greedy = engines.sampling_options(None, 7, [4, 9], seed=5)
    assert greedy["temperature"] == 0 and greedy["seed"] is None and greedy["max_tokens"] == 7
    assert greedy["stop_token_ids"] == [4, 9] and greedy["ignore_eos"] and greedy["repetition_penalty"] == 1
    drawn = engines.sampling_options(Sampling(0.7, 0.9, 0), 7, [4], seed=2**40 + 5)
    assert (drawn["temperature"], drawn["top_p"], drawn["top_k"], drawn["seed"]) == (0.7, 0.9, -1, 5)


def test_the_vllm_adapter_speaks_token_ids(llama: Any, handle_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself cannot run here: a stand-in with its interface answers with our own greedy tokens, stop token kept."""
    from guidetune.evaluation.generation import generate

    model = llama(1)
    handle = handle_of(model)
    handle.folder = tmp_path
    started: list[dict[str, Any]] = []

    class Part:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    class LLM:
        def __init__(self, **options: Any) -> None:
            started.append(options)

        def generate(self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool) -> list[Any]:
            answers = []
            for prompt, how in zip(prompts, params, strict=True):
                ids = prompt["prompt_token_ids"]
                done = dict(generate(model, [ids], max_new_tokens=how.max_tokens, stop=how.stop_token_ids))[0]
                answers.append(Part(outputs=[Part(token_ids=[*done.tokens, *how.stop_token_ids[: int(done.finished)]])]))
            return answers

    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, Part  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 100))
    prompts = [list(range(5, 5 + n)) for n in (3, 30, 8)]
    options: dict[str, Any] = {"max_new_tokens": 20, "stop": [17], "context": 32}
    with engines.generator(handle, "vllm") as served:
        found = dict(served(prompts, **options))
        assert dict(served(prompts[:1], **options))[0] == found[0]
    assert found == dict(generate(model, prompts, **options))
    assert found[1].cut > 0
    assert len(started) == 1
    assert started[0]["generation_config"] == "vllm" and started[0]["gpu_memory_utilization"] == 0.45 and started[0]["dtype"] == "float32"


def test_auto_evaluates_with_our_own_loop(llama: Any, handle_of: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    task = build("task", {"method": "gsm8k", "path": "rows.jsonl", "max_new_tokens": 4})
    both = [evaluate(handle_of(llama(1)), [task], tmp_path / name, EvalSettings(engine=name), tmp_path) for name in ("auto", "hf")]
    assert both[0]["gsm8k"]["metrics"] == both[1]["gsm8k"]["metrics"]
    # The same result, so also the same artefact.
    assert (tmp_path / "auto/gsm8k/items.jsonl").read_text() == (tmp_path / "hf/gsm8k/items.jsonl").read_text()
