"""A user's own task: one YAML file, or one Python file with a class."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from guidetune import recipe, registry
from guidetune.errors import BadInput
from guidetune.evaluation.evaluate import evaluate, plan
from guidetune.evaluation.task import Output
from guidetune.models.handle import open_handle

# A paragraph whose last code words name a file, and the indented block below it.
DOCS = re.compile(r"([^\n]*`(?:tickets\.yaml|acronym\.py)`:)\n\n((?:    [^\n]*\n|\n)+?)(?=\n?\S|\n    guidetune)")
YAML = """\
method: generate
path: tickets.jsonl
prompt: "Which team handles this?\\n{body}\\nAnswer 'team: NAME'."
reference: team
match: regex
pattern: "team: (\\\\w+)"
max_new_tokens: 4
"""
PYTHON = """\
from guidetune.evaluation.task import RowTask, Item, ask, column
from guidetune.registry import method


@method(kind="task", name="shouting", summary="The question in capitals.")
class Shouting(RowTask):
    mode = "generate"
    marks: int = 1

    def item(self, row, number):
        text = str(column(row, "body"))
        return Item(str(number), ask(text), reference=text.upper() + "!" * self.marks, gold=text.upper() + "!" * self.marks)

    def score(self, item, output):
        return {"correct": int(output.text == item.reference)}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both forms, which is not the current one."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tickets.yaml").write_text(YAML)
    (folder / "shouting.py").write_text(PYTHON)
    (folder / "tickets.jsonl").write_text("".join(json.dumps({"body": f"ticket {i}", "team": "ops"}) + "\n" for i in range(3)))
    monkeypatch.chdir(tmp_path)
    return folder


def only_task(*texts: str, data: Path | None = None) -> Any:
    (task,) = recipe.evaluation(texts, data).task
    return task


def test_one_yaml_file(own: Path) -> None:
    task = only_task("own/tickets.yaml")
    (planned,) = plan([task])
    assert (planned.label, len(planned.items)) == ("tickets", 3)
    assert task.score(planned.items[0], Output(text="team: OPS"))["correct"] == 1
    assert only_task("own/tickets.yaml:limit=2,label=two").label == "two"
    assert only_task("{path: own/tickets.yaml, limit: 2}").limit == 2
    # The resolved task runs from anywhere.
    assert registry.build("task", task.spec()) == task and Path(task.path).is_absolute()


def test_one_python_file(own: Path) -> None:
    task = only_task("own/shouting.py:marks=2", data=own / "tickets.jsonl")
    (planned,) = plan([task])
    perfect = task.perfect(planned.items[0])
    assert planned.label == "shouting" and perfect.text == "TICKET 0!!" and task.score(planned.items[0], perfect)["correct"] == 1
    assert task.spec()["method"] == str(own / "shouting.py") and registry.build("task", task.spec()) == task
    (own / "loud.yaml").write_text("method: shouting.py\npath: tickets.jsonl\nmarks: 3\n")
    assert plan([only_task("own/loud.yaml")])[0].items[0].reference == "TICKET 0!!!"
    # Two files may use one name; neither is known by it elsewhere.
    (own / "quiet.py").write_text(PYTHON.replace("text.upper()", "text.lower()"))
    assert {plan([only_task(f"own/{name}", data=own / "tickets.jsonl")])[0].items[0].gold for name in ("quiet.py", "shouting.py")} == {
        "ticket 0!",
        "TICKET 0!",
    }
    with pytest.raises(BadInput, match="'shouting': unknown task"):
        only_task("shouting", data=own / "tickets.jsonl")


def test_the_examples_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = {re.search(r"`(\w+\.(?:yaml|py))`[^`]*$", before)[1]: dedent(block) for before, block in DOCS.findall(page)}  # type: ignore[index]
    assert blocks.keys() == {"tickets.yaml", "acronym.py"} and len(blocks["tickets.yaml"].splitlines()) < 20
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "tickets.jsonl").write_text(json.dumps({"body": "It burns.", "team": "Fire", "product": "oven"}) + "\n")
    (tmp_path / "phrases.jsonl").write_text(json.dumps({"phrase": "As soon as possible"}) + "\n")
    monkeypatch.chdir(tmp_path)
    tickets, acronym = recipe.evaluation(["tickets.yaml", "acronym.py:path=phrases.jsonl,upper=false"]).task
    one, two = (planned.items[0] for planned in plan([tickets, acronym]))
    assert one.prompt.endswith("It burns.\nAnswer 'team: NAME'.") and tickets.score(one, Output(text="I say team: fire."))["correct"] == 1
    assert acronym.score(two, Output(text="asap"))["correct"] == 1 and acronym.score(two, Output(text="ASAP"))["correct"] == 0


