"""What tasks with programs share: finding the program in an output, its tests, and the votes of programs that behave alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from guidetune.evaluation.sandbox import EXPLAINED, Limits, isolation, run_all
from guidetune.evaluation.task import Item, Output, RowTask

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
# Where a continued function has ended: what HumanEval's authors stop at (arXiv 2107.03374).
_STOP = re.compile(r"\n(?:class |def |#|if |print)")


@dataclass(frozen=True)
class Problem:
    """What a program is tested with.

    Args:
        prompt: code that a continuation continues; a complete program in the output comes after it.
        entry: the function that must be defined.
        tests: statements to run after the program; any exception fails it.
        call: a further statement that runs the tests, where they are wrapped in a function.
    """

    prompt: str
    entry: str | None
    tests: str
    call: str = ""


def defines(code: str, name: str | None) -> bool:
    return re.search(r"^(?:async )?def " + (re.escape(name) + r"\b" if name else ""), code, re.MULTILINE) is not None


def program(output: str, problem: Problem) -> str:
    """The program in an output, without its tests.

    The last fenced block that defines the entry point, else the last fenced block, else the text (up to MBPP's `[DONE]`): the code in it
    when it defines the entry point, else as a continuation of the prompt, up to the next statement at the margin.
    """
    output = output.partition("[DONE]")[0]
    blocks = [match[1] for match in _FENCE.finditer(output)]
    for block in [*reversed([b for b in blocks if defines(b, problem.entry)]), *blocks[-1:]]:
        # What the prompt imports and defines is part of the program: outputs often repeat the last function only.
        return f"{problem.prompt}\n\n{block}" if defines(block, problem.entry) or not problem.prompt else problem.prompt + block
    if defines(output, problem.entry):
        return f"{problem.prompt}\n\n{_code_in(output)}"
    end = _STOP.search(output)
    return problem.prompt + (output[: end.start()] if end else output)


def _code_in(text: str) -> str:
    """The text when it is Python, else its longest run of whole lines that is, from the first line that looks like code."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if re.match(r"(?:async def|def|import|from|class)\b|@", line)), 0)
    for start, end in [(0, len(lines)), *((first, end) for end in range(min(len(lines), first + 400), first, -1))]:
        part = "\n".join(lines[start:end])
        try:
            ast.parse(part)
            return part
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return text


# Records what the functions under test return, and goes on after a failure: the behaviour of a program on the tests' inputs.
_RECORDER = """
__seen, __inside = [], []
def __text(value):  # equal values have one text: sets and dictionaries in any order, 3 and 3.0
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(__text, value))) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(__text(k) + ": " + __text(v) for k, v in value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return "[("[isinstance(value, tuple)] + ", ".join(map(__text, value)) + "]"
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer()):
        return repr(int(value))
    return repr(value)
def __record(function):
    def called(*args, **kwargs):
        if __inside:  # a function that calls itself is recorded once
            return function(*args, **kwargs)
        __inside.append(True)
        try:
            value = function(*args, **kwargs)
        except Exception as error:
            __seen.append(type(error).__name__)
            raise
        finally:
            __inside.clear()
        __seen.append(__text(value)[:10000])
        return value
    return called
"""


_SHOW = """
import hashlib as __hashlib
print("\\nbehaviour", __hashlib.sha256(repr(__seen).encode()).hexdigest())
"""


class _WithoutAsserts(ast.NodeTransformer):
    """Every `assert X` becomes an X whose outcome does not matter."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:  # noqa: N802 - ast's name
        handler = ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=None, body=[ast.Pass()])
        return ast.Try(body=[ast.Expr(node.test)], handlers=[handler], orelse=[], finalbody=[])


def behaviour(code: str, problem: Problem) -> str | None:
    """A program that prints what `code` returns for the inputs in the tests, whatever they expect; None when it cannot be made."""
    try:
        tree = ast.parse(problem.tests)
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        defined = {n.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    wrapped = sorted(called & defined) if not problem.call else [problem.entry or ""]
    wrap = "\n".join(f"{name} = __record({name})" for name in wrapped)
    tests = ast.unparse(ast.fix_missing_locations(_WithoutAsserts().visit(tree)))
    call = f"try:\n    {problem.call}\nexcept Exception:\n    pass" if problem.call else ""
    return "\n".join([code, _RECORDER, wrap, tests, call, _SHOW])


class CodeTask(RowTask):
    """A task whose outputs are programs, judged by running them with their tests in a sandbox (`guidetune.evaluation.sandbox`).

    `correct`: the program ran to the end of its tests; `outcome` says how it ended. With several samples programs that return the same
    for all inputs of the tests are one vote in maj@k; the expected values play no part in it.
    """

    mode: ClassVar[str] = "generate"
    metric: ClassVar[str] = "pass"
    default_new_tokens: ClassVar[int] = 1024
    runs_code: ClassVar[bool] = True

    timeout: PositiveFloat = Field(10.0, description="Seconds that one program may run.")
    memory_mb: PositiveInt = Field(1024, description="Memory of one program.")
    format: Literal["chat", "plain"] = Field("chat", description="plain: no chat template; the model continues the code itself.")

    def limits(self) -> Limits:
        return Limits(seconds=self.timeout, memory_mb=self.memory_mb)

    def scores(self, answered: Sequence[tuple[Item, Output]]) -> list[dict[str, Any]]:
        found = [program(output.text, item.payload) for item, output in answered]
        tested = [f"{code}\n\n{item.payload.tests}\n\n{item.payload.call}\n" for code, (item, _) in zip(found, answered, strict=True)]
        order = {text: place for place, text in enumerate(dict.fromkeys(tested))}  # equal samples run once
        runs = run_all(list(order), self.limits())
        # A program that does not end, or floods its output, has no behaviour to vote with.
        ends = [runs[order[text]].status not in ("timeout", "output") for text in tested]
        votes = self._votes(found, answered, ends)
        verdicts = []
        for place, text in enumerate(tested):
            ended = runs[order[text]]
            verdicts.append({"correct": int(ended.passed), "outcome": ended.status, "detail": ended.detail, "answer": votes[place]})
        return verdicts

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        return self.scores([(item, output)])[0]

    def _votes(self, codes: Sequence[str], answered: Sequence[tuple[Item, Output]], ends: Sequence[bool]) -> list[str | None]:
        """What each program's behaviour is called, where an item has several samples; None for one that does not run to its end."""
        counts: dict[str, int] = {}
        for item, _ in answered:
            counts[item.id] = counts.get(item.id, 0) + 1
        texts = [
            behaviour(code, item.payload) if counts[item.id] > 1 and end else None
            for code, (item, _), end in zip(codes, answered, ends, strict=True)
        ]
        order = {text: place for place, text in enumerate(dict.fromkeys(text for text in texts if text is not None))}
        runs = run_all(list(order), self.limits())
        votes: list[str | None] = []
        for text in texts:
            ended = runs[order[text]] if text is not None else None
            lines = ended.output.splitlines() if ended is not None and ended.passed else []
            votes.append(sha256(lines[-1].encode()).hexdigest()[:16] if lines and lines[-1].startswith("behaviour ") else None)
        return votes

    def notes(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        outcomes = [one["outcome"] for line in lines for one in line.get("samples", [line])]
        late = outcomes.count("timeout")
        return [EXPLAINED[isolation()], *([f"{late} of {len(outcomes)} programs were ended after {self.timeout:g} s"] if late else [])]
