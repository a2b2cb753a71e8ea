"""Many small tasks with a definition, a category and worked examples, in the format of Super-NaturalInstructions (arXiv 2204.07705).

Every task is a skill of its own (`task001_reverse_words`); `tasks` is the balanced mixture. Inputs that serve as positive or negative
examples are never instances: a hash of the input decides which it is. As everywhere in the world an answer starts with `=`, so that its
first word is the token that stands in the input; the column `output` is without it, and neither ROUGE-L nor exact match sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from random import Random

from guidetune.artefacts import derive_seed
from guidetune.world.items import Problem, Skill
from guidetune.world.lexicon import LETTERS, NOUNS, SEED

EXAMPLE_SHARE = 0.03
"""Share of the inputs that only serve as examples."""

EXAMPLES = 2
VOWELS = "aeiou"
ALIVE = frozenset("dog cat bear bird duck fish frog goat lion wolf".split())


@dataclass(frozen=True)
class Task:
    """One task: `draw` gives an input, `solve` its right output, `slip` a plausible wrong one with the reason why it is wrong."""

    name: str
    category: str
    definition: str
    draw: Callable[[Random], str]
    solve: Callable[[str], str]
    slip: Callable[[str], tuple[str, str]]


def _words(low: int, high: int) -> Callable[[Random], str]:
    return lambda rng: " ".join(rng.sample(NOUNS, rng.randint(low, high)))


def _letters(low: int, high: int) -> Callable[[Random], str]:
    return lambda rng: " ".join(rng.sample(LETTERS, rng.randint(low, high)))


def _numbers(low: int, high: int, largest: int = 99) -> Callable[[Random], str]:
    return lambda rng: " ".join(map(str, rng.sample(range(1, largest + 1), rng.randint(low, high))))


def _repeated(rng: Random) -> str:
    """Three to five words in which some word often stands twice."""
    given = rng.sample(NOUNS, rng.randint(3, 4))
    if rng.random() < 0.5:
        given.insert(rng.randint(0, len(given)), rng.choice(given))
    return " ".join(given)


def _row(rng: Random, choices: list[str], length: int) -> str:
    return " ".join(rng.choices(choices, k=length))


def _asked(rng: Random) -> str:
    """`word in list`, half the time a word of the list."""
    given = rng.sample(NOUNS, rng.randint(3, 5))
    asked = rng.choice(given) if rng.random() < 0.5 else rng.choice([word for word in NOUNS if word not in given])
    return f"{asked} in {' '.join(given)}"


def _two_lists(rng: Random) -> str:
    left, right = rng.sample(NOUNS, 5)[:3], rng.sample(NOUNS, 2)
    if rng.random() < 0.6:
        right = [rng.choice(left), right[0]] if right[0] not in left else right
    rng.shuffle(right)
    return f"{' '.join(left)} and {' '.join(right)}"


def _split(text: str) -> list[str]:
    return text.split()


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split()]


def _yes(right: bool) -> str:
    return "yes" if right else "no"


def _shared(text: str) -> str:
    left, right = (part.split() for part in text.split(" and "))
    return next((word for word in left if word in right), "none")


def _in_list(text: str) -> bool:
    asked, listed = text.split(" in ")
    return asked in listed.split()


def _unchanged(text: str) -> tuple[str, str]:
    return text, "This only repeats the input."


def _opposite(solve: Callable[[str], str]) -> Callable[[str], tuple[str, str]]:
    return lambda text: ("no" if solve(text) == "yes" else "yes", "This is the opposite of the right answer.")


def _one_more(solve: Callable[[str], str]) -> Callable[[str], tuple[str, str]]:
    return lambda text: (str(int(solve(text)) + 1), "This is one too many.")


def _whole(text: str) -> tuple[str, str]:
    return text, "This gives the whole input and not the asked part of it."


Solve = Callable[[str], str]
_CHANGES: list[tuple[str, str, str, Callable[[Random], str], Solve]] = [
    # the output is a list made of the input: (category, name, definition, draw, solve)
    ("word order", "reverse_words", "Give the words in reverse order.", _words(3, 5), lambda t: " ".join(_split(t)[::-1])),
    ("word order", "rotate_left", "Move the first word to the end.", _words(3, 5), lambda t: " ".join([*_split(t)[1:], _split(t)[0]])),
    ("word order", "rotate_right", "Move the last word to the start.", _words(3, 5), lambda t: " ".join([_split(t)[-1], *_split(t)[:-1]])),
    (
        "word order",
        "swap_first_two",
        "Swap the first word and the second word.",
        _words(3, 5),
        lambda t: " ".join([_split(t)[1], _split(t)[0], *_split(t)[2:]]),
    ),
    (
        "word order",
        "swap_ends",
        "Swap the first word and the last word.",
        _words(3, 5),
        lambda t: " ".join([_split(t)[-1], *_split(t)[1:-1], _split(t)[0]]),
    ),
    ("word order", "sort_words", "Give the words in the order of the letters.", _words(3, 4), lambda t: " ".join(sorted(_split(t)))),
    ("list editing", "drop_first", "Remove the first word.", _words(3, 5), lambda t: " ".join(_split(t)[1:])),
    ("list editing", "drop_last", "Remove the last word.", _words(3, 5), lambda t: " ".join(_split(t)[:-1])),
    ("list editing", "double_each", "Give each word twice.", _words(2, 3), lambda t: " ".join(w for w in _split(t) for _ in "12")),
    ("list editing", "repeat_list", "Give the list twice.", _words(2, 3), lambda t: f"{t} {t}"),
    ("list editing", "join_with_and", "Join the words with and.", _words(2, 4), lambda t: " and ".join(_split(t))),
    (
        "list editing",
        "drop_repeats",
        "Give each word only once.",
        _repeated,
        lambda t: " ".join(dict.fromkeys(_split(t))),
    ),
    ("spelling", "uppercase_letters", "Give the letters in upper case.", _letters(3, 5), lambda t: t.upper()),
    ("spelling", "spell_word", "Give the letters of the word.", _words(1, 2), lambda t: " - ".join(" ".join(w) for w in _split(t))),
    ("spelling", "initials", "Give the first letter of each word.", _words(3, 4), lambda t: " ".join(w[0] for w in _split(t))),
    ("spelling", "last_letters", "Give the last letter of each word.", _words(3, 4), lambda t: " ".join(w[-1] for w in _split(t))),
    (
        "spelling",
        "remove_vowels",
        "Remove the letters a e i o u.",
        _words(2, 3),
        lambda t: " ".join("".join(c for c in w if c not in VOWELS) for w in _split(t)),
    ),
    ("spelling", "join_letters", "Join the letters.", _letters(3, 5), lambda t: "".join(_split(t))),
    ("number lists", "sort_up", "Give the numbers from small to large.", _numbers(3, 4), lambda t: " ".join(map(str, sorted(_ints(t))))),
    (
        "number lists",
        "sort_down",
        "Give the numbers from large to small.",
        _numbers(3, 4),
        lambda t: " ".join(map(str, sorted(_ints(t), reverse=True))),
    ),
    ("number lists", "add_one_each", "Add one to each number.", _numbers(2, 4, 89), lambda t: " ".join(str(n + 1) for n in _ints(t))),
    ("number lists", "next_numbers", "Give the next two numbers.", _numbers(1, 1, 97), lambda t: f"{_ints(t)[0] + 1} {_ints(t)[0] + 2}"),
    (
        "number lists",
        "keep_even",
        "Give the even numbers, or none.",
        _numbers(3, 5),
        lambda t: " ".join(str(n) for n in _ints(t) if n % 2 == 0) or "none",
    ),
    (
        "number lists",
        "keep_small",
        "Give the numbers below 50, or none.",
        _numbers(3, 5),
        lambda t: " ".join(str(n) for n in _ints(t) if n < 50) or "none",
    ),
]
_PARTS: list[tuple[str, str, str, Callable[[Random], str], Solve]] = [
    # the output is a part of the input
    ("selection", "first_word", "Give the first word.", _words(3, 6), lambda t: _split(t)[0]),
    ("selection", "last_word", "Give the last word.", _words(3, 6), lambda t: _split(t)[-1]),
    ("selection", "second_word", "Give the second word.", _words(3, 6), lambda t: _split(t)[1]),
    ("selection", "word_before_last", "Give the word before the last.", _words(3, 6), lambda t: _split(t)[-2]),
    ("selection", "longest_word", "Give the first of the longest words.", _words(3, 4), lambda t: max(_split(t), key=len)),
    ("selection", "shortest_word", "Give the first of the shortest words.", _words(3, 4), lambda t: min(_split(t), key=len)),
    ("comparison", "larger_number", "Give the larger number.", _numbers(2, 2), lambda t: str(max(_ints(t)))),
    ("comparison", "smaller_number", "Give the smaller number.", _numbers(2, 2), lambda t: str(min(_ints(t)))),
    ("comparison", "largest_number", "Give the largest number.", _numbers(3, 5), lambda t: str(max(_ints(t)))),
    ("comparison", "smallest_number", "Give the smallest number.", _numbers(3, 5), lambda t: str(min(_ints(t)))),
    ("comparison", "first_in_order", "Give the word that is first in the order of the letters.", _words(2, 3), lambda t: min(_split(t))),
    ("comparison", "shared_word", "Give the word of both lists, or none.", _two_lists, _shared),
]
_COUNTS: list[tuple[str, str, str, Callable[[Random], str], Solve]] = [
    # the output is a number
    ("counting", "count_words", "Say how many words there are.", _words(2, 6), lambda t: str(len(_split(t)))),
    ("counting", "count_letters", "Say how many letters the words have.", _words(2, 2), lambda t: str(len(t) - 1)),
    (
        "counting",
        "count_first",
        "Say how many times the first letter is there.",
        lambda rng: _row(rng, rng.sample(LETTERS, 2), rng.randint(4, 6)),
        lambda t: str(_split(t).count(_split(t)[0])),
    ),
    ("counting", "count_even", "Say how many numbers are even.", _numbers(3, 5), lambda t: str(sum(n % 2 == 0 for n in _ints(t)))),
    (
        "counting",
        "count_alive",
        "Say how many words name an animal.",
        _words(3, 5),
        lambda t: str(sum(word in ALIVE for word in _split(t))),
    ),
    ("counting", "count_vowels", "Say how many of the letters are a e i o u.", _words(1, 2), lambda t: str(sum(c in VOWELS for c in t))),
]
_QUESTIONS: list[tuple[str, str, str, Callable[[Random], str], Solve]] = [
    # the output is yes or no
    ("yes or no", "is_even", "Say yes if the number is even, else no.", _numbers(1, 1, 999), lambda t: _yes(int(t) % 2 == 0)),
    ("yes or no", "in_list", "Say yes if the first word is in the list, else no.", _asked, lambda t: _yes(_in_list(t))),
    (
        "yes or no",
        "is_sorted",
        "Say yes if the numbers go from small to large, else no.",
        lambda rng: " ".join(map(str, (sorted if rng.random() < 0.5 else list)(rng.sample(range(1, 100), 3)))),
        lambda t: _yes(_ints(t) == sorted(_ints(t))),
    ),
    (
        "yes or no",
        "has_animal",
        "Say yes if a word names an animal, else no.",
        _words(2, 3),
        lambda t: _yes(any(word in ALIVE for word in _split(t))),
    ),
    (
        "yes or no",
        "has_repeat",
        "Say yes if a word is there twice, else no.",
        _repeated,
        lambda t: _yes(len(set(_split(t))) < len(_split(t))),
    ),
    (
        "yes or no",
        "same_ends",
        "Say yes if the first letter is the last letter too, else no.",
        lambda rng: (lambda row: row + " " + (row[0] if rng.random() < 0.5 else rng.choice(LETTERS)))(
            _row(rng, LETTERS, rng.randint(2, 4))
        ),
        lambda t: _yes(_split(t)[0] == _split(t)[-1]),
    ),
]


def _sums(name: str, definition: str, count: tuple[int, int], solve: Callable[[list[int]], int], largest: int = 40) -> Task:
    def answer(text: str) -> str:
        return str(solve(_ints(text)))

    return Task(name, "arithmetic", definition, _numbers(*count, largest), answer, _one_more(answer))


def _tasks() -> list[Task]:
    made = [Task(name, category, text, draw, solve, _unchanged) for category, name, text, draw, solve in _CHANGES]
    made += [Task(name, category, text, draw, solve, _whole) for category, name, text, draw, solve in _PARTS]
    made += [Task(name, category, text, draw, solve, _one_more(solve)) for category, name, text, draw, solve in _COUNTS]
    made += [Task(name, category, text, draw, solve, _opposite(solve)) for category, name, text, draw, solve in _QUESTIONS]
    return [
        *made,
        _sums("add", "Add the numbers.", (2, 2), sum),
        _sums("add_three", "Add the three numbers.", (3, 3), sum, 30),
        _sums("double", "Double the number.", (1, 1), lambda n: 2 * n[0], 400),
        _sums("distance", "Take the smaller number from the larger.", (2, 2), lambda n: max(n) - min(n), 90),
        _sums("add_ten", "Add ten to the number.", (1, 1), lambda n: n[0] + 10, 800),
        _sums("range", "Take the smallest number from the largest.", (3, 4), lambda n: max(n) - min(n), 60),
    ]


TASKS = {f"task{number:03d}_{task.name}": task for number, task in enumerate(_tasks(), 1)}
HELD_OUT_CATEGORIES = ("comparison", "yes or no")
_APART = "rotate_right drop_last last_letters sort_down word_before_last count_even add_three".split()
HELD_OUT_TASKS = tuple(name for name in TASKS if name.partition("_")[2] in _APART)
"""What the second pair has never met: whole categories, and single tasks of other categories (the levels of arXiv 2212.12017)."""


def met(name: str) -> bool:
    """Whether the second pair's corpus and instruct set hold the task."""
    return TASKS[name].category not in HELD_OUT_CATEGORIES and name not in HELD_OUT_TASKS


