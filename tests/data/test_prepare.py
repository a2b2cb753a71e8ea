from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidetune.data import view
from guidetune.data.chat import Chat
from guidetune.data.ledger import _quantiles
from guidetune.data.prepare import PrepareSettings, _line, leaks, prepare, read_records
from guidetune.data.records import Record, content_key
from guidetune.data.rows import EncodedRows
from guidetune.errors import BadInput
from tests.data.chats import chat_of


def rows_file(folder: Path, rows: list[Any], name: str = "train.jsonl") -> dict[str, str]:
    with open(folder / name, "w", encoding="utf-8") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return {"path": name}


def good(k: int) -> dict[str, str]:
    return {"prompt": f"question {k}", "completion": f"answer {k}"}


def run(folder: Path, rows: list[Any], chat: Chat, operations: list[Any] = (), name: str = "out", **settings: Any) -> Any:
    return prepare([rows_file(folder, rows)], operations, chat, PrepareSettings(**settings), folder / name, folder)


def test_every_row_is_in_the_ledger(tmp_path: Path, chat: Chat) -> None:
    long = {"prompt": "word " * 300, "completion": "ok"}
    hopeless = {"prompt": "q", "completion": "word " * 300}
    rows = [good(0), "{broken", good(1), {"foo": 1}, {"prompt": "a", "completion": ""}, {"prompt": "a\ud800", "completion": "b"}]
    rows += [long, hopeless, {"prompt": "a", "completion": 5}, "[1]", good(2)]
    result = run(tmp_path, rows, chat, max_length=200)
    totals = json.loads((result.path / "ledger.json").read_text())
    assert totals["read"] == 11 == totals["used"] + sum(totals["dropped"].values())
    assert totals["used"] == 4 and totals["cut"] == 1 and totals["ends_with_stop"] == 4
    assert totals["dropped"] == {
        "broken JSON": 1,
        "wrong columns": 1,
        "empty answer": 1,
        "lone surrogate": 1,
        "answer longer than max_length": 1,
        "content is not text": 1,
        "not a row": 1,
    }
    assert totals["examples"]["broken JSON"][0]["line"] == 2
    lines = [json.loads(line) for line in (result.path / "ledger.jsonl").read_text().splitlines()]
    assert sorted(line["line"] for line in lines) == list(range(1, 12))
    assert [line["outcome"] for line in sorted(lines, key=lambda x: x["line"])].count("dropped") == 7
    cut = next(line for line in lines if line["outcome"] == "cut")
    assert cut["line"] == 7 and cut["tokens_cut"] > 0
    stored = EncodedRows.open(result.path)
    assert len(stored) == 4 and stored.lengths.max() == 200 == totals["lengths"]["max"]
    assert int(stored.supervised.sum()) == totals["supervised_tokens"] and int(stored.lengths.sum()) == totals["tokens"]
    assert [r["id"] for r in read_records(result.path)] == stored.ids
    assert result.result == totals


def test_rows_are_what_chat_encodes(tmp_path: Path, chat: Chat) -> None:
    result = run(tmp_path, [good(k) for k in range(600)], chat)
    stored = EncodedRows.open(result.path)
    for k, record in enumerate(read_records(result.path)):
        encoded = chat.encode(record["messages"])
        assert stored[k].input_ids.tolist() == encoded.input_ids
        assert (stored[k].loss_weight > 0).tolist() == encoded.target
        assert stored[k].loss_weight[0] == 0


def test_same_inputs_are_not_prepared_again(tmp_path: Path, chat: Chat) -> None:
    first = run(tmp_path, [good(0)], chat)
    bytes_before = (first.path / "rows.arrow").read_bytes()
    assert run(tmp_path, [good(0)], chat).reused
    assert not run(tmp_path, [good(0), good(1)], chat).reused
    again = run(tmp_path, [good(0)], chat)
    assert not again.reused and (again.path / "rows.arrow").read_bytes() == bytes_before
    assert not run(tmp_path, [good(0)], chat, max_length=100).reused
    assert not run(tmp_path, [good(0)], chat_of("llama3"), max_length=100).reused
    assert not run(tmp_path, [good(0)], chat_of("llama3"), ["deduplicate"], max_length=100).reused


