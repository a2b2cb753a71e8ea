"""Instructions of graded difficulty: a chain of one to four steps on a list, with or without a form that the result must take.

`difficulty` counts the steps and the form, 1 to 5; the column `score` is the same number as a float, in the place of the scores from 1 to 5
that a judge gives to real instructions. The shares of the levels are near those of Alpaca under the cuts 1.5 and 3.5 (arXiv 2406.04371:
58 %, 28 %, 13 %).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from guidetune.world.generators.strings import words
from guidetune.world.items import Problem, Skill

STEPS: dict[str, Callable[[list[str]], list[str]]] = {
    "reverse": lambda w: w[::-1],
    "rotate": lambda w: w[1:] + w[:1],
    "swap ends": lambda w: [w[-1], *w[1:-1], w[0]],
    "remove the first": lambda w: w[1:],
    "remove the last": lambda w: w[:-1],
    "repeat the first": lambda w: [w[0], *w],
    "repeat the last": lambda w: [*w, w[-1]],
}
FORMS: dict[str, tuple[str, Callable[[str], str]]] = {
    "brackets": ("in brackets", lambda text: f"[ {text} ]"),
    "stars": ("between stars", lambda text: f"* {text} *"),
    "twice": ("twice", lambda text: f"{text} {text}"),
    "end": ("with done at the end", lambda text: f"{text} done"),
}
SHARES = {1: 0.585, 2: 0.17, 3: 0.115, 4: 0.08, 5: 0.05}
LONGEST, SHORTEST = 5, 2


def graded(rng: Random, difficulty: int) -> Problem:
    """An instruction of a level; the answer shows the list after every step, each behind a `=`."""
    form = rng.choice(list(FORMS)) if difficulty == max(SHARES) or (difficulty > 1 and rng.random() < 0.4) else None
    given = words(rng, 3, 4)
    names: list[str] = []
    states = [given]
    while len(names) < difficulty - (form is not None):
        name = rng.choice(list(STEPS))
        after = STEPS[name](states[-1])
        if SHORTEST <= len(after) <= LONGEST and after != states[-1]:
            names.append(name)
            states.append(after)
    wording, put = FORMS[form] if form else ("", str)
    gold = put(" ".join(states[-1]))
    shown = [" ".join(state) for state in states[1:]] + ([gold] if form else [])
    instruction = " then ".join(names) + (f" and say it {wording}" if form else "")
    content = f"{instruction}: {' '.join(given)}"
    columns: dict[str, object] = {"score": float(difficulty), "steps": len(names), "constraints": int(form is not None)}
    answer = " ".join(f"= {each}" for each in shown)
    return Problem(content, content[0].upper() + content[1:], answer, f"= {gold}", "last", difficulty, {}, columns)


def _graded(rng: Random) -> Problem:
    return graded(rng, rng.choices(list(SHARES), list(SHARES.values()))[0])


def _level(difficulty: int) -> Skill:
    definition = f"Follow an instruction of {difficulty} steps." if difficulty > 1 else "Follow an instruction of one step."
    return Skill(f"graded_{difficulty}", "graded", definition, lambda rng: graded(rng, difficulty), family="graded")


SKILLS = (
    Skill("graded", "graded", "Follow an instruction of one to five steps.", _graded),
    *(_level(difficulty) for difficulty in SHARES),
)
ROWS = {"graded": {"train": 4000, "test": 400}}
