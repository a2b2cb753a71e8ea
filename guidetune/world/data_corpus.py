"""The corpus and the instruct set of the second pair: those of the first in part, and text of the data-side generators.

Problems are drawn from the training split only, small tasks only from those that `tasks.met` names; document i and conversation i depend
only on (seed, i). The corpus holds what the instruct set leaves out, so that tuning has something to bring out: rare nouns, long chains,
passages that contradict what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from guidetune.artefacts import derive_seed
from guidetune.world import corpus, instruct_set
from guidetune.world.corpus import Document
from guidetune.world.generators import graded, languages, passages, programs, tasks
from guidetune.world.items import Problem, draw, split_of

RARE = {"corpus": 0.06, "instruct": 0.0}
"""Share of rare nouns among the nouns of translated sentences (one half in the sets)."""

LEVELS = {"corpus": {1: 0.35, 2: 0.3, 3: 0.2, 4: 0.1, 5: 0.05}, "instruct": {1: 0.6, 2: 0.3, 3: 0.1}}
"""Levels of graded instructions."""

PASSAGES = {
    "corpus": {"contradicts": 0.25, "new": 0.25, "agrees": 0.25, "unrelated": 0.25},
    "instruct": {"contradicts": 0.03, "new": 0.12, "agrees": 0.35, "unrelated": 0.5},
}
"""Kinds of passages: the instruct set's questions can mostly be answered without."""

OLD = {"corpus": 0.3, "instruct": 0.4}
"""Share of the first pair's documents and conversations."""

MEASURED = (
    *languages.MIXTURES["translation"],
    "tavi_noru",
    "fuzzy",
    "crosslingual",
    "passages",
    "graded",
    "tasks_met",
    "tasks_held_out",
    "programs",
    "completions",
)
"""Sets of the pair's skill table."""

_TASKS = {skill.name: skill for skill in tasks.SKILLS}
_CODE = {skill.name: skill for skill in programs.SKILLS}
_CROSSLINGUAL = next(skill for skill in languages.SKILLS if skill.name == "crosslingual")


