"""An item of the embedded world, and the rule that keeps its training and test problems apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput

SPLITS = ("train", "test")
TEST_SHARE = 0.1


@dataclass(frozen=True)
class Problem:
    """What a generator draws: `content` is the canonical form of the problem, free of wording, that decides its split.

    `columns` are what its exported row holds beside the columns of every row: the fields of a published data format, labels, scores.
    `held_out` forces the problem into the test split whatever its content (facts that target training never names).
    """

    content: str
    prompt: str
    answer: str
    gold: str
    check: str
    difficulty: int = 1
    meta: dict[str, object] = field(default_factory=dict)
    columns: dict[str, object] = field(default_factory=dict)
    held_out: bool = False


@dataclass(frozen=True)
class Item:
    """One problem with its reference answer.

    `prompt` is the user's text, `answer` a full assistant text in the style of its set, `gold` the part that is checked,
    `check` the kind of check `grade` makes, `difficulty` a level from 1, `meta` details of the skill, `columns` further columns of its row.
    """

    id: str
    skill: str
    category: str
    difficulty: int
    prompt: str
    answer: str
    gold: str
    check: str
    meta: dict[str, object] = field(default_factory=dict)
    columns: dict[str, object] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt and the reference answer as chat messages."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Skill:
    """A named generator; `definition` is the task in one sentence, `category` groups skills for held-out-task studies.

    Skills of one `family` (default: the name) pose the same kind of problem and share one train/test split. Skills that are
    `seeded_as` the same name draw the same numbers, so that their items with one number belong together. `first_id` gives a
    skill's rows the column `task_id`, counted from a number of each split.
    """

    name: str
    category: str
    definition: str
    draw: Callable[[Random], Problem]
    family: str = ""
    seeded_as: str = ""
    first_id: Mapping[str, int] | None = None


def split_of(content: str) -> str:
    """`train` or `test`, by a hash of the problem's canonical content: the same problem is always on the same side."""
    share = int.from_bytes(sha256(content.encode()).digest()[:4], "big") / 2**32
    return "test" if share < TEST_SHARE else "train"


def draw(skill: Skill, rng: Random, split: str) -> Problem:
    """A problem of the wanted split: problems of the other one are drawn again."""
    while True:
        problem = skill.draw(rng)
        if ("test" if problem.held_out else split_of(f"{skill.family or skill.name}|{problem.content}")) == split:
            return problem


def stream(skill: Skill, split: str, seed: int = 0, purpose: str = "items") -> Iterator[Item]:
    """Endless items of one skill; item i depends only on (seed, purpose, skill, split, i)."""
    if split not in SPLITS:
        raise BadInput(f"split {split!r} is not one of {', '.join(SPLITS)}")
    index = 0
    while True:
        rng = Random(derive_seed(seed, "world", purpose, skill.seeded_as or skill.name, split, str(index)))
        problem = draw(skill, rng, split)
        yield Item(
            id=f"{skill.name}-{split}-{seed}-{index}",
            skill=skill.name,
            category=skill.category,
            difficulty=problem.difficulty,
            prompt=problem.prompt,
            answer=problem.answer,
            gold=problem.gold,
            check=problem.check,
            meta={**problem.meta, "content": problem.content},
            columns=problem.columns if skill.first_id is None else {**problem.columns, "task_id": skill.first_id[split] + index},
        )
        index += 1


def distinct(skill: Skill, split: str, count: int, seed: int = 0) -> list[Item]:
    """The first `count` items of a stream whose prompts differ; fewer when the skill has fewer problems than that."""
    found: dict[str, Item] = {}
    for draws, item in enumerate(stream(skill, split, seed), start=1):
        found.setdefault(item.prompt, item)
        if len(found) == count or draws >= 20 * count + 200:
            break
    return list(found.values())
