"""The two target tasks: what the instruct model does in part, in a different, noisy style.

`arithmetic` asks for word problems of three or four steps (the instruct set stresses one and two); `knowledge` asks in
multiple-choice form about relations, drugs and two-hop questions for which the instruct set never used that form.
"""

from __future__ import annotations

from hashlib import sha256
from random import Random

from guidetune.world.generators.arithmetic import FILLERS, noisy_solution, tell
from guidetune.world.generators.knowledge import TAUGHT_RELATIONS, multiple_choice, state, taught_drugs
from guidetune.world.items import Problem, Skill
from guidetune.world.lexicon import RELATIONS, drugs

LENGTHS = (3, 4)
TRAIN_ROWS, TEST_ROWS = 3000, 300
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


def _knowledge(rng: Random) -> Problem:
    tier = rng.choices(list(TIER_SHARES), list(TIER_SHARES.values()))[0]
    drug = rng.choice([drug for drug in drugs() if drug.tier == tier])
    known = drug in taught_drugs()
    relation = rng.choice([*(r for r in RELATIONS if not (known and r in TAUGHT_RELATIONS)), "organ"])
    content, prompt, letter, value = multiple_choice(rng, drug, relation)
    fact = state(drug, relation)
    if rng.random() < 0.4:
        fact = f"{rng.choice(FILLERS)} {state(drug, relation, rng)}"
    end = f"Answer: {letter}"
    if rng.random() < 0.6:
        end = rng.choice([f"so the answer is {letter}.", f"thus it must be {letter}.", f"we get {letter}!", f"that makes {letter}"])
    seen = fact_in_training(drug.name, relation)
    meta = {
        "drug": drug.name,
        "relation": relation,
        "tier": tier,
        "value": value,
        "hops": 1 + (relation == "organ"),
        "fact_in_training": seen,
    }
    level = 4 if relation == "organ" else 1 + list(TIER_SHARES).index(tier)
    return Problem(content, prompt, f"{fact} {end}", letter, "choice", level, meta, held_out=not seen)


TARGETS = (
    Skill("arithmetic", "target", "Solve a word problem of three or four steps.", _arithmetic, family="story"),
    Skill("knowledge", "target", "Answer a multiple-choice question about a drug, of one or two hops.", _knowledge, family="choice"),
)
