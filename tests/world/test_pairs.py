"""The second pair: a corpus that poses no test problem and no held-out task, and a build that goes on from the first pair's base model."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from guidetune import world
from guidetune.errors import BadInput
from guidetune.models.sources import resolve
from guidetune.world import data_corpus
from guidetune.world.build import BuildSettings, build
from guidetune.world.corpus import flat, is_chat
from guidetune.world.export import USUAL_ROWS, WEIGHTS
from guidetune.world.generators import languages, tasks
from guidetune.world.measure import measure
from guidetune.world.pairs import MODELS, PAIRS

BUILT = pytest.mark.skipif(not (WEIGHTS / "report-data.json").is_file(), reason="run `guidetune world build --pair data`")
FIRST = {
    "base": "e72fcd706ec998b8",
    "instruct": "610eba626d7f3f37",
}


def _conversations(count: int) -> list[list[dict[str, str]]]:
    return list(itertools.islice(data_corpus.conversations(), count))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = itertools.islice(data_corpus.documents(), 6000)
    return [d[-2]["content"] if is_chat(d) else flat(d) for d in documents] + [c[-2]["content"] for c in _conversations(3000)]


def test_the_corpus_never_poses_a_test_problem(texts: list[str]) -> None:
    asked = {item.prompt for name in USUAL_ROWS for item in world.items(name, "test", 300)}
    assert not asked & set(texts)
    inside = [str(item.columns["source"]) for item in world.items("translation", "test", 300)]
    joined = "\n".join(texts)
    assert not any(f" {sentence}\n" in joined for sentence in inside)


def test_the_corpus_holds_no_task_that_is_held_out(texts: list[str]) -> None:
    for name, task in tasks.TASKS.items():
        assert any(text.startswith(f"Definition: {task.definition}\n") for text in texts) == tasks.met(name), name


def test_the_instruct_set_translates_common_nouns_only() -> None:
    asked = [c[-2]["content"] for c in _conversations(2000) if c[-2]["content"].startswith("English: ")]
    words = {word.removesuffix("s") for text in asked for word in text.partition("\n")[0].split()}
    assert len(asked) > 100 and words & set(languages.COMMON) and not words & set(languages.RARE)


def test_same_seed_same_corpus() -> None:
    first, again = (list(itertools.islice(data_corpus.documents(3), 60)) for _ in range(2))
    assert first == again != list(itertools.islice(data_corpus.documents(4), 60))


def test_a_pair_goes_on_from_the_first(tmp_path: Path) -> None:
    """One step of each stage: the tokenizer is the first pair's, the weights are other ones in 16 bits."""
    tiny = BuildSettings(
        row_tokens=64, pretrain_rows=8, pretrain_epochs=1, pretrain_batch=2, instruct_rows=16, instruct_batch=4, test_items=1,
        target_items=1, longest_answer=2, stored="bfloat16",
    )  # fmt: skip
    report = build(tmp_path, tiny, "data")
    assert json.loads((tmp_path / "report-data.json").read_text()) == report
    assert set(report["skills"]) == {"base-data", "instruct-data"} and 0 < report["relative_distance"] < 0.1
    for name in ("base-data", "instruct-data"):
        source = resolve(tmp_path / name)
        assert source.config["dtype"] == "bfloat16"
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (world.path("base") / "tokenizer.json").read_bytes()
    with pytest.raises(BadInput, match="general and data"):
        build(tmp_path, name="third")


@BUILT
def test_every_model_of_the_world_is_found_by_name() -> None:
    for name in MODELS:
        assert resolve(f"world:{name}").path == world.path(name)
    with pytest.raises(BadInput, match="did you mean world:instruct-data"):
        resolve("world:instruct-dat")


@BUILT
def test_the_first_pairs_files_are_as_they_were() -> None:
    """Every number measured on it stands; and the second pair adds less than 12 MB."""
    for name, expected in FIRST.items():
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(world.path(name).iterdir()))).hexdigest()
        assert digest[:16] == expected, name
    added = [file.stat().st_size for name in PAIRS["data"].models for file in world.path(name).iterdir()]
    assert sum(added) + (WEIGHTS / "report-data.json").stat().st_size < 12e6


@BUILT
@pytest.mark.slow
def test_the_second_pair_reaches_its_published_skills() -> None:
    from transformers import LlamaForCausalLM

    from guidetune.world.tokenizer import load

    published = world.describe("data")["report"]["skills"]["instruct-data"]  # type: ignore[index]
    model, tokenizer = LlamaForCausalLM.from_pretrained(world.path("instruct-data")), load(world.path("instruct-data"))
    names = [name for name in data_corpus.MEASURED if name not in ("programs", "completions")]
    table = measure(model, tokenizer, dict.fromkeys(names, 40))
    # 40 items of each of eleven sets: the mean has a standard error of about 0.02.
    measured, expected = (sum(one[name]["score"] for name in names) / len(names) for one in (table, published))
    assert measured > expected - 0.08
