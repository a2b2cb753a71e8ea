"""What holds for every registered operation: a new one is tested by being there. One that needs options has a row in `SETTINGS`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guidetune import registry, yaml12
from guidetune.data.prepare import COLUMNS, PrepareSettings, prepare, read_records
from guidetune.data.records import Record
from guidetune.data.rows import EncodedRows
from guidetune.data.side import SideTable, SideWriter
from guidetune.errors import BadInput, RunFailed
from tests.data.chats import chat_of
from tests.data.operating import conversation, operate

EVERY = registry.names("operation")
_TEMPLATES = {"plain": {"user": "{user}", "assistant": "{assistant}"}, "asked": {"user": "Q: {user}", "assistant": "{assistant}"}}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "annotate": [{"append": "!", "when": "score > 0.3"}, {"put": {"language": "es"}}],
    "deduplicate": [{}, {"by": "prompt"}, {"near": {"n": 2, "threshold": 0.9}}],
    "demonstrate": [
        {"k": {0: 1, 2: 1}},
        {"k": 2, "retrieve": "nearest", "keep_zero_shot": True},
        {"retrieve": "fixed", "form": "text"},
        {"pool": "pool.jsonl", "retrieve": "nearest"},
    ],
    "join": [{"path": "scores.parquet"}, {"path": "scores.parquet", "missing": "drop"}],
    "mix": [{"rows": 50}, {"weights": "equal"}, {"outer": {"g": 1, "h": 2}, "cap": 10}, {"tokens": 900}],
    "order": [{"shuffle": True}, {"by": "score"}, {"by": "score", "cuts": [0.5], "shuffle": True}, {"phases": ["source == a"]}],
    "overlap": [{"against": ["pool.jsonl"]}, {"against": ["pool.jsonl"], "on_hit": "drop", "n": 2}],
    "sample": [{"n": 10}, {"fraction": 0.5}],
    "score": [{"scorer": {"method": "column", "column": "score"}, "to": "d"}, {"scorer": {"method": "length", "of": "row"}}],
    "select": [
        {"by": "score", "top": 5, "per": "source"},
        {"prefix": 0.5, "per": "source", "shuffled": True},
        {"by": "score", "threshold": 0.5},
    ],
    "split": [{"sizes": {"test": 0.3, "train": "rest"}}, {"sizes": {"test": 2, "train": "rest"}, "per": "source", "shuffled": True}],
    "template": [{"templates": _TEMPLATES}, {"templates": _TEMPLATES, "choose": "all", "cap": 7}],
}  # fmt: skip
CASES = [(name, options) for name in EVERY for options in SETTINGS.get(name, [{}])]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    lines = [{"prompt": f"pool {k} of some words", "completion": "fine"} for k in range(8)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with SideWriter(tmp_path / "scores.parquet", {"loss": float, "said": str}) as out:
        ids = [f"{s}{k}" for s in "ab" for k in range(0, 20, 2)]
        out.write(ids, loss=[len(id) * 0.1 for id in ids], said=ids)
    return tmp_path


def rows(other: str = "") -> list[Record]:
    """20 rows of each of two sources; `other` is said by the second one's besides."""
    out = []
    for source, group, more in (("a", "g", ""), ("b", "h", other)):
        for k in range(20):
            text = f"{more}what is {source} {k} {'and so on' * (k % 3)}"
            fields = {"group": group, "task": f"{source}{k % 4}"}
            out.append(conversation(f"{source}{k}", source, text, f"{more}answer {k}", fields=fields, scores={"score": (k * 7 % 20) / 20}))
    return out


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_row_is_accounted_for_and_every_id_can_be_traced(name: str, options: dict[str, Any], place: Path) -> None:
    given = rows()
    done = operate({"method": name, **options}, given, place)  # fails when the numbers do not add up
    ids = [record.id for record in done.records]
    assert len(set(ids)) == len(ids)
    known = {record.id: record for record in given}
    for record in done.records:
        assert record.origin in known and record.source == known[record.origin].source and record.line == known[record.origin].line
        assert (record.of == "") == (record.id in known)
    assert {record.origin for record in done.records} | set(done.whys) == set(known)
    assert set(done.whys) & {record.origin for record in done.records} == set()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_same_seed_gives_the_same_bytes(name: str, options: dict[str, Any], place: Path) -> None:
    step = {"method": name, **options}
    first = operate(step, rows(), place, seed=7)
    assert repr(operate(step, rows(), place, seed=7).records) == repr(first.records)
    given = rows()
    operate(step, given, place)
    assert given == rows()  # records are not changed in place


