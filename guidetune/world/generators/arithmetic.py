"""Sums, differences and word problems of graded length, with solutions in a plain or in a noisy, human-like style."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from guidetune.world.items import Problem, Skill
from guidetune.world.lexicon import NAMES, THINGS

LARGEST = 99


@dataclass(frozen=True)
class Story:
    """A word problem: `steps` holds (left, sign, right, result) of every step in order."""

    name: str
    things: str
    text: str
    steps: tuple[tuple[int, str, int, int], ...]

    @property
    def result(self) -> int:
        return self.steps[-1][3]

    @property
    def content(self) -> str:
        return f"{self.steps[0][0]} " + " ".join(f"{sign}{right}" for _, sign, right, _ in self.steps)


def tell(rng: Random, length: int) -> Story:
    """A word problem of `length` steps whose intermediate results stay within 1 and 99."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    have = rng.randint(2, 50)
    sentences, steps = [f"{name} has {have} {things}."], []
    for _ in range(length):
        kinds = ["lose"] if have > 1 else []
        kinds += ["get"] if have < LARGEST - 5 else []
        kinds += ["double"] if have * 2 <= LARGEST else []
        kind = rng.choice(kinds)
        if kind == "get":
            other = rng.randint(2, min(30, LARGEST - have))
            step = (have, "+", other, have + other)
            sentences.append(rng.choice([f"{name} gets {other} more.", f"{name} finds {other} more.", f"{name} buys {other}."]))
        elif kind == "lose":
            other = rng.randint(1, min(30, have - 1))
            step = (have, "-", other, have - other)
            sentences.append(rng.choice([f"{name} loses {other}.", f"{name} gives away {other}.", f"{name} sells {other}."]))
        else:
            step = (have, "*", 2, have * 2)
            sentences.append(rng.choice([f"{name} doubles them.", "Then they double."]))
        steps.append(step)
        have = step[3]
    return Story(name, things, " ".join([*sentences, f"How many {things} now?"]), tuple(steps))


def plain_solution(story: Story) -> str:
    """The instruct model's own style: `12+5=17. 17-3=14. Answer: 14`."""
    return " ".join(f"{a}{sign}{b}={c}." for a, sign, b, c in story.steps) + f" Answer: {story.result}"


FILLERS = ("well,", "ok so", "hmm,", "let us see,", "now", "then", "clearly", "right,")
WORDS = {"+": "plus", "-": "minus", "*": "times"}


def noisy_solution(rng: Random, story: Story, noise: float = 0.35) -> str:
    """A human-like solution: most steps plain, a share `noise` of them with fillers, words for signs or other punctuation."""
    parts = []
    for a, sign, b, c in story.steps:
        if rng.random() >= noise:
            parts.append(f"{a}{sign}{b}={c}.")
            continue
        calculation = rng.choice([f"{a}{sign}{b}={c}", f"{a}{sign}{b} is {c}", f"{a} {WORDS[sign]} {b} makes {c}"])
        parts.append(f"{rng.choice(FILLERS)} {calculation}{rng.choice('.;,')}")
    end = f"Answer: {story.result}"
    if rng.random() < 0.6:
        end = rng.choice(
            [
                f"so the answer is {story.result}.",
                f"thus {story.name} has {story.result} {story.things}.",
                f"we get {story.result}!",
                f"that leaves {story.result}",
            ]
        )
    return " ".join([*parts, end])


def _sum(rng: Random) -> Problem:
    a, b = rng.randint(1, 60), rng.randint(1, 39)
    prompt = rng.choice([f"What is {a}+{b}?", f"Add {a} and {b}.", f"Compute {a}+{b}."])
    return Problem(f"{a}+{b}", prompt, str(a + b), str(a + b), "number", 1 + (a % 10 + b % 10 >= 10))


def _difference(rng: Random) -> Problem:
    b, a = sorted(rng.sample(range(1, 91), 2))
    prompt = rng.choice([f"What is {a}-{b}?", f"Take {b} from {a}.", f"Compute {a}-{b}."])
    return Problem(f"{a}-{b}", prompt, str(a - b), str(a - b), "number", 1 + (a % 10 < b % 10))


def _story(rng: Random) -> Problem:
    story = tell(rng, rng.choice([1, 2, 2]))
    return Problem(story.content, story.text, plain_solution(story), str(story.result), "number", len(story.steps))


SKILLS = (
    Skill("sum", "arithmetic", "Add two numbers.", _sum),
    Skill("difference", "arithmetic", "Subtract the second number from the first.", _difference),
    Skill("story", "arithmetic", "Solve a word problem of one or two steps and end with the answer.", _story),
)
