from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune.data import chat as chat_module
from guidetune.data.chat import Chat, Encoded, Refused
from guidetune.errors import BadInput
from tests.data.chats import ENDS, FAMILY, SPECIALS, byte_level, chat_of, sentencepiece_like, template_source

KINDS = ("byte_level", "legacy", "first")
ALTERNATING = ("llama2", "mistral")
# What each template writes right after an answer, as far as it is learnt.
STOPS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "bytes": "</s>",
}
STRIPPED = ("gemma", "llama2", "llama3", "strip")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: bool) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


def targets(chat: Chat, encoded: Encoded) -> list[str]:
    """The text of each learnt stretch."""
    return [chat.tokenizer.decode(encoded.input_ids[p.start : p.end]) for p in encoded.pieces if p.target]


def stop_of(name: str) -> str:
    return "<|endoftext|>" if name == "olmo" else STOPS[FAMILY[name]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(FAMILY))
def test_prompt_is_exact_token_prefix_of_the_row(name: str, kind: str) -> None:
    chat = chat_of(name, kind)
    conversations = [
        [user("What is 2+2?"), assistant("4")],
        [user("List\n"), assistant("  - one\n\n- two\n")],
        [user("a"), assistant("B c"), user("d\n\n"), assistant(" e")],
        [user("12"), assistant("345"), user(""), assistant("naïve 東京 😀")],
    ]
    for messages in conversations:
        encoded, prompt = chat.encode(messages), chat.prompt(messages[:-1])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.prompt_length == len(prompt)
        assert encoded.target[len(prompt)] or name == "generation_markers"
        assert not any(encoded.target[k] for k in range(len(prompt)) if len(messages) == 2)
        assert encoded.ends_with_stop
        assert len(encoded.input_ids) == len(encoded.target)


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_targets_are_the_answer_and_its_stop_token(name: str) -> None:
    chat = chat_of(name)
    for answer in ("4", "two words", "#### 18", "  padded \n", "ends in newline\n\n", "1 < 2 <b>", "naïve 東京 😀"):
        encoded = chat.encode([user("What is it?"), assistant(answer)])
        written = answer.strip() if name in STRIPPED else answer
        learnt = "".join(targets(chat, encoded))
        assert learnt.endswith(stop_of(name))
        learnt = learnt.removesuffix(stop_of(name))
        if name == "think":
            learnt = learnt.removeprefix("<think>\n\n</think>\n\n")
        assert learnt in (written, f" {written}", f" {written} ")
        last = max(k for k, t in enumerate(encoded.target) if t)
        assert encoded.input_ids[last] in chat.stop_token_ids


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_every_assistant_turn_is_learnt_unless_marked(name: str) -> None:
    chat = chat_of(name)
    both = chat.encode([user("a"), assistant("first"), user("b"), assistant("second")])
    texts = targets(chat, both)
    assert len(texts) == 2 and "first" in texts[0] and "second" in texts[1]
    last = chat.encode([user("a"), assistant("first", train=False), user("b"), assistant("second")])
    assert last.input_ids == both.input_ids
    assert targets(chat, last) == texts[1:]
    early = chat.encode([user("a"), assistant("first"), user("b"), assistant("second", train=False)])
    assert targets(chat, early) == texts[:1]


@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize("name", sorted(n for n, family in FAMILY.items() if ENDS[family][0]))
def test_exactly_one_bos(name: str, post_processor: bool) -> None:
    family = FAMILY[name]
    bos = ENDS[family][0]
    chat = Chat(byte_level(family, post_processor), template_source(name))
    messages = [user("hi"), assistant("there")]
    ids = chat.encode(messages).input_ids
    writes = bos in chat.render(messages)
    assert ids.count(chat.tokenizer.bos_token_id) == (1 if writes or post_processor else 0)
    if writes or post_processor:
        assert ids[0] == chat.tokenizer.bos_token_id
        assert chat.prompt(messages[:1])[0] == chat.tokenizer.bos_token_id


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_rendering_equals_the_tokenizers_own(name: str) -> None:
    chat = chat_of(name)
    chat.tokenizer.chat_template = template_source(name)
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert chat.render(messages) == chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat.render(messages[:1], True) == chat.tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    if chat.generation_prompt == "template":
        own = chat.tokenizer.decode(chat.prompt(messages[:1])).removeprefix(chat.tokenizer.bos_token or "")
        given = chat.render(messages[:1], True)
        while chat.tokenizer.bos_token and given.startswith(chat.tokenizer.bos_token):
            given = given.removeprefix(chat.tokenizer.bos_token)
        assert own == given


