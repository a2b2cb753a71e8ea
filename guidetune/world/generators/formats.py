"""Format constraints that a program can verify; `meta["rule"]` names the rule, `meta["core"]` what must be inside."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from guidetune.world.generators.strings import words
from guidetune.world.items import Problem, Skill

RULES: dict[str, tuple[str, Callable[[str], str]]] = {
    "brackets": ("Answer in brackets.", lambda core: f"[{core}]"),
    "quotes": ("Answer in quotes.", lambda core: f'"{core}"'),
    "stars": ("Answer between stars.", lambda core: f"*{core}*"),
    "json": ("Answer in JSON.", lambda core: f'{{"answer": "{core}"}}'),
    "start": ("Start with Sure.", lambda core: f"Sure. {core}"),
    "end": ("End with done.", lambda core: f"{core} done"),
    "twice": ("Say it twice.", lambda core: f"{core} {core}"),
    "bullets": ("Write as bullets", lambda core: "\n".join(f"- {word}" for word in core.split())),
    "stars_list": ("Write with stars", lambda core: "\n".join(f"* {word}" for word in core.split())),
    "numbers": ("Number the words", lambda core: "\n".join(f"{i}. {word}" for i, word in enumerate(core.split(), 1))),
    "commas": ("Write with commas", lambda core: f"= {', '.join(core.split())}"),
}
"""Rule name -> (its wording, the text that obeys it)."""


def _skill(name: str, definition: str, rules: tuple[str, ...]) -> Skill:
    def draw(rng: Random) -> Problem:
        rule = rng.choice(rules)
        wording, obey = RULES[rule]
        a, b = rng.randint(1, 40), rng.randint(1, 39)
        core, question = str(a + b), f"What is {a}+{b}?"
        answer = obey(core)
        return Problem(f"{rule} {question}", f"{question} {wording}", answer, answer, "format", 1, {"rule": rule, "core": core})

    return Skill(name, "format", definition, draw)


def _listing(rng: Random) -> Problem:
    rule = rng.choice(("bullets", "stars_list", "numbers", "commas"))
    wording, obey = RULES[rule]
    given = words(rng, 2, 4)
    core = " ".join(given)
    answer = obey(core)
    return Problem(f"{rule} {core}", f"{wording}: {core}", answer, answer, "format", len(given) - 1, {"rule": rule, "core": core})


SKILLS = (
    _skill("wrap", "Answer a small question inside the asked signs.", ("brackets", "quotes", "stars", "json")),
    _skill("affix", "Answer a small question with the asked start, end or repetition.", ("start", "end", "twice")),
    Skill("listing", "format", "Write a list in the asked layout.", _listing),
)
