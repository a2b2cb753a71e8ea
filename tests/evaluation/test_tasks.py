from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guidetune.errors import BadInput
from guidetune.evaluation.evaluate import ANSWER, EvalSettings, plan
from guidetune.evaluation.task import Item, Output, Task, TaskContext, column, fill
from guidetune.registry import build, get, names

REAL: list[Any] = [
    ({"method": "gsm8k", "path": "gsm8k/test.jsonl"}, 1319),
    ({"method": "math500", "path": "math500/test.jsonl", "grader": "exact"}, 500),
    ({"method": "medqa", "path": "medqa/test_4options.jsonl"}, 1273),
    ({"method": "medqa", "path": "medqa/test_4options.jsonl", "mode": "generate"}, 1273),
    ({"method": "medqa", "path": "medqa/test_4options.jsonl", "mode": "generate", "choose": "text"}, 1273),
    ({"method": "medmcqa", "path": "medmcqa/dev_single_choice.jsonl"}, 2816),
    ({"method": "medmcqa", "path": "medmcqa/dev_single_choice.jsonl", "mode": "generate"}, 2816),
    ({"method": "pubmedqa", "path": "pubmedqa/test.jsonl"}, 500),
    ({"method": "pubmedqa", "path": "pubmedqa/test.jsonl", "mode": "generate"}, 500),
    ({"method": "pubmedqa", "path": "pubmedqa/pqa_l_1000_prompted.jsonl.gz"}, 1000),
    ({"method": "mmlu_medical", "path": "mmlu_medical/test.jsonl"}, 1089),
    ({"method": "arc_challenge", "path": "general_qa/arc_challenge.jsonl"}, 1172),
    ({"method": "arc_easy", "path": "general_qa/arc_easy.jsonl.gz", "best_by": "acc_mutual_info"}, 2376),
    ({"method": "piqa", "path": "general_qa/piqa.jsonl.gz"}, 1838),
    ({"method": "commonsenseqa", "path": "general_qa/commonsense_qa.jsonl"}, 1221),
    ({"method": "winogrande", "path": "general_qa/winogrande.jsonl"}, 1267),
    ({"method": "winogrande", "path": "general_qa/winogrande.jsonl", "format": "chat"}, 1267),
    ({"method": "truthfulqa", "path": "truthfulqa/fold_0_test.csv"}, 409),
    ({"method": "truthfulqa", "path": "truthfulqa/fold_0_train.csv", "best_by": "mc1"}, 326),
    ({"method": "triviaqa", "path": "general_qa/triviaqa.jsonl.gz"}, 3000),
    ({"method": "translation", "path": "mt_medical/es_en_test_2000.jsonl.gz", "source": "es", "target": "en"}, 2000),
    pytest.param({"method": "super_ni", "path": "super_ni/tasks.jsonl.gz"}, 8800, marks=pytest.mark.slow),
    pytest.param({"method": "super_ni", "path": "super_ni/tasks.jsonl.gz", "split": "train"}, 8589, marks=pytest.mark.slow),
    ({"method": "generate", "path": "gsm8k/test.jsonl", "prompt": "{question}", "reference": "answer", "match": "number"}, 1319),
    (
        {"method": "generate", "path": "general_qa/triviaqa.jsonl.gz", "prompt": "{context}", "reference": "aliases", "match": "contains"},
        3000,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "count"), REAL, ids=lambda value: f"{value['method']}-{value['path']}" if isinstance(value, dict) else "")
def test_golds_score_one_and_nothing_scores_zero(shared_data: Path, spec: dict[str, Any], count: int) -> None:
    task = build("task", spec)
    items = plan([task], root=shared_data)[0].items
    assert len(items) == count
    for item in items:
        perfect = task.perfect(item)
        assert perfect is not None
        assert task.score(item, perfect)["correct"] == 1, item
        assert task.score(item, Output(text=""))["correct"] == 0, item


@pytest.mark.slow
@pytest.mark.parametrize("grader", ["math_verify", "gift"])
def test_every_math500_solution_is_right(shared_data: Path, grader: str) -> None:
    task = build("task", {"method": "math500", "path": "math500/test.jsonl", "grader": grader})
    items = task.items(TaskContext(shared_data))
    right = sum(task.score(item, Output(text=item.gold or ""))["correct"] for item in items)
    boxed = sum(task.score(item, Output(text=f"\\boxed{{{item.reference}}}"))["correct"] for item in items)
    assert (right, boxed) == (500, 500)


def test_every_task_is_documented() -> None:
    for name in names("task"):
        cls = get("task", name)
        assert issubclass(cls, Task) and cls.name == name and cls.summary
        assert getattr(cls, "mode", None) in ANSWER or "mode" in cls.model_fields
        assert all(field.description for field in cls.model_fields.values()), name


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def items_of(folder: Path, **spec: Any) -> list[Item]:
    return list(plan([build("task", spec)], root=folder)[0].items)