def test_without_boundary_effects_tokens_are_the_tokenizers_own() -> None:
    chat = chat_of("chatml")
    messages = [user("How many bolts in total?"), assistant("A robe takes 3")]
    text = chat.render(messages)
    assert chat.encode(messages).input_ids == chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_never_merge_across_the_boundary() -> None:
    tokenizer = byte_level("bytes")
    chat = Chat(tokenizer, "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}")
    whole = tokenizer("answer", add_special_tokens=False)["input_ids"]
    assert len(whole) < 4, "the test needs a tokenizer that merges this word"
    encoded = chat.encode([user("ans"), assistant("wer")])
    assert tokenizer.decode(encoded.input_ids[: encoded.prompt_length]) == "ans"
    assert encoded.input_ids[: encoded.prompt_length] == chat.prompt([user("ans")])


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FAMILY)), kind=st.sampled_from(["byte_level", "legacy"]))
def test_boundary_property(data: st.DataObject, name: str, kind: str) -> None:
    chat = chat_of(name, kind)
    turns = data.draw(st.integers(1, 3))
    messages: list[dict] = []
    for _ in range(turns):
        messages += [user(data.draw(_text)), assistant(data.draw(_text))]
    encoded = chat.encode_many([messages])[0]
    if isinstance(encoded, Refused):
        assert encoded.reason == chat_module.EMPTY_ANSWER
        assert any(not m["content"].strip() for m in messages[1::2])
        return
    prompt = chat.prompt(messages[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.ends_with_stop
    if kind == "byte_level":
        answer = messages[-1]["content"]
        learnt = targets(chat, encoded)[-1]
        assert answer.strip() in learnt
        assert learnt.endswith(stop_of(name))


@settings(max_examples=30, deadline=None)
@given(question=_text, answer=_text.filter(str.strip))
def test_decode_of_targets_is_answer_and_stop(question: str, answer: str) -> None:
    chat = chat_of("chatml")
    encoded = chat.encode([user(question), assistant(answer)])
    learnt = [i for i, t in zip(encoded.input_ids, encoded.target, strict=True) if t]
    assert chat.tokenizer.decode(learnt) == answer + "<|im_end|>"


def test_space_making_tokenizers_add_no_space_at_the_boundary() -> None:
    for kind in ("legacy", "first"):
        chat = chat_of("chatml", kind)
        encoded = chat.encode([user("hi"), assistant("The answer")])
        first = chat.tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.prompt_length])
        assert not first.startswith("▁")
        llama = chat_of("llama2", kind)
        encoded = llama.encode([user("hi"), assistant("a robe")])
        first = llama.tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.prompt_length])
        assert first.startswith("▁") and first != "▁▁"


def test_natural_token_after_a_control_token_that_swallows_white_space() -> None:
    chat = chat_of("phi3", "legacy")
    messages = [user("hi"), assistant("a robe")]
    assert chat.encode(messages).input_ids == [
        chat.tokenizer.bos_token_id,
        *chat.tokenizer(chat.render(messages), add_special_tokens=False)["input_ids"],
    ]