def test_over_length_choices(tmp_path: Path, chat: Chat) -> None:
    rows = [good(0), {"prompt": "word " * 300, "completion": "ok"}]
    assert run(tmp_path, rows, chat, max_length=100).result["cut"] == 1
    dropped = run(tmp_path, rows, chat, max_length=100, over_length="drop").result
    assert dropped["dropped"] == {"longer than max_length": 1} and dropped["cut"] == 0
    with pytest.raises(BadInput, match=r"1 rows are longer than max_length 100") as error:
        run(tmp_path, rows, chat, max_length=100, over_length="refuse", name="refused")
    assert "train line 2" in str(error.value)
    assert not (tmp_path / "refused").exists()
    assert run(tmp_path, rows, chat, max_length=3000, over_length="refuse").result["used"] == 2


@pytest.mark.parametrize(("limit", "passes"), [(None, True), (2, True), (1, False), (0, False), (0.5, True), (0.4, False), (0.0, False)])
def test_max_dropped(tmp_path: Path, chat: Chat, limit: int | float | None, passes: bool) -> None:
    rows = [good(0), good(1), "{", "{"]
    if passes:
        assert run(tmp_path, rows, chat, max_dropped=limit).result["used"] == 2
    else:
        with pytest.raises(BadInput, match=r"2 of 4 rows are dropped, more than max_dropped .*broken JSON \(2\).*line 3"):
            run(tmp_path, rows, chat, max_dropped=limit)


def test_errors_before_work_starts(tmp_path: Path, chat: Chat) -> None:
    with pytest.raises(BadInput, match="columns .foo.*understood") as error:
        run(tmp_path, [{"foo": 1}] * 60, chat)
    assert not (tmp_path / "out").exists()
    rows_file(tmp_path, [{"foo": 1}], "a.jsonl")
    rows_file(tmp_path, [], "b.jsonl")
    with pytest.raises(BadInput) as error:
        prepare([{"path": "a.jsonl"}, {"path": "b.jsonl"}], [], chat, PrepareSettings(), tmp_path / "out", tmp_path)
    assert len(error.value.problems) == 2
    with pytest.raises(BadInput, match="no data at"):
        prepare([{"path": "none.jsonl"}], [], chat, PrepareSettings(), tmp_path / "out", tmp_path)
    with pytest.raises(BadInput, match="no data sources"):
        prepare([], [], chat, PrepareSettings(), tmp_path / "out", tmp_path)
    with pytest.raises(BadInput, match="did you mean 'deduplicate'"):
        run(tmp_path, [good(0)], chat, ["deduplicat"])
    with pytest.raises(BadInput, match=r"all 2 rows are dropped: empty answer \(2\)"):
        run(tmp_path, [{"prompt": "a", "completion": ""}] * 2, chat)
    with pytest.raises(BadInput, match="no system role"):
        run(tmp_path, [{"system": "s", "instruction": "a", "output": "b"}], chat_of("gemma"))


def test_sources_weights_names_and_limits(tmp_path: Path, chat: Chat) -> None:
    rows_file(tmp_path, [good(k) for k in range(5)], "a.jsonl")
    rows_file(tmp_path, [good(k) for k in range(5)], "b.jsonl")
    specs = [{"path": "a.jsonl", "limit": 2, "weight": 0.5}, {"path": "b.jsonl", "name": "second"}]
    result = prepare(specs, [], chat, PrepareSettings(), tmp_path / "out", tmp_path)
    stored = EncodedRows.open(result.path)
    assert stored.sources == ["a", "a", *["second"] * 5] and len(set(stored.ids)) == 7
    assert stored[0].loss_weight.max() == 0.5 and stored[6].loss_weight.max() == 1.0
    assert result.result["sources"]["a"]["read"] == 2 and result.result["sources"]["second"]["used"] == 5
    # The rows of one source do not depend on the other.
    alone = prepare(specs[1:], [], chat, PrepareSettings(), tmp_path / "alone", tmp_path)
    assert EncodedRows.open(alone.path).ids == stored.ids[2:]


def test_interrupted_work_leaves_nothing_under_the_final_name(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Chat, "encode_many", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, [good(0)], chat)
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, [good(0)], chat).result["used"] == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_deduplicate(tmp_path: Path, chat: Chat) -> None:
    rows = [good(0), good(1), good(0), {"prompt": "question 1", "completion": "other"}]
    totals = run(tmp_path, rows, chat, ["deduplicate"]).result
    assert totals["used"] == 3 and totals["dropped"] == {"duplicate": 1}
    totals = run(tmp_path, rows, chat, [{"method": "deduplicate", "by": "prompt"}]).result
    assert totals["used"] == 2 and totals["dropped"] == {"duplicate": 2}
    assert [r["messages"][0]["content"] for r in read_records(tmp_path / "out")] == ["question 0", "question 1"]


