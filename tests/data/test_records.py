from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidetune.data import records
from guidetune.data.records import Dropped, Identifiers, Record, normalise
from guidetune.data.sources import SourceSpec
from guidetune.errors import BadInput


def made(raw: dict[str, Any], **spec: Any) -> Record | Dropped:
    return normalise(raw, SourceSpec(path="x.jsonl", **spec), "x", 1, Identifiers())


def turns(raw: dict[str, Any], **spec: Any) -> list[tuple[str, str]]:
    record = made(raw, **spec)
    assert isinstance(record, Record), record
    return [(m["role"], m["content"]) for m in record.messages]


ONE = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    "raw",
    [
        {"instruction": "2+2?", "output": "4"},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": "2+2?", "response": "4"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"instruction": "2+2?", "response": "4"},
        {"query": "2+2?", "response": "4"},
        {"question": "2+2?", "answer": "4"},
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, {"role": "assistant", "content": "4"}]},
        {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "other": 1},
        {"conversation": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_known_shapes(raw: dict[str, Any]) -> None:
    assert turns(raw) == ONE


def test_alpaca_with_input_system_and_history() -> None:
    raw = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief.", "history": [["hi", "hello"]]}
    assert turns(raw) == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "Add.\n\n2, 2"),
        ("assistant", "4"),
    ]


def test_sharegpt_with_tools() -> None:
    raw = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "w"}'},
            {"from": "observation", "value": "18"},
            {"from": "gpt", "value": "It is 18."},
        ],
        "tools": '[{"name": "w"}]',
    }
    assert turns(raw) == [
        ("system", 'Available tools:\n[{"name": "w"}]'),
        ("user", "weather?"),
        ("assistant", '{"name": "w"}'),
        ("tool", "18"),
        ("assistant", "It is 18."),
    ]
    assert turns({**raw, "tools": "[]"})[0] == ("user", "weather?")


def test_openai_tool_calls_become_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]}
    raw = {"messages": [{"role": "user", "content": "weather?"}, call]}
    assert turns(raw)[1] == ("assistant", '{"name": "w", "arguments": "{}"}')


def test_train_flags_and_trailing_turns() -> None:
    raw = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "train": False},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
            {"role": "user", "content": "thanks"},
        ]
    }
    record = made(raw)
    assert isinstance(record, Record)
    assert [m.get("train") for m in record.messages] == [None, False, None, None]
    assert record.meta == {"trimmed_turns": 1}
    prompt = {"prompt": [*raw["messages"][:1], {"role": "assistant", "content": "b"}, raw["messages"][2]], "completion": "d"}
    record = made(prompt)
    assert isinstance(record, Record) and record.messages[1]["train"] is False and "train" not in record.messages[3]


def test_map_with_columns_text_and_nested_values() -> None:
    raw = {"q": "Which?", "options": {"A": "one", "B": "two"}, "letter": "B", "n": 3, "list": [{"text": "deep"}], "a.b": "dotted"}
    assert turns(raw, map={"user": "q", "assistant": "letter"}) == [("user", "Which?"), ("assistant", "B")]
    user = "{q}\nA. {options[A]}\nB. {options.B}\n{{{n}}} {list[0][text]}"
    assert turns(raw, map={"user": user, "assistant": "a.b", "system": "options.A"}) == [
        ("system", "one"),
        ("user", "Which?\nA. one\nB. two\n{3} deep"),
        ("assistant", "dotted"),
    ]
    assert turns({"chat": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}, map={"messages": "chat"}) == ONE


def test_map_never_reaches_into_python() -> None:
    result = made({"q": "x", "a": "y"}, map={"user": "{q.__class__}", "assistant": "a"})
    assert isinstance(result, Dropped) and result.reason == records.WRONG_COLUMNS
    with pytest.raises(BadInput, match="is a column"):
        made({"q": "x", "a": "y"}, map={"user": "{q!r}", "assistant": "a"})
    with pytest.raises(BadInput, match="braces"):
        made({"q": "x", "a": "y"}, map={"user": "{q", "assistant": "a"})