def test_prompts_are_the_published_ones(tmp_path: Path) -> None:
    row = {"question": "Which?", "options": {"A": "one", "B": "two"}, "answer_idx": "B"}
    name = write(tmp_path / "q.jsonl", row)
    assert items_of(tmp_path, method="medqa", path=name)[0].prompt == "Question: Which?\nA. one\nB. two\nAnswer:"
    assert items_of(tmp_path, method="medmcqa", path=name)[0].prompt == "Question: Which?\nChoices:\nA. one\nB. two\nAnswer:"
    assert items_of(tmp_path, method="mcq", path=name)[0].prompt == "Which?\nA. one\nB. two\nAnswer:"
    words = {"A": "yes", "B": "no", "C": "maybe"}
    name = write(tmp_path / "p.jsonl", {"realidx": "7", "question": "Some text.\nMore.\nIs it?", "options": words, "answer_idx": "C"})
    item = items_of(tmp_path, method="pubmedqa", path=name)[0]
    assert item.prompt == "Abstract: Some text.\nMore.\nQuestion: Is it?\nAnswer:"
    assert (item.id, item.choices, item.reference) == ("7", ("yes", "no", "maybe"), 2)
    name = write(tmp_path / "o.jsonl", {"realidx": 1, "question": "Is it?", "ctx": ["One.", "Two."], "options": words, "answer_idx": "A"})
    item = items_of(tmp_path, method="pubmedqa", path=name, context="ctx")[0]
    assert item.prompt == "Abstract: One.\nTwo.\nQuestion: Is it?\nAnswer:"


@pytest.mark.parametrize(
    ("options", "answer", "place"),
    [
        ({"A": "x", "B": "y"}, "B", 1),
        (["x", "y", "z"], 2, 2),
        (["x", "y", "z"], "C", 2),
        (["x", "y", "z"], "Y.", 1),
        (["10", "20", "30"], "20", 1),
        (["x", "y", "z"], "2", 2),
        ({"A": "x", "B": None, "C": "y"}, "C", 1),
    ],
)
def test_mcq_reads_answers_of_many_kinds(tmp_path: Path, options: Any, answer: Any, place: int) -> None:
    name = write(tmp_path / "q.jsonl", {"q": "?", "o": options, "a": answer})
    assert items_of(tmp_path, method="mcq", path=name, question="q", options="o", answer="a")[0].reference == place


def test_mcq_options_from_columns(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("question,a,b,answer_idx\nWhich?,one,two,B\n", encoding="utf-8")
    item = items_of(tmp_path, method="mcq", path="q.csv", options=["a", "b"])[0]
    assert (item.prompt, item.reference) == ("Which?\nA. one\nB. two\nAnswer:", 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "options": ["x", "y"], "answer_idx": "E"}, "neither a letter nor the text"),
        ({"question": "?", "options": ["x", "y"], "answer_idx": None}, "names no option"),
        ({"question": "?", "options": ["x"], "answer_idx": 0}, "2 to 26 options"),
        ({"question": "?", "options": "x", "answer_idx": 0}, "neither a list"),
        ({"question": "?", "option": ["x"], "answer_idx": 0}, "no column 'options' (did you mean 'option'?)"),
    ],
)
def test_mcq_refuses_bad_rows_with_their_line(tmp_path: Path, row: Any, message: str) -> None:
    good = {"question": "?", "options": ["x", "y"], "answer_idx": 0}
    name = write(tmp_path / "q.jsonl", good, row)
    with pytest.raises(BadInput) as caught:
        items_of(tmp_path, method="mcq", path=name)
    assert f"{name}, line 2: " in str(caught.value) and message in str(caught.value)


def test_gsm8k_filters(tmp_path: Path) -> None:
    name = write(tmp_path / "g.jsonl", {"question": "How many?", "answer": "16 - 3 = 13\n#### 1,300"})
    task = build("task", {"method": "gsm8k", "path": name})
    item = plan([task], root=tmp_path)[0].items[0]
    assert (item.prompt, item.reference) == ("How many?", "1300")

    def verdict(text: str) -> tuple[int, int, int, int]:
        found = task.score(item, Output(text=text))
        return found["correct"], found["strict"], found["flexible"], found["boxed"]

    assert verdict("#### 1300") == (1, 1, 1, 0)
    assert verdict("It is $1,300.00.") == (1, 0, 1, 0)
    assert verdict(r"\boxed{1300} after 7 days") == (1, 0, 0, 1)
    assert verdict("1299") == (0, 0, 0, 0)
    bad = write(tmp_path / "b.jsonl", {"question": "?", "answer": "none"})
    with pytest.raises(BadInput, match="line 1: answer = 'none' has no number"):
        items_of(tmp_path, method="gsm8k", path=bad)


