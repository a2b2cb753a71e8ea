"""HumanEval and MBPP: the programs are really run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from guidetune import cli
from guidetune.artefacts import read_json
from guidetune.errors import BadInput
from guidetune.evaluation.code import Problem, program
from guidetune.evaluation.evaluate import EvalSettings, plan
from guidetune.evaluation.results import judge, summarise
from guidetune.evaluation.task import Item, Output, TaskContext
from guidetune.registry import build

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are limited on POSIX systems only")
HUMANEVAL = {"method": "humaneval", "path": "humaneval/human_eval.jsonl"}
MBPP = {"method": "mbpp", "path": "mbpp/mbpp.jsonl.gz"}
STUB = 'def add(a, b):\n    """Sum of a and b."""\n'
TEST = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n"


def rate(task: Any, items: list[Item], outputs: list[Output]) -> list[int]:
    return [verdict["correct"] for verdict in task.scores(list(zip(items, outputs, strict=True)))]


@pytest.mark.parametrize(
    ("spec", "every"),
    [
        (HUMANEVAL, 16),
        ({**HUMANEVAL, "format": "plain"}, 16),
        ({**MBPP, "part": "all"}, 120),
        ({**MBPP, "format": "plain", "shots": 3}, 60),
        pytest.param(HUMANEVAL, 1, marks=pytest.mark.slow),
        pytest.param({**MBPP, "part": "all"}, 1, marks=pytest.mark.slow),
    ],
)
def test_published_solutions_pass_and_nothing_fails(shared_data: Path, spec: dict[str, Any], every: int) -> None:
    task = build("task", {**spec, "timeout": 60})
    items = task.items(TaskContext(shared_data))
    assert len(items) == (164 if spec["method"] == "humaneval" else {"all": 974}.get(spec.get("part", ""), 500))
    items = items[::every]
    assert rate(task, items, [task.perfect(item) for item in items]) == [1] * len(items)
    assert rate(task, items, [Output(text="")] * len(items)) == [0] * len(items)


def test_the_shipped_sample_runs() -> None:
    folder = Path(__file__).parents[2] / "examples" / "data"
    for spec in ({"method": "humaneval", "path": "humaneval.jsonl", "timeout": 60}, {"method": "bfcl", "path": "bfcl_parallel.jsonl"}):
        task = build("task", spec)
        (planned,) = plan([task], EvalSettings(allow_code=True), folder)
        assert len(planned.items) == 8
        assert rate(task, list(planned.items), [task.perfect(item) for item in planned.items]) == [1] * 8


def test_code_runs_only_when_it_is_allowed(shared_data: Path) -> None:
    tasks = [build("task", HUMANEVAL), build("task", MBPP)]
    with pytest.raises(BadInput) as caught:
        plan(tasks, root=shared_data)
    assert len(caught.value.problems) == 2 and "--allow-code" in str(caught.value)
    assert len(plan(tasks, EvalSettings(allow_code=True), shared_data)[0].items) == 164


def test_the_command_line_runs_code_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"humaneval:path={Path(__file__).parents[2] / 'examples' / 'data' / 'humaneval.jsonl'}"
    arguments = ["eval", "world:instruct", "--tasks", spec, "--set", "limit=2", "--set", "max_new_tokens=4", "--out", str(tmp_path / "out")]
    for extra, code in (([], 2), (["--allow-code"], 0)):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments, *extra])
        out, err = capsys.readouterr()
        assert (caught.value.code or 0) == code, err
    assert "humaneval: programs ran" in out
    assert read_json(tmp_path / "out" / "results.json")["tasks"]["humaneval"]["notes"]


def test_poisoned_answers_harm_nothing_and_the_others_are_judged(tmp_path: Path) -> None:
    task, item = task_and_item(timeout=2)
    kept = tmp_path / "kept"
    kept.write_text("mine", encoding="utf-8")
    os.chmod(tmp_path, 0o777)
    os.chmod(kept, 0o666)
    poison = [
        "while True: pass",
        "print('x' * 2**30)",
        "import sys\n    while True: sys.stdout.write('x' * 2**20)",
        "import os\n    while True: os.fork()",
        f"import os\n    os.remove({str(kept)!r})",
        f"import shutil\n    shutil.rmtree({str(tmp_path)!r})",
        "import os\n    os.kill(os.getppid(), 9)",
        f"import os\n    os.kill({os.getpid()}, 9)",
        "x = [0] * 2**40",
        "import sys\n    sys.setrecursionlimit(10**9); return add(a, b)",
        "def add(a, b): return add",
        "raise KeyboardInterrupt",
        "raise SystemExit(0)",
    ]
    outputs = [Output(text=f"    {body}") for body in [*poison, "return a + b"]]
    began = time.monotonic()
    verdicts = task.scores([(item, output) for output in outputs])
    assert time.monotonic() - began < 60
    assert [verdict["correct"] for verdict in verdicts] == [0] * len(poison) + [1]
    assert kept.read_text(encoding="utf-8") == "mine"
    assert all(len(verdict["detail"]) <= 300 for verdict in verdicts)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("    return a + b\n", "    return a + b\n"),  # a continuation
        ("    return a + b\n\nprint(add(1, 2))", "    return a + b\n"),
        ("Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.", "def add(a, b):\n    return a + b"),
        ("```\ndef add(a, b):\n    return a + b\n```\n```python\nprint(add(1, 2))\n```", "def add(a, b):\n    return a + b"),
        ("```python\nimport math\n\n\ndef add(a, b):\n    return a + b", "import math\n\n\ndef add(a, b):\n    return a + b"),
        ("Here it is.\n\ndef add(a, b):\n    return a + b\n\nHope this helps!", "def add(a, b):\n    return a + b\n"),
        ("```python\n    return a + b\n```", "    return a + b"),
    ],
)
def test_the_program_is_found_in_an_output(output: str, expected: str) -> None:
    found = program(output, Problem(STUB, "add", TEST, "check(add)"))
    assert found.endswith(expected) and found.startswith(STUB)
    space: dict[str, Any] = {}
    exec(found, space)  # noqa: S102 - a program of this file
    assert space["add"](1, 2) == 3


def task_and_item(**options: Any) -> tuple[Any, Item]:
    task = build("task", {**HUMANEVAL, "timeout": 2, **options})
    return task, task.item({"prompt": STUB, "entry_point": "add", "test": TEST, "task_id": "x/1"}, 0)


def test_outcomes_are_named() -> None:
    task, item = task_and_item(timeout=1)
    for text, outcome, detail in [
        ("    return a + b", "passed", ""),
        ("    return 3", "failed", "AssertionError"),
        ("    while True: pass", "timeout", "not finished after 1 seconds"),
        ("    import os; os._exit(0)", "early exit", "ended before its tests did"),
        ("    return a +", "failed", "SyntaxError: invalid syntax"),
    ]:
        found = task.score(item, Output(text=text))
        assert (found["outcome"], found["detail"]) == (outcome, detail)
        assert found["correct"] == (outcome == "passed")


def test_votes_go_by_behaviour_and_not_by_the_expected_values() -> None:
    task, item = task_and_item()
    texts = ["    return 3", "    return a + b", "    return sum([a, b])", "    return 3.5", "    return 1 / 0", "    while True: pass"]
    outputs = [Output(text=text) for text in texts]
    verdicts = task.scores([(item, output) for output in outputs])
    votes = [verdict["answer"] for verdict in verdicts]
    assert votes[1] == votes[2] and len({votes[0], votes[1], votes[3], votes[4]}) == 4 and votes[5] is None
    line = judge(task, item, outputs, verdicts)
    assert (line["correct"], line["majority"]) == (pytest.approx(2 / 6), 1)
    result = summarise(task, [line], 6, 0)
    assert result["metrics"]["pass@1"] == pytest.approx(2 / 6) and result["metrics"]["maj@6"] == 1
    assert result["curves"]["pass"][0] == pytest.approx(2 / 6) and result["curves"]["maj"][-1] == 1
    assert result["notes"] and "programs ran" in result["notes"][0]


def test_recursion_and_sets_are_one_behaviour() -> None:
    task = build("task", {**MBPP, "part": "all"})
    tests = ["assert f(5) == {'a', 'b', 'c', 'd', 'e'}"]
    item = task.item({"task_id": 700, "text": "?", "test_list": tests}, 0)
    codes = ["def f(n):\n  return set('abcdefgh'[:n])", "def f(n):\n  return f(n - 1) | {'abcdefgh'[n - 1]} if n else set()"]
    verdicts = task.scores([(item, Output(text=f"```python\n{code}\n```")) for code in codes])
    assert [verdict["correct"] for verdict in verdicts] == [1, 1] and verdicts[0]["answer"] == verdicts[1]["answer"] is not None


def test_mbpp_votes_and_setup(tmp_path: Path) -> None:
    task = build("task", {**MBPP, "part": "all"})
    row = {"task_id": 700, "text": "Double.", "code": "def d(x):\r\n  return 2 * x", "test_setup_code": "y = d(1)", "test_list": ["assert d(2) == 4", "assert y == 2"]}  # fmt: skip # noqa: E501
    item = task.item(row, 0)
    assert "Double." in item.prompt and "assert d(2) == 4" in item.prompt
    outputs = [Output(text=f"```python\ndef d(x):\n  return {body}\n```") for body in ("2 * x", "x + x", "x")]
    verdicts = task.scores([(item, output) for output in outputs])
    assert [verdict["correct"] for verdict in verdicts] == [1, 1, 0]
    assert verdicts[0]["answer"] == verdicts[1]["answer"] != verdicts[2]["answer"]
