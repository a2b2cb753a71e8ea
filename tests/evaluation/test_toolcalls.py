"""Tool calls: the published answers match themselves, and every fault has its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guidetune.errors import BadInput
from guidetune.evaluation.results import judge, summarise
from guidetune.evaluation.task import Output, TaskContext
from guidetune.evaluation.toolcalls import (
    REWARDS,
    Call,
    argument_f1,
    ast_match,
    error_class,
    first_allowed,
    match_calls,
    python_text,
    read_calls,
    with_dots,
)
from guidetune.registry import build

FILES = {"simple_python": (400, 400, 400), "multiple": (200, 200, 200), "parallel": (200, 540, 540), "parallel_multiple": (200, 607, 605)}


def bfcl(folder: Path, name: str, **options: Any) -> tuple[Any, list[Any]]:
    task = build("task", {"method": "bfcl", "path": f"bfcl/BFCL_v4_{name}.json", **options})
    return task, task.items(TaskContext(folder))


@pytest.mark.parametrize("name", FILES)
def test_published_answers_match(shared_data: Path, name: str) -> None:
    rows, golds, valid = FILES[name]
    task, items = bfcl(shared_data, name)
    verdicts = [task.score(item, task.perfect(item)) for item in items]
    assert len(items) == rows == sum(v["correct"] for v in verdicts) == sum(v["unrepaired"] for v in verdicts)
    assert not any(task.score(item, Output(text=""))["correct"] for item in items)
    faults = []
    for item in items:
        schemas = {function["name"]: function for function in item.payload}
        for gold in item.reference:
            call = first_allowed(gold)
            faults.append((item.id, *ast_match(call, schemas[call.name], gold)))
    assert len(faults) == golds and sum(fault[1] == "valid" for fault in faults) == valid
    wrong = [fault for fault in faults if fault[1] != "valid"]
    # two published answers hold an argument that the tool does not have
    odd = [("parallel_multiple_12", "unexpected_param", "permeability"), ("parallel_multiple_26", "unexpected_param", "type")]
    assert wrong == (odd if name == "parallel_multiple" else [])


def test_values_that_pass_only_as_variables(shared_data: Path) -> None:
    found = []
    for name in FILES:
        for item in bfcl(shared_data, name)[1]:
            schemas = {function["name"]: function for function in item.payload}
            for gold in item.reference:
                call = first_allowed(gold)
                properties = schemas[call.name]["parameters"]["properties"]
                strict = {key: [v for v in gold[call.name][key] if v != ""] + [object()] for key in call.arguments if key in properties}
                for key, value in call.arguments.items():
                    if key in properties and len(strict[key]) > 1:
                        kind = {"string": str, "array": list, "float": (float, int), "integer": int, "boolean": bool, "dict": dict}
                        if not isinstance(value, kind.get(properties[key]["type"], object)) or (
                            isinstance(value, bool) and properties[key]["type"] in ("integer", "float")
                        ):
                            found.append((item.id, key))
    many = [("parallel_152", "mod")] * 2 + [("parallel_multiple_21", "x"), ("parallel_multiple_21", "y")]
    assert found == [("simple_python_307", "venue"), *many]


def test_irrelevance_rewards_silence_and_says_so(shared_data: Path) -> None:
    task, items = bfcl(shared_data, "irrelevance")
    assert len(items) == 240
    quiet = [task.score(item, task.perfect(item)) for item in items]
    loud = [task.score(item, Output(text=f"[{item.payload[0]['name']}(x=1)]")) for item in items]
    assert all(v["correct"] == 1 and v["call_rate"] == 0 for v in quiet)
    assert all(v["correct"] == 0 and v["call_rate"] == 1 and v["error"] == "unwanted_call" for v in loud)


TOOL = {
    "name": "math.area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"}, "height": {"type": "float"}, "unit": {"type": "string"}, "on": {"type": "string"},
            "points": {"type": "array", "items": {"type": "integer"}}, "round": {"type": "boolean"}, "style": {"type": "dict"},
        },
        "required": ["base", "height"],
    },
}  # fmt: skip
GOLD = {
    "math.area": {
        "base": [10], "height": [5.0], "unit": ["units", ""], "on": ["April 1, 2024", ""], "points": [[1, 2], ""], "round": [True, ""],
        "style": [{"color": ["red", "Blue"], "width": [2, ""]}, ""],
    }
}  # fmt: skip


def match(name: str = "math.area", **arguments: Any) -> str:
    return ast_match(Call(name, {"base": 10, "height": 5.0, **arguments}), TOOL, GOLD)[0]


def test_the_rules_of_values_and_types() -> None:
    assert match() == "valid"
    assert match("math_area") == "wrong_func_name"
    assert ast_match(Call("math.area", {"base": 10}), TOOL, GOLD) == ("missing_required", "height")
    assert match(zz=1) == "unexpected_param"
    assert match(base="10") == match(base=10.0) == match(base=True) == "type_error"
    assert match(height=5) == "valid"  # an integer is cast
    assert match(unit="Units") == match(unit="u-n.its") == "valid" and match(unit="cm") == "value_error"
    assert match(on="april 1 2024") == "valid"
    assert match(points=[1, 2]) == "valid" and match(points=[2, 1]) == "value_error"
    assert match(round=True) == "valid" and match(round="True") == "type_error"
    assert match(style={"color": "RED"}) == "valid" and match(style={"color": "red", "width": 2}) == "valid"
    assert match(style={"width": 2}) == match(style={"color": "green"}) == match(style={"color": "red", "zz": 1}) == "value_error"
    needed = {"math.area": {**GOLD["math.area"], "unit": ["units"]}}
    assert ast_match(Call("math.area", {"base": 10, "height": 5.0}), TOOL, needed) == ("missing_optional", "unit")


def test_several_calls_in_any_order() -> None:
    golds = [{"f": {"a": [1]}}, {"f": {"a": [2]}}]
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}]
    one, two = Call("f", {"a": 1}), Call("f", {"a": 2})
    assert match_calls([two, one], tools, golds)[0] == "valid"
    assert match_calls([one, one], tools, golds)[0] == "value_error"
    assert match_calls([one, two, two], tools, golds)[0] == match_calls([one], tools, golds)[0] == "wrong_count"
    assert match_calls([], tools, golds)[0] == "no_call"
    assert match_calls([Call("g", {}), one], tools, golds)[0] == "wrong_func_name"


CALL = Call("f.g", {"a": 1, "b": "x", "c": [True, None]})
JSON = '{"name": "f.g", "arguments": {"a": 1, "b": "x", "c": [true, null]}}'


@pytest.mark.parametrize(
    ("text", "repairs"),
    [
        ("[f.g(a=1, b='x', c=[True, None])]", ()),
        ("f.g(a=1, b='x', c=[true, null])", ()),
        (JSON, ()),
        (f"[{JSON}]", ()),
        (JSON.replace("arguments", "parameters"), ()),
        ('{"f.g": {"a": 1, "b": "x", "c": [true, null]}}', ()),
        (
            json.dumps({"tool_calls": [{"type": "function", "function": {"name": "f.g", "arguments": '{"a":1,"b":"x","c":[true,null]}'}}]}),
            (),
        ),
        (f"<tool_call>\n{JSON}\n</tool_call>", ()),
        (f"<tool_call>{JSON}", ()),  # the closing tag may be a stop token
        (f"<function_call> {JSON.replace('name', 'function')} </function_call> Done.", ()),
        (f"[TOOL_CALLS] [{JSON}]", ()),
        (f"<|python_tag|>{JSON}", ()),
        ('<function=f.g>{"a": 1, "b": "x", "c": [true, null]}</function>', ()),
        (
            "<function=f.g>\n<parameter=a>\n1\n</parameter>\n<parameter=b>x</parameter><parameter=c>[true, null]</parameter>\n</function>",
            (),
        ),
        (f"<think>f.g(a=2) perhaps?</think>\n{JSON}", ("thinking",)),
        (f"```json\n{JSON}\n```", ("fence",)),
        (f"I call it:\n{JSON}\nDone.", ("prose",)),
        ("I call it:\n[f.g(a=1, b='x', c=[True, None])]\nDone.", ("prose",)),
        (JSON.replace("]}}", "],}}"), ("trailing comma",)),
        ("{'name': 'f.g', 'arguments': {'a': 1, 'b': 'x', 'c': [True, None]}}", ("python literals",)),
    ],
)
def test_calls_are_read_in_the_usual_forms(text: str, repairs: tuple[str, ...]) -> None:
    found = read_calls(text)
    assert found.calls == (CALL,) and found.repairs == repairs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot call f(x) here.",
        "f(1, 2)",
        '{"answer": 42}',
        "[1, 2]",
        "{" * 5000,
        "[" * 5000,
        "f(" * 5000,
        "\n" * 50_000,
        "f(a=" + "-" * 50_000 + "1)",
    ],
)
def test_what_is_no_call(text: str) -> None:
    assert read_calls(text).calls == ()


def test_variables_negative_numbers_and_several_calls() -> None:
    found = read_calls("[f(a=-1, b=other.value, c=(1, 2)), g()]").calls
    assert found == (Call("f", {"a": -1, "b": "other.value", "c": (1, 2)}), Call("g", {}))
    assert read_calls(python_text(found[1:] + (CALL,))).calls == (Call("g", {}), CALL)
    assert with_dots([Call("f_g", {})], ["f.g", "h"]) == (Call("f.g", {}),)


def test_error_classes_and_their_order() -> None:
    tools = [{"name": "f", "parameters": {"properties": {"a": {}, "b": {}, "c": {}}}}, {"name": "g", "parameters": {"properties": {}}}]
    gold = Call("f", {"a": 1, "b": 2})
    cases = {
        "correct": gold,
        "wrong value": Call("f", {"a": 1, "b": "2"}),
        "missing": Call("f", {"a": 1}),
        "redundant": Call("f", {"a": 1, "b": 2, "c": 3}),
        "redundant + missing": Call("f", {"a": 1, "c": 3}),
        "hallucinated parameter": Call("f", {"a": 1, "b": 2, "z": 3}),
        "hallucinated + one": Call("f", {"a": 1, "z": 3}),
        "hallucinated + redundant + missing": Call("f", {"a": 1, "c": 2, "z": 3}),
        "wrong tool": Call("g", {}),
        "hallucinated tool": Call("h", {}),
        "unparsable": None,
    }
    assert {error_class(call, gold, tools): call for call in cases.values()} == cases and set(cases) == set(REWARDS)
    order = ["correct", "wrong value", "missing", "hallucinated parameter", "wrong tool", "unparsable"]
    assert [REWARDS[name] for name in order] == sorted((REWARDS[name] for name in order), reverse=True)
    assert argument_f1([[gold]], [[gold]], True) == 1
    assert argument_f1([[cases["wrong value"]]], [[gold]], True) == 0.5 and argument_f1([[cases["wrong value"]]], [[gold]], False) == 1


def test_a_result_counts_errors_by_class(shared_data: Path) -> None:
    task, items = bfcl(shared_data, "multiple")
    items = items[:4]
    outputs = [task.perfect(items[0]), Output(text="no"), Output(text="no", finished=False), Output(text=f"```\n{items[3].gold}\n```")]
    lines = [judge(task, i, [o], [task.score(i, o)]) for i, o in zip(items, outputs, strict=True)]
    found = summarise(task, lines, 1, 0)
    assert found["notes"] == ["a tool was called on 50.0 % of the items, and should have been on 100.0 %"]
    assert found["score"] == 0.5 and found["metrics"]["unrepaired"] == 0.25 and found["metrics"]["call_rate"] == 0.5
    assert found["metrics"]["error: no_call"] == found["metrics"]["error: truncated"] == 0.25
    assert json.loads(json.dumps(lines[0], default=str))["error"] == "valid"


def test_answers_must_be_there(tmp_path: Path) -> None:
    row = {"id": "simple_0", "question": [[{"role": "user", "content": "?"}]], "function": [TOOL]}
    (tmp_path / "q.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    task = build("task", {"method": "bfcl", "path": "q.json"})
    with pytest.raises(BadInput, match="no file of allowed values"):
        task.items(TaskContext(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps({"id": "simple_1", "ground_truth": []}) + "\n", encoding="utf-8")
    with pytest.raises(BadInput, match="line 1: no allowed values for 'simple_0'"):
        build("task", {"method": "bfcl", "path": "q.json", "answers_path": "a.json"}).items(TaskContext(tmp_path))