@pytest.mark.parametrize(
    ("options", "reference", "right", "wrong"),
    [
        ({"match": "exact"}, "Paris", "paris.", "in Paris"),
        ({"match": "contains"}, ["Rome", "Paris"], "It is Paris, of course.", "Parisian"),
        ({"match": "number"}, "18 eggs", "So 18.0", "19"),
        ({"match": "boxed"}, "1/2", r"\boxed{\frac{1}{2}}", "1/2"),
        ({"match": "boxed"}, "1/2", r"\boxed{0.50}", r"\boxed{2}"),
        ({"match": "regex", "pattern": "label: (\\w+)"}, "spam", "label: ham, label: SPAM", "spam"),
    ],
)
def test_a_users_own_task(tmp_path: Path, options: dict[str, str], reference: Any, right: str, wrong: str) -> None:
    name = write(tmp_path / "t.jsonl", {"q": "Where?", "a": reference, "kind": "geo"})
    task = build("task", {"method": "generate", "path": name, "prompt": "Q: {q} {{x}}", "reference": "a", "category": "kind", **options})
    item = plan([task], root=tmp_path)[0].items[0]
    assert (item.prompt, item.meta) == ("Q: Where? {x}", {"category": "geo"})
    assert task.score(item, Output(text=right))["correct"] == 1
    assert task.score(item, Output(text=wrong))["correct"] == 0
    perfect = task.perfect(item)
    assert perfect is None or task.score(item, perfect)["correct"] == 1


def test_patterns_are_checked_at_once() -> None:
    base = {"method": "generate", "path": "x", "prompt": "p", "reference": "r"}
    for extra in ({"match": "regex"}, {"pattern": "x"}, {"match": "regex", "pattern": "("}):
        with pytest.raises(BadInput):
            build("task", {**base, **extra})


def test_world_sets_grade_themselves() -> None:
    from guidetune import world

    for name in list(world.sets())[:4]:
        task = build("task", {"method": "world", "set": name, "n": 20})
        planned = plan([task])[0]
        assert planned.label == name and len(planned.items) > 5
        assert all(task.score(item, Output(text=item.gold or ""))["correct"] == 1 for item in planned.items)
        assert {"skill", "category", "difficulty"} <= planned.items[0].meta.keys()
    with pytest.raises(BadInput, match="either set or path"):
        build("task", "world")
    with pytest.raises(BadInput, match="no set 'nothing_like_it'"):
        plan([build("task", {"method": "world", "set": "nothing_like_it"})])


def test_world_reads_exported_rows(tmp_path: Path) -> None:
    from guidetune import world

    name = next(iter(world.sets()))
    rows = [world.row(item) for item in world.items(name, "test", 5, 0)]
    write(tmp_path / f"{name}.test.jsonl", *rows)
    planned = plan([build("task", {"method": "world", "path": f"{name}.test.jsonl"})], root=tmp_path)[0]
    assert planned.label == name
    assert [item.id for item in planned.items] == [row["id"] for row in rows]


def test_fill_and_column() -> None:
    assert fill(r"{a} in \boxed{} {{a}}", {"a": "{b}"}) == r"{b} in \boxed{} {a}"
    assert column({"a": {"b": 3}}, "a.b") == 3
    with pytest.raises(BadInput, match="no column 'quetsion'.*did you mean 'question'"):
        fill("{quetsion}", {"question": 1})


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    name = write(tmp_path / "g.jsonl", {"id": "x", "question": "?", "answer": "1"}, {"id": "x", "question": "?", "answer": "2"})
    tasks = [
        build("task", {"method": "gsm8k", "path": "missing.jsonl", "label": "one"}),
        build("task", {"method": "gsm8k", "path": name}),
        build("task", {"method": "gsm8k", "path": name}),
        build("task", {"method": "gsm8k", "path": name, "label": "a/b"}),
        build("task", {"method": "perplexity", "path": "text.tx"}),
    ]
    with pytest.raises(BadInput) as caught:
        plan(tasks, root=tmp_path)
    text = "\n".join(caught.value.problems)
    for part in ("missing.jsonl", "two tasks are called 'gsm8k'", "2 items have the id 'x'", "'a/b' cannot be a file name", "text.tx"):
        assert part in text


def test_limits_draw_the_same_items_for_every_model(tmp_path: Path) -> None:
    name = write(tmp_path / "g.jsonl", *({"question": f"{i}?", "answer": str(i)} for i in range(50)))
    task = build("task", {"method": "gsm8k", "path": name})
    chosen = [[item.id for item in plan([task], EvalSettings(limit=10, seed=seed), tmp_path)[0].items] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 10 and chosen[0] == sorted(chosen[0], key=int)
    assert set(chosen[0]) < {item.id for item in plan([task], EvalSettings(limit=20), tmp_path)[0].items}
    assert len(plan([build("task", {"method": "gsm8k", "path": name, "limit": 3})], EvalSettings(limit=10), tmp_path)[0].items) == 3
