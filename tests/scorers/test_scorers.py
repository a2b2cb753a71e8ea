"""Scores of rows: the contract of every scorer, published formulas, and what a kill leaves."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from guidetune import pipeline, registry
from guidetune.data.chat import Chat
from guidetune.data.rows import EncodedRow, EncodedRows
from guidetune.errors import BadInput, RunFailed
from guidetune.guidance.store import Guidance
from guidetune.models.handle import ModelHandle
from guidetune.recipe import from_mapping, load
from guidetune.scorers import NoScore, Row, ScoreContext, read, score
from guidetune.scorers._nll import tokens
from guidetune.scorers.ifd import ifd
from guidetune.scorers.judge import read_ratings
from tests.pipeline.conftest import _pair, place, tiny_tokenizer  # noqa: F401
from tests.servers import MODEL, Proxy, serving
from tests.tiny import tiny_model

TEXTS = [("sum of one and two", "three"), ("blue", "red is blue and the result is four"), ("alpha beta", "gamma delta"), ("six", "five")]


@pytest.fixture(scope="module")
def tools() -> ScoreContext:
    """A tiny model as `base`, `instruct` and `far` (with another tokenizer), and the guidance of `base` and `instruct`."""
    tokenizer = tiny_tokenizer()
    chat = Chat(tokenizer)
    model = tiny_model("llama", vocab=len(tokenizer))
    other = tiny_tokenizer()
    other.add_tokens(["one and"])
    other.chat_template = None
    far = tiny_model("llama", vocab=len(other), seed=3)
    handles = {
        "base": ModelHandle("base", model, tokenizer, chat, "b"),
        "instruct": ModelHandle("instruct", tiny_model("llama", vocab=len(tokenizer), seed=1), tokenizer, chat, "i"),
        "far": ModelHandle("far", far, other, None, "f"),
    }
    made = rows(chat)
    stores = {}
    for name in ("base", "instruct"):
        values = [log_probs(handles[name].model, row.input_ids.tolist(), row.targets.tolist()) for row in made]
        at = np.concatenate([[0], np.cumsum([len(v) for v in values])])
        stores[name] = Guidance(np.concatenate(values).astype(np.float16), at)
    return ScoreContext(chat, handles.__getitem__, stores.__getitem__)


def rows(chat: Chat) -> list[Row]:
    found = []
    for k, (asked, answer) in enumerate(TEXTS):
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        one = chat.encode(messages)
        weight = np.array(one.target, dtype=np.float32)
        found.append(Row(k, f"r{k}", messages, np.array(one.input_ids, dtype=np.int32), weight, {"score": f" {k + 1}.5\n\n"}))
    return found


def log_probs(model: torch.nn.Module, ids: list[int], targets: list[int]) -> np.ndarray:
    """The textbook: log softmax of the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return np.array([float(logits[t - 1, ids[t]]) for t in targets])


@pytest.fixture(scope="module")
def difficulty() -> Iterator[Proxy]:
    """A judge whose two ratings follow from the length of what it is asked; it says nothing readable of `six`."""

    def reply(messages: list[dict[str, str]]) -> str:
        text = messages[0]["content"]
        return "I cannot say." if "\nsix\n" in text else f"Thinking. [[{1 + len(text) % 5}, {1 + len(text) % 3}]]"

    with Proxy(reply=reply) as proxy:
        yield proxy


def options(name: str, judge: Proxy, tmp_path: Path) -> dict[str, Any]:
    judge_options = {"judge": {"model": "m", "base_url": judge.url, "cache": str(tmp_path / "api"), "reasks": 1}}
    return {"column": {"column": "score"}, "judge": judge_options}.get(name, {})


@pytest.mark.parametrize("name", registry.names("scorer"))
def test_the_contract_of_every_scorer(name: str, tools: ScoreContext, difficulty: Proxy, tmp_path: Path) -> None:
    scorer = registry.build("scorer", {"method": name, **options(name, difficulty, tmp_path)})
    made = rows(tools.chat)
    whole = list(scorer.scores(made, tools))
    assert len(whole) == len(made) and all(isinstance(one, NoScore) or math.isfinite(one) for one in whole)
    assert any(not isinstance(one, NoScore) for one in whole)
    # a row's score is its own: neither order, nor neighbours, nor batches
    backwards = list(scorer.scores(made[::-1], tools))[::-1]
    alone = [scorer.scores([row], tools)[0] for row in made]
    for a, b, c in zip(whole, backwards, alone, strict=True):
        assert (a == b == c) if isinstance(a, NoScore) else (a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5))
    assert registry.build("scorer", scorer.spec()).deciding() == scorer.deciding()