def test_in_a_recipe(own: Path) -> None:
    tree = {
        "models": {"base": "world:base", "instruct": "world:instruct"},
        "data": {"train": [{"path": "tickets.jsonl", "map": {"user": "body", "assistant": "team"}}]},
        "evaluate": {
            "task": ["tickets.yaml", {"path": "tickets.yaml", "label": "b"}],
            "general": [{"method": "shouting.py", "path": "tickets.jsonl"}],
        },
    }
    loaded = recipe.from_mapping(tree, own)
    assert [task.label for task in loaded.evaluate.task] == ["tickets", "b"]
    again = recipe.parse(loaded.resolved_yaml())
    assert again.evaluate == loaded.evaluate


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.yaml", YAML.replace("prompt:", "promt:"), "t.yaml:3: promt = .*did you mean 'prompt'"),
        (
            "t.yaml",
            YAML.replace("method: generate", "method: generat"),
            "t.yaml:1: unknown task 'generat' .did you mean 'generate'",
        ),
        ("t.yaml", YAML.replace("method: generate\n", ""), "needs `method`"),
        ("t.yaml", YAML.replace("tickets.jsonl", "tickts.jsonl"), "tickts.jsonl"),
        ("t.yaml", YAML.replace("match: regex", "match: rgex"), "t.yaml:5: match = 'rgex'.*did you mean 'regex'"),
        ("t.yaml", "method: t2.yaml", "not another YAML file"),
        ("t.yaml", "a: [", "t.yaml:1: not valid YAML"),
        ("t.py", "x = (", "t.py:1: the file does not run: SyntaxError"),
        ("t.py", "\nimport nothing_like_this", "t.py:2: the file does not run: ModuleNotFoundError"),
        ("t.py", "x = 1", "registers none; decorate its class with @method.kind='task'"),
        ("t.py", PYTHON + PYTHON.replace("shouting", "other"), "registers several: shouting, other"),
        ("t.py", PYTHON.replace("shouting", "gsm8k"), "there is a task called 'gsm8k' already"),
        ("t.py", PYTHON.replace("marks: int", "marks: nowhere"), "t.py:.* the file does not run"),
    ],
)
def test_faults_name_the_file_and_the_line(own: Path, name: str, text: str, message: str) -> None:
    (own / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        only_task(f"own/{name}", data=own / "tickets.jsonl" if name.endswith(".py") else None)
    assert registry.get("task", "gsm8k").__module__ == "guidetune.evaluation.tasks.gsm8k"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def score(", "def scor(", "TypeError: task Shouting does not define score"),
        ('mode = "generate"', "", "mode = None: a task says how a model answers"),
        ('"correct": int(', '"right": int(', "a mapping with a number `correct`"),
        (
            "output.text ==",
            "output.txt ==",
            "shouting.py:15: task shouting fails .* AttributeError: 'Output' object has no attribute 'txt'",
        ),
        ("text.upper()", "text.uper()", "shouting.py:12: task shouting fails .* AttributeError"),
    ],
)
def test_mistakes_of_a_class_are_told_before_the_model_runs(own: Path, old: str, new: str, message: str) -> None:
    (own / "shouting.py").write_text(PYTHON.replace(old, new))
    with pytest.raises(BadInput, match=message):
        plan([only_task("own/shouting.py:path=own/tickets.jsonl")])


def test_a_missing_file(own: Path) -> None:
    with pytest.raises(BadInput, match="there is no task file .*ticket.yaml .did you mean 'tickets.yaml'"):
        only_task("own/ticket.yaml")
    with pytest.raises(BadInput, match="task file .*nothing.py cannot be read: No such file"):
        only_task("own/nothing.py")


def test_results_are_kept_by_model_task_and_settings(own: Path) -> None:
    """A second evaluation does not run the model, also after others in between; a changed file does."""
    handle, calls = open_handle("world:instruct"), []
    handle.model.model.register_forward_hook(lambda *_: calls.append(1))

    def runs(*names: str) -> bool:
        calls.clear()
        evaluate(handle, [only_task(name) for name in names], own / "out")
        return bool(calls)

    python = "own/shouting.py:path=own/tickets.jsonl,max_new_tokens=4"
    assert runs("own/tickets.yaml", python) and not runs("own/tickets.yaml", python)
    assert runs("own/tickets.yaml:limit=1") and not runs("own/tickets.yaml") and not runs("own/tickets.yaml:limit=1")
    (own / "shouting.py").write_text(PYTHON.replace("text.upper()", "text.lower()"))
    assert runs(python) and not runs(python)


def test_a_folder_of_data_files(tmp_path: Path) -> None:
    for place in ("arc_challenge.jsonl", "ifeval/input_data.jsonl", "medqa/test_4options.jsonl", "medqa/train.jsonl", "qa/piqa.jsonl.gz"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("")
    found = {name: only_task(name, data=tmp_path).path for name in ("arc", "ifeval", "medqa", "piqa")}
    assert {name: str(Path(path).relative_to(tmp_path)) for name, path in found.items()} == {
        "arc": "arc_challenge.jsonl",
        "ifeval": "ifeval/input_data.jsonl",
        "medqa": "medqa/test_4options.jsonl",
        "piqa": "qa/piqa.jsonl.gz",
    }
    with pytest.raises(BadInput, match="winogrande.jsonl"):
        only_task("winogrande", data=tmp_path)
