"""What each operation does to rows; what holds for all of them is in test_operation_contract.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidetune import registry
from guidetune.data.conditions import parse
from guidetune.data.neighbours import embed, nearest
from guidetune.data.ngrams import bands, ngrams, signatures, words
from guidetune.data.records import Record, slots
from guidetune.data.side import EmbeddingsWriter, SideWriter
from guidetune.errors import BadInput
from tests.data.operating import Done, conversation, operate


def said(record: Record) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in record.messages]


def row(id: str, **fields: Any) -> Record:
    return Record(id, "s", [], fields=fields)


QUESTION = {"user": "Q: {question}\n", "assistant": " {answer}"}


# template


def test_verbalisations_and_their_versions(tmp_path: Path) -> None:
    templates = {
        "plain": {"user": "{question}", "assistant": "{answer}"},
        "long": {**QUESTION, "system": "Answer {kind}.", "when": "n > 1"},
    }
    rows = [row("a", question="2+2?", answer="4", kind="well", n=1), row("b", question="x", answer=7, kind="badly", n="2\n")]
    done = operate({"method": "template", "templates": templates, "choose": "all"}, rows, tmp_path)
    assert [r.id for r in done.records] == ["a", "b", "b~long"] and done.made == 1
    assert said(done.records[0]) == [("user", "2+2?"), ("assistant", "4")]
    assert said(done.records[2]) == [("system", "Answer badly."), ("user", "Q: x"), ("assistant", "7")]
    assert done.records[2].of == "b" and done.records[2].fields["template"].startswith("long@")
    renamed = registry.build("operation", {"method": "template", "templates": {"plain": {**templates["plain"], "user": "{question} "}}})
    assert renamed.templates["plain"].version != done.records[0].fields["template"].split("@")[1]
    assert set(done.facts["templates"].values()) == {2, 1}


def test_which_template_a_row_gets(tmp_path: Path) -> None:
    rows = [row(f"r{k}", question=f"q{k}", answer="a") for k in range(200)]
    templates = {name: {"user": name + " {question}", "assistant": "{answer}"} for name in ("x", "y")}

    def drawn(**options: Any) -> list[str]:
        done = operate({"method": "template", "templates": templates, **options}, rows, tmp_path)
        assert len(done.records) == 200
        return [r.messages[0]["content"][0] for r in done.records]

    assert 70 < drawn().count("x") < 130 and drawn() == drawn()
    assert set(drawn(choose="y")) == {"y"} and set(drawn(choose="first")) == {"x"}
    with pytest.raises(BadInput, match="did you mean 'x'|choose is all"):
        drawn(choose="xx")


def test_rows_that_no_template_fits_and_caps(tmp_path: Path) -> None:
    rows = [row(f"r{k}", question=f"q{k}", answer="a") for k in range(50)]
    bad = [row("none", question="q"), row("null", question="q", answer=None), row("empty", question="q", answer=" "),
           row("list", question=["q"], answer="a"), row("flag", question=True, answer="a")]  # fmt: skip
    step = {"method": "template", "templates": {"t": QUESTION}, "cap": 20}
    done = operate(step, rows + bad, tmp_path)
    assert done.dropped == {"over the template's cap": 30, "no template fits": 5}
    assert done.whys["none"] == "t: no column 'answer'" and done.whys["null"] == "t: answer is missing"
    assert done.whys["empty"] == "t: answer is empty" and done.whys["list"] == "t: question is list, not text"
    ids = [r.id for r in done.records]
    assert len(ids) == 20 and ids != [f"r{k}" for k in range(20)]  # not simply the first ones
    assert operate({**step, "cap": 50}, rows, tmp_path).records == operate({**step, "cap": None}, rows, tmp_path).records
    assert set(ids) == {r.id for r in operate(step, rows[::-1], tmp_path).records}


def test_several_right_answers(tmp_path: Path) -> None:
    rows = [row(f"r{k}", question="q", answer=["one", "two", 3]) for k in range(60)]
    done = operate({"method": "template", "templates": {"t": QUESTION}}, rows, tmp_path)
    for record in done.records:
        assert record.fields["references"] == ["one", "two", "3"]
        assert record.messages[1]["content"] == record.fields["references"][record.fields["gold"]]
    assert {r.fields["gold"] for r in done.records} == {0, 1, 2}
    first = operate({"method": "template", "templates": {"t": QUESTION}, "golds": "first"}, rows, tmp_path)
    assert {r.fields["gold"] for r in first.records} == {0}


def test_a_conversation_may_be_said_anew(tmp_path: Path) -> None:
    step = {"method": "template", "templates": {"t": {"user": "Translate: {user}", "assistant": "{assistant}!"}}}
    assert said(operate(step, [conversation("a")], tmp_path).records[0]) == [("user", "Translate: question of a"), ("assistant", "yes!")]


_plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), max_size=12)


@given(
    parts=st.lists(st.tuples(_plain, st.sampled_from(["a", "b", "c[0]", "c[1].d"])), max_size=5),
    end=_plain,
    values=st.lists(_plain, min_size=4, max_size=4),
)
def test_any_template_says_what_its_columns_say(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, str]], end: str, values: list[str]
) -> None:
    a, b, c0, d = values
    known = {"a": a, "b": b, "c[0]": c0, "c[1].d": d}
    text = "".join(f"{literal}{{{name}}}" for literal, name in parts) + end
    expected = "".join(literal + known[name] for literal, name in parts) + end
    step = {"method": "template", "templates": {"t": {"user": text, "assistant": "ok"}}, "strip": False}
    place = tmp_path_factory.getbasetemp() / "any"
    place.mkdir(exist_ok=True)
    done = operate(step, [row("r", a=a, b=b, c=[c0, {"d": d}])], place)
    if expected.strip() and all(known[name].strip() for _, name in parts):
        assert done.records[0].messages[0]["content"] == expected
    else:
        assert done.dropped == {"no template fits": 1}
    assert "".join(lit + (f"{{{name}}}" if name else "") for lit, name in slots(text)) == text


@pytest.mark.parametrize("text", ["{", "}", "{}", "{a!r}", "{a:>3}"])
def test_a_template_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadInput, match="templates.t.user"):
        registry.build("operation", {"method": "template", "templates": {"t": {"user": text, "assistant": "x"}}})


# conditions


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("score > 0.6", True), ("score >= 0.7", True), ("score < 0.7", False), ("score == 0.70", True), ("score != 0.7", False),
        ("language == es", True), ("language in [es, 'pt']", True), ("language not in [es]", False), ("language != pt", True),
        ("nothing == es", False), ("nothing != es", False), ("nothing not in [es]", False), ("nothing is missing", True),
        ("language is present and score > 0.5", True), ("language is present and score > 0.9", False),
        ("language > 3", False), ("nan > 0", False), ("nan is present", True), ("user contains of", True), ("source == s", True),
        ("text_score >= 4", True), ("null is missing", True), ("n == 2", True), ("options[B] == two", True),
    ],
)  # fmt: skip
def test_conditions(text: str, holds: bool) -> None:
    fields = {"language": "es", "text_score": "4\n\n", "null": None, "n": 2, "options": {"A": "one", "B": "two"}}
    assert parse(text)(conversation("a", fields=fields, scores={"score": 0.7, "nan": float("nan")})) is holds


@pytest.mark.parametrize("text", ["", "score", "score >", "score > high", "a in b", "a is there", "> 3"])
def test_conditions_that_are_none(text: str) -> None:
    with pytest.raises(BadInput):
        parse(text)


# annotate


def test_text_is_added_where_the_condition_holds(tmp_path: Path) -> None:
    rows = [conversation("a", scores={"s": 0.9}), conversation("b", scores={"s": 0.1}), conversation("c")]
    done = operate({"method": "annotate", "when": "s > 0.6", "append": " [IND]", "put": {"language": "es"}, "weight": 0.5}, rows, tmp_path)
    assert [r.messages[0]["content"].endswith(" [IND]") for r in done.records] == [True, False, False]
    assert done.records[0].fields == {"language": "es"} and done.records[0].weight == 0.5 and done.records[1:] == rows[1:]
    assert done.facts == {"edited": 1}
    done = operate({"method": "annotate", "prepend": "Be brief.", "to": "system"}, rows[:1], tmp_path)
    assert said(done.records[0])[0] == ("system", "Be brief.")


def test_options_are_permuted_with_their_label(tmp_path: Path) -> None:
    letters = [row(f"d{k}", options={"A": "w", "B": "x", "C": "y", "D": "z"}, gold="C") for k in range(40)]
    numbers = [row(f"l{k}", options=["w", "x", "y", "z"], gold=2) for k in range(40)]
    texts = [row(f"t{k}", options=["w", "x", "y", "z"], gold="y") for k in range(40)]
    bad = [row("bad", options=["w", "x"], gold="y"), row("one", options=["w"], gold=0)]
    done = operate({"method": "annotate", "permute": "options", "label": "gold"}, [*letters, *numbers, *texts, *bad], tmp_path)
    assert done.dropped == {"options cannot be permuted": 2}
    for record in done.records:
        options, gold = record.fields["options"], record.fields["gold"]
        assert (options[gold] if record.id[0] in "dl" else gold) == "y"
        assert sorted(options.values() if isinstance(options, dict) else options) == ["w", "x", "y", "z"]
    golds = [r.fields["gold"] for r in done.records if r.id[0] == "d"]
    assert set(golds) == set("ABCD")


# select


def chosen(tmp_path: Path, scores: list[Any], **options: Any) -> list[int]:
    rows = [conversation(f"{k}", fields={} if s is None else {"s": s}, source="ab"[k % 2]) for k, s in enumerate(scores)]
    return [int(r.id) for r in operate({"method": "select", **options}, rows, tmp_path).records]


def test_selection_by_score(tmp_path: Path) -> None:
    scores = [3, "1", 2.5, "4\n", 0, 4]
    assert chosen(tmp_path, scores, by="s", top=2) == [3, 5]
    assert chosen(tmp_path, scores, by="s", top=2, descending=False) == [1, 4]
    assert chosen(tmp_path, scores, by="s", top=1) == [3]  # of equal scores the earlier row
    assert chosen(tmp_path, scores, by="s", fraction=0.5) == [0, 3, 5]
    assert chosen(tmp_path, scores, by="s", threshold=2.5) == [0, 2, 3, 5]
    assert chosen(tmp_path, scores, by="s", threshold=2.5, descending=False) == [1, 2, 4]
    assert chosen(tmp_path, scores, by="s", top=1, per="source") == [0, 3]
    assert chosen(tmp_path, scores, by="s", top=100) == list(range(6))


def test_missing_is_not_nan(tmp_path: Path) -> None:
    scores = [1, None, float("nan"), "high", 2]
    assert chosen(tmp_path, scores, by="s", top=5) == [0, 4]
    assert chosen(tmp_path, scores, by="s", top=5, missing="keep") == [0, 1, 4]
    rows = [conversation(f"{k}", fields={} if s is None else {"s": s}) for k, s in enumerate(scores)]
    assert operate({"method": "select", "by": "s", "top": 5}, rows, tmp_path).dropped == {"no score": 1, "score is not a number": 2}
    with pytest.raises(BadInput, match="row '1' .* has no s"):
        chosen(tmp_path, scores, by="s", top=5, missing="refuse")
    with pytest.raises(BadInput, match="no row has a number as 't'"):
        chosen(tmp_path, scores, by="t", top=5)


def test_prefixes_are_nested(tmp_path: Path) -> None:
    scores = [None] * 100
    sizes = {n: chosen(tmp_path, scores, prefix=n, per="source", shuffled=True) for n in (1, 10, 30, 100)}
    assert [len(s) for s in sizes.values()] == [2, 20, 60, 100]
    assert all(set(sizes[a]) < set(sizes[b]) for a, b in ((1, 10), (10, 30), (30, 100)))
    assert chosen(tmp_path, scores, prefix=3) == [0, 1, 2] != sizes[1]
    assert len(chosen(tmp_path, [None] * 50, prefix=0.01)) == 1  # one per cent of 50 rows is one row


# order


def ordered(tmp_path: Path, scores: list[Any], **options: Any) -> Done:
    return operate({"method": "order", **options}, [conversation(f"{k}", scores={"s": s}) for k, s in enumerate(scores)], tmp_path)


def test_orders(tmp_path: Path) -> None:
    assert [r.id for r in ordered(tmp_path, [2, 3, 1, 3], by="s").records] == ["2", "0", "1", "3"]
    assert [r.id for r in ordered(tmp_path, [2, 3, 1, 3], by="s", descending=True).records] == ["1", "3", "0", "2"]
    shuffled = [r.id for r in ordered(tmp_path, [0] * 50, shuffle=True).records]
    assert shuffled != sorted(shuffled, key=int) and sorted(shuffled, key=int) == [str(k) for k in range(50)]
    assert shuffled == [r.id for r in ordered(tmp_path, [0] * 50, shuffle=True).records]


def test_cuts_are_a_partition(tmp_path: Path) -> None:
    done = ordered(tmp_path, [5.0, 1.0, 1.5, 3.5, 3.4, float("nan")], by="s", cuts=[1.5, 3.5])
    assert [(r.id, r.phase) for r in done.records] == [("1", 0), ("2", 1), ("4", 1), ("0", 2), ("3", 2)]
    assert done.facts == {"phases": [1, 2, 2], "edges": [1.5, 3.5]} and done.dropped == {"score is not a number": 1}
    thirds = ordered(tmp_path, list(range(90)), by="s", quantiles=[1 / 3, 2 / 3], shuffle=True)
    assert thirds.facts["phases"] == [30, 30, 30] and [r.phase for r in thirds.records] == sorted(r.phase for r in thirds.records)
    assert [int(r.id) for r in thirds.records[:30]] != list(range(30))


def test_phases_by_condition(tmp_path: Path) -> None:
    rows = [conversation(f"{k}", source="ab"[k % 2]) for k in range(6)] + [conversation("x", source="c")]
    done = operate({"method": "order", "phases": ["source == b", "source == a"]}, rows, tmp_path)
    assert [(r.id, r.phase) for r in done.records] == [("1", 0), ("3", 0), ("5", 0), ("0", 1), ("2", 1), ("4", 1)]
    assert done.dropped == {"in no phase": 1}
    for options in ({}, {"cuts": [2, 1], "by": "s"}, {"cuts": [1]}, {"by": "s", "shuffle": True}, {"quantiles": [2.0], "by": "s"}):
        with pytest.raises(BadInput):
            registry.build("operation", {"method": "order", **options})


# join


def test_join_by_id(tmp_path: Path) -> None:
    with SideWriter(tmp_path / "t.parquet", {"loss": float, "answer": str}, {"scorer": "x"}) as out:
        out.write(["b", "a"], loss=[float("nan"), 0.5], answer=["B", None])
    rows = [conversation("a"), conversation("b"), conversation("c"), conversation("a~2", of="a")]
    done = operate({"method": "join", "path": "t.parquet"}, rows, tmp_path)
    assert [r.scores.get("loss", "none") for r in done.records][::3] == [0.5, 0.5] and np.isnan(done.records[1].scores["loss"])
    assert done.records[2].scores == {} and done.records[1].fields == {"answer": "B"} and done.records[0].fields == {}
    assert done.facts["table"] == {"scorer": "x"}
    dropped = operate({"method": "join", "path": "t.parquet", "columns_as": {"loss": "l"}, "missing": "drop"}, rows, tmp_path)
    assert [r.id for r in dropped.records] == ["a", "b", "a~2"] and dropped.records[0].scores == {"l": 0.5}
    with pytest.raises(BadInput, match="has no row 'c'"):
        operate({"method": "join", "path": "t.parquet", "missing": "refuse"}, rows, tmp_path)


# demonstrate


def test_random_demonstrations(tmp_path: Path) -> None:
    rows = [conversation(f"r{k}", text=f"question {k // 2}", answer=f"a{k}") for k in range(40)]  # each text twice
    done = operate({"method": "demonstrate", "k": 3}, rows, tmp_path)
    for record in done.records:
        demos = record.fields["demos"]
        shown = [m["content"] for m in record.messages if m["role"] == "user"]
        assert len(set(demos)) == 3 and record.id not in demos
        assert shown[-1] not in shown[:-1]  # never one with the same text
        assert [m.get("train", True) for m in record.messages if m["role"] == "assistant"] == [False] * 3 + [True]
    assert len({tuple(r.fields["demos"]) for r in done.records}) > 30
    assert operate({"method": "demonstrate", "k": 0}, rows, tmp_path).records == rows
    none = operate({"method": "demonstrate", "k": {0: 1}}, rows, tmp_path)
    assert none.records == rows
    counts = operate({"method": "demonstrate", "k": {0: 0.5, 2: 0.5}}, rows, tmp_path).facts["demonstrations"]
    assert counts["k=0"] + counts["k=2"] == 40 and counts["k=0"] > 8 < counts["k=2"]


def test_fixed_demonstrations_of_a_group(tmp_path: Path) -> None:
    rows = [conversation(f"r{k}", fields={"task": "xy"[k % 2]}) for k in range(20)]
    done = operate({"method": "demonstrate", "k": 2, "retrieve": "fixed", "within": "task"}, rows, tmp_path)
    for task in "xy":
        sets = [tuple(r.fields["demos"]) for r in done.records if r.fields["task"] == task]
        assert max(sets.count(s) for s in sets) >= 8  # the same for all but the demonstrations themselves
        assert all(int(id[1:]) % 2 == "xy".index(task) for s in sets for id in s)


def test_one_shot_prompts_of_adaptive_mt(tmp_path: Path) -> None:
    pairs = [(f"el paciente {k} tiene {'fiebre' if k % 3 else 'tos'} desde hace {k} días", f"en {k}") for k in range(30)]
    rows = [
        Record(
            f"r{k}", "s", [{"role": "user", "content": f"Spanish: {es}\nEnglish:"}, {"role": "assistant", "content": en}], fields={"es": es}
        )
        for k, (es, en) in enumerate(pairs)
    ]
    pool = [{"es": es.upper() if k < 5 else es + " ya", "en": en} for k, (es, en) in enumerate(pairs)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pool), encoding="utf-8")
    spec = {"path": "pool.jsonl", "map": {"user": "Spanish: {es}\nEnglish:", "assistant": "{en}"}}
    step = {
        "method": "demonstrate",
        "retrieve": "nearest",
        "pool": spec,
        "on": "es",
        "keep_zero_shot": True,
        "form": "text",
        "between": " ",
        "separator": "\n",
    }
    done = operate(step, rows, tmp_path)
    zero, one = done.records[::2], done.records[1::2]
    assert len(done.records) == 60 == 2 * done.made and zero == rows
    for k, (a, b) in enumerate(zip(zero, one, strict=True)):
        before, after = a.messages[0]["content"], b.messages[0]["content"]
        assert after.endswith(before) and after.count("\n") == before.count("\n") + 2  # two lines in front
        assert b.of == a.id and b.messages[1] == a.messages[1] and b.scores["demo_distance"] > 0
        if k >= 5:
            assert f"{pairs[k][0]} ya" in after
        else:
            assert pairs[k][0].upper() not in after  # the same text, but for case, is no demonstration


def test_nearest_by_given_embeddings_equals_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [conversation(f"r{k}") for k in range(60)]
    vectors = rng.normal(size=(60, 8)).astype(np.float16)
    vectors[10:20] = vectors[10]  # equal ones: the first in the pool
    (tmp_path / "e").mkdir()
    with EmbeddingsWriter(tmp_path / "e", 8) as out:
        out.write([r.id for r in rows][::-1], vectors[::-1])
    done = operate({"method": "demonstrate", "retrieve": "nearest", "embeddings": "e", "k": 2}, rows, tmp_path)
    exact = ((vectors[:, None].astype(np.float64) - vectors[None].astype(np.float64)) ** 2).sum(-1)
    np.fill_diagonal(exact, np.inf)
    for k, record in enumerate(done.records):
        assert record.fields["demos"] == [f"r{p}" for p in np.argsort(exact[k], kind="stable")[:2]][::-1]
    far = operate({"method": "demonstrate", "retrieve": "nearest", "embeddings": "e", "min_distance": 2.0}, rows, tmp_path)
    assert all(r.scores["demo_distance"] >= 2.0 for r in far.records)


@given(data=st.data(), metric=st.sampled_from(["l2", "cosine"]))
def test_nearest_is_exact(data: st.DataObject, metric: str) -> None:
    q, p, d = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    queries, pool = (rng.integers(1, 4, (n, d)).astype(np.float32) for n in (q, p))  # many ties
    k = data.draw(st.integers(1, 5))
    places, distances = nearest(queries, pool, k, metric)  # type: ignore[arg-type]
    a, b = queries.astype(np.float64), pool.astype(np.float64)
    if metric == "cosine":
        a, b = ((x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (a, b))
    exact = ((a[:, None] - b[None]) ** 2).sum(-1) / (2 if metric == "cosine" else 1)
    for row in range(q):
        found = places[row][places[row] >= 0]
        assert len(found) == min(k, p) == len(set(found.tolist()))
        assert exact[row][found] == pytest.approx(np.sort(exact[row])[: len(found)], abs=1e-6)
        if metric == "l2":
            assert found.tolist() == np.argsort(exact[row], kind="stable")[: len(found)].tolist()
            assert distances[row][: len(found)] == pytest.approx(exact[row][found])


def test_demonstrations_that_are_too_long_are_left_out_first(tmp_path: Path) -> None:
    rows = [conversation(f"r{k}", text=f"{k} " + "word " * 60) for k in range(6)]
    done = operate({"method": "demonstrate", "k": 4}, rows, tmp_path, max_length=700)
    assert 0 < done.facts["demonstrations"]["left out for length"] < 24
    assert all(1 <= len(r.fields["demos"]) < 4 for r in done.records)


def test_hashed_embeddings_see_fuzzy_matches() -> None:
    a, b, c, none = embed(["The patient has a high fever", "the PATIENT had a high  fever!", "Stock markets fell today", ""])
    assert a @ b > 0.6 > 0.2 > abs(float(a @ c)) and not none.any() and np.linalg.norm(a) == pytest.approx(1)


# split


def test_shares_are_drawn_by_row_or_by_group(tmp_path: Path) -> None:
    rows = [conversation(f"r{k}", fields={"doc": f"d{k // 5}"}) for k in range(500)]
    step = {"method": "split", "sizes": {"test": 0.2, "train": "rest"}}
    done = operate(step, rows, tmp_path)
    held = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    kept = {r.id for r in done.records}
    assert 60 < len(held) < 140 and kept | {h["id"] for h in held} == {r.id for r in rows} and len(kept) + len(held) == 500
    assert held[0]["split"] == "test" and held[0]["messages"][0]["role"] == "user" and done.dropped == {"held out": len(held)}
    fewer = {r.id for r in operate(step, rows[:300], tmp_path).records}
    assert fewer == {id for id in kept if int(id[1:]) < 300}  # rows that go move no others
    done = operate({**step, "group": "doc"}, rows, tmp_path)
    held = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert held and {r.fields["doc"] for r in done.records}.isdisjoint(h["doc"] for h in held)


def test_the_first_rows_of_each_task(tmp_path: Path) -> None:
    rows = [conversation(f"{task}{k}", fields={"task": task}) for task, n in (("a", 200), ("b", 105)) for k in range(n)]
    step = {"method": "split", "sizes": {"test": 100, "validation": 10, "train": "rest"}, "per": "task"}
    done = operate(step, rows, tmp_path)
    assert [r.id for r in done.records] == [f"a{k}" for k in range(110, 200)]  # b is too small: it has none to train on
    assert done.facts["parts"] == {"test": 200, "validation": 15, "train": 90}
    both = operate({**step, "keep": ["train", "validation"], "shuffled": True}, rows, tmp_path)
    assert len(both.records) == 105 and [r.id for r in both.records][0] != "a100"


def test_levels_of_generalisation(tmp_path: Path) -> None:
    rows = [conversation(f"{c}{t}{k}", fields={"category": c, "task": f"{c}{t}"}) for c in "xyz" for t in "12" for k in range(40)]
    step = {
        "method": "split",
        "sizes": {"test": 10, "train": "rest"},
        "per": "task",
        "held_out_tasks": ["x1"],
        "held_out_categories": ["z"],
    }
    done = operate(step, rows, tmp_path)
    held = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    level = {h["task"]: h["level"] for h in held}
    expected = {"x1": "partially_supervised", "x2": "fully_supervised", "y1": "fully_supervised", "y2": "fully_supervised"}
    assert level == {**expected, "z1": "fully_held_out", "z2": "fully_held_out"}
    assert {r.fields["level"] for r in done.records} == {"train"}
    more = operate({**step, "held_out_categories": ["z", "y"]}, rows, tmp_path)
    again = {h["task"]: h["level"] for h in map(json.loads, (tmp_path / "held_out.jsonl").read_text().splitlines())}
    assert again == {**level, "y1": "fully_held_out", "y2": "fully_held_out"} and len(more.records) == 30
    alone = operate({**step, "held_out_tasks": ["x1", "x2"]}, rows, tmp_path)  # the last task of its category
    again = {h["task"]: h["level"] for h in map(json.loads, (tmp_path / "held_out.jsonl").read_text().splitlines())}
    assert again["x1"] == again["x2"] == "fully_held_out" and alone.records
    for sizes in ({"test": 0.4}, {"test": 1.4, "train": "rest"}, {"test": 10, "train": 0.5}, {"test": 10}, {"a": "rest", "b": "rest"}):
        with pytest.raises(BadInput):
            registry.build("operation", {"method": "split", "sizes": sizes, "keep": [next(iter(sizes))]})


# overlap


TWENTY = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split()


def test_runs_of_words_shared_with_a_test_set(tmp_path: Path) -> None:
    tests = [
        {"prompt": " ".join(TWENTY), "completion": "a"},
        {"prompt": "too short", "completion": "b"},
        {"prompt": "quite other", "completion": "c"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tests))
    rows = [
        conversation("planted", text="before it. " + ", ".join(w.upper() for w in TWENTY[2:15]) + " and after", source="a"),
        conversation("twelve", text=" ".join(TWENTY[:12]), source="a"),
        conversation("whole", text="Too  short!", source="b"),
        conversation("part", text="this is too short a text", source="b"),
        conversation("turned", text=" ".join(TWENTY[::-1]), source="b"),
    ]
    step = {"method": "overlap", "against": ["test.jsonl"], "on_hit": "drop"}
    done = operate(step, rows, tmp_path)
    assert [r.id for r in done.records] == ["twelve", "part", "turned"] and done.dropped == {"leaks test text": 2}
    assert done.facts["test_rows_met"] == {"a / test": {"met": 1, "share": 0.333333}, "b / test": {"met": 1, "share": 0.333333}}
    assert done.facts["too_short"] == {"test": 2} and done.facts["leaking_rows"] == {"a": 1, "b": 1}
    assert len(operate({**step, "on_hit": "report"}, rows, tmp_path).records) == 5
    with pytest.raises(BadInput, match=r"2 rows share 13 words.*\n.*id planted\) and test line 1\n.*\n.*on_hit: report"):
        operate({**step, "on_hit": "refuse"}, rows, tmp_path)
    assert len(operate({**step, "on_hit": "refuse"}, rows[1:2], tmp_path).records) == 1
    itself = [conversation(f"t{k}", text=t["prompt"], answer=t["completion"]) for k, t in enumerate(tests)]
    assert operate({**step, "on_hit": "report"}, itself, tmp_path).facts["test_rows_met"]["s / test"] == {"met": 3, "share": 1.0}


# near-duplicates


def test_near_duplicates_go(tmp_path: Path) -> None:
    text = " ".join(f"word{k}" for k in range(60))
    rows = [
        conversation("a", text=text, source="a"),
        conversation("same words", text=text.upper().replace(" ", "  "), source="b"),
        conversation("one changed", text=text.replace("word30", "other"), source="b"),
        conversation("half changed", text=" ".join(TWENTY) + text[200:], source="b"),
        conversation("other", text=" ".join(TWENTY), source="b"),
        conversation("empty", text="?!", source="b", answer="..."),
        conversation("empty too", text="!!", source="b", answer="."),
    ]
    done = operate({"method": "deduplicate", "near": {}}, rows, tmp_path)
    assert [r.id for r in done.records] == ["a", "half changed", "other", "empty", "empty too"] and done.dropped == {"near-duplicate": 2}
    assert len(operate({"method": "deduplicate", "near": {"threshold": 0.95}}, rows, tmp_path).records) == 6
    assert len(operate("deduplicate", rows, tmp_path).records) == 7


def test_minhash_estimates_the_share_in_common() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        union = rng.integers(0, 2**63, 200, dtype=np.uint64)
        a, b = union[: rng.integers(100, 200)], union[rng.integers(0, 100) :]
        signed = signatures([a, b])
        exact = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
        errors.append(abs(float((signed[0] == signed[1]).mean()) - exact))
    assert np.mean(errors) <= 1 / np.sqrt(128) and np.quantile(errors, 0.99) <= 3 / np.sqrt(128)
    for threshold in (0.5, 0.7, 0.9):
        count, places = bands(threshold)
        assert count * places <= 128 and 1 - (1 - threshold**places) ** count >= 0.95
    assert len(ngrams("a b c d e f", 5)) == 2 and len(ngrams("a b", 5)) == 1 and not set(ngrams("a b", 5)) & set(ngrams("a b c d e", 5))
    assert len(words("東京 is big")) == 4


def test_a_pool_that_shows_nothing_says_why(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text('{"es": "a", "en": "b"}\n')
    with pytest.raises(BadInput, match=r"the pool pool.jsonl has no conversation .*1 wrong columns\); give it a map"):
        operate({"method": "demonstrate", "pool": "pool.jsonl"}, [conversation("a")], tmp_path)
    with pytest.raises(BadInput, match="to show or compare .empty"):
        operate("demonstrate", [], tmp_path)