def test_ifd_in_both_published_forms() -> None:
    """arXiv 2308.12032 and 2402.00530."""
    assert ifd(1.0, 2.0, "loss") == 0.5 and ifd(1.0, 2.0, "perplexity") == pytest.approx(0.367879, abs=1e-6)
    assert ifd(1.7, 1.7, "loss") == ifd(1.7, 1.7, "perplexity") == 1  # an instruction that does not matter
    assert ifd(1e-12, 2.0, "loss") < 1e-9 and ifd(0.0, 2.0, "perplexity") == pytest.approx(0.135335, abs=1e-6)  # one that says all
    # the forms rank rows differently
    assert ifd(1.0, 2.0, "loss") < ifd(3.0, 4.0, "loss") and ifd(1.0, 2.0, "perplexity") == ifd(3.0, 4.0, "perplexity")
    assert isinstance(ifd(0.0, 0.0, "loss"), NoScore)


@pytest.mark.parametrize("form", ["loss", "perplexity"])
def test_ifd_of_rows_is_the_textbook_s(form: str, tools: ScoreContext) -> None:
    scorer = registry.build("scorer", {"method": "ifd", "form": form})
    chat, model = tools.chat, tools.open_model("base").model
    for row, found in zip(rows(chat), scorer.scores(rows(chat), tools), strict=True):
        given = -log_probs(model, row.input_ids.tolist(), row.targets.tolist()).mean()
        (one,) = tokens([row], "base", tools.open_model("base"), tools)
        answer = row.input_ids[row.targets].tolist()
        assert one.header == chat.tokenizer.encode("<|end|>\n<|assistant|>\n", add_special_tokens=False)
        assert one.answers_alone() == [([*one.header, *answer], list(range(len(one.header), len(one.header) + len(answer))))]
        alone = -log_probs(model, *one.answers_alone()[0]).mean()
        assert found == pytest.approx(given / alone if form == "loss" else math.exp(given - alone), rel=1e-5)


def test_answers_of_several_turns_stand_alone(tools: ScoreContext) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "red blue")]
    messages = [{"role": role, "content": text} for role, text in turns]
    one = tools.chat.encode(messages)
    row = Row(0, "x", messages, np.array(one.input_ids, dtype=np.int32), np.array(one.target, dtype=np.float32))
    (read_as,) = tokens([row], "base", tools.open_model("base"), tools)
    pieces = read_as.answers_alone()
    assert len(pieces) == 2 and sum(len(targets) for _, targets in pieces) == len(row.targets)
    spoken = [[ids[t] for t in targets] for ids, targets in pieces]
    assert [t for piece in spoken for t in piece] == row.input_ids[row.targets].tolist()


def test_a_model_with_another_tokenizer_reads_the_text_in_its_own(tools: ScoreContext) -> None:
    handle = tools.open_model("far")
    row = rows(tools.chat)[0]
    (one,) = tokens([row], "far", handle, tools)
    assert handle.tokenizer.decode(one.ids) == "sum of one and two\nthree<|end|>"
    assert handle.tokenizer.decode([one.ids[t] for t in one.targets]) == "three<|end|>"
    nll = -log_probs(handle.model, one.ids, one.targets).mean()
    (found,) = registry.build("scorer", {"method": "perplexity", "model": "far"}).scores([row], tools)
    assert found == pytest.approx(math.exp(nll), rel=1e-4)


def test_perplexity_guidance_and_learnability_agree(tools: ScoreContext) -> None:
    made = rows(tools.chat)

    def by(spec: dict) -> np.ndarray:
        return np.array(registry.build("scorer", spec).scores(made, tools))

    nll = {name: by({"method": "perplexity", "model": name, "form": "nll"}) for name in ("base", "instruct")}
    assert by({"method": "perplexity", "model": "base"}) == pytest.approx(np.exp(nll["base"]))
    assert by({"method": "confidence"}) == pytest.approx(nll["instruct"], rel=1e-3)  # the store has fp16
    assert by({"method": "learnability"}) == pytest.approx(nll["base"] - nll["instruct"], abs=5e-3)
    q = [np.exp(tools.guidance("instruct").row(k).astype(float)) for k in range(len(made))]
    assert by({"method": "confidence", "measure": "doubt"}) == pytest.approx([1 - row.mean() for row in q])
    assert by({"method": "confidence", "measure": "low_share", "below": 0.01}) == pytest.approx([(row < 0.01).mean() for row in q])
    sizes = by({"method": "length"}) + by({"method": "length", "of": "prompt"})
    assert sizes.tolist() == by({"method": "length", "of": "row"}).tolist() == [len(row.input_ids) for row in made]
    prompt = by({"method": "perplexity", "model": "base", "of": "prompt", "form": "nll"})
    first = made[0]
    places = list(range(1, first.targets[0]))
    assert prompt[0] == pytest.approx(-log_probs(tools.open_model("base").model, first.input_ids.tolist(), places).mean(), rel=1e-5)