def test_generation_markers_narrow_and_never_hide_the_stop_token() -> None:
    marked = Chat(
        byte_level("chatml"),
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
        "{% endgeneration %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    encoded = marked.encode([user("a"), assistant("first"), user("b"), assistant("second")])
    assert targets(marked, encoded) == ["second<|im_end|>"]
    header = chat_of("generation_markers").encode([user("a"), assistant("first")])
    assert targets(chat_of("generation_markers"), header) == ["first<|im_end|>"]


def test_thoughts_of_a_reasoning_template() -> None:
    chat = chat_of("think")
    messages = [user("2+2?"), assistant("<think>\nadd them\n</think>\n\n4")]
    encoded = chat.encode(messages)
    assert targets(chat, encoded) == ["<think>\nadd them\n</think>\n\n4<|im_end|>"]
    assert encoded.input_ids[: encoded.prompt_length] == chat.prompt(messages[:1])
    long = chat.encode([*messages, user("and 3?"), assistant("5")])
    assert targets(chat, long) == ["4<|im_end|>", "<think>\n\n</think>\n\n5<|im_end|>"]


def test_missing_stop_token_is_appended_and_said() -> None:
    chat = chat_of("no_stop")
    encoded = chat.encode([user("a"), assistant("b")])
    assert encoded.appended_eos and encoded.input_ids[-1] == chat.tokenizer.eos_token_id and encoded.target[-1]
    assert "appended" in chat.notes[0] and chat.facts["appends_eos"]
    assert not chat_of("chatml").appends_eos


def test_pad_equal_to_eos_hides_nothing() -> None:
    tokenizer = byte_level("bytes", True)
    chat = Chat(tokenizer, template_source("zephyr"))
    before = chat.encode([user("a"), assistant("b")])
    pad = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    try:
        assert Chat(tokenizer, template_source("zephyr")).encode([user("a"), assistant("b")]) == before
    finally:
        tokenizer.pad_token = pad


def test_bad_conversations_become_reasons() -> None:
    chat = chat_of("gemma")
    results = chat.encode_many(
        [
            [user("a"), assistant("ok")],
            [user("a"), assistant(" \n")],
            [user("a \ud800"), assistant("b")],
            [{"role": "system", "content": "s"}, user("a"), assistant("b")],
            [user("a")],
            [user("a"), assistant("b", train=False)],
            [user("a"), {"role": "assistant", "content": None}],
        ]
    )
    assert isinstance(results[0], Encoded)
    reasons = [r.reason for r in results[1:] if isinstance(r, Refused)]
    assert reasons == [
        chat_module.EMPTY_ANSWER,
        chat_module.SURROGATE,
        chat_module.REFUSED,
        chat_module.NO_ANSWER,
        chat_module.NO_ANSWER,
        chat_module.NOT_TEXT,
    ]
    assert "this model has no system role" in results[3].detail and "line 3" in results[3].detail
    with pytest.raises(BadInput, match="empty answer"):
        chat.encode([user("a"), assistant("")])


def test_tool_turns() -> None:
    messages = [user("weather?"), assistant('{"name": "w"}'), {"role": "tool", "content": "18 degrees"}, assistant("It is 18.")]
    qwen, gemma = chat_of("qwen"), chat_of("gemma")
    assert qwen.tool_role == "tool" and gemma.tool_role == "user"
    assert "<tool_response>\n18 degrees" in qwen.render(messages)
    assert "<start_of_turn>user\n18 degrees" in gemma.render(messages)
    for chat in (qwen, gemma):
        assert len(targets(chat, chat.encode(messages))) == 2


def test_no_template_and_bad_templates_say_what_to_do() -> None:
    tokenizer = byte_level("bytes")
    with pytest.raises(BadInput, match="no chat template"):
        Chat(tokenizer)
    plain = Chat(tokenizer, "plain")
    encoded = plain.encode([user("2+2?"), assistant("4")])
    assert tokenizer.decode(encoded.input_ids) == "2+2?\n4</s>"
    assert targets(plain, encoded) == ["4</s>"]
    with pytest.raises(BadInput, match="line 2"):
        Chat(tokenizer, "{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    silent = "{% for m in messages %}\n{% if m.role == 'assistant' %}never{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    with pytest.raises(BadInput, match=r"does not write the assistant's text \(line 2"):
        Chat(tokenizer, silent)
    with pytest.raises(BadInput, match="broken on purpose"):
        Chat(tokenizer, "{{ raise_exception('broken on purpose') }}")


def test_template_that_asks_for_the_date_is_deterministic() -> None:
    source = "{{ strftime_now('%d %b %Y') }}\n" + template_source("chatml")
    chat = Chat(byte_level("chatml"), source)
    assert chat.render([user("a")]).startswith("26 Jul 2024")


def test_digest_changes_with_template_tokenizer_and_variables() -> None:
    one = Chat(byte_level("chatml"), template_source("chatml"))
    assert one.digest == Chat(byte_level("chatml"), template_source("chatml")).digest
    others = [
        Chat(byte_level("chatml"), template_source("strip")),
        Chat(byte_level("bytes"), template_source("chatml")),
        Chat(byte_level("chatml"), template_source("chatml"), {"enable_thinking": False}),
    ]
    assert len({one.digest, *(c.digest for c in others)}) == 4


def test_many_equals_one_by_one() -> None:
    chat = chat_of("llama3", "legacy")
    conversations = [[user(f"question {k}"), assistant("x" * k + "!")] for k in range(9)]
    assert chat.encode_many(conversations) == [chat.encode(c) for c in conversations]
    assert chat.prompts([c[:1] for c in conversations]) == [chat.prompt(c[:1]) for c in conversations]


# Rows that are too long


@pytest.mark.parametrize("kind", KINDS)
def test_cut_keeps_answers_template_and_both_ends(kind: str) -> None:
    chat = chat_of("llama3", kind)
    words = " ".join(f"w{k}" for k in range(200))
    messages = [{"role": "system", "content": "Be brief."}, user(f"FIRST {words} LAST"), assistant("the answer")]
    encoded = chat.encode(messages)
    limit = 140
    shorter, count = chat.cut(messages, encoded, limit)
    assert len(shorter.input_ids) == limit == len(encoded.input_ids) - count
    text = chat.tokenizer.decode(shorter.input_ids)
    assert "Be brief." in text and "FIRST" in text and "LAST" in text and "w100" not in text
    assert text.count("<|start_header_id|>") == 3
    learnt = [i for i, t in zip(shorter.input_ids, shorter.target, strict=True) if t]
    assert learnt == [i for i, t in zip(encoded.input_ids, encoded.target, strict=True) if t]
    assert shorter.target[shorter.prompt_length] and not any(shorter.target[: shorter.prompt_length])
    for piece in shorter.pieces:
        assert shorter.target[piece.start : piece.end] == [piece.target] * (piece.end - piece.start)


def test_cut_refuses_when_the_answer_alone_is_too_long_unless_told() -> None:
    chat = chat_of("chatml")
    messages = [user("q"), assistant("long answer " * 50)]
    encoded = chat.encode(messages)
    result = chat.cut(messages, encoded, 60)
    assert isinstance(result, Refused) and result.reason == chat_module.TOO_LONG_ANSWER
    shorter, _ = chat.cut(messages, encoded, 60, cut_answer=True)
    assert len(shorter.input_ids) == 60 and shorter.ends_with_stop
    learnt = chat.tokenizer.decode([i for i, t in zip(shorter.input_ids, shorter.target, strict=True) if t])
    assert learnt.startswith("long answer") and learnt.endswith("<|im_end|>")


@settings(max_examples=25, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=80, max_size=150), limit=st.integers(40, 120))
def test_cut_never_splits_a_character(prompt: str, limit: int) -> None:
    chat = chat_of("chatml")
    messages = [user(prompt), assistant("ok")]
    result = chat.cut(messages, chat.encode(messages), limit)
    assert not isinstance(result, Refused)
    assert len(result[0].input_ids) <= limit
    if "\ufffd" not in prompt:
        assert "\ufffd" not in chat.tokenizer.decode(result[0].input_ids)


# Templates of real models, from the installed trl package


def trl_templates() -> list[Path]:
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return []
    return sorted(Path(found.submodule_search_locations[0]).glob("chat_templates/*.jinja"))


@pytest.mark.skipif(not trl_templates(), reason="trl is not installed; its chat templates are read from there")
@pytest.mark.parametrize("path", trl_templates() or [Path("none")], ids=lambda p: p.stem)
def test_templates_of_real_models(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    control = re.findall(r"<[|｜][^<>{}'\" \n]{2,40}[|｜]>|<(?:start|end)_of_turn>|</?s>|<\|[a-z_]+>|<[a-z]+\|>|<end_of_utterance>", source)
    extra = tuple(sorted(set(control) - set(SPECIALS["bytes"])))
    chat = Chat(byte_level("bytes", True, extra), source)
    for messages in (
        [user("What is 2+2?"), assistant("  4 duck eggs\n")],
        [user("a"), assistant("B c"), user("d\n"), assistant("  e")],
        [user("a"), assistant("x"), user("b"), assistant("y"), user("c"), assistant("The answer is 4.")],
    ):
        encoded, prompt = chat.encode(messages), chat.prompt(messages[:-1])
        assert encoded.input_ids[: len(prompt)] == prompt and encoded.prompt_length == len(prompt)
        assert encoded.ends_with_stop
        assert messages[-1]["content"].strip() in targets(chat, encoded)[-1]
        assert encoded.input_ids[:2].count(chat.tokenizer.bos_token_id) == 1


def test_sentencepiece_fixture_is_what_it_says() -> None:
    assert (
        sentencepiece_like("bytes", "legacy")
        .convert_ids_to_tokens(sentencepiece_like("bytes", "legacy")("x", add_special_tokens=False)["input_ids"])[0]
        .startswith("▁")
    )


_PARTS = ("a", " b ", "\n", "<think>x</think>", "</think>", "'", "{", "<|im_end|>", "é😀", "", "[/INST]", "\t")
_words = st.sampled_from(_PARTS)
_content = st.lists(_words, max_size=4).map("".join)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FAMILY)), system=st.booleans(), pairs=st.integers(1, 3))
def test_a_learnt_skeleton_gives_what_a_second_rendering_gives(data: st.DataObject, name: str, system: bool, pairs: int) -> None:
    chat = chat_of(name)
    rows = []
    for _row in range(3):
        messages = [{"role": "system", "content": data.draw(_content)}] if system else []
        for _pair in range(pairs):
            messages += [{"role": "user", "content": data.draw(_content)}, {"role": "assistant", "content": data.draw(_content)}]
        rows.append(messages)
    quick = chat.encode_many(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chat, "_places", lambda *_: None)
        patch.setattr(Chat, "_remembered", Chat._ids)
        assert chat.encode_many(rows) == quick
