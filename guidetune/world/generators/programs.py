"""Small functions on integers, strings and lists, with tests, in the forms of MBPP (arXiv 2108.07732) and HumanEval (arXiv 2107.03374).

A row of `programs` asks by a sentence and three tests and is read by the evaluation task `mbpp`; a row of `completions` asks by signature
and docstring and is read by `humaneval`. Expected values come from running the reference function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from guidetune.world.items import Problem, Skill
from guidetune.world.lexicon import LETTERS, NOUNS

TESTS = 3
NAMES = "f g h run go".split()
FIRST_TASK_ID = {"test": 11, "train": 601}
"""Where the split's rows begin in MBPP's numbering: its tests are 11 to 510, its training problems 601 to 974."""


@dataclass(frozen=True)
class Step:
    """One expression of an argument: `sentence` and `expression` name it `{x}`, the constant `{k}`."""

    kind: str
    sentence: str
    expression: str
    constants: tuple[object, ...] = tuple(range(2, 10))


_LETTERS = tuple(LETTERS[:8])
STEPS = (
    Step("int", "add {k}", "{x} + {k}"),
    Step("int", "take {k} away", "{x} - {k}"),
    Step("int", "multiply by {k}", "{x} * {k}"),
    Step("int", "give the rest after division by {k}", "{x} % {k}"),
    Step("int", "give the larger of it and {k}", "max({x}, {k})"),
    Step("int", "give the smaller of it and {k}", "min({x}, {k})"),
    Step("int", "give the distance to {k}", "abs({x} - {k})"),
    Step("str", "repeat it {k} times", "{x} * {k}", (2, 3, 4)),
    Step("str", "give the first {k} letters", "{x}[:{k}]", (1, 2, 3)),
    Step("str", "give the last {k} letters", "{x}[-{k}:]", (1, 2, 3)),
    Step("str", "remove the first {k} letters", "{x}[{k}:]", (1, 2)),
    Step("str", "add {k} at the end", "{x} + '{k}'", _LETTERS),
    Step("str", "add {k} at the start", "'{k}' + {x}", _LETTERS),
    Step("str", "count the letter {k}", "{x}.count('{k}')", _LETTERS),
    Step("str", "reverse it", "{x}[::-1]", ("",)),
    Step("str", "give it in upper case", "{x}.upper()", ("",)),
    Step("list", "add {k} to each number", "[n + {k} for n in {x}]"),
    Step("list", "multiply each number by {k}", "[n * {k} for n in {x}]"),
    Step("list", "give the numbers above {k}", "[n for n in {x} if n > {k}]"),
    Step("list", "give the numbers below {k}", "[n for n in {x} if n < {k}]"),
    Step("list", "count the number {k}", "{x}.count({k})"),
    Step("list", "give the first {k}", "{x}[:{k}]", (1, 2, 3)),
    Step("list", "give the last {k}", "{x}[-{k}:]", (1, 2, 3)),
    Step("list", "add {k} at the end", "{x} + [{k}]"),
    Step("list", "give the sum plus {k}", "sum({x}) + {k}"),
    Step("list", "reverse it", "{x}[::-1]", ("",)),
    Step("list", "sort it", "sorted({x})", ("",)),
)
BY_KIND = {kind: [step for step in STEPS if step.kind == kind] for kind in ("int", "str", "list")}
ARGUMENTS = {"int": "x", "str": "s", "list": "v"}
CHAINED = [step for step in STEPS if step.kind == "int"][:3]


@dataclass(frozen=True)
class Program:
    """A function: its body's lines without indent, the last of which begins with `return`."""

    name: str
    argument: str
    sentence: str
    body: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Signature and docstring: what HumanEval shows."""
        return f'def {self.name}({self.argument}):\n    """{self.sentence[0].upper()}{self.sentence[1:]}."""\n'

    @property
    def solution(self) -> str:
        """The body, indented: what HumanEval expects."""
        return "".join(f"    {line}\n" for line in self.body)

    @property
    def code(self) -> str:
        """The whole function: what MBPP expects."""
        return f"def {self.name}({self.argument}):\n{self.solution}"


@lru_cache(maxsize=4096)
def _function(argument: str, body: tuple[str, ...]) -> Callable[[object], object]:
    space: dict[str, Callable[[object], object]] = {}
    exec(f"def made({argument}):\n" + "".join(f"    {line}\n" for line in body), space)  # our own table above, no outside text
    return space["made"]


def _value(rng: Random, kind: str, constant: object) -> object:
    if kind == "int":
        return rng.randint(1, 20)
    if kind == "str":
        word = rng.choice(NOUNS)
        return word + str(constant) if isinstance(constant, str) and rng.random() < 0.5 else word
    values = [rng.randint(1, 12) for _ in range(rng.randint(3, 4))]
    if isinstance(constant, int) and rng.random() < 0.5:
        values[rng.randrange(len(values))] = constant
    return values


def _program(rng: Random) -> tuple[Program, str, list[str], int]:
    """The program, its content, its tests and its number of steps."""
    steps, kind = 1, rng.choice(list(BY_KIND))
    step = rng.choice(BY_KIND[kind])
    constant = rng.choice(step.constants)
    argument = ARGUMENTS[kind]
    sentence, expression = step.sentence.format(k=constant), step.expression.format(x=argument, k=constant)
    body = (f"return {expression}",)
    if kind == "int" and rng.random() < 0.6:
        steps, second = 2, rng.choice(CHAINED)
        then = rng.choice(second.constants)
        sentence += f" then {second.sentence.format(k=then)}"
        body = (f"y = {expression}", f"return {second.expression.format(x='y', k=then)}")
    program = Program(rng.choice(NAMES), argument, sentence, body)
    function = _function(argument, body)
    values: list[object] = []
    while len(values) < TESTS:
        value = _value(rng, kind, constant)
        if value not in values:
            values.append(value)
    return program, " ; ".join((kind, *body)), [f"assert {program.name}({value!r}) == {function(value)!r}" for value in values], steps


def _columns(program: Program, tests: list[str]) -> dict[str, object]:
    calls = "".join(f"    {test.replace(f'assert {program.name}(', 'assert candidate(', 1)}\n" for test in tests)
    return {
        "text": f"Write a function {program.name}({program.argument}): {program.sentence}.",
        "code": program.code,
        "test_list": tests,
        "entry_point": program.name,
        "canonical_solution": program.solution,
        "test": f"def check(candidate):\n{calls}",
    }


def _from_sentence(rng: Random) -> Problem:
    program, content, tests, steps = _program(rng)
    columns = _columns(program, tests)
    prompt = "\n".join([str(columns["text"]), *tests, "Code:"])
    answer = program.code.rstrip("\n")
    return Problem(content, prompt, answer, answer, "program", steps, {}, columns)


def _from_docstring(rng: Random) -> Problem:
    program, content, tests, steps = _program(rng)
    answer = program.code.rstrip("\n")
    return Problem(content, program.prompt, answer, answer, "program", steps, {}, _columns(program, tests))


SKILLS = (
    Skill("programs", "code", "Write a function from a sentence and three tests.", _from_sentence, "program", first_id=FIRST_TASK_ID),
    Skill(
        "completions",
        "code",
        "Write a function from its signature and docstring.",
        _from_docstring,
        "program",
        first_id=FIRST_TASK_ID,
    ),
)
ROWS = {"programs": {"train": 2000, "test": 200}, "completions": {"train": 2000, "test": 200}}