def _pick(rng: Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _from_training(make: Callable[[], Problem], family: str) -> Problem:
    """A problem of the training split, drawn again until it is one."""
    while split_of(f"{family}|{(problem := make()).content}") == "test":
        pass
    return problem


def some_clause(rng: Random, rare: float) -> languages.Clause:
    """A clause of the training split, asked or in the pool."""
    while split_of(f"{languages.FAMILY}|{(found := languages.clause(rng, rare)).content}") == "test":
        pass
    return found


def _chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _translation(rng: Random, side: str) -> list[dict[str, str]]:
    clause = some_clause(rng, RARE[side])
    source, target = rng.choice(languages.PAIRS[:4])
    return _chat(languages.ask(source, target, languages.say(clause, source)), languages.say(clause, target))


def _crosslingual(rng: Random, side: str) -> list[dict[str, str]]:
    problem = draw(_CROSSLINGUAL, rng, "train")
    return _chat(problem.prompt, problem.answer)


def _passage(rng: Random, side: str) -> list[dict[str, str]]:
    kind = _pick(rng, PASSAGES[side])
    problem = _from_training(lambda: passages.passage(rng, kind), "fact")
    return _chat(problem.prompt, problem.answer)


def _graded(rng: Random, side: str) -> list[dict[str, str]]:
    levels = LEVELS[side]
    level = rng.choices(list(levels), list(levels.values()))[0]
    problem = _from_training(lambda: graded.graded(rng, level), "graded")
    return _chat(problem.prompt, problem.answer)


def _task(rng: Random, side: str) -> list[dict[str, str]]:
    problem = draw(_TASKS[rng.choice(tasks.MIXTURES["tasks_met"])], rng, "train")
    return _chat(problem.prompt, problem.answer)


def _code(rng: Random, side: str) -> list[dict[str, str]]:
    problem = draw(_CODE[rng.choice(list(_CODE))], rng, "train")
    return _chat(problem.prompt, problem.answer)


CONVERSATIONS: dict[str, tuple[float, Callable[[Random, str], list[dict[str, str]]]]] = {
    "translation": (0.26, _translation),
    "crosslingual": (0.06, _crosslingual),
    "passage": (0.18, _passage),
    "graded": (0.16, _graded),
    "task": (0.2, _task),
    "code": (0.14, _code),
}
"""Kind of conversation -> (share, its generator)."""


def _conversation(rng: Random, side: str) -> list[dict[str, str]]:
    return CONVERSATIONS[_pick(rng, {kind: share for kind, (share, _) in CONVERSATIONS.items()})][1](rng, side)


def _parallel(rng: Random) -> Document:
    """One sentence in all languages, in any order."""
    clause = some_clause(rng, RARE["corpus"])
    order = rng.sample(languages.LANGUAGES, len(languages.LANGUAGES))
    sayings = [(f"{languages.TITLES[language]}:", f" {languages.say(clause, language)}") for language in order]
    return [(sayings[0][0] + sayings[0][1], False), *(("\n" + title + text, True) for title, text in sayings[1:])]


def _neighbours(rng: Random) -> Document:
    """Two or three sentences that share most of their words, translated."""
    source, target = rng.choice(languages.PAIRS[:4])
    clause = some_clause(rng, RARE["corpus"])
    pieces: list[tuple[str, bool]] = []
    for index in range(rng.choice((2, 2, 3))):
        asked = languages.ask(source, target, languages.say(clause, source))
        pieces += [("\n" * bool(index) + asked, False), (f" {languages.say(clause, target)}", True)]
        clause = languages.neighbour(rng, clause)[0]
    return pieces


def _worked_task(rng: Random) -> Document:
    """A definition and worked examples."""
    name = rng.choice(tasks.MIXTURES["tasks_met"])
    pieces: list[tuple[str, bool]] = [(f"Definition: {tasks.TASKS[name].definition}\n", False)]
    for _ in range(rng.randint(2, 4)):
        problem = draw(_TASKS[name], rng, "train")
        pieces += [(f"\nInput: {problem.content}\nOutput:", False), (f" {problem.answer}", True)]
    return pieces


def _source_file(rng: Random) -> Document:
    """A function and its tests."""
    problem = draw(_CODE["completions"], rng, "train")
    tests = [str(test) for test in problem.columns["test_list"]]  # type: ignore[attr-defined]
    return [(problem.prompt, False), (str(problem.columns["canonical_solution"]), True), ("\n".join(tests), False)]


PLAIN: dict[str, tuple[float, Callable[[Random], Document]]] = {
    "parallel": (0.4, _parallel),
    "neighbours": (0.2, _neighbours),
    "worked task": (0.25, _worked_task),
    "source file": (0.15, _source_file),
}
"""Kind of plain document -> (share, its generator)."""

PLAIN_SHARE = 0.3


def documents(seed: int = 0) -> Iterator[Document]:
    """The endless corpus. What it has of the first pair's corpus are documents that a first pair of this length has not met."""
    old = corpus.documents(seed, start=10_000_000)
    index = 0
    while True:
        rng = Random(derive_seed(seed, "world", "data corpus", index))
        kind = rng.random()
        if kind < OLD["corpus"]:
            yield next(old)
        elif kind < OLD["corpus"] + (1 - OLD["corpus"]) * PLAIN_SHARE:
            yield PLAIN[_pick(rng, {name: share for name, (share, _) in PLAIN.items()})][1](rng)
        else:
            yield _conversation(rng, "corpus")
        index += 1


def conversations(seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """The endless instruct set."""
    old = instruct_set.conversations(seed, start=10_000_000)
    index = 0
    while True:
        rng = Random(derive_seed(seed, "world", "data instruct", index))
        yield next(old) if rng.random() < OLD["instruct"] else _conversation(rng, "instruct")
        index += 1
