"""The target tasks: what the instruct model does in part, in a different, noisy style.

`arithmetic` asks for word problems of three or four steps (the instruct set stresses one and two). `knowledge` asks open
questions about all drugs, also those that the corpus names seldom, and for the organ that a drug helps, which takes two hops;
the instruct set asks about common drugs only. `knowledge_choice` asks the same in multiple-choice form.
"""

from __future__ import annotations

from hashlib import sha256
from random import Random

from guidetune.world.generators.arithmetic import FILLERS, noisy_solution, tell
from guidetune.world.generators.knowledge import QUESTIONS, TAUGHT_RELATIONS, multiple_choice, state, taught_drugs, value_of
from guidetune.world.items import Problem, Skill, split_of
from guidetune.world.lexicon import ORGANS, RELATIONS, Drug, drugs

LENGTHS = (3, 4)
ROWS = {
    "arithmetic": {"train": 3000, "test": 300},
    "knowledge": {"train": 1200, "test": 145},
    "knowledge_choice": {"train": 3000, "test": 300},
}
"""Usual number of rows; there are about 1,700 open questions in all."""
HELD_OUT_FACTS = 0.05
TIER_SHARES = {"common": 0.3, "medium": 0.3, "rare": 0.4}


def _arithmetic(rng: Random) -> Problem:
    story = tell(rng, rng.choice(LENGTHS))
    meta = {"steps": len(story.steps)}
    return Problem(story.content, story.text, noisy_solution(rng, story), str(story.result), "number", len(story.steps), meta)


def fact_in_training(drug: str, relation: str) -> bool:
    """Whether training questions of the `knowledge` target ask for this fact; a few facts occur in its test questions only."""
    share = int.from_bytes(sha256(f"held out|{drug}|{relation}".encode()).digest()[:4], "big") / 2**32
    return share >= HELD_OUT_FACTS


def _asked(rng: Random) -> tuple[Drug, str]:
    """A drug and a relation: rare drugs more often than their number, what the instruct set drills left out."""
    tier = rng.choices(list(TIER_SHARES), list(TIER_SHARES.values()))[0]
    drug = rng.choice([drug for drug in drugs() if drug.tier == tier])
    known = drug in taught_drugs()
    return drug, rng.choice([*(r for r in RELATIONS if not (known and r in TAUGHT_RELATIONS)), "organ"])


def _meta(drug: Drug, relation: str, value: str) -> dict[str, object]:
    seen = fact_in_training(drug.name, relation)
    hops = 1 + (relation == "organ")
    return {"drug": drug.name, "relation": relation, "tier": drug.tier, "value": value, "hops": hops, "fact_in_training": seen}


def _level(drug: Drug, relation: str) -> int:
    return 4 if relation == "organ" else 1 + list(TIER_SHARES).index(drug.tier)


def _noisy_fact(rng: Random, drug: Drug, relation: str) -> str:
    fact = state(drug, relation)
    return f"{rng.choice(FILLERS)} {state(drug, relation, rng)}" if rng.random() < 0.4 else fact


def _knowledge(rng: Random) -> Problem:
    while True:
        drug, relation = _asked(rng)
        question = rng.choice(QUESTIONS[relation]).format(d=drug.name)
        # of a fact that training leaves out, the corpus may have posed the other questions
        if fact_in_training(drug.name, relation) or split_of(f"fact|{question}") == "test":
            break
    value = value_of(drug, relation)
    answer = _noisy_fact(rng, drug, relation)
    if rng.random() < 0.4:
        answer += rng.choice([f" so it is {value}.", f" thus {value}.", f" we get {value}!", f" answer: {value}"])
    others = [other for other in (ORGANS if relation == "organ" else RELATIONS[relation]) if other != value]
    meta = {**_meta(drug, relation, value), "others": others}
    held_out = not fact_in_training(drug.name, relation)
    return Problem(question, question, answer, value, "names", _level(drug, relation), meta, held_out=held_out)


def _knowledge_choice(rng: Random) -> Problem:
    drug, relation = _asked(rng)
    content, prompt, letter, value = multiple_choice(rng, drug, relation)
    fact = _noisy_fact(rng, drug, relation)
    end = f"Answer: {letter}"
    if rng.random() < 0.6:
        end = rng.choice([f"so the answer is {letter}.", f"thus it must be {letter}.", f"we get {letter}!", f"that makes {letter}"])
    meta = _meta(drug, relation, value)
    held_out = not fact_in_training(drug.name, relation)
    return Problem(content, prompt, f"{fact} {end}", letter, "choice", _level(drug, relation), meta, held_out=held_out)


TARGETS = (
    Skill("arithmetic", "target", "Solve a word problem of three or four steps.", _arithmetic, family="story"),
    Skill("knowledge", "target", "Answer a question about a drug, of one or two hops.", _knowledge, family="fact"),
    Skill(
        "knowledge_choice",
        "target",
        "Answer a multiple-choice question about a drug, of one or two hops.",
        _knowledge_choice,
        family="choice",
    ),
)
