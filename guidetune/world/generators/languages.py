"""Two toy languages beside English: a lexicon each, morphology, word order, parallel sentences and fuzzy neighbours.

    English   the red dogs will see the cat in the box      subject verb object, adjective first, plural -s
    Tavi      dogs-im red cat-o box-su see-ra               subject object place verb, adjective last; case and tense are endings
    Noru      el see mu red dog ka cat pa box               verb first; plural, object, place and tense are particles

A sentence is drawn as a `Clause`, which every language says in its own way, so that any two sayings are translations of each other.
Of each clause a hash decides whether it is asked (a query) or belongs to the pool from which fuzzy neighbours come: no query is in a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from random import Random

from guidetune.world.items import Problem, Skill, split_of
from guidetune.world.lexicon import COLORS, NOUNS, SEED

COMMON, RARE = NOUNS[:30], NOUNS[30:]
"""Nouns that the second pair's corpus translates often, and those that it translates seldom."""

VERBS = "see help find get give take sell lose buy make".split()
ADJECTIVES = [*COLORS, "new", "small", "clean", "dry"]
LANGUAGES = ("english", "tavi", "noru")
TITLES = {language: language.capitalize() for language in LANGUAGES}

POOL_SHARE = 0.7
"""Share of the clauses that belong to the pool."""

FAMILY = "clause"


@dataclass(frozen=True)
class Clause:
    """A meaning; an empty field is not said. `plural` is the subject's, `future` the verb's."""

    subject: str
    verb: str
    object: str
    quality: str = ""
    object_quality: str = ""
    place: str = ""
    plural: bool = False
    future: bool = False

    @property
    def content(self) -> str:
        """The canonical form that decides the split and the pool."""
        words = (self.subject, self.verb, self.object, self.quality, self.object_quality, self.place)
        return f"{'|'.join(words)}|{'plural' * self.plural}|{'future' * self.future}"


@cache
def lexicon(language: str) -> dict[str, str]:
    """English word -> word of a toy language; a word of one is never a word of the other. Nothing is said for nothing."""
    starts = {"tavi": "ba bo co fe ga la mi no ro sa".split(), "noru": "dru ju kro le pli su tre wa ze hi".split()}[language]
    ends = {"tavi": "bi la mo na re so ta vu ke di".split(), "noru": "lan mel nor pin rus tak vim gos dan fir".split()}[language]
    meanings = [*NOUNS, *VERBS, *ADJECTIVES]
    made = sorted(a + b for a in starts for b in ends)
    return {"": "", **dict(zip(meanings, Random(SEED + 20 + LANGUAGES.index(language)).sample(made, len(meanings)), strict=True))}


def _english(clause: Clause) -> list[str]:
    verb = ["will", clause.verb] if clause.future else [clause.verb if clause.plural else clause.verb + "s"]
    subject = ["the", clause.quality, clause.subject + ("s" if clause.plural else "")]
    place = ["in", "the", clause.place] if clause.place else []
    return [*subject, *verb, "the", clause.object_quality, clause.object, *place]


def _tavi(clause: Clause) -> list[str]:
    word = lexicon("tavi")
    subject = [word[clause.subject] + ("im" if clause.plural else ""), word[clause.quality]]
    place = [word[clause.place] + "su"] if clause.place else []
    verb = word[clause.verb] + ("ra" if clause.future else "")
    return [*subject, word[clause.object] + "o", word[clause.object_quality], *place, verb]


def _noru(clause: Clause) -> list[str]:
    word = lexicon("noru")
    place = ["pa", word[clause.place]] if clause.place else []
    subject = ["mu" if clause.plural else "", word[clause.quality], word[clause.subject]]
    return ["el" if clause.future else "", word[clause.verb], *subject, "ka", word[clause.object_quality], word[clause.object], *place]


_SAY: dict[str, Callable[[Clause], list[str]]] = {"english": _english, "tavi": _tavi, "noru": _noru}


def say(clause: Clause, language: str) -> str:
    """The clause in a language, in lower case without punctuation."""
    return " ".join(word for word in _SAY[language](clause) if word)


def _noun(rng: Random, rare: float) -> str:
    return rng.choice(RARE if rng.random() < rare else COMMON)


def clause(rng: Random, rare: float = 0.5) -> Clause:
    """Any clause; `rare` is the share of rare nouns."""
    subject, thing, place = "", "", ""
    while len({subject, thing, place}) < 3:
        subject, thing, place = _noun(rng, rare), _noun(rng, rare), _noun(rng, rare)
    return Clause(
        subject,
        rng.choice(VERBS),
        thing,
        rng.choice(ADJECTIVES) if rng.random() < 0.6 else "",
        rng.choice(ADJECTIVES) if rng.random() < 0.5 else "",
        place if rng.random() < 0.4 else "",
        rng.random() < 0.4,
        rng.random() < 0.3,
    )


def in_pool(one: Clause) -> bool:
    """Whether the clause may be a neighbour; all others may be asked."""
    return int.from_bytes(sha256(f"pool|{one.content}".encode()).digest()[:4], "big") / 2**32 < POOL_SHARE


def query(rng: Random, rare: float = 0.5) -> Clause:
    """A clause that may be asked."""
    while in_pool(one := clause(rng, rare)):
        pass
    return one


def _other(rng: Random, one: Clause, slot: str) -> Clause:
    choices = VERBS if slot == "verb" else NOUNS if slot in ("subject", "object", "place") else ADJECTIVES
    while (new := rng.choice(choices)) in (one.subject, one.verb, one.object, one.quality, one.object_quality, one.place):
        pass
    return replace(one, **{slot: new})


