"""The world's tokenizer: round trips, special tokens, template, generation mask."""

from __future__ import annotations

import itertools

import pytest

from guidetune import world
from guidetune.world import tokenizer as tokenizers
from guidetune.world.corpus import documents, flat
from guidetune.world.instruct_set import conversations


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(flat(d) for d in itertools.islice(documents(), 2000))


def test_every_text_comes_back(tokenizer):
    texts = [flat(d) for d in itertools.islice(documents(), 500)]
    texts += [c[-1]["content"] for c in itertools.islice(conversations(), 500)]
    texts += [
        text for name in ("arithmetic", "knowledge") for item in world.items(name, "test", 100) for text in (item.prompt, item.answer)
    ]
    texts += ["Grüße, 12 €\n\ttab", "日本語 🙂"]
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_and_distinct(tokenizer):
    ids = [tokenizer(token).input_ids for token in tokenizers.SPECIAL]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(ids)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|eos|>" and tokenizer.bos_token is None
    assert len(tokenizer) <= tokenizers.VOCABULARY


def test_digits_are_single(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer("4711+23").input_ids] == list("4711+23")


def test_template_and_generation_mask(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|system|>Be kind.<|end|><|user|>What is 1+1?<|end|><|assistant|>2<|end|>"
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(trained) == "2<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, tokenize=True).input_ids
    assert list(out["input_ids"][: len(prompt)]) == list(prompt)
    with pytest.raises(Exception, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_equal_texts_equal_bytes(tokenizer, tmp_path):
    again = tokenizers.train(flat(d) for d in itertools.islice(documents(), 2000))
    tokenizer.save_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    loaded = tokenizers.load(tmp_path / "a")
    assert loaded.chat_template == tokenizer.chat_template
