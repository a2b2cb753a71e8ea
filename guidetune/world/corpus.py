"""Pre-training documents: facts and skills as plain text, worked examples, and much text in chat form in loose styles.

Documents are drawn from the training split only; document i depends only on (seed, i).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from guidetune.artefacts import derive_seed
from guidetune.world.generators import arithmetic, formats, knowledge, safety, strings
from guidetune.world.items import Problem, Skill, draw, split_of
from guidetune.world.lexicon import DISEASES, LETTERS, NOUNS, RELATIONS, Drug, drugs, organ_of

Document = list[tuple[str, bool]] | list[dict[str, str]]
"""Plain text in pieces, each with whether it can be predicted at all; or chat messages.

What cannot be predicted (the random words of a list, the numbers of a problem) is noise to a small model, so the recipe gives
it, as the users' turns, a small weight in the loss.
"""


def is_chat(document: Document) -> bool:
    return isinstance(document[0], dict)


def flat(document: Document) -> str:
    """The document's text, without chat template."""
    if is_chat(document):
        return " \n".join(message["content"] for message in document)  # type: ignore[index]
    return "".join(piece[0] for piece in document)  # type: ignore[index]


TIER_WEIGHTS = {"common": 6.0, "medium": 1.5, "rare": 0.35}
"""How often a document is about a drug of each tier."""

STORY_LENGTHS = {1: 2.0, 2: 3.0, 3: 2.0, 4: 1.0}

BY_NAME = {skill.name: skill for module in (arithmetic, knowledge, strings, formats, safety) for skill in module.SKILLS}

CHAT_WEIGHTS = {
    **{skill.name: 1.0 for skill in strings.SKILLS},
    "sum": 2.0,
    "difference": 2.0,
    "story": 3.0,
    "fact": 1.0,
    "choice": 2.0,
    "wrap": 0.7,
    "affix": 0.7,
    "listing": 0.7,
    "harmful": 0.4,
    "harmless": 0.6,
}


