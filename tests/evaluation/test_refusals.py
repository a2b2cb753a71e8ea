from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from pathlib import Path

import pytest

from guidetune.evaluation.judge import agreement
from guidetune.evaluation.refusals import FOUND, GCG, garbled, refuses
from guidetune.evaluation.results import judge, summarise
from guidetune.evaluation.task import Output, TaskContext
from guidetune.registry import build


@pytest.fixture(scope="module")
def labelled(shared_data: Path) -> list[dict[str, str]]:
    raw = gzip.decompress((shared_data / "xstest" / "xstest_v2_completions_mistralinstruct.csv.gz").read_bytes())
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8"), newline="")))


# list -> answers marked, by the label that two people gave: compliance, full refusal, partial refusal
MARKED = {"xstest": (3, 12, 4), "gcg": (26, 12, 3), "extended": (4, 12, 4)}


@pytest.mark.parametrize("matcher", MARKED)
def test_lists_against_people(labelled: list[dict[str, str]], matcher: str) -> None:
    labels = Counter(row["final_label"] for row in labelled)
    assert (labels["1_full_compliance"], labels["2_full_refusal"], labels["3_partial_refusal"]) == (374, 49, 27)
    found = Counter(row["final_label"] for row in labelled if refuses(row["completion"], matcher))
    assert (found["1_full_compliance"], found["2_full_refusal"], found["3_partial_refusal"]) == MARKED[matcher]
    assert FOUND[matcher] == (found["2_full_refusal"], found["1_full_compliance"])  # what the notes tell the user
    judged = ["refusal" if refuses(row["completion"], matcher) else "answer" for row in labelled]
    human = ["answer" if row["final_label"] == "1_full_compliance" else "refusal" for row in labelled]
    assert 0 < agreement(judged, human)["kappa"] < 0.4  # rough, as the notes say


def test_xstest_by_kind(labelled: list[dict[str, str]]) -> None:
    marked = Counter(row["type"].startswith("contrast") for row in labelled if refuses(row["completion"], "xstest"))
    assert (marked[False], marked[True]) == (4, 15)
    assert len(GCG) == 28


def test_lists_look_where_they_say() -> None:
    assert refuses("  I'm Sorry, no.", "xstest") and not refuses("Well, I'm sorry.", "xstest")
    assert refuses("That is illegal.", "gcg") and not refuses("that is ILLEGAL", "gcg")
    assert refuses("I can’t help with that.", "extended") and not refuses("I can’t help with that.", "xstest")
    assert garbled("") and garbled("?? !! 12") and garbled("the " * 40) and not garbled("Use the kill command.")


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ({"method": "xstest", "path": "xstest/xstest_prompts.csv"}, 450),
        ({"method": "advbench", "path": "advbench/harmful_instructions_en.txt"}, 520),
    ],
)
@pytest.mark.parametrize("matcher", MARKED)
def test_golds_score_one(shared_data: Path, spec: dict[str, str], count: int, matcher: str) -> None:
    task = build("task", {**spec, "matcher": matcher})
    items = task.items(TaskContext(shared_data))
    assert len(items) == count
    assert all(task.score(item, task.perfect(item))["correct"] == 1 for item in items)


def test_a_model_that_always_refuses(shared_data: Path) -> None:
    results = {}
    for spec in (
        {"method": "xstest", "path": "xstest/xstest_prompts.csv"},
        {"method": "advbench", "path": "advbench/harmful_instructions_en.txt"},
    ):
        task = build("task", spec)
        answer = Output(text="I cannot help with that.")
        lines = [judge(task, item, [answer], [task.score(item, answer)]) for item in task.items(TaskContext(shared_data))]
        results[spec["method"]] = summarise(task, lines, 1, 0)
        assert not any("cannot help" in line["output"] for line in lines)  # kept as a hash
        assert build("task", {**spec, "keep_text": True}).kept_text(answer) == answer.text
        assert any("rough" in note and "12 of 49" in note for note in results[spec["method"]]["notes"])
    safety = results["xstest"]["metrics"]
    assert (safety["refusal_safe"], safety["refusal_unsafe"]) == (1, 1) and results["xstest"]["score"] == pytest.approx(200 / 450)
    assert (results["advbench"]["score"], results["advbench"]["metrics"]["attack_success"]) == (1, 0)
    assert {name: group["n"] for name, group in results["xstest"]["by"]["skill"].items()} == {"safe": 250, "unsafe": 200}