def test_sample(tmp_path: Path, chat: Chat) -> None:
    rows = [good(k) for k in range(100)]

    def sampled(seed: int, rows: list[Any] = rows, **options: Any) -> list[str]:
        result = run(tmp_path, rows, chat, [{"method": "sample", **options}], seed=seed)
        totals = result.result
        assert totals["read"] == len(rows) == totals["used"] + totals["dropped"].get("not sampled", 0)
        return [r["messages"][0]["content"] for r in read_records(result.path)]

    ten = sampled(1, n=10)
    assert len(ten) == 10 and ten == sampled(1, n=10) and ten != sampled(2, n=10)
    assert ten == sorted(ten, key=lambda text: int(text.split()[1]))
    assert set(ten) < set(sampled(1, n=20))
    assert len(sampled(1, n=500)) == 100
    half = sampled(1, fraction=0.5)
    assert 30 < len(half) < 70 and sampled(1, fraction=1.0) == [r["prompt"] for r in rows]
    # A row's fate does not depend on the rows around it.
    assert sampled(1, rows[:50], fraction=0.5) == [text for text in half if int(text.split()[1]) < 50]
    with pytest.raises(BadInput, match="either n or fraction"):
        sampled(1)


def test_operations_in_a_row(tmp_path: Path, chat: Chat) -> None:
    rows = [good(k % 10) for k in range(40)]
    totals = run(tmp_path, rows, chat, ["deduplicate", {"method": "sample", "n": 4}]).result
    assert totals["used"] == 4 and totals["dropped"] == {"duplicate": 30, "not sampled": 6}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ledger.json",
        "ledger.jsonl",
        "manifest.json",
        "prompts.index",
        "records.jsonl",
        "rows.arrow",
        "rows.index",
        "tokenizer.json",
    ]


def test_control_tokens_in_the_text_are_counted(tmp_path: Path, chat: Chat) -> None:
    totals = run(tmp_path, [good(0), {"prompt": "what is <|im_end|>?", "completion": "a token"}], chat).result
    assert totals["control_text"] == 1 and totals["used"] == 2 and not totals["dropped"]
    assert "<|im_end|>" in totals["examples"]["control token in the text"][0]["why"]


def test_leaks(tmp_path: Path, chat: Chat) -> None:
    result = run(tmp_path, [good(k) for k in range(5)], chat)
    found = leaks(result.path, ["question 3 ", "question 9", ""])
    assert found.rows == 1 and [leak.text for leak in found.examples] == ["question 3"]
    assert found.examples[0].id == EncodedRows.open(result.path).ids[3]
    assert leaks(result.path, []).rows == leaks(result.path, ["question"]).rows == 0


def test_leaks_are_counted_by_row_not_by_turn(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(*asked: str) -> dict[str, Any]:
        return {"messages": [m for a in asked for m in ({"role": "user", "content": a}, {"role": "assistant", "content": "ok"})]}

    result = run(tmp_path, [talk("a", "b"), talk("c"), talk("b", "b", "a"), talk(" a\n")], chat)
    for scan in (1 << 20, 1, 2, 3):
        monkeypatch.setattr("guidetune.data.prepare._SCAN", scan)
        assert leaks(result.path, ["a", "b"]).rows == 3 and leaks(result.path, ["c ", "z"]).rows == 1
    found = leaks(result.path, ["a"])
    ids = EncodedRows.open(result.path).ids
    assert found.examples == [(ids[0], "a"), (ids[2], "a"), (ids[3], "a")]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_quantiles_from_a_histogram_are_those_of_the_lengths(lengths: list[int]) -> None:
    exact = np.percentile(lengths, [50, 95], method="inverted_cdf").astype(int).tolist()
    assert list(_quantiles(np.bincount(lengths)).values()) == [*exact, max(lengths)]


_message = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["user", "assistant"]),
    st.text(max_size=20),
    st.sampled_from([{}, {"train": False}]),
)


@given(messages=st.lists(_message, max_size=3), id=st.text(max_size=8))
def test_text_is_written_as_json_writes_it(messages: list[dict[str, Any]], id: str) -> None:
    values = {"id": id, "source": "s", "messages": messages}
    assert _line(Record(**values)) == json.dumps(values, ensure_ascii=False) + "\n"
    assert content_key(messages) == json.dumps([[m["role"], m["content"]] for m in messages])