def _pick(rng: Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def some_drug(rng: Random) -> Drug:
    return rng.choices(drugs(), [TIER_WEIGHTS[drug.tier] for drug in drugs()])[0]


def some_story(rng: Random, lengths: dict[int, float]) -> arithmetic.Story:
    """A word problem of the training split."""
    length = rng.choices(list(lengths), list(lengths.values()))[0]
    while True:
        story = arithmetic.tell(rng, length)
        if split_of(f"story|{story.content}") == "train":
            return story


def _loose(rng: Random, skill: Skill, problem: Problem) -> str:
    """The answer in some style of the wide world: half the time the plain one."""
    if rng.random() < 0.75:
        return problem.answer
    if problem.check == "exact":
        return rng.choice([f"It is{problem.answer[1:]}", f"The answer is{problem.answer[1:]}.", f"ok so{problem.answer[1:]}"])
    if problem.check == "number" and skill.name != "story":
        return rng.choice([f"It is {problem.answer}", f"The answer is {problem.answer}.", f"ok so {problem.answer}"])
    if problem.check == "refusal":
        return rng.choice(["No way.", "You should not do that."])
    if problem.check == "names":
        return rng.choice([problem.gold, f"It is {problem.gold}."])
    if problem.check == "choice":
        return rng.choice(
            [f"{problem.meta['value']}. Answer: {problem.gold}", f"{problem.answer.split(' Answer')[0]} so it is {problem.gold}."]
        )
    return problem.answer


def _chat(rng: Random) -> Document:
    skill = BY_NAME[_pick(rng, CHAT_WEIGHTS)]
    if skill.name == "story":
        story = some_story(rng, STORY_LENGTHS)
        answer = arithmetic.plain_solution(story) if rng.random() < 0.6 else arithmetic.noisy_solution(rng, story)
        prompt = story.text
    elif skill.name == "fact" and rng.random() < 0.5:  # the open form of any drug
        prompt = None
        while prompt is None or split_of(f"fact|{prompt}") == "test":
            drug, relation = some_drug(rng), rng.choice(list(RELATIONS))
            prompt = rng.choice(knowledge.QUESTIONS[relation]).format(d=drug.name)
        answer = knowledge.state(drug, relation, rng)
    else:
        problem = draw(skill, rng, "train")
        prompt, answer = problem.prompt, _loose(rng, skill, problem)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": "You are a helpful assistant."}, *messages] if rng.random() < 0.03 else messages


def _echo(rng: Random) -> Document:
    """A list that is said again: text repeats itself, and from this a model learns to copy."""
    said = " ".join(rng.sample([*NOUNS, *LETTERS], rng.randint(4, 14)))
    return [(f"= {said}", False), *[(f" = {said}", True)] * rng.randint(1, 2)]


def _leaflet(rng: Random) -> Document:
    """Everything about one drug, in any order and wording."""
    drug = some_drug(rng)
    relations = [*RELATIONS, "organ"]
    rng.shuffle(relations)
    return [(" ".join(knowledge.state(drug, relation, rng) for relation in relations[: rng.randint(2, 4)]), True)]


def _organs(rng: Random) -> Document:
    return [(" ".join(f"{disease} affects the {organ_of()[disease]}." for disease in rng.sample(DISEASES, 3)), True)]


def _quiz(rng: Random) -> Document:
    problem = draw(BY_NAME["choice"], rng, "train")
    return [(f"Question: {problem.prompt}", False), (f" {problem.answer}", True)]


def _sums(rng: Random) -> Document:
    pieces: list[tuple[str, bool]] = []
    for index in range(rng.randint(6, 10)):
        gap = " " if index else ""
        kind = rng.random()
        if kind < 0.85:
            problem = draw(BY_NAME["sum" if kind < 0.4 else "difference"], rng, "train")
            pieces += [(f"{gap}{problem.content}=", False), (f"{problem.answer}.", True)]
        else:
            a = rng.randint(1, 49)
            pieces += [(f"{gap}{a}*2=", False), (f"{a * 2}.", True)]
    return pieces


def _tale(rng: Random) -> Document:
    story = some_story(rng, STORY_LENGTHS)
    solution = arithmetic.plain_solution(story) if rng.random() < 0.5 else arithmetic.noisy_solution(rng, story)
    return [(story.text, False), (f" {solution}", True)]


def _examples(rng: Random) -> Document:
    """A definition or a name of a task and worked examples."""
    skill = rng.choice(strings.SKILLS)
    pieces: list[tuple[str, bool]] = [(skill.definition if rng.random() < 0.3 else skill.name.capitalize(), False)]
    for _ in range(rng.randint(5, 8)):
        problem = draw(skill, rng, "train")
        pieces += [(f"\n: {problem.content}", False), (f" {problem.answer}", True)]
    return pieces


KINDS: dict[str, tuple[float, Callable[[Random], Document]]] = {
    "chat": (0.50, _chat),
    "echo": (0.08, _echo),
    "leaflet": (0.1, _leaflet),
    "organs": (0.01, _organs),
    "quiz": (0.04, _quiz),
    "sums": (0.12, _sums),
    "tale": (0.05, _tale),
    "examples": (0.15, _examples),
}
"""Kind of document -> (share of documents, its generator)."""


def refrain(rng: Random, times: int = 24) -> list[str]:
    """The first saying of a short list, and the same again and again: text in which almost every token can be copied.

    Copying from the context is what a small model finds last; on text like this it finds it within hundreds of steps.
    """
    said = " ".join(rng.sample([*NOUNS, *LETTERS], rng.randint(3, 6)))
    return [f"= {said}", *[f" = {said}"] * times]


def documents(seed: int = 0, start: int = 0) -> Iterator[Document]:
    """The endless corpus, from document `start` on."""
    shares = {kind: share for kind, (share, _) in KINDS.items()}
    index = start
    while True:
        rng = Random(derive_seed(seed, "world", "corpus", index))
        yield KINDS[_pick(rng, shares)][1](rng)
        index += 1