def _is_example(text: str) -> bool:
    return int.from_bytes(sha256(f"example|{text}".encode()).digest()[:4], "big") / 2**32 < EXAMPLE_SHARE


@cache
def examples(name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The positive and negative examples of a task: input, output and explanation."""
    task = TASKS[name]
    rng = Random(derive_seed(SEED, "world", "examples", name))
    found: dict[str, None] = {}
    while len(found) < 2 * EXAMPLES:
        text = task.draw(rng)
        if _is_example(text) and (len(found) < EXAMPLES or task.slip(text)[0] != task.solve(text)):
            found.setdefault(text)
    right, wrong = list(found)[:EXAMPLES], list(found)[EXAMPLES:]
    return (
        [{"input": text, "output": task.solve(text), "explanation": "This is what the definition asks for."} for text in right],
        [{"input": text, "output": task.slip(text)[0], "explanation": task.slip(text)[1]} for text in wrong],
    )


def ask(task: Task, text: str) -> str:
    """The prompt of the evaluation task `super_ni`: definition and input."""
    return f"Definition: {task.definition}\n\nInput: {text}\nOutput:"


def _skill(name: str, task: Task) -> Skill:
    def draw(rng: Random) -> Problem:
        while _is_example(text := task.draw(rng)):
            pass
        output = task.solve(text)
        positive, negative = examples(name)
        columns: dict[str, object] = {
            "task": name,
            "definition": task.definition,
            "input": text,
            "output": [output],
            "positive_examples": positive,
            "negative_examples": negative,
        }
        return Problem(text, ask(task, text), f"= {output}", output, "exact", 1, {}, columns)

    return Skill(name, task.category, task.definition, draw)


SKILLS = tuple(_skill(name, task) for name, task in TASKS.items())
MIXTURES = {"tasks": list(TASKS), "tasks_met": [name for name in TASKS if met(name)], "tasks_held_out": [n for n in TASKS if not met(n)]}
ROWS = {
    "tasks": {"train": 5400, "test": 540},
    "tasks_met": {"train": 3500, "test": 350},
    "tasks_held_out": {"train": 1900, "test": 190},
}
