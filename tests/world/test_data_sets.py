"""The sets for data-side systems: true languages, labelled passages, graded chains, tasks in Super-NI's format, programs that run."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune import world
from guidetune.errors import BadInput
from guidetune.evaluation.evaluate import EvalSettings, plan
from guidetune.evaluation.task import Output
from guidetune.registry import build
from guidetune.world.corpus import BY_NAME, documents
from guidetune.world.export import DATA_SIDE, MIXTURES, USUAL_ROWS, export_tasks
from guidetune.world.generators import graded, languages, passages, programs, tasks
from guidetune.world.instruct_set import conversations
from guidetune.world.items import draw, split_of
from guidetune.world.lexicon import drugs

SKILLS = {skill.name: skill for module in DATA_SIDE for skill in module.SKILLS}
QUICK = [name for name in SKILLS if SKILLS[name].category != "code"]
SEEDS = st.integers(0, 2**40)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def test_the_first_pairs_corpus_and_sets_are_as_they_were() -> None:
    """What the shipped pair was made of, and every number of docs/world.md measured on, draws the same bytes."""
    assert _digest(list(itertools.islice(documents(), 2000))) == "8912a3455e379337"
    assert _digest(list(itertools.islice(conversations(), 2000))) == "bc5b7b68c585c421"
    names = (*BY_NAME, "general", "arithmetic", "knowledge", "knowledge_choice")
    rows = [world.row(item) for name in names for split in ("train", "test") for item in world.items(name, split, 60)]
    for row in rows:
        if row["meta"].pop("rejected", None) and row["skill"] == "harmful":  # notes that came later
            del row["meta"]["action"]
    assert _digest(rows) == "b1b00809d98fd3cd"


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, name=st.sampled_from(QUICK), split=st.sampled_from(("train", "test")))
def test_a_draw_is_gradable_repeatable_and_on_its_side(seed: int, name: str, split: str) -> None:
    skill = SKILLS[name]
    problem = draw(skill, Random(seed), split)
    assert problem == draw(skill, Random(seed), split)
    assert split_of(f"{skill.family or skill.name}|{problem.content}") == split
    row = {"check": problem.check, "gold": problem.gold, "meta": problem.meta, "prompt": problem.prompt, "skill": name, **problem.columns}
    assert world.grade(row, problem.answer) and not world.grade(row, "") and not world.grade(row, "I do not know.")
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("family", sorted({skill.family or skill.name for skill in SKILLS.values()} - set(tasks.TASKS)))
def test_families_share_no_problem_between_splits(family: str) -> None:
    members = [name for name, skill in SKILLS.items() if (skill.family or skill.name) == family]
    sides = {split: {item.meta["content"] for name in members for item in world.items(name, split, 150)} for split in ("train", "test")}
    assert sides["train"] and sides["test"] and not sides["train"] & sides["test"]


def test_usual_sizes_are_reached() -> None:
    for name in ("translation", "fuzzy", "passages", "graded", "programs", "completions", "crosslingual"):
        assert (len(world.items(name, "train")), len(world.items(name, "test"))) == tuple(USUAL_ROWS[name].values()), name


# ---------------------------------------------------------------------------------------------------------------------
# Languages


def test_the_grammar_of_each_language() -> None:
    one = languages.Clause("dog", "see", "cat", "red", "", "box", plural=True, future=True)
    tavi, noru = languages.lexicon("tavi"), languages.lexicon("noru")
    assert languages.say(one, "english") == "the red dogs will see the cat in the box"
    assert languages.say(one, "tavi") == f"{tavi['dog']}im {tavi['red']} {tavi['cat']}o {tavi['box']}su {tavi['see']}ra"
    assert languages.say(one, "noru") == f"el {noru['see']} mu {noru['red']} {noru['dog']} ka {noru['cat']} pa {noru['box']}"
    plain = languages.Clause("dog", "see", "cat")
    assert languages.say(plain, "english") == "the dog sees the cat"
    assert languages.say(plain, "tavi") == f"{tavi['dog']} {tavi['cat']}o {tavi['see']}"
    words = [word for language in (tavi, noru) for word in language.values() if word]
    assert len(set(words)) == len(words) == 2 * (len(tavi) - 1)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_a_sentence_can_be_read_back(seed: int) -> None:
    """No two meanings have one saying: what is asked has one right answer."""
    rng = Random(seed)
    one, other = languages.clause(rng), languages.clause(rng)
    for language in languages.LANGUAGES:
        assert (languages.say(one, language) == languages.say(other, language)) == (one == other)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_a_neighbour_differs_in_the_words_it_says(seed: int) -> None:
    rng = Random(seed)
    asked = languages.query(rng)
    near, changed = languages.neighbour(rng, asked)
    assert languages.in_pool(near) and not languages.in_pool(asked)
    english = languages.say(asked, "english"), languages.say(near, "english")
    assert languages.similarity(*english) == 1 - changed / len(english[0].split())


def test_fuzzy_prompts_show_a_neighbour_that_the_pool_holds() -> None:
    for split, count in (("train", 200), ("test", 100)):
        pool = {item.columns["english"]: item.columns["tavi"] for item in world.items("fuzzy_pool", split, 5 * count)}
        asked = world.items("fuzzy", split, count)
        assert all(pool[item.columns["fuzzy_source"]] == item.columns["fuzzy_target"] for item in asked)
        assert not pool.keys() & {item.columns["english"] for item in asked}
        assert all(item.prompt.endswith(languages.ask("english", "tavi", str(item.columns["source"]))) for item in asked)
        assert {item.columns["changed_words"] for item in asked} == {1, 2}
    train = {item.columns["english"] for item in world.items("fuzzy_pool", "train", 1000)}
    assert not train & {item.columns["english"] for item in world.items("fuzzy_pool", "test", 500)}


def test_instructions_come_in_the_language_of_the_words_too() -> None:
    asked = Counter((item.columns["language"], item.columns["prompt_language"]) for item in world.items("crosslingual", "test", 300))
    assert set(asked) == {("english", "english"), *((a, b) for a in ("tavi", "noru") for b in ("english", a))}


# ---------------------------------------------------------------------------------------------------------------------
# Passages


def test_passages_are_labelled_by_what_they_say() -> None:
    facts = {drug.name: drug.facts for drug in drugs()}
    seen = Counter()
    for item in world.items("passages", "train", 400):
        columns, kind = item.columns, item.columns["passage"]
        drug, relation = str(item.meta["drug"]), str(item.meta["relation"])
        known = facts.get(drug, {}).get(relation)
        statements = {form.format(d=drug, v=item.gold) for form in passages.STATEMENTS[relation]}
        stated = any(statement in str(columns["context"]) for statement in statements)
        seen[kind] += 1
        assert columns["without_context"] == known and columns["context_dependent"] == (known != item.gold)
        assert stated == (kind != "unrelated")
        assert {"contradicts": known != item.gold, "new": known is None, "agrees": known == item.gold, "unrelated": known == item.gold}[
            kind
        ]
        assert str(columns["context"]).count(". ") + 1 == item.difficulty
    assert min(seen.values()) > 60 and set(seen) == set(passages.KINDS)


# ---------------------------------------------------------------------------------------------------------------------
# Graded instructions


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, difficulty=st.sampled_from(list(graded.SHARES)))
def test_difficulty_counts_steps_and_form(seed: int, difficulty: int) -> None:
    problem = graded.graded(Random(seed), difficulty)
    assert problem.columns["score"] == difficulty == problem.columns["steps"] + problem.columns["constraints"]  # type: ignore[operator]
    instruction = problem.prompt.partition(":")[0]
    assert instruction.count(" then ") == problem.columns["steps"] - 1  # type: ignore[operator]
    assert (" and say it " in instruction) == bool(problem.columns["constraints"])
    assert problem.answer.count("=") == difficulty and problem.answer.endswith(problem.gold)


def test_levels_are_shared_out_as_the_cuts_expect() -> None:
    scores = [item.columns["score"] for item in world.items("graded", "train", 2000)]
    shares = [sum(low <= score < high for score in scores) / len(scores) for low, high in ((1, 1.5), (1.5, 3.5), (3.5, 6))]
    assert shares == pytest.approx([0.585, 0.285, 0.13], abs=0.04)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def test_there_are_many_tasks_in_many_categories() -> None:
    categories = Counter(task.category for task in tasks.TASKS.values())
    assert len(tasks.TASKS) >= 40 and len(categories) >= 6 and min(categories.values()) >= 3
    assert len({task.definition for task in tasks.TASKS.values()}) == len(tasks.TASKS)
    held = {task.category for name, task in tasks.TASKS.items() if not tasks.met(name)}
    assert set(tasks.HELD_OUT_CATEGORIES) < held  # some categories are held out in part
    assert sum(map(len, (MIXTURES["tasks_met"], MIXTURES["tasks_held_out"]))) == len(tasks.TASKS)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_examples_of_a_task_are_right_wrong_and_never_asked(name: str) -> None:
    positive, negative = tasks.examples(name)
    solve = tasks.TASKS[name].solve
    assert len(positive) == len(negative) == tasks.EXAMPLES
    assert all(solve(one["input"]) == one["output"] for one in positive)
    assert all(solve(one["input"]) != one["output"] and one["explanation"] for one in negative)
    shown = {one["input"] for one in (*positive, *negative)}
    instances = [*world.items(name, "train", 60), *world.items(name, "test", 30)]
    assert not shown & {item.columns["input"] for item in instances}
    answers = Counter(item.answer for item in instances)
    assert len(answers) > 1 and answers.most_common(1)[0][1] < 0.8 * len(instances)


def test_task_files_are_read_as_rows_and_evaluated(tmp_path: Path) -> None:
    name = "task001_reverse_words"
    files = export_tasks(tmp_path, [name])
    planned = plan([build("task", {"method": "super_ni", "path": str(files[name]), "category": "category"})])[0]
    assert len(planned.items) == 600
    first = planned.items[0]
    assert first.messages[-1]["content"] == world.items(name, "test", 1)[0].prompt
    assert first.meta == {"skill": name, "category": "word order"}
    listed = {split: files[f"{split} tasks"].read_text().split() for split in ("train", "test")}
    assert sorted(listed["train"] + listed["test"]) == sorted(tasks.TASKS)


# ---------------------------------------------------------------------------------------------------------------------
# Programs, and the evaluation tasks of published formats on rows of the world


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ({"method": "super_ni", "path": "world:tasks_held_out"}, 190),
        ({"method": "translation", "path": "world:english_tavi", "source": "source", "target": "target"}, 200),
        ({"method": "squad", "path": "world:passages"}, 300),
        ({"method": "generate", "path": "world:graded", "prompt": "{prompt}", "reference": "answer"}, 400),
        ({"method": "mbpp", "path": "world:programs", "template": "{text}\n{tests}", "closing": "Code:"}, 200),
        ({"method": "humaneval", "path": "world:completions", "template": "{prompt}"}, 200),
        ({"method": "world", "set": "completions"}, 200),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_golds_score_one_in_published_formats(spec: dict, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDETUNE_CACHE", str(tmp_path))
    task = build("task", spec)
    planned = plan([task], EvalSettings(allow_code=True))[0]
    assert len(planned.items) == count
    chosen = planned.items[:: 20 if spec["method"] in ("mbpp", "humaneval", "world") else 1]
    verdicts = task.scores([(item, Output(text=text)) for item in chosen for text in (item.gold or "", "")])
    assert [verdict["correct"] for verdict in verdicts] == [1, 0] * len(chosen)


def test_programs_are_only_run_where_that_is_allowed(tmp_path: Path) -> None:
    task = build("task", {"method": "world", "set": "programs"})
    with pytest.raises(BadInput, match="allow"):
        plan([task], EvalSettings())
    path = tmp_path / "programs.jsonl"
    path.write_text("".join(json.dumps(world.row(item)) + "\n" for item in world.items("programs", "test", 3)))
    with pytest.raises(BadInput, match="mbpp"):
        plan([build("task", {"method": "world", "path": str(path)})], EvalSettings(allow_code=True))
    assert programs.FIRST_TASK_ID["test"] <= world.items("programs", "test", 3)[0].columns["task_id"] <= 510