def test_source_system_prompt_is_a_default() -> None:
    assert turns({"prompt": "2+2?", "completion": "4"}, system="Be brief.")[0] == ("system", "Be brief.")
    own = {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert turns(own, system="Be brief.")[0] == ("system", "Own.")


@pytest.mark.parametrize(
    ("raw", "spec", "reason"),
    [
        ({"foo": "a"}, {}, records.WRONG_COLUMNS),
        ({}, {}, records.WRONG_COLUMNS),
        ({"q": "a"}, {"map": {"user": "q", "assistant": "a"}}, records.WRONG_COLUMNS),
        ({"question": "a", "answer": "b", "options": ["x"]}, {}, records.WRONG_COLUMNS),
        ({"prompt": "a", "completion": 4}, {}, records.NOT_TEXT),
        ({"prompt": None, "completion": "b"}, {}, records.NOT_TEXT),
        ({"prompt": "a", "completion": ["b", "c"]}, {}, records.NOT_TEXT),
        ({"q": "a", "a": ["b"]}, {"map": {"user": "q", "assistant": "a"}}, records.NOT_TEXT),
        ({"messages": "hello"}, {}, records.NOT_TEXT),
        ({"messages": ["hello"]}, {}, records.NOT_TEXT),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, records.NOT_TEXT),
        ({"messages": [{"role": "wizard", "content": "a"}]}, {}, records.BAD_ROLE),
        ({"messages": []}, {}, records.NO_ANSWER),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, records.NO_ANSWER),
        ({"prompt": "a", "completion": " \n"}, {}, records.EMPTY_ANSWER),
        ({"prompt": " ", "completion": "a"}, {}, records.EMPTY_PROMPT),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, records.EMPTY_PROMPT),
    ],
)
def test_bad_rows_get_a_reason(raw: dict[str, Any], spec: dict[str, Any], reason: str) -> None:
    result = made(raw, **spec)
    assert isinstance(result, Dropped) and result.reason == reason and result.detail


def test_numbers_are_named_with_the_way_to_take_them() -> None:
    result = made({"q": "a", "n": 4}, map={"user": "q", "assistant": "n"})
    assert isinstance(result, Dropped) and "n is int 4" in result.detail and "{n}" in result.detail
    assert turns({"q": "a", "n": 4}, map={"user": "q", "assistant": "{n}"})[1] == ("assistant", "4")


def test_unknown_columns_error_lists_what_was_found() -> None:
    error = records.explain_columns(SourceSpec(path="x.jsonl"), ["question", "options", "answer"])
    assert "question, options, answer" in str(error) and "messages: [{role, content}]" in str(error) and "{options[A]}" in str(error)
    assert "chosen" in str(records.explain_columns(SourceSpec(path="x.jsonl"), ["chosen", "rejected"]))


def test_ids_are_stable_and_distinct() -> None:
    spec = SourceSpec(path="x.jsonl")
    rows = [{"id": "a"}, {"id": "a"}, {"id": 7}, {"id": None}, {}, {}, {"unique_id": "u"}, {"id": True}]
    rows = [{**r, "prompt": "p", "completion": "c"} for r in rows]

    def ids(rows: list[dict], source: str = "x") -> list[str]:
        give = Identifiers()
        return [normalise(r, spec, source, k, give).id for k, r in enumerate(rows)]

    got = ids(rows)
    assert len(set(got)) == len(rows)
    assert got[0] == "a" and got[2] == "7" and got[6] == "u"
    assert got == ids(rows)
    # Another row in front does not rename the rows after it.
    assert ids([{"prompt": "new", "completion": "c"}, *rows])[1:] == got
    assert ids(rows[3:5]) != ids(rows[3:5], "y")
    assert len(set(ids([rows[4]] * 50))) == 50


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "type"]), inner),
    max_leaves=6,
)
_columns = st.sampled_from(["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "system", "tools", "id"])


@given(raw=st.dictionaries(_columns, _json, max_size=5))
def test_any_row_becomes_a_record_or_a_reason(raw: dict[str, Any]) -> None:
    result = made(raw)
    if isinstance(result, Record):
        assert result.messages[-1]["role"] == "assistant"
        assert all(isinstance(m["content"], str) for m in result.messages)
    else:
        assert result.reason and result.detail