@pytest.mark.parametrize(
    "value, expected",
    [("4\n\n", 4.0), ("3.5625", 3.5625), (2, 2.0), (None, "no column"), ("hard", "not a number"), ([4], "not a number"), ("nan", "finite")],
)
def test_released_scores_are_text(value: Any, expected: float | str, tools: ScoreContext) -> None:
    row = Row(0, "a", [], np.zeros(2, np.int32), np.ones(2, np.float32), {} if value is None else {"score": value})
    (found,) = registry.build("scorer", {"method": "column", "column": "score"}).scores([row], tools)
    assert found == expected if isinstance(expected, float) else expected in found.why


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Hard. [[4, 3]]", 3.5),
        ("[[1, 1]] no: [[5, 5]]", 5.0),
        ("<think>[[2, 2]]</think> [[4 / 5]]", 4.5),
        ("[[4]]", 4.0),
        ("[[6, 3]]", None),
        ("4 and 3", None),
        ("[[a, b]]", None),
    ],
)
def test_ratings_are_read_or_missing(text: str, expected: float | None) -> None:
    assert read_ratings(text, 1, 5) == expected


def test_the_judge_pays_once_and_never_guesses(tools: ScoreContext, difficulty: Proxy, tmp_path: Path) -> None:
    made = rows(tools.chat)
    judge = options("judge", difficulty, tmp_path)["judge"]
    scorer = registry.build("scorer", {"method": "judge", "judge": judge})
    before = len(difficulty.bodies)
    found = scorer.scores(made, tools)
    assert isinstance(found[3], NoScore) and all(1 <= value <= 5 for value in found[:3])  # `six` has no verdict
    assert "{" not in difficulty.bodies[-1]["messages"][0]["content"].split("Instruction:")[0]
    assert len(difficulty.bodies) - before == 5  # four rows, and one asked again
    assert "4 verdicts asked for, 1 unreadable, 0 failed" in scorer.notes()[0]
    again = registry.build("scorer", {"method": "judge", "judge": judge})
    assert again.scores(made, tools)[:3] == found[:3] and len(difficulty.bodies) - before == 5
    # where the server is decides nothing, what is asked does
    elsewhere = registry.build("scorer", {"method": "judge", "judge": {**judge, "base_url": "http://127.0.0.1:1/v1"}})
    other = registry.build("scorer", {"method": "judge", "judge": judge, "prompt": "Rate {instruction}"})
    assert elsewhere.deciding()["judge"] == scorer.deciding()["judge"] and other.deciding() != scorer.deciding()
    poor = {**judge, "price_in": 1.0, "price_out": 1.0, "budget": 1e-9, "cache": str(tmp_path / "other")}
    with pytest.raises(RunFailed, match="the budget of 1e-09 is spent"):
        registry.build("scorer", {"method": "judge", "judge": poor}).scores(made, tools)


def test_our_own_server_is_a_judge(tools: ScoreContext, tmp_path: Path) -> None:
    """`guidetune serve` behind the same client: a model that cannot judge gives no score, and nothing fails."""
    from guidetune.models.handle import open_handle

    with serving(open_handle(MODEL)) as server:
        judge = {"model": MODEL, "base_url": server.url, "cache": str(tmp_path), "max_tokens": 8, "reasks": 0, "retries": 0}
        scorer = registry.build("scorer", {"method": "judge", "judge": judge})
        found = scorer.scores(rows(tools.chat), tools)
    assert all(isinstance(one, NoScore) and one.why == "no verdict in the reply" for one in found)
    assert "4 verdicts asked for, 4 unreadable, 0 failed; 4 requests" in scorer.notes()[0]


class _Dies(BaseException):
    pass


