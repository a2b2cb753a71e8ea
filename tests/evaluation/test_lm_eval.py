"""lm-evaluation-harness tasks on our models: its own scores, our results. Runs where the extra `eval` is installed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guidetune.errors import BadInput
from guidetune.evaluation.evaluate import EvalSettings, evaluate, paired_results, plan, read_items
from guidetune.registry import build

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")

COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
TASKS = {
    "quiz": COMMON
    + """task: quiz
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
num_fewshot: 2
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: mcc}}]
""",
    "quiz0": COMMON
    + """task: quiz0
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "last": COMMON
    + """task: last
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[gold]}}}}"
metric_list: [{{metric: acc, aggregation: mean}}, {{metric: perplexity, aggregation: perplexity}}]
""",
    "roll": COMMON
    + """task: roll
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""",
    "say": COMMON
    + """task: say
output_type: generate_until
doc_to_text: "{{{{question}}}} Answer:"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["e", "\\n\\n"], max_gen_toks: 24, do_sample: false}}
filter_list:
  - {{name: strict, filter: [{{function: regex, regex_pattern: "([a-z]+)"}}, {{function: take_first}}]}}
  - {{name: loose, filter: [{{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
}
GROUP = "group: both\ntask: [quiz, quiz0]\n"
WORDS = "Paris is the capital of France and Janet sells duck eggs for two dollars each day".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("harness")
    draw = random.Random(3)
    rows = []
    for i in range(14):
        choices = [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(4)]
        question = " ".join(draw.sample(WORDS, 6)) + f" {i}?"
        rows.append(
            {"question": question, "choices": choices, "gold": draw.randrange(4), "long": " ".join(draw.choices(WORDS, k=60 + 5 * i))}
        )
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(text.format(data=place / "rows.jsonl"))
    (place / "both.yaml").write_text(GROUP)
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    return place


@pytest.fixture(scope="module")
def handle(llama: Callable[..., Any], handle_of: Callable[..., Any]) -> Any:
    return handle_of(llama(max_position_embeddings=160))  # so short that the longest texts need windows and cuts


def theirs(model: Any, folder: Path, *names: str, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True, **options)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference(handle: Any, folder: Path) -> dict[str, Any]:
    """What lm-eval says of the same model through its own class."""
    from lm_eval.models.huggingface import HFLM

    return theirs(HFLM(pretrained=handle.model, tokenizer=handle.tokenizer, batch_size=4), folder, *TASKS)


def test_our_scoring_and_generation_give_lm_eval_its_own_results(handle: Any, folder: Path, reference: dict[str, Any]) -> None:
    """The same requests through its evaluator: every log-likelihood, every `is greedy`, every text, every metric."""
    from guidetune.evaluation.harness import OurModel

    found = theirs(OurModel(handle, batch_tokens=512), folder, *TASKS)
    for name in TASKS:
        for one, other in zip(found["samples"][name], reference["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"] and one["doc_id"] == other["doc_id"]
            for ours, expected in zip(one["resps"], other["resps"], strict=True):
                for a, b in zip(np.ravel(ours), np.ravel(expected), strict=True):
                    assert (a == b) if isinstance(b, str) else float(a) == pytest.approx(float(b), abs=1e-4 * max(1, abs(float(b)) / 100))
        for key, value in reference["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][key] == pytest.approx(value, rel=1e-5), (name, key)


@pytest.mark.parametrize(
    ("name", "metric"),
    [("quiz", "acc"), ("quiz", "acc_norm"), ("last", "acc"), ("roll", "word_perplexity"), ("roll", "bits_per_byte"), ("say", None)],
)
def test_scores_as_a_task_of_ours_are_lm_evals(
    handle: Any, folder: Path, reference: dict[str, Any], tmp_path: Path, name: str, metric: str | None
) -> None:
    task = build("task", {"method": "lm_eval", "task": name, "folder": str(folder), **({"metric": metric} if metric else {})})
    result = evaluate(handle, [task], tmp_path)[name]
    expected = reference["results"][name]
    metric = metric or "exact_match"
    key = next(key for key in expected if key.split(",")[0] == metric and "stderr" not in key)
    assert result["metric"] == metric and result["score"] == pytest.approx(expected[key], rel=1e-5) and result["n"] == 14
    assert result["ci"][0] <= result["score"] <= result["ci"][1]
    assert result["higher_is_better"] == (name != "roll")
    for other, value in expected.items():
        short, _, rest = other.partition(",")
        if isinstance(value, float) and "stderr" not in other:
            shown = result["metrics"].get(short if rest in ("none", "strict") else other)
            assert shown == pytest.approx(value, rel=1e-5), other
    lines = read_items(tmp_path, result)
    assert [line["id"] for line in lines] == [str(i) for i in range(14)]
    assert paired_results(tmp_path, result, tmp_path, result)["diff"] == 0.0


def test_the_same_questions_as_our_own_multiple_choice(handle: Any, folder: Path, tmp_path: Path) -> None:
    bridge = build("task", {"method": "lm_eval", "task": "quiz0", "folder": str(folder)})
    spec = {
        "method": "mcq",
        "path": str(folder / "rows.jsonl"),
        "options": "choices",
        "answer": "gold",
        "choose": "text",
        "format": "plain",
    }
    own = build("task", {**spec, "template": "Question: {question}\nAnswer:"})
    results = evaluate(handle, [bridge, own], tmp_path)
    for metric in ("acc", "acc_norm"):
        assert results["quiz0"]["metrics"][metric] == results["mcq"]["metrics"].get(metric, results["mcq"]["score"])
    for a, b in zip(read_items(tmp_path, results["quiz0"]), read_items(tmp_path, results["mcq"]), strict=True):
        assert a["choices_loglik"] == pytest.approx(b["choices_loglik"], abs=1e-4) and a["correct"] == b["correct"]
    assert paired_results(tmp_path, results["quiz0"], tmp_path, {**results["mcq"], "metric": results["quiz0"]["metric"]})["lost"] == 0


def test_groups_limits_chat_and_shots(handle: Any, folder: Path, tmp_path: Path) -> None:
    both = build("task", {"method": "lm_eval", "task": "both", "folder": str(folder), "limit": 9, "shots": 1})
    result = evaluate(handle, [both], tmp_path / "a")["both"]
    assert result["n"] == 9 and set(result["by"]["category"]) <= {"quiz", "quiz0"}
    assert read_items(tmp_path / "a", result)[0]["prompt"].count("Question:") == 2
    chat = build("task", {"method": "lm_eval", "task": "say", "folder": str(folder), "chat": True, "filter": "loose", "max_new_tokens": 4})
    spoken = evaluate(handle, [chat], tmp_path / "b")["say"]
    assert "exact_match,strict" in spoken["metrics"] and spoken["metric"] == "exact_match"
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=handle.model, tokenizer=handle.tokenizer, batch_size=1)
    expected = theirs(lm, folder, "say", apply_chat_template=True, gen_kwargs={"max_gen_toks": 4})["samples"]["say"]
    texts = {str(one["doc_id"]): one["resps"][0][0] for one in expected}
    assert {line["id"]: line["output"] for line in read_items(tmp_path / "b", spoken)} == texts


def test_nothing_is_seeded_and_a_second_run_is_read_from_disk(handle: Any, folder: Path, tmp_path: Path) -> None:
    tasks = [build("task", {"method": "lm_eval", "task": name, "folder": str(folder)}) for name in ("quiz", "say")]
    random.seed(11), np.random.seed(12), torch.manual_seed(13)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(handle, tasks, tmp_path)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    stamp = (tmp_path / "quiz" / "items.jsonl").stat().st_mtime_ns
    again = [build("task", {"method": "lm_eval", "task": name, "folder": str(folder)}) for name in ("quiz", "say")]
    evaluate(handle, again, tmp_path)
    assert (tmp_path / "quiz" / "items.jsonl").stat().st_mtime_ns == stamp
    (folder / "quiz0.yaml").touch()
    evaluate(handle, [build("task", {"method": "lm_eval", "task": "quiz", "folder": str(folder), "shots": 0})], tmp_path)
    assert (tmp_path / "quiz" / "items.jsonl").stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "quizz"}, "no task 'quizz'.*did you mean 'quiz'"),
        ({"metric": "acc_nrm"}, "no metric 'acc_nrm'.*did you mean 'acc_norm'"),
        ({"metric": "mcc"}, "mcc is no mean over items"),
        ({"folder": "nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_needed(folder: Path, change: dict[str, str], said: str) -> None:
    task = build("task", {"method": "lm_eval", "task": "quiz", "folder": str(folder), **change})
    with pytest.raises(BadInput, match=said):
        plan([task], EvalSettings())


def test_from_the_command_line_on_an_adapter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from typer.testing import CliRunner

    from guidetune import world
    from guidetune.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    text = TASKS["quiz0"].format(data="rows.jsonl")  # relative: beside the task
    (tmp_path / "tasks" / "quiz0.yaml").write_text(text)
    (tmp_path / "tasks" / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    places = world.export(tmp_path / "world")
    base = next(Path(path) for name, path in places.items() if "instruct" in str(name))
    torch.manual_seed(0)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    scores = {}
    for model in (str(base), "adapter"):
        out = CliRunner().invoke(app, ["eval", model, "--tasks", "lm_eval:quiz0", "--data", "tasks", "--out", f"out-{Path(model).name}"])
        assert out.exit_code == 0, out.output
        scores[model] = [
            json.loads(line)["choices_loglik"] for line in open(tmp_path / f"out-{Path(model).name}" / "quiz0" / "items.jsonl")
        ]
    assert scores[str(base)] != scores["adapter"]
