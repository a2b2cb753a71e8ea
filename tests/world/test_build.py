"""Building the pair: equal seeds give equal bytes, also after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from guidetune.world import build as building
from guidetune.world.build import BuildSettings, build

TINY = BuildSettings(
    vocabulary=400, tokenizer_documents=300, hidden=32, layers=2, heads=2, intermediate=64, row_tokens=32, pretrain_rows=48,
    copy_tokens=24, copy_rows=48, copy_batch=8, pretrain_epochs=1,
    pretrain_batch=8, instruct_rows=32, instruct_batch=8, test_items=1, target_items=2, longest_answer=4,
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for name in ("base", "instruct")
        for p in sorted((folder / name).rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, build(folder, TINY)


def test_a_build_gives_two_model_folders(built):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, report = built
    for name in ("base", "instruct"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        ends = [tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id]
        assert model.generation_config.eos_token_id == ends and model.generation_config.pad_token_id == tokenizer.pad_token_id
        assert model.config.tie_word_embeddings and model.config.vocab_size == len(tokenizer)
        assert tokenizer.chat_template
    assert report["corpus_tokens"] == TINY.pretrain_rows * TINY.row_tokens
    assert 0 < report["relative_distance"] < 1
    assert set(report["skills"]) == {"base", "instruct"}


def test_interrupted_build_goes_on_to_equal_bytes(built, tmp_path, monkeypatch):
    folder, report = built
    from guidetune.engine import loop

    whole = loop.fit
    interruptions = iter([True, False, True, False, False])

    def killed(*args, **kwargs):
        if next(interruptions):
            settings = args[2].model_copy(update={"checkpoint_every": 2})
            calls = []

            def stop(step):
                calls.append(step)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return False

            return whole(args[0], args[1], settings, *args[3:], **{**kwargs, "stop": stop})
        return whole(*args, **kwargs)

    monkeypatch.setattr(loop, "fit", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, TINY)
    again = build(tmp_path, TINY)
    assert contents(tmp_path) == contents(folder)
    assert again["skills"] == report["skills"]


def test_finished_stages_are_reused(built, monkeypatch):
    folder, report = built
    before = contents(folder)
    monkeypatch.setattr(building, "_fit", None)  # a stage made again would call it
    assert build(folder, TINY) == report
    assert contents(folder) == before