def test_a_kill_costs_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: ScoreContext) -> None:
    monkeypatch.setattr("guidetune.scorers.WINDOW", 4)
    ids = [f"r{k}" for k in range(10)]
    encoded = EncodedRows.from_rows(
        [EncodedRow(id, "s", np.arange(3 + k, dtype=np.int32), np.ones(3 + k, np.float32)) for k, id in enumerate(ids)]
    )
    records = [{"id": id, "messages": []} for id in ids]
    seen: list[str] = []

    class Counting:
        name, columns, models, unit = "counting", (), (), ""
        dies = True

        def scores(self, window: list[Row], context: ScoreContext) -> list[Any]:
            if self.dies and window[0].id == "r8":
                raise _Dies
            seen.extend(row.id for row in window)
            return [NoScore("odd") if row.place == 3 else float(len(row.input_ids)) for row in window]

        def deciding(self) -> dict:
            return {}

        def notes(self) -> list[str]:
            return []

    one = Counting()
    with pytest.raises(_Dies):
        score(one, encoded, iter(records), tools, tmp_path, "c")  # type: ignore[arg-type]
    one.dies = False
    summary = score(one, encoded, iter(records), tools, tmp_path, "c")  # type: ignore[arg-type]
    assert seen == ids  # nothing twice
    assert (
        summary["n"] == 10
        and summary["missing"] == 1
        and summary["why"] == {"odd": 1}
        and summary["examples"] == [{"id": "r3", "why": "odd"}]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.parquet"]
    found = read(tmp_path, ["r9", "r3", "r0"])
    assert found[0] == 12 and np.isnan(found[1]) and found[2] == 3
    wrong = SimpleNamespace(name="w", columns=(), models=(), unit="", scores=lambda rows, context: [float("inf")] * len(rows))
    with pytest.raises(RunFailed, match="scorer 'w' gave inf for row r0"):
        score(wrong, encoded, iter(records), tools, tmp_path / "..", "w")  # type: ignore[arg-type]


STORY = "world:story"
SCORED = """
name: scored
models: {base: base, instruct: instruct}
data:
  train: [train.jsonl]
  scores: {ifd: {method: ifd, model: base}, doubt: {method: confidence, measure: doubt}, tokens: length}
tune: {params: {rank: 4}, max_length: 128, batch: 8, phases: {method: equal, by: ifd}}
"""


def test_a_score_is_computed_once(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    from guidetune.scorers import ifd as module

    (place / "recipe.yaml").write_text(SCORED)
    text = pipeline.score(load(place / "recipe.yaml"), place / "runs/a", place / "scores.jsonl")
    lines = [json.loads(line) for line in (place / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and set(lines[0]) == {"id", "ifd", "doubt", "tokens"} and all(0 < line["doubt"] < 1 for line in lines)
    assert "phase 3 (3): 8 rows" in text and "ifd: 24 of 24 rows; mean" in text
    order = sorted(lines, key=lambda line: line["ifd"])

    def refuses(*args: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr(module, "mean_nll", refuses)
    assert pipeline.score(load(place / "recipe.yaml"), place / "runs/a")  # in this run
    assert pipeline.score(load(place / "recipe.yaml"), place / "runs/b")  # and in another one beside it
    with pytest.raises(AssertionError, match="scored again"):
        pipeline.score(load(place / "recipe.yaml", ["data.scores.ifd.form=perplexity"]), place / "runs/a")
    # the operation gives the numbers of the stage, and rows can be selected by them
    monkeypatch.undo()
    operations = ["data.operations=[{method: score, scorer: {method: ifd, model: base}, to: hard}, {method: select, by: hard, top: 6}]"]
    phased = ["tune.phases={method: equal, by: hard, phases: 2}", "data.scores={}"]
    pipeline.score(load(place / "recipe.yaml", operations + phased), place / "runs/c", place / "hard.jsonl")
    hard = {line["id"]: line["hard"] for line in map(json.loads, (place / "hard.jsonl").read_text().splitlines())}
    assert hard == {line["id"]: line["ifd"] for line in order[-6:]}
    with pytest.raises(BadInput, match="confidence reads guidance.*name it in data.scores"):
        pipeline.score(load(place / "recipe.yaml", ["data.operations=[{method: score, scorer: confidence}]"]), place / "runs/d")


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            {"tune": {"phases": {"method": "cuts", "by": "ifdd", "at": [1]}}},
            "tune.phases.by = 'ifdd': no name in data.scores.*did you mean 'ifd'",
        ),
        ({"tune": {"phases": {"method": "cuts", "by": "judge", "at": [1]}}}, "the scorer judge needs options; set it up in data.scores"),
        ({"data": {"train": [STORY], "scores": {"d": {"method": "ifd", "form": "ratio"}}}}, "data.scores.d.form = 'ratio'"),
        ({"data": {"train": [STORY], "scores": {"d": "ifdd"}}}, "unknown scorer .did you mean 'ifd'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(change: dict, expected: str) -> None:
    tree = {"models": {"base": "world:base", "instruct": "world:instruct"}, "data": {"train": [STORY]}, **change}
    with pytest.raises(BadInput, match=expected):
        from_mapping(tree)


def test_without_scores_there_is_nothing_to_show(place: Path) -> None:  # noqa: F811
    with pytest.raises(BadInput, match="the recipe names no score; add data: {scores"):
        pipeline.score(load(place / "recipe.yaml"), place / "runs/a")
    shutil.rmtree(place / "runs")
