"""Skills on short lists of words or letters, in categories, each with a written definition.

A result starts with `=`, so that a word has a space before it, and is the same token, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from guidetune.world.items import Problem, Skill
from guidetune.world.lexicon import LETTERS, NOUNS

DEFINITION_SHARE = 0.15
"""How many prompts give the definition of the task instead of its short name."""


def words(rng: Random, low: int = 3, high: int = 5) -> list[str]:
    """A list of distinct words, or (one time in three) of distinct letters."""
    pool = LETTERS if rng.random() < 0.33 else NOUNS
    return rng.sample(pool, rng.randint(low, high))


def _skill(name: str, category: str, definition: str, verb: str, solve: Callable[[list[str]], str], low: int = 3, high: int = 5) -> Skill:
    """A skill whose input is one list: the prompt is `verb: list`, its question form, or definition and list."""

    def draw(rng: Random) -> Problem:
        given = words(rng, low, high)
        text = " ".join(given)
        prompt = f"{definition} Input: {text}" if rng.random() < DEFINITION_SHARE else f"{verb}: {text}"
        answer = f"= {solve(given)}"
        return Problem(text, prompt, answer, answer, "exact", len(given) - low + 1)

    return Skill(name, category, definition, draw)


def _ask(rng: Random, name: str, short: str, arguments: str) -> str:
    """The short form of a prompt, or now and then its definition and input."""
    return f"{DEFINITIONS[name]} Input: {arguments}" if rng.random() < DEFINITION_SHARE else short


def _after(rng: Random) -> Problem:
    given = words(rng)
    index = rng.randrange(len(given) - 1)
    content, answer = f"{given[index]}: {' '.join(given)}", f"= {given[index + 1]}"
    prompt = _ask(rng, "after", f"After {content}", content)
    return Problem(content, prompt, answer, answer, "exact", len(given) - 2)


def _remove(rng: Random) -> Problem:
    given = words(rng)
    gone = rng.choice(given)
    content, answer = f"{gone}: {' '.join(given)}", f"= {' '.join(w for w in given if w != gone)}"
    prompt = _ask(rng, "remove", f"Remove {content}", content)
    return Problem(content, prompt, answer, answer, "exact", len(given) - 2)


def _replace(rng: Random) -> Problem:
    given = words(rng, 4, 6)
    new, given = given[0], given[1:]
    old = rng.choice(given)
    text, answer = " ".join(given), f"= {' '.join(new if w == old else w for w in given)}"
    content = f"{old} by {new}: {text}"
    prompt = _ask(rng, "replace", f"Replace {content}", content)
    return Problem(content, prompt, answer, answer, "exact", len(given) - 2)


def _member(rng: Random) -> Problem:
    given = words(rng, 4, 6)
    asked, given = given[0], given[1:]
    if rng.random() < 0.5:
        asked = rng.choice(given)
    content, answer = f"{asked}: {' '.join(given)}", "= yes" if asked in given else "= no"
    prompt = _ask(rng, "member", f"Is there {content}", content)
    return Problem(content, prompt, answer, answer, "exact", len(given) - 2)


def _repeat(rng: Random) -> Problem:
    times = rng.randint(2, 4)
    given = words(rng, 1, 2)
    content, answer = f"{times} times: {' '.join(given)}", f"= {' '.join(given * times)}"
    prompt = _ask(rng, "repeat", f"Repeat {content}", content)
    return Problem(content, prompt, answer, answer, "exact", len(given))


def _spell(rng: Random) -> Problem:
    given = rng.sample(NOUNS, rng.choice([2, 2, 3]))
    content, answer = " ".join(given), f"= {' - '.join(' '.join(word) for word in given)}"
    return Problem(content, _ask(rng, "spell", f"Spell: {content}", content), answer, answer, "exact", len(given) - 1)


def _uppercase(rng: Random) -> Problem:
    given = rng.sample(LETTERS, rng.randint(3, 5))
    content, answer = " ".join(given), f"= {' '.join(given).upper()}"
    return Problem(content, _ask(rng, "uppercase", f"Uppercase: {content}", content), answer, answer, "exact", len(given) - 2)


DEFINITIONS = {
    "after": "Give the word that follows the given one.",
    "remove": "Give the list without the given word.",
    "replace": "Give the list with the first word changed to the second.",
    "member": "Say yes if the given word is in the list, else no.",
    "repeat": "Give the list as many times as the number says.",
    "spell": "Give the letters of each word, with a dash between words.",
    "uppercase": "Give the letters in upper case.",
}

SKILLS = (
    _skill("reverse", "order", "Give the words in reverse order.", "Reverse", lambda w: " ".join(reversed(w))),
    _skill("rotate", "order", "Move the first word to the end.", "Rotate", lambda w: " ".join(w[1:] + w[:1])),
    _skill("swap", "order", "Swap the first word and the last word.", "Swap ends", lambda w: " ".join([w[-1], *w[1:-1], w[0]])),
    _skill("first", "selection", "Give the first word.", "First", lambda w: w[0]),
    _skill("last", "selection", "Give the last word.", "Last", lambda w: w[-1]),
    Skill("after", "selection", DEFINITIONS["after"], _after),
    Skill("remove", "edit", DEFINITIONS["remove"], _remove),
    Skill("replace", "edit", DEFINITIONS["replace"], _replace),
    Skill("repeat", "edit", DEFINITIONS["repeat"], _repeat),
    _skill("count", "measure", "Say how many words there are.", "Count", lambda w: str(len(w)), 2, 6),
    Skill("member", "measure", DEFINITIONS["member"], _member),
    _skill("join", "form", "Join the words with and.", "Join", " and ".join),
    Skill("spell", "form", DEFINITIONS["spell"], _spell),
    Skill("uppercase", "form", DEFINITIONS["uppercase"], _uppercase),
)
