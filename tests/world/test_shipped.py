"""The shipped pair reaches, on a small sample, what its report publishes."""

from __future__ import annotations

import pytest

from guidetune import world
from guidetune.world.export import WEIGHTS
from guidetune.world.measure import measure

pytestmark = pytest.mark.skipif(not (WEIGHTS / "report.json").is_file(), reason="no shipped pair; run `guidetune world build`")


@pytest.mark.slow
def test_instruct_reaches_its_published_skills():
    from transformers import LlamaForCausalLM

    from guidetune.world.tokenizer import load

    report = world.describe()["report"]
    published = report["skills"]["instruct"]
    model, tokenizer = LlamaForCausalLM.from_pretrained(world.path("instruct")), load(world.path("instruct"))
    sample = 10
    table = measure(model, tokenizer, {name: sample for name in published if name not in ("arithmetic", "knowledge", "knowledge_choice")})
    measured = sum(row["score"] for row in table.values()) / len(table)
    expected = sum(published[name]["score"] for name in table) / len(table)
    # 10 items of each skill: the mean over skills has a standard error of about 0.02.
    assert measured > expected - 0.08


def test_files_are_small_safetensors_with_ends():
    import json

    for name in ("base", "instruct"):
        files = list(world.path(name).glob("*.safetensors"))
        assert files and all(file.stat().st_size <= 6000 * 1024 for file in files)
        assert sum(file.stat().st_size for file in files) < 10e6
        ends = json.loads((world.path(name) / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        assert len(set(ends)) == 2
