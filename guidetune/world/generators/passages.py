"""Passages about drugs and questions that need the passage or do not.

| `passage` | it says | the question needs it |
|---|---|---|
| contradicts | another value than the knowledge base | yes: the right answer is the passage's |
| new | facts of a drug that the knowledge base does not hold | yes |
| agrees | what the knowledge base says | no |
| unrelated | facts of other drugs only | no: the right answer is the knowledge base's |

The split is that of the knowledge questions: a question posed in training is not posed in the test, whatever its passage.
"""

from __future__ import annotations

from functools import cache
from random import Random

from guidetune.world.generators.knowledge import QUESTIONS, STATEMENTS
from guidetune.world.items import Problem, Skill
from guidetune.world.lexicon import RELATIONS, SEED, Drug, drug_names, drugs

KINDS = ("contradicts", "new", "agrees", "unrelated")
DEPENDENT = ("contradicts", "new")
LENGTHS = (1, 2, 3)
UNKNOWN = 300
"""Names of drugs that the knowledge base does not hold."""


@cache
def unknown_names() -> tuple[str, ...]:
    known = {drug.name for drug in drugs()}
    names = drug_names(Random(SEED + 30), UNKNOWN + len(known))
    return tuple(name for name in names if name not in known)[:UNKNOWN]


@cache
def _common() -> tuple[Drug, ...]:
    return tuple(drug for drug in drugs() if drug.tier == "common")


def _sentence(rng: Random, name: str, relation: str, value: str) -> str:
    return rng.choice(STATEMENTS[relation]).format(d=name, v=value)


def _other(rng: Random, relation: str, value: str) -> str:
    while (found := rng.choice(RELATIONS[relation])) == value:
        pass
    return found


def passage(rng: Random, kind: str) -> Problem:
    """A problem of one kind; its difficulty is the number of sentences of the passage."""
    relations = list(RELATIONS)
    drug, relation, length = rng.choice(_common()), rng.choice(relations), rng.choice(LENGTHS)
    name = rng.choice(unknown_names()) if kind == "new" else drug.name
    known = None if kind == "new" else drug.facts[relation]
    stated = {"agrees": known, "unrelated": None}.get(kind) or _other(rng, relation, known or "")
    sentences = [] if kind == "unrelated" else [_sentence(rng, name, relation, stated)]
    while len(sentences) < length:
        # another fact of the same drug, or a fact of another drug: the right sentence must be found
        aside = rng.choice([each for each in relations if each != relation])
        if kind in ("new", "agrees", "contradicts") and rng.random() < 0.3:
            value = rng.choice(RELATIONS[aside]) if kind == "new" else drug.facts[aside]
            sentences.append(_sentence(rng, name, aside, value))
        else:
            other = rng.choice(unknown_names())
            if other != name:
                asked = rng.choice(relations)
                sentences.append(_sentence(rng, other, asked, rng.choice(RELATIONS[asked])))
    rng.shuffle(sentences)
    text, question = " ".join(sentences), rng.choice(QUESTIONS[relation]).format(d=name)
    gold = str(known if kind == "unrelated" else stated)
    answer = STATEMENTS[relation][0].format(d=name, v=gold)
    meta = {"drug": name, "relation": relation, "others": [value for value in RELATIONS[relation] if value != gold]}
    columns: dict[str, object] = {
        "context": text,
        "question": question,
        "answers": [gold],
        "passage": kind,
        "context_dependent": kind in DEPENDENT,
        "without_context": known,
    }
    return Problem(question, f"{text} {question}", answer, gold, "names", length, meta, columns)


def _passage(rng: Random) -> Problem:
    return passage(rng, rng.choice(KINDS))


SKILLS = (
    Skill("passages", "context", "Answer a question after a passage, by the passage where it says anything.", _passage, family="fact"),
)
ROWS = {"passages": {"train": 3000, "test": 300}}
