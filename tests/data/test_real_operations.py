"""Operations on published data, where it is beside the checkout: the counts that papers and files state."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from guidetune.data.prepare import PrepareSettings, prepare, read_records
from guidetune.data.records import Record, load
from guidetune.data.sources import SourceSpec
from tests.data.chats import chat_of
from tests.data.operating import operate


@pytest.mark.slow
def test_nested_sizes_of_super_ni(tmp_path: Path, shared_data: Path) -> None:
    """Quick Learners: a multi-task set of size s has Σ min(s, n_t) rows, sizes are nested, and tests are in none."""
    spec = SourceSpec(
        path="super_ni/tasks.jsonl.gz", map={"user": "{prompt}", "assistant": "{output}"}, columns={"task": "task", "split": "split"}
    )
    rows = [found for _, found in load(spec, shared_data) if isinstance(found, Record)]
    training = [row for row in rows if row.fields["split"] == "train"]
    sizes = Counter(row.fields["task"] for row in training)
    assert len(sizes) > 5
    before: set[str] = set()
    for size in (10, 100, 200, 1000):
        kept = {r.id for r in operate({"method": "select", "prefix": size, "per": "task"}, training, tmp_path).records}
        assert len(kept) == sum(min(size, n) for n in sizes.values()) and before <= kept
        before = kept
    split = {"method": "split", "sizes": {"test": 100, "validation": 10, "train": "rest"}, "per": "task"}
    done = operate(split, training, tmp_path)
    held = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {r.id for r in done.records}.isdisjoint(h["id"] for h in held)
    assert sum(h["split"] == "test" for h in held) == sum(min(100, n) for n in sizes.values())


def test_fuzzy_matches_of_medical_translations(tmp_path: Path, shared_data: Path) -> None:
    """Adaptive MT: every query gives a zero-shot and a one-shot prompt, and identical sentences are no matches."""
    form = {"user": "Spanish: {es}\nEnglish:", "assistant": "{en}"}
    pool: dict[str, Any] = {"path": "mt_medical/es_en_train_4000.jsonl.gz", "map": form, "limit": 1500}
    queries = {"path": "mt_medical/es_en_train_4000.jsonl.gz", "limit": 300}
    steps = [
        {"method": "template", "templates": {"t": form}},
        {"method": "demonstrate", "retrieve": "nearest", "on": "es", "pool": pool, "keep_zero_shot": True,
         "form": "text", "between": " ", "separator": "\n"},
    ]  # fmt: skip
    done = prepare([queries], steps, chat_of("llama3"), PrepareSettings(loss_on="all"), tmp_path / "out", shared_data)
    made = list(read_records(done.path))
    totals = done.result
    assert totals["read"] == 300 and len(made) == totals["used"] and totals["operations"][1]["made"] == totals["operations"][1]["in"]
    asked = [row["messages"][0]["content"] for row in made]
    zero = [text for text in asked if text.count("Spanish:") == 1]
    one = [text for text in asked if text.count("Spanish:") == 2]
    assert len(zero) == len(one) == len(made) / 2
    with gzip.open(shared_data / "mt_medical/es_en_train_4000.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["es"].strip() for _, line in zip(range(300), file, strict=False)]
    for text in one:  # the queries are in the pool too: none may find itself
        shown, query = (part.split("\nEnglish:")[0].strip() for part in text.split("Spanish: ")[1:])
        assert query in texts and " ".join(shown.casefold().split()) != " ".join(query.casefold().split())


@pytest.mark.slow
def test_stages_of_scored_alpaca(tmp_path: Path, shared_data: Path) -> None:
    """Phased IFT: the released stage has 6,889 rows of scores 3.5 to 5, 9 of them without an answer."""
    spec = {"path": "phased/en-alpaca52k-stage3.jsonl", "map": {"user": "data[0]", "assistant": "data[1]"}, "columns": {"score": "score"}}
    step = {"method": "order", "by": "score", "cuts": [1.5, 3.5, 4.5], "shuffle": True}
    done = prepare([spec], [step], chat_of("chatml"), PrepareSettings(max_length=4096), tmp_path / "out", shared_data)
    totals = done.result
    assert totals["read"] == 6889 and totals["dropped"] == {"empty answer": 9}
    phases = totals["operations"][0]["facts"]["phases"]
    assert phases[:2] == [0, 0] and sum(phases) == 6880 and min(phases[2:]) > 500


@pytest.mark.parametrize("against", ["gsm8k/test.jsonl"])
def test_gsm8k_does_not_leak_into_itself(tmp_path: Path, shared_data: Path, against: str) -> None:
    spec = SourceSpec(path="gsm8k/train.jsonl.gz", limit=1000)
    rows = [found for _, found in load(spec, shared_data) if isinstance(found, Record)]
    tests = {"path": str(shared_data / against), "name": "test"}
    facts = operate({"method": "overlap", "against": [tests], "on_hit": "report"}, rows, tmp_path).facts
    assert sum(part["met"] for part in facts["test_rows_met"].values()) < 0.02 * facts["test_rows"]["test"]
    itself = [found for _, found in load(SourceSpec(path=against, limit=50), shared_data) if isinstance(found, Record)]
    assert operate({"method": "overlap", "against": [tests], "on_hit": "drop"}, itself, tmp_path).records == []