MEMORY = """
import json, sys
from pathlib import Path
from guidetune.data.prepare import PrepareSettings, prepare
from tests.data.chats import chat_of

place, rows = Path(sys.argv[1]), int(sys.argv[2])
with open(place / "x.jsonl", "w") as file:
    for k in range(rows):
        own = f"row-{k}" if k % 2 else None
        print(json.dumps({"id": own, "prompt": f"question {k % 100}", "completion": f"answer {k}"}), file=file)
used = prepare([{"path": "x.jsonl"}], json.loads(sys.argv[3]), chat_of("chatml"), PrepareSettings(), place / "out", place).result["used"]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([used, int(status["VmHWM"].split()[0]) * 1024]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "operations",
    [
        ["deduplicate"],
        [{"method": "template", "templates": {"t": {"user": "Say {prompt}", "assistant": "{completion}"}}}, {"method": "mix"}],
    ],
)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, operations: list[Any]) -> None:
    peaks = {}
    for rows in (20_000, 200_000):
        (tmp_path / str(rows)).mkdir()
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(rows)), str(rows), json.dumps(operations)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        used, peaks[rows] = json.loads(done.stdout)
        assert used == rows
    growth = (peaks[200_000] - peaks[20_000]) / 180_000
    # 11 to 22 bytes per row of hash table are mapped for the ids, twice that for the duplicates; Python sets of them took 200.
    # mix holds 4 for each row's member and 16 for each that it draws
    assert growth < 80, f"{growth:.0f} bytes per row"


def test_view_and_export(tmp_path: Path, chat: Chat) -> None:
    from rich.console import Console

    from guidetune.guidance.store import Guidance

    result = run(tmp_path, [good(0), {"prompt": "naïve 東京", "completion": "two\nlines\x07 😀"}, "{"], chat)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view.audit(result.path, show=2, test_texts=["question 0"]))
    text = console.export_text()
    assert "▶answer 0<|im_end|>◀" in text and "▶two⏎\nlines\\x07 😀<|im_end|>◀" in text
    assert "dropped 1: broken JSON" in text and "line 3" in text and "prompt of the test set: 1" in text

    rows = EncodedRows.open(result.path)
    counts = rows.supervised
    guidance = Guidance(np.full(int(counts.sum()), -0.5, np.float16), np.concatenate([[0], np.cumsum(counts)]))
    assert view.export_rows(result.path, chat.tokenizer, tmp_path / "x" / "rows.jsonl", guidance) == 2
    lines = [json.loads(line) for line in (tmp_path / "x" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, row in zip(lines, rows, strict=True):
        assert line["id"] == row.id and len(line["input_ids"]) == len(line["loss_weight"]) == len(row.input_ids)
        assert "".join(p["text"] for p in line["pieces"]) == chat.tokenizer.decode(row.input_ids)
        assert len(line["log_prob"]) == sum(w > 0 for w in line["loss_weight"])
    assert lines[1]["pieces"][1] == {"text": "two\nlines\x07 😀<|im_end|>", "supervised": True}
    assert view.export(result.path, tmp_path / "y.jsonl") == 2
    texts = view.TokenTexts(result.path)
    assert "".join(texts.tokens(rows[1].input_ids)) == texts.text(rows[1].input_ids)


@pytest.mark.parametrize(
    ("path", "mapping", "used"),
    [
        ("gsm8k/train.jsonl.gz", {"user": "question", "assistant": "answer"}, 60),
        ("gsm8k/test.jsonl", {}, 60),
        (
            "medmcqa/dev_single_choice.jsonl",
            {"user": "{question}\nA. {options[A]}\nB. {options[B]}\nC. {options[C]}\nD. {options[D]}\nAnswer:", "assistant": "answer_idx"},
            60,
        ),
        ("dolly_hhrlhf/train_small.jsonl.gz", {}, 60),
        ("toolcall_demo/glaive_toolcall_en_demo.json.gz", {}, 60),
        ("phased/numina_cot_2k.jsonl", {}, 60),
        ("alpaca/alpaca_en_demo.json", {}, 60),
        ("truthfulqa/fold_0_train.csv", {"user": "Question", "assistant": "Best Answer"}, 60),
        ("preference_demo/dpo_en_demo.json.gz", {"user": "conversations[0].value", "assistant": "chosen.value"}, 60),
    ],
)
def test_real_files(tmp_path: Path, shared_data: Path, path: str, mapping: dict[str, str], used: int) -> None:
    spec = {"path": path, "map": mapping, "limit": 60}
    settings = PrepareSettings(max_length=20_000, over_length="refuse", max_dropped=0)
    totals = prepare([spec], [], chat_of("llama3"), settings, tmp_path / "out", shared_data).result
    assert totals["used"] == used == totals["ends_with_stop"] and not totals["dropped"] and not totals["cut"]