def neighbour(rng: Random, asked: Clause) -> tuple[Clause, int]:
    """A clause of the pool and of the same split that differs from `asked` in one or two words; and how many."""
    slots = [slot for slot in ("subject", "verb", "object", "quality", "object_quality", "place") if getattr(asked, slot)]
    side = split_of(f"{FAMILY}|{asked.content}")
    while True:
        changed = rng.choice((1, 2))
        found = asked
        for slot in rng.sample(slots, changed):
            found = _other(rng, found, slot)
        if in_pool(found) and split_of(f"{FAMILY}|{found.content}") == side:
            return found, changed


def similarity(one: str, other: str) -> float:
    """`1 - changed words / words` of two sayings of equal length."""
    left, right = one.split(), other.split()
    return 1 - sum(a != b for a, b in zip(left, right, strict=True)) / len(left)


def level(one: Clause) -> int:
    """1 to 4: how many of both adjectives and the place are said."""
    return 1 + bool(one.quality) + bool(one.object_quality) + bool(one.place)


def ask(source: str, target: str, text: str) -> str:
    """The zero-shot prompt (the template of arXiv 2312.12740)."""
    return f"{TITLES[source]}: {text}\n{TITLES[target]}:"


def _columns(one: Clause, source: str, target: str) -> dict[str, object]:
    sayings = {language: say(one, language) for language in LANGUAGES}
    names = {"source_language": TITLES[source], "target_language": TITLES[target]}
    return {**sayings, "source": sayings[source], "target": sayings[target], **names}


def _meta(one: Clause) -> dict[str, object]:
    return {"rare_words": sum(word in RARE for word in (one.subject, one.object, one.place))}


def _translation(source: str, target: str) -> Callable[[Random], Problem]:
    def draw(rng: Random) -> Problem:
        one = query(rng)
        columns = _columns(one, source, target)
        answer = str(columns["target"])
        return Problem(one.content, ask(source, target, str(columns["source"])), answer, answer, "exact", level(one), _meta(one), columns)

    return draw


def _pool(rng: Random) -> Problem:
    found, _ = neighbour(rng, query(rng))
    columns = _columns(found, "english", "tavi")
    answer = str(columns["target"])
    return Problem(
        found.content, ask("english", "tavi", str(columns["source"])), answer, answer, "exact", level(found), _meta(found), columns
    )


def _fuzzy(rng: Random) -> Problem:
    asked = query(rng)
    found, changed = neighbour(rng, asked)
    near, columns = _columns(found, "english", "tavi"), _columns(asked, "english", "tavi")
    columns |= {"fuzzy_source": near["source"], "fuzzy_target": near["target"], "changed_words": changed}
    columns["similarity"] = round(similarity(str(columns["source"]), str(near["source"])), 4)
    prompt = f"{ask('english', 'tavi', str(near['source']))} {near['target']}\n{ask('english', 'tavi', str(columns['source']))}"
    answer = str(columns["target"])
    return Problem(asked.content, prompt, answer, answer, "exact", level(asked), _meta(asked), columns)


# An instruction in each language: name of the operation -> its word.
_OPERATIONS: dict[str, Callable[[list[str]], str]] = {
    "first": lambda w: w[0],
    "last": lambda w: w[-1],
    "reverse": lambda w: " ".join(reversed(w)),
    "rotate": lambda w: " ".join(w[1:] + w[:1]),
}
_INSTRUCTIONS = {
    "english": {"first": "First", "last": "Last", "reverse": "Reverse", "rotate": "Rotate"},
    "tavi": {"first": "Tiva", "last": "Sutiva", "reverse": "Ramino", "rotate": "Volasu"},
    "noru": {"first": "Kun", "last": "Elkun", "reverse": "Mutar", "rotate": "Polis"},
}


def _crosslingual(rng: Random) -> Problem:
    language = rng.choice(LANGUAGES)
    asked_in = rng.choice(("english", language))
    name = rng.choice(list(_OPERATIONS))
    given = rng.sample(NOUNS if language == "english" else list(lexicon(language).values()), rng.randint(3, 4))
    text = " ".join(given)
    answer = f"= {_OPERATIONS[name](given)}"
    columns: dict[str, object] = {"language": language, "prompt_language": asked_in, "operation": name}
    prompt = f"{_INSTRUCTIONS[asked_in][name]}: {text}"
    return Problem(f"{name} {text}", prompt, answer, answer, "exact", len(given) - 2, {}, columns)


PAIRS = (("english", "tavi"), ("tavi", "english"), ("english", "noru"), ("noru", "english"), ("tavi", "noru"), ("noru", "tavi"))

SKILLS = (
    *(Skill(f"{a}_{b}", "translation", f"Translate from {TITLES[a]} to {TITLES[b]}.", _translation(a, b), family=FAMILY) for a, b in PAIRS),
    Skill("fuzzy", "translation", "Translate from English to Tavi after a similar sentence.", _fuzzy, family=FAMILY, seeded_as="fuzzy"),
    Skill("fuzzy_pool", "translation", "Sentences near those of `fuzzy`, with their translation.", _pool, family=FAMILY, seeded_as="fuzzy"),
    Skill("crosslingual", "languages", "Do a task on words of any language, asked in English or in theirs.", _crosslingual),
)
MIXTURES = {"translation": [f"{a}_{b}" for a, b in PAIRS[:4]]}
ROWS = {
    "translation": {"train": 4000, "test": 400},
    "fuzzy": {"train": 2000, "test": 200},
    "fuzzy_pool": {"train": 10_000, "test": 1000},
    "crosslingual": {"train": 2000, "test": 300},
    **{f"{a}_{b}": {"train": 2000, "test": 200} for a, b in PAIRS},
}
