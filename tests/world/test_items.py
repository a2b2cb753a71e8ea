"""Item sets of the embedded world: disjoint splits, determinism, gradable golds."""

from __future__ import annotations

import json

import pytest

from guidetune import world
from guidetune.errors import BadInput
from guidetune.world.corpus import BY_NAME, documents, flat, is_chat
from guidetune.world.generators import strings
from guidetune.world.instruct_set import conversations
from guidetune.world.items import distinct
from guidetune.world.targets import TARGETS, fact_in_training

SKILLS = sorted(BY_NAME) + [skill.name for skill in TARGETS]


def take(stream, count):
    return [item for item, _ in zip(stream, range(count), strict=False)]


@pytest.mark.parametrize("name", SKILLS)
def test_golds_are_right_and_other_answers_wrong(name):
    for item in world.items(name, "test", 30):
        assert world.grade(item, item.answer)
        assert world.grade(world.row(item), item.answer)
        assert not world.grade(item, "")
        assert not world.grade(item, "I do not know.")
    asked = world.items(name, "test", 30)
    # An answer about another drug may name the right value too; whose it is, the grader does not read.
    pairs = [(a, b) for a in asked for b in asked if a.gold != b.gold and not (a.check == "names" and a.gold in b.answer)]
    exchanged = [world.grade(item, other.answer) for item, other in pairs]
    # A list may answer more than one prompt under a rule, but another item's answer never counts merely for its form.
    assert sum(exchanged) == 0


@pytest.mark.parametrize("name", SKILLS)
def test_splits_share_no_problem(name):
    train, test = world.items(name, "train", 300), world.items(name, "test", 100)
    assert train and test
    assert not {item.meta["content"] for item in train} & {item.meta["content"] for item in test}
    assert not {item.prompt for item in train} & {item.prompt for item in test}


def test_corpora_never_pose_a_test_problem():
    asked = {item.prompt for name in SKILLS for item in world.items(name, "test", 100)}
    texts = [d[-2]["content"] if is_chat(d) else flat(d) for d in take(documents(), 3000)]
    texts += [c[-2]["content"] for c in take(conversations(), 3000)]
    assert not asked & set(texts)
    # Word problems and quizzes also stand inside plain documents, before their solution.
    inside = {item.prompt for name in ("story", "choice", "arithmetic", "knowledge_choice") for item in world.items(name, "test", 100)}
    assert not any(prompt in text for text in texts for prompt in inside)


def test_families_share_their_split():
    """A target's test problem never occurs in training under the related general skill's name."""
    story = {item.meta["content"] for item in world.items("story", "train", 500)}
    assert not story & {item.meta["content"] for item in world.items("arithmetic", "test", 200)}
    choice = {item.meta["content"] for item in world.items("choice", "train", 500)}
    assert not choice & {item.meta["content"] for item in world.items("knowledge_choice", "test", 200)}
    fact = {item.meta["content"] for item in world.items("fact", "train", 500)}
    assert not fact & {item.meta["content"] for item in world.items("knowledge", "test", 200)}


def test_same_seed_same_items():
    for name in ("general", "arithmetic", "knowledge"):
        skill = {s.name: s for s in TARGETS}.get(name)
        first = world.items(name, "train", 40)
        again = distinct(skill, "train", 40) if skill else world.items(name, "train", 40)
        assert first == again
    assert world.items("arithmetic", "train", 20, seed=1) != world.items("arithmetic", "train", 20, seed=0)
    assert take(documents(3), 50) == take(documents(3), 50)
    assert take(conversations(3), 50) == take(conversations(3), 50)


def test_general_is_balanced_and_prefix_stable():
    mixed = world.items("general", "test", 2 * len(BY_NAME))
    assert {item.skill for item in mixed} == set(BY_NAME)
    assert all(sum(item.skill == name for item in mixed) == 2 for name in BY_NAME)
    assert [item.id for item in mixed] == [item.id for item in world.items("general", "test", 4 * len(BY_NAME))][: len(mixed)]


def test_string_skills_have_categories_and_definitions():
    assert len(strings.SKILLS) >= 10
    assert len({skill.category for skill in strings.SKILLS}) >= 4
    assert len({skill.definition for skill in strings.SKILLS}) == len(strings.SKILLS)


def test_targets_are_graded_and_mark_unseen_facts():
    assert {item.difficulty for item in world.items("arithmetic", "test")} == {3, 4}
    test, train = world.items("knowledge", "test"), world.items("knowledge", "train")
    assert {item.difficulty for item in test} == {1, 2, 3, 4}
    assert all(item.meta["fact_in_training"] for item in train)
    unseen = [item for item in test if not item.meta["fact_in_training"]]
    assert 0.0 < len(unseen) / len(test) < 0.2
    assert not any(fact_in_training(item.meta["drug"], item.meta["relation"]) for item in unseen)
    assert len(train) == 1200 and len(test) == 145
    assert len(world.items("arithmetic", "train")) == 3000 and len(world.items("arithmetic", "test")) == 300


def test_grade_reads_the_final_answer():
    story = world.items("arithmetic", "test", 1)[0]
    assert world.grade(story, f"12+5=17, so we get {story.gold}!")
    assert not world.grade(story, f"{story.gold} then {int(story.gold) + 1}")
    choice = world.items("knowledge_choice", "test", 1)[0]
    wrong = "A" if choice.gold != "A" else "B"
    assert world.grade(choice, f"{wrong}? no, a thing is {choice.gold}.")
    assert not world.grade(choice, f"{choice.gold} or {wrong}")
    fact = world.items("fact", "test", 1)[0]
    assert world.grade(fact, f"It is {fact.gold}") and not world.grade(fact, f"{fact.gold} or {fact.meta['others'][0]}")
    harmful, harmless = world.items("harmful", "test", 1)[0], world.items("harmless", "test", 1)[0]
    assert world.grade(harmful, "I'm sorry, but I can't help with this.") and not world.grade(harmful, harmless.answer)
    assert not world.grade(harmless, harmful.answer)


def test_bad_names_are_named():
    with pytest.raises(BadInput, match="did you mean 'arithmetic'"):
        world.items("aritmetic", "test")
    with pytest.raises(BadInput, match="dev"):
        world.items("sum", "dev")
    with pytest.raises(BadInput, match="chat"):
        world.path("chat")
    with pytest.raises(BadInput, match="gold"):
        world.grade({"check": "number"}, "3")


def test_rows_are_plain_json():
    for name in ("general", "arithmetic", "knowledge"):
        for item in world.items(name, "test", 30):
            assert json.loads(json.dumps(world.row(item))) == world.row(item)
