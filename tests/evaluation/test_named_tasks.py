"""The named benchmarks: published forms of their data, prompts, scores and oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune.errors import BadInput
from guidetune.evaluation.answers import choice_answer
from guidetune.evaluation.evaluate import evaluate, plan, read_items
from guidetune.evaluation.metrics import byte_level_tokens, choice_scores, rouge_l, squad_exact, squad_f1
from guidetune.evaluation.task import Item, Output, RowTask
from guidetune.registry import build, get, names

ROWS: dict[str, dict[str, Any]] = {
    "arc": {"question": "Why?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "2"},
    "arc_ready": {"query": "Question: Why?", "choices": ["one", "two"], "gold": 1},
    "piqa": {"goal": "Why?", "sol1": "one", "sol2": "two", "label": 1},
    "piqa_ready": {"query": "Question: Why?\n", "choices": ["one", "two"], "gold": 1},
    "commonsenseqa": {"question": "Why?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"},
    "commonsenseqa_ready": {"query": "Question: Why?\nChoices:\nA. one\nB. two\nAnswer:", "choices": ["A", "B"], "gold": 1},
    "mmlu": {"question": "Why?", "subject": "anatomy", "choices": ["one", "two"], "answer": 1},
    "medmcqa": {"question": "Why?", "opa": "one", "opb": "two", "opc": "three", "opd": "four", "cop": 1},
    "pubmedqa": {"pubid": 7, "question": "Why?", "context": {"contexts": ["Some.", "More."]}, "final_decision": "no"},
    "pubmedqa_ready": {"context": "Context: Some.\nMore.\nQuestion: Why?\nA. yes\nB. no\nC. maybe\nAnswer: ", "continuation": "no"},
}
PROMPTS = {
    "arc": "Question: Why?\nAnswer:",
    "piqa": "Question: Why?\nAnswer:",
    "commonsenseqa": "Question: Why?\nA. one\nB. two\nAnswer:",
    "mmlu": "Why?\nA. one\nB. two\nAnswer:",
    "medmcqa": "Question: Why?\nChoices:\nA. one\nB. two\nC. three\nD. four\nAnswer:",
    "pubmedqa": "Abstract: Some.\nMore.\nQuestion: Why?\nAnswer:",
}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def items_of(folder: Path, spec: dict[str, Any]) -> tuple[Any, list[Item]]:
    task = build("task", spec)
    return task, list(plan([task], root=folder)[0].items)


@pytest.mark.parametrize("form", ROWS)
def test_published_forms_give_the_published_prompt(tmp_path: Path, form: str) -> None:
    name = form.split("_")[0]
    task, (item,) = items_of(tmp_path, {"method": name, "path": write(tmp_path / "q.jsonl", ROWS[form])})
    assert items_of(tmp_path, task.spec())[1] == [item]  # with every option written out, as in a resolved recipe
    assert (item.prompt, item.reference) == (PROMPTS[name], 1)
    assert (item.text is not None) == (name in ("arc", "piqa"))  # continued as plain text; the others ask in the chat


def test_medical_subjects_of_mmlu(tmp_path: Path) -> None:
    rows = [{**ROWS["mmlu"], "subject": subject} for subject in ("anatomy", "astronomy", "medical genetics")]
    task, items = items_of(tmp_path, {"method": "mmlu_medical", "path": write(tmp_path / "q.jsonl", *rows)})
    assert [item.meta["category"] for item in items] == ["anatomy", "medical genetics"]
    lines = [
        {**task.score(item, Output(loglik=ll)), "meta": item.meta}
        for item, ll in zip(items * 2, [(0, 1), (0, 1), (1, 0), (0, 1)], strict=True)
    ]
    assert task.overall(lines)["macro"] == 0.75


def test_winogrande_scores_what_follows_the_name(tmp_path: Path) -> None:
    published = {"sentence": "Ann thanked Bo because _ had helped.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    ready = {"context_options": ["Ann thanked Bo because Ann", "Ann thanked Bo because Bo"], "continuation": "had helped.", "gold": 1}
    for row in (published, ready):
        name = write(tmp_path / "q.jsonl", row)
        task, (item,) = items_of(tmp_path, {"method": "winogrande", "path": name})
        assert item.contexts == ("Ann thanked Bo because Ann", "Ann thanked Bo because Bo")
        assert (item.choices, item.reference) == (("had helped.", "had helped."), 1)
        assert (
            task.score(item, Output(loglik=(-2.0, -1.0)))["correct"] == 1 and task.score(item, Output(loglik=(-1.0, -1.0)))["correct"] == 0
        )
        _, (item,) = items_of(tmp_path, {"method": "winogrande", "path": name, "format": "chat"})
        assert "A. Ann thanked Bo because Ann had helped.\nB. Ann" in item.prompt and item.choices == ("A", "B")
    with pytest.raises(BadInput, match="line 1: sentence = 'No blank.' has no blank"):
        items_of(tmp_path, {"method": "winogrande", "path": write(tmp_path / "b.jsonl", {**published, "sentence": "No blank."})})


def test_truthfulqa(tmp_path: Path) -> None:
    row = {"Question": "Can pigs fly?", "Best Answer": "No", "Correct Answers": "No; They cannot.", "Incorrect Answers": "Yes; Sometimes"}
    task, (item,) = items_of(tmp_path, {"method": "truthfulqa", "path": write(tmp_path / "q.jsonl", row)})
    assert item.choices == ("No.", "Yes.", "Sometimes.", "They cannot.") and item.text == "Q: Can pigs fly?\nA:"
    found = task.score(item, Output(loglik=(-2.0, -1.0, -3.0, -0.5)))  # the other true answer does not count for MC1
    e = torch.tensor([-2.0, -1.0, -3.0, -0.5]).exp()
    assert found["mc1"] == 0 and found["mc2"] == pytest.approx(float((e[0] + e[3]) / e.sum()), abs=1e-6)
    targets = {"question": "Can pigs fly?", "mc1_targets": {"choices": ["No.", "Yes.", "Sometimes."], "labels": [1, 0, 0]}}
    targets["mc2_targets"] = {"choices": ["No.", "They cannot.", "Yes.", "Sometimes."], "labels": [1, 1, 0, 0]}
    _, (same,) = items_of(tmp_path, {"method": "truthfulqa", "path": write(tmp_path / "m.jsonl", targets)})
    assert (same.choices, same.payload[0]) == (item.choices, item.payload[0]) and sorted(same.payload[1]) == sorted(item.payload[1])


def test_squad_and_triviaqa(tmp_path: Path) -> None:
    assert squad_f1("the Eiffel Tower in Paris", ["Eiffel Tower"]) == pytest.approx(2 / 3) and squad_exact(
        "The Eiffel tower!", ["eiffel tower"]
    )
    row = {
        "id": "x",
        "context": "It stands in Paris.",
        "question": "Where?",
        "answers": {"text": ["Paris", "in Paris"], "answer_start": [13, 10]},
    }
    task, (item,) = items_of(tmp_path, {"method": "squad", "path": write(tmp_path / "s.jsonl", row)})
    assert (item.id, item.prompt) == ("x", "It stands in Paris.\nQuestion: Where?\nAnswer:")
    verdict = task.score(item, Output(text="\nthe city of Paris\nQuestion: Who?"))
    assert (verdict["em"], verdict["contains"]) == (0, 1) and verdict["f1"] == pytest.approx(2 / 4)
    nothing, (empty,) = items_of(tmp_path, {"method": "squad", "path": write(tmp_path / "n.jsonl", {**row, "answers": {"text": []}})})
    assert nothing.score(empty, Output(text=""))["correct"] == 1 and nothing.score(empty, Output(text="Paris"))["correct"] == 0
    rows = [
        {"question": "Which band?", "answer": {"value": "The The", "aliases": ["The The (band)"]}},
        {"context": "Question: Who?\nAnswer:", "answer": "Bo", "aliases": ["Bob"]},
    ]
    task, items = items_of(tmp_path, {"method": "triviaqa", "path": write(tmp_path / "t.jsonl", *rows)})
    assert [item.prompt for item in items] == ["Question: Which band?\nAnswer:", "Question: Who?\nAnswer:"]
    assert [item.reference for item in items] == [["The The", "The The (band)"], ["Bo", "Bob"]]
    assert task.score(items[0], Output(text="the the"))["em"] == 1 and task.score(items[0], Output(text=""))["em"] == 0


def test_super_ni(tmp_path: Path) -> None:
    rows = [
        {"task": "task1", "split": "test", "definition": "Say it.", "instance_input": "x", "output": ["the dog was running", "it ran"]},
        {"task": "task1", "split": "train", "definition": "Say it.", "instance_input": "y", "output": "z"},
        {"task_name": "task2", "definition": ["Übersetze."], "inputs": "hello world", "targets": "你好 世界"},
    ]
    task, items = items_of(tmp_path, {"method": "super_ni", "path": write(tmp_path / "s.jsonl", *rows)})
    assert [item.prompt for item in items] == [
        "Definition: Say it.\n\nInput: x\nOutput:",
        "Definition: Übersetze.\n\nInput: hello world\nOutput:",
    ]
    assert task.score(items[0], Output(text="the dogs were running"))["correct"] == pytest.approx(0.75)
    assert task.score(items[0], Output(text="The dog was running!"))["exact"] == 1
    assert rouge_l("你好 世界", ["你好 世界"]) == 0  # the default tokenizer
    assert task.score(items[1], Output(text="你好 世界"))["correct"] == 1
    assert 0 < task.score(items[1], Output(text="你好"))["correct"] < 1
    other, (_, item) = items_of(tmp_path, {"method": "super_ni", "path": "s.jsonl", "language": "other"})
    assert other.score(item, Output(text="你好 世界"))["correct"] == 1
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BadInput, match="not a tokenizer.json"):
        byte_level_tokens(str(tmp_path / "bad.json"))


def test_translation(tmp_path: Path) -> None:
    rows = [{"es": "uno", "en": "the cat is on the mat"}, {"es": "dos", "en": "there is a small dog"}]
    name = write(tmp_path / "t.jsonl", *rows)
    task, items = items_of(tmp_path, {"method": "translation", "path": name, "source": "es", "target": "en"})
    assert items[0].prompt == "Translate from Spanish to English. Answer with the translation only.\n\nuno"
    said = ["the cat sat on the mat", "there is a dog"]
    lines = [
        {**task.score(i, Output(text=t)), "output": t, "reference": i.reference, "meta": i.meta} for i, t in zip(items, said, strict=True)
    ]
    found = task.overall(lines)
    oracle = {"bleu": 35.4037, "chrf": 57.5806, "chrf++": 60.7097, "ter": 18.1818}
    assert found == {key: pytest.approx(value, abs=1e-4) for key, value in oracle.items()}
    assert task.notes(lines)[0].startswith("bleu: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    assert "tok:zh" in build("task", {"method": "translation", "path": name, "source": "en", "target": "zh"}).notes([])[0]
    with pytest.raises(BadInput, match="no program 'no-such-comet'.*") as caught:
        items_of(
            tmp_path,
            {
                "method": "translation",
                "path": name,
                "source": "es",
                "target": "en",
                "comet_path": "x.ckpt",
                "comet_command": "no-such-comet",
            },
        )
    assert "comet_path = 'x.ckpt' is no .ckpt file" in str(caught.value)
    with pytest.raises(BadInput, match="tokenize = 'nonsense'"):
        items_of(tmp_path, {"method": "translation", "path": name, "source": "es", "target": "en", "tokenize": "nonsense"})


def test_choice_oracles() -> None:
    assert choice_scores([-4.0, -5.0], ["No", "Certainly not"]) == {"acc": 0, "acc_norm": 1, "acc_bytes": 1}
    assert choice_scores([-4.0, -5.0], ["a", "b"], [-1.0, -4.0])["acc_mutual_info"] == 1


def log_probs(model: Any, ids: list[int], start: int) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_log_likelihoods_are_those_of_plain_transformers(llama: Any, handle_of: Any, tmp_path: Path) -> None:
    """Contexts of their own (WinoGrande), choices without their question (mutual information), examples before the question."""
    blanks = [
        {"sentence": f"Ann{'a' * i} thanked Bo because _ had helped {i} times.", "option1": f"Ann{'a' * i}", "option2": "Bo", "answer": "1"}
        for i in range(4)
    ]
    quiz = [
        {"question": f"What is {i}?", "choices": ["Paris", f"the city {i}"], "gold": 0, "query": f"Question: What is {i}?"}
        for i in range(4)
    ]
    specs = [
        {"method": "winogrande", "path": write(tmp_path / "w.jsonl", *blanks), "shots": 1},
        {"method": "arc", "path": write(tmp_path / "q.jsonl", *quiz), "best_by": "acc_mutual_info", "shots": 2},
        {"method": "arc", "path": "q.jsonl", "label": "chat", "format": "chat", "mutual_info": True, "shots": 2, "header": "Choose."},
    ]
    handle, tasks = handle_of(llama(3)), [build("task", spec) for spec in specs]
    results = evaluate(handle, tasks, tmp_path / "out", root=tmp_path)
    tokenizer = handle.tokenizer

    def plainly(before: str, choice: str) -> float:
        ids, start = tokenizer(f"{before} {choice}")["input_ids"], len(tokenizer(before)["input_ids"])
        return log_probs(handle.model, ids, start) if before else log_probs(handle.model, [tokenizer.bos_token_id, *ids], 1)

    def in_chat(messages: Any, choice: str) -> float:
        prompt = handle.chat.prompt(messages)
        return log_probs(handle.model, [*prompt, *tokenizer(choice, add_special_tokens=False)["input_ids"]], len(prompt))

    for one in plan(tasks, root=tmp_path):
        for item, line in zip(one.items, read_items(tmp_path / "out", results[one.label]), strict=True):
            rate = in_chat if item.messages else plainly
            places = item.contexts or [item.messages or item.text] * 2
            expected = [rate(before, choice) for before, choice in zip(places, item.choices, strict=True)]
            assert line["choices_loglik"] == pytest.approx(expected, abs=1e-4)
            if item.prior is not None:
                alone = [rate(item.prior.messages or "", choice) for choice in item.choices]
                assert line["choices_prior_loglik"] == pytest.approx(alone, abs=1e-4)
    assert "acc_mutual_info" in results["arc"]["metrics"]


def test_examples_before_the_question(tmp_path: Path) -> None:
    dev = [{"question": f"Dev {i}?", "subject": "ab"[i % 2], "choices": ["x", "y"], "answer": i % 2} for i in range(12)]
    write(tmp_path / "dev.jsonl", *dev)
    write(tmp_path / "test.jsonl", {"question": "Test?", "subject": "b", "choices": ["x", "y"], "answer": 0}, dev[1])
    base = {"method": "mmlu", "path": "test.jsonl", "shots_path": "dev.jsonl"}
    _, (first, second) = items_of(tmp_path, {**base, "system": "Be brief.", "header": "About {subject}."})
    assert [m["role"] for m in first.messages] == ["system", *["user", "assistant"] * 5, "user"]
    assert first.messages[1]["content"] == "About b.\n\nDev 1?\nA. x\nB. y\nAnswer:" and first.messages[2]["content"] == "B"
    assert first.question == "Be brief.\n\nTest?\nA. x\nB. y\nAnswer:"
    asked = [m["content"] for m in second.messages if m["role"] == "user"]
    assert len(asked) == len(set(asked)) == 6  # never its own example, though the file holds it
    _, (plain, _) = items_of(tmp_path, {**base, "shots": 2, "format": "plain"})
    assert plain.text == "Dev 1?\nA. x\nB. y\nAnswer: B\n\nDev 3?\nA. x\nB. y\nAnswer: B\n\nTest?\nA. x\nB. y\nAnswer:"
    draws = [items_of(tmp_path, {**base, "shots": 2, "shots_order": "random", "shots_seed": seed})[1][0].prompt for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(BadInput, match="9 shots, and dev.jsonl has 6 examples with subject = 'b'"):
        items_of(tmp_path, {**base, "shots": 9})
    write(tmp_path / "sums.jsonl", {"question": "1+1?", "answer": "So\n#### 2"}, {"question": "2+2?", "answer": "So\n#### 4"})
    _, (item, _) = items_of(tmp_path, {"method": "gsm8k", "path": "sums.jsonl", "shots": 1})
    assert [m["content"] for m in item.messages] == ["2+2?", "So\n#### 4", "1+1?"]
    write(tmp_path / "if.jsonl", *({"prompt": f"{i}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for i in range(3)))
    with pytest.raises(BadInput, match="no answers that examples could show"):
        items_of(tmp_path, {"method": "ifeval", "path": "if.jsonl", "shots": 1})


def test_only_the_rows_that_are_wanted(tmp_path: Path) -> None:
    rows = [{"q": str(i), "a": str(i), "level": i % 3} for i in range(6)]
    spec = {"method": "generate", "path": write(tmp_path / "t.jsonl", *rows), "prompt": "{q}", "reference": "a"}
    assert [item.id for item in items_of(tmp_path, {**spec, "where": {"level": [0, 2]}})[1]] == ["0", "2", "3", "5"]
    with pytest.raises(BadInput, match="no column 'levle'.*did you mean 'level'"):
        items_of(tmp_path, {**spec, "where": {"levle": 0}})


# One small row for each task that reads rows: golds score 1 and nothing scores 0 in any clone, without the real files.
SAMPLES: dict[str, dict[str, Any]] = {
    **{name: ROWS[name] for name in ("arc", "piqa", "commonsenseqa", "mmlu", "medmcqa", "pubmedqa")},
    "arc_challenge": ROWS["arc"],
    "arc_easy": ROWS["arc_ready"],
    "mmlu_medical": ROWS["mmlu"],
    "medqa": {"question": "Why?", "options": {"A": "one", "B": "two"}, "answer_idx": "B"},
    "mcq": {"question": "Why?", "options": ["one", "two"], "answer_idx": "two"},
    "winogrande": {"sentence": "Ann thanked Bo because _ had helped.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    "truthfulqa": {"Question": "Pigs?", "Best Answer": "No", "Correct Answers": "No", "Incorrect Answers": "Yes"},
    "squad": {"context": "In Paris.", "question": "Where?", "answers": ["Paris"]},
    "triviaqa": {"question": "Where?", "answer": {"value": "Paris", "aliases": ["City of Light"]}},
    "super_ni": {"definition": "Say it.", "input": "x", "output": "the dog ran"},
    "translation": {"es": "uno", "en": "the cat is on the mat"},
    "ifeval": {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "gsm8k": {"question": "1+1?", "answer": "So\n#### 2"},
    "math500": {"problem": "1+1?", "answer": "2"},
    "generate": {"question": "1+1?", "answer": "2"},
}
NEEDED = {"translation": {"source": "es", "target": "en"}, "generate": {"prompt": "{question}", "reference": "answer"}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=12) | st.sampled_from(["A", "B", "1", "two", "one"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["A", "B", "text", "label", "choices", "labels"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def row_task(name: str, path: str = "q.jsonl") -> Any:
    cls = get("task", name)
    if not issubclass(cls, RowTask) or name not in SAMPLES:
        pytest.skip("reads no rows, or is tested in a file of its own")
    return build("task", {"method": name, "path": path, **NEEDED.get(name, {})})


@pytest.mark.parametrize("name", names("task"))
def test_a_gold_scores_one_and_nothing_scores_zero(tmp_path: Path, name: str) -> None:
    task = row_task(name, write(tmp_path / "q.jsonl", SAMPLES[name]) if name in SAMPLES else "")
    (item,) = plan([task], root=tmp_path)[0].items
    perfect = task.perfect(item) or Output(text="No commas.")
    verdict, nothing = task.score(item, perfect), task.score(item, Output(text=""))
    assert verdict["correct"] == 1 and nothing["correct"] == 0
    # Items of a run have the same numbers, whatever the model said.
    assert {key for key, value in verdict.items() if isinstance(value, (int, float))} == {
        key for key, value in nothing.items() if isinstance(value, (int, float))
    }


def test_named_columns_count_for_every_row(tmp_path: Path) -> None:
    name = write(tmp_path / "q.jsonl", ROWS["arc"])
    for options in ({"question": "qestion"}, {"id": "key"}):
        with pytest.raises(BadInput, match=f"no column '{next(iter(options.values()))}'"):
            items_of(tmp_path, {"method": "arc", "path": name, **options})


@pytest.mark.parametrize("mode", ["loglik", "generate"])
@pytest.mark.parametrize("name", ["mcq", "arc", "winogrande", "pubmedqa", "commonsenseqa"])
def test_choices_in_every_mode(tmp_path: Path, name: str, mode: str) -> None:
    path = write(tmp_path / "q.jsonl", SAMPLES[name])
    for options in (
        {"choose": c, "format": f, "best_by": b} for c in ("letter", "text") for f in ("chat", "plain") for b in ("acc", "acc_mutual_info")
    ):
        task, (item,) = items_of(tmp_path, {"method": name, "path": path, "mode": mode, **options})
        assert task.score(item, task.perfect(item))["correct"] == 1 and task.score(item, Output())["correct"] == 0


@pytest.mark.parametrize("name", names("task"))
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_rows_of_any_kind_are_read_or_refused(name: str, data: st.DataObject) -> None:
    task, sample = row_task(name), SAMPLES[name]
    row = {**sample, **data.draw(st.dictionaries(st.sampled_from(sorted(sample)), JSON, min_size=1))}
    for missing in data.draw(st.sets(st.sampled_from(sorted(sample)), max_size=1)):
        del row[missing]
    try:
        item = task.item(row, 0)
    except BadInput:
        return
    task.score(item, Output(text="one"))
    assert item.messages or item.text is not None


@given(st.text(max_size=80), st.lists(st.text(max_size=30), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_scores_of_any_text_are_between_0_and_1(text: str, golds: list[str]) -> None:
    assert 0 <= squad_f1(text, golds) <= 1 and squad_exact(text, [*golds, text]) == 1 and squad_f1(text, [*golds, text]) == 1
    assert squad_exact(text, golds) <= squad_f1(text, golds)
    assert 0 <= rouge_l(text, golds, byte_level_tokens()) <= 1
    assert choice_answer(text, ["A", "B", "C"], ["yes", "no", "maybe"]) in (None, 0, 1, 2)