@pytest.mark.parametrize(("name", "options"), CASES)
def test_another_source_changes_no_row(name: str, options: dict[str, Any], place: Path) -> None:
    step = {"method": name, **options}
    first, second = (
        {r.id: r for r in operate(step, given, place).records if r.source == "a"} for given in (rows(), rows("Something else. "))
    )
    assert first == second


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_row_of_no_row(name: str, options: dict[str, Any], place: Path) -> None:
    """An operation on nothing gives nothing, or says what is wrong."""
    try:
        assert operate({"method": name, **options}, [], place).records == []
    except BadInput as error:
        assert all(problem.strip() for problem in error.problems)


STRANGE = [
    "\x00\x07\x1b[31m control",
    "مرحبا بالعالم",
    "‮right to left override",
    "e\u0301 a\u0308 combining n\u0303",
    "𝕌𝕟𝕚𝕔𝕠𝕕𝕖 👩‍👩‍👧‍👦",
    "  \t\n ",
    "",
    "lone \ud800 surrogate",
    "{braces} {",
    "東京タワー" * 30,
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_strange_text_and_scores_are_rows_or_ledger_lines(name: str, options: dict[str, Any], place: Path) -> None:
    scores = [0.5, math.nan, math.inf, -math.inf, 0.0]
    strange = [
        Record(f"x{k}", "a", [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} yes"}], k, fields={"group": "g"},
               scores={"score": scores[k % 5]} if k % 4 else {})
        for k, text in enumerate(STRANGE)
    ]  # fmt: skip
    done = operate({"method": name, **options}, [*rows(), *strange], place)
    assert {r.origin for r in done.records} | set(done.whys) == {r.id for r in [*rows(), *strange]}


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", EVERY)
def test_any_texts(name: str, place: Path, data: st.DataObject) -> None:
    options = data.draw(st.sampled_from(SETTINGS.get(name, [{}])))
    texts = data.draw(st.lists(st.text(max_size=30), min_size=1, max_size=8))
    given = [
        conversation(f"r{k}", "ab"[k % 2], text or " ", fields={"group": "gh"[k % 2]}, scores={"score": 0.5})
        for k, text in enumerate(texts)
    ]
    try:
        done = operate({"method": name, **options}, given, place)
    except BadInput as error:
        assert error.problems
    else:
        assert {r.origin for r in done.records} | set(done.whys) == {r.id for r in given}


# From files to encoded rows


def lines(place: Path, name: str, values: list[Any]) -> str:
    text = "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values)
    (place / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return name


CHAIN: list[Any] = [
    {"method": "deduplicate", "near": {}},
    {"method": "template", "templates": {t: {"user": f"{t}: {{q}}?", "assistant": "{a}"} for t in "tu"}, "choose": "all"},
    {"method": "demonstrate", "k": {0: 1, 1: 1}, "within": "source"},
    {"method": "order", "by": "n", "cuts": [5], "shuffle": True},
    {"method": "mix", "weights": "equal", "rows": 60},
]  # fmt: skip


def test_a_chain_of_operations_and_what_is_kept_beside_the_rows(place: Path) -> None:
    specs = []
    for name, size in (("x", 30), ("y", 12)):
        said = [f"{name} {k * 7919 % 997} {k * 104729 % 991} {k}" for k in range(size)]
        file = lines(place, f"{name}.jsonl", [{"id": f"{name}{k}", "q": q, "a": k, "n": k} for k, q in enumerate(said)])
        specs.append({"path": file, "columns": {"n": "n"}, "tags": {"language": "es"}})
    done = prepare(specs, CHAIN, chat_of("chatml"), PrepareSettings(), place / "out", place)
    totals, encoded = done.result, EncodedRows.open(done.path)
    assert totals["read"] + totals["made"] == totals["used"] + sum(totals["dropped"].values()) and totals["used"] == 60
    for name in ("x", "y"):
        tally = totals["sources"][name]
        assert tally["read"] + tally["made"] == tally["used"] + sum(tally["dropped"].values()) and tally["used"] == 30
    parts = totals["operations"]
    assert [part["method"] for part in parts] == [step["method"] for step in CHAIN]
    assert all(a["out"] == b["in"] for a, b in zip(parts, parts[1:], strict=False)) and parts[1]["made"] == 42
    assert parts[1]["examples"][0]["after"] == [["user", "t: x 0 0 0?"], ["assistant", "0"]]
    side = SideTable.open(done.path / COLUMNS)
    assert list(side.ids()) == encoded.ids == [r["id"] for r in read_records(done.path)]
    phases, present = side.numbers("phase")
    assert present.all() and set(phases) == {0, 1} and set(side.values("language", encoded.ids)) == {"es"}
    assert all(v.split("@")[0] in "tu" for v in side.values("template", encoded.ids))
    of = {line["id"]: line.get("of", line["id"]) for line in map(json.loads, (done.path / "ledger.jsonl").read_text().splitlines())}
    assert set(of.values()) == {f"{s}{k}" for s, n in (("x", 30), ("y", 12)) for k in range(n)}
    again = prepare(specs, CHAIN, chat_of("chatml"), PrepareSettings(), place / "again", place)
    assert (again.path / "rows.arrow").read_bytes() == (done.path / "rows.arrow").read_bytes()
    assert not [p.name for p in done.path.iterdir() if p.name.startswith(".")]


def test_without_options_the_rows_are_those_of_plain_tuning(place: Path) -> None:
    file = lines(place, "x.jsonl", [{"prompt": f"q{k}", "completion": f"a{k}"} for k in range(20)])
    plain = prepare([file], [], chat_of("llama3"), PrepareSettings(), place / "plain", place)
    through: list[Any] = [
        {"method": "template", "templates": {"t": {"user": "{user}", "assistant": "{assistant}"}}},
        {"method": "demonstrate", "k": 0},
        {"method": "mix"},
    ]
    done = prepare([file], through, chat_of("llama3"), PrepareSettings(), place / "through", place)
    assert EncodedRows.open(done.path).digest == EncodedRows.open(plain.path).digest


POISON: list[Any] = [
    {"q": "fine", "a": "yes", "id": 1},
    {"q": 5, "a": 1.5, "id": 1},
    {"q": None, "a": "x"},
    {"q": ["list"], "a": {"object": 1}},
    {"q": True, "a": False},
    {"a": "no question"},
    {},
    "[1, 2]",
    "{broken",
    '{"q": "nan", "a": NaN}',
    {"q": "words " * 20_000, "a": "longer than any row"},
    {"q": "control \x00\x1b", "a": "yes"},
    {"q": "مرحبا \u202e", "a": "e\u0301"},
    {"q": "deep", "a": "yes", "n": json.loads("[" * 60 + "]" * 60)},
    '{"q": "lone \\ud800", "a": "yes"}',
]


def test_poisoned_rows_end_as_ledger_lines(place: Path) -> None:
    spec = {"path": lines(place, "x.jsonl", POISON), "columns": {"n": "n"}, "tags": {"group": "g"}}
    with pytest.raises(BadInput, match="columns: n: no 'n' in the first") as caught:
        prepare(
            [{**spec, "path": lines(place, "y.jsonl", POISON[:6])}], CHAIN[1:2], chat_of("chatml"), PrepareSettings(), place / "o", place
        )
    assert caught.value.problems
    steps = [CHAIN[0], CHAIN[1], CHAIN[2], "mix"]
    done = prepare([spec], steps, chat_of("chatml"), PrepareSettings(max_length=256), place / "out", place)
    totals = done.result
    assert totals["read"] == len(POISON) and totals["read"] + totals["made"] == totals["used"] + sum(totals["dropped"].values())
    dropped = {
        line["line"]: line["reason"]
        for line in map(json.loads, (done.path / "ledger.jsonl").read_text().splitlines())
        if line["outcome"] == "dropped"
    }
    assert dropped[3] == dropped[4] == dropped[5] == dropped[6] == "no template fits" and dropped[9] == "broken JSON"
    assert dropped[8] == "not a row" and dropped[14] == "content is not text" and dropped[15] == "lone surrogate"
    assert {record["id"].split("~")[0] for record in read_records(done.path)} >= {"1"}
    for empty in ([], ["", "  "]):
        with pytest.raises(BadInput, match="empty|no rows"):
            prepare([lines(place, "e.jsonl", empty)], CHAIN, chat_of("chatml"), PrepareSettings(), place / "e", place)


@pytest.mark.slow
def test_a_row_of_ten_megabytes_is_cut_or_dropped(place: Path) -> None:
    file = lines(place, "x.jsonl", [{"prompt": "some words " * 1_000_000, "completion": "a"}, {"prompt": "q", "completion": "a"}])
    steps = [{"method": "deduplicate", "near": {}}, "mix"]
    done = prepare([file], steps, chat_of("chatml"), PrepareSettings(max_length=256, over_length="drop"), place / "out", place)
    assert done.result["dropped"] == {"longer than max_length": 1} and done.result["used"] == 1
    file = lines(place, "x.jsonl", [{"prompt": "some words " * 50_000, "completion": "a"}, {"prompt": "q", "completion": "a"}])
    done = prepare([file], steps, chat_of("chatml"), PrepareSettings(max_length=256), place / "out", place)
    assert done.result["used"] == 2 and done.result["cut"] == 1 and EncodedRows.open(done.path).lengths.max() == 256


def test_what_is_learnt(place: Path) -> None:
    talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second"))]
    file = lines(place, "x.jsonl", [{"messages": talk}])
    chat = chat_of("chatml")

    def learnt(loss_on: str, source: str | None = None) -> str:
        done = prepare([{"path": file, "loss_on": source}], [], chat, PrepareSettings(loss_on=loss_on), place / "out", place)  # type: ignore[arg-type]
        row = EncodedRows.open(done.path)[0]
        assert row.loss_weight[0] == 0
        return chat.tokenizer.decode(row.input_ids[row.loss_weight > 0])

    assert learnt("assistant") == "first<|im_end|>second<|im_end|>" and learnt("target") == "second<|im_end|>"
    whole = chat.render(talk).rstrip("\n")
    assert whole.endswith(learnt("all")) and len(learnt("all")) > len(whole) - 15
    assert learnt("all", "target") == "second<|im_end|>"


def test_the_examples_of_the_docs_can_be_written_so() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)^    - (?:\{method: .*|method: .*(?:\n      .*)*)", text)
    built = [registry.build("operation", spec) for block in blocks for spec in yaml12.load(block)]
    assert {step.name for step in built} == set(EVERY)


CARELESS = """
from itertools import islice
from guidetune.data.operations import Operation
from guidetune.registry import method


@method(kind="operation", name="careless", summary="Loses rows.")
class Careless(Operation):
    streams = {streams}

    def apply(self, rows, context):
        {body}
"""


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "body", ["yield from islice(rows, 3)", "yield from [*rows] * 2", "yield from [r for r in rows if r.line]", "yield from ()"]
)
def test_an_operation_that_loses_or_invents_rows_is_found_out(place: Path, body: str, streams: bool) -> None:
    (place / "own.py").write_text(CARELESS.format(body=body, streams=streams))
    with pytest.raises(RunFailed, match="it must account for all"):
        operate(str(place / "own.py"), rows(), place)


def test_an_own_operation_may_make_rows_and_give_scores(place: Path) -> None:
    body = "\n        ".join(["for record in rows:", "    yield record", "    yield context.copy(record, 'again', phase=1)"])
    (place / "own.py").write_text(CARELESS.format(body=body, streams=True))
    done = operate(str(place / "own.py"), rows(), place)
    assert done.made == 40 and [r.phase for r in done.records] == [0, 1] * 40 and done.records[1].id == "a0~again"
