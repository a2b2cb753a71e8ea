"""Questions about the drugs of the knowledge base: open ones, and multiple choice with one or two hops."""

from __future__ import annotations

from random import Random

from guidetune.world.items import Problem, Skill
from guidetune.world.lexicon import ORGANS, RELATIONS, Drug, drugs, organ_of

STATEMENTS = {
    "treats": ("{d} treats {v}.", "{d} is a drug against {v}."),
    "plant": ("{d} is made from {v}.", "{d} comes from {v}."),
    "color": ("{d} pills are {v}.", "The color of {d} is {v}."),
    "effect": ("{d} causes {v}.", "A side effect of {d} is {v}."),
}
"""Ways to state a fact; the first is the instruct model's."""

QUESTIONS = {
    "treats": ("What does {d} treat?", "Which disease is {d} for?", "What is {d} a drug against?", "When do people take {d}?"),
    "plant": ("What is {d} made from?", "Which plant does {d} come from?", "Where does {d} come from?", "Which plant is in {d}?"),
    "color": ("Which color is {d}?", "What color do {d} pills have?", "What is the color of {d}?", "How do {d} pills look?"),
    "effect": ("What does {d} cause?", "What is a side effect of {d}?", "Which side effect does {d} have?", "What may {d} lead to?"),
    "organ": ("Which organ does {d} help?", "For which organ is {d} good?"),
}

TAUGHT_RELATIONS = ("treats", "color")
"""Relations that the instruct set asks in multiple-choice form, and only for the drugs of `taught_drugs`."""

CHOICES = "ABCD"


def taught_drugs() -> tuple[Drug, ...]:
    """The drugs whose `TAUGHT_RELATIONS` the instruct set asks in multiple-choice form: the first half of the common ones."""
    common = [drug for drug in drugs() if drug.tier == "common"]
    return tuple(common[: len(common) // 2])


def value_of(drug: Drug, relation: str) -> str:
    """The value of a relation, or for `organ` the organ that the disease it treats affects."""
    return organ_of()[drug.facts["treats"]] if relation == "organ" else drug.facts[relation]


def state(drug: Drug, relation: str, rng: Random | None = None) -> str:
    """The fact as a sentence, two sentences for `organ`; with `rng` in any of its wordings."""
    if relation == "organ":
        disease = drug.facts["treats"]
        return f"{state(drug, 'treats', rng)} {disease} affects the {organ_of()[disease]}."
    form = rng.choice(STATEMENTS[relation]) if rng else STATEMENTS[relation][0]
    return form.format(d=drug.name, v=drug.facts[relation])


def multiple_choice(rng: Random, drug: Drug, relation: str) -> tuple[str, str, str, str]:
    """Content (free of wording and order), prompt, letter and value of a four-way question."""
    right = value_of(drug, relation)
    values = ORGANS if relation == "organ" else RELATIONS[relation]
    options = [right, *rng.sample([value for value in values if value != right], len(CHOICES) - 1)]
    content = f"{drug.name} {relation}: {' '.join(sorted(options))}"
    rng.shuffle(options)
    question = rng.choice(QUESTIONS[relation]).format(d=drug.name)
    prompt = question + " " + " ".join(f"{letter}) {option}" for letter, option in zip(CHOICES, options, strict=True))
    return content, prompt, CHOICES[options.index(right)], right


def _fact(rng: Random) -> Problem:
    drug = rng.choice([drug for drug in drugs() if drug.tier == "common"])
    relation = rng.choice(list(RELATIONS))
    question = rng.choice(QUESTIONS[relation]).format(d=drug.name)
    gold = drug.facts[relation]
    others = [value for value in RELATIONS[relation] if value != gold]
    meta = {"drug": drug.name, "relation": relation, "tier": drug.tier, "others": others}
    return Problem(question, question, state(drug, relation), gold, "names", 1, meta)


def _choice(rng: Random) -> Problem:
    drug, relation = rng.choice(taught_drugs()), rng.choice(TAUGHT_RELATIONS)
    content, prompt, letter, value = multiple_choice(rng, drug, relation)
    meta = {"drug": drug.name, "relation": relation, "tier": drug.tier, "value": value}
    return Problem(content, prompt, f"{state(drug, relation)} Answer: {letter}", letter, "choice", 1, meta)


SKILLS = (
    Skill("fact", "knowledge", "Answer a question about a drug.", _fact),
    Skill("choice", "knowledge", "Choose the right option about a drug and end with its letter.", _choice),
)
