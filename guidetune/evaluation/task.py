"""What a task is: items to put to a model, and a judgement of what comes back.

A task is one file in `guidetune/evaluation/tasks/` with one class. Its `mode` says how a model answers:

    generate   the model continues the chat prompt of `item.messages`; `score` reads `output.text`
    loglik     the model rates every one of `item.choices`; `score` reads `output.loglik`
    nll        the model rates the tokens of the item itself; `score` reads `output.nll` and `output.tokens`

The chat template is always the model's own. Items with `text` instead of messages are put to the model as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt

from guidetune.errors import BadInput
from guidetune.registry import Method, nearest

if TYPE_CHECKING:
    from guidetune.data.sources import SourceSpec

_HOLE = re.compile(r"\{\{|\}\}|\{(\w+)\}")


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        id: unique in its task and the same for every model: paired tests match by it.
        messages: the conversation so far; for an `nll` task the whole conversation, answers included.
        text: plain text in place of messages.
        reference: what `score` compares with.
        choices: the answers that a `loglik` task rates.
        gold: a perfect output, where the data holds one (tests feed it back: it must score 1).
        meta: `skill`, `difficulty` and `category` break the score down; anything else is kept beside the result.
        payload: an object that `score` needs; not written to disk.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    reference: Any = None
    choices: tuple[str, ...] | None = None
    gold: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    payload: Any = field(default=None, repr=False, compare=False)

    @property
    def prompt(self) -> str:
        """What the user sees of the question: the plain text, or the contents of the messages."""
        return self.text if self.text is not None else "\n\n".join(str(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Output:
    """What a model gave for one item. `loglik`: summed log-probability of each choice; `nll`: of the item's `tokens` targets, in nats.

    `windows` are the (nll, tokens) of the parts of a long text. `finished`: generation met a stop token; `cut`: tokens removed from
    an item too long for the model.
    """

    text: str = ""
    tokens: int = 0
    finished: bool = True
    cut: int = 0
    loglik: tuple[float, ...] | None = None
    nll: float | None = None
    windows: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class TaskContext:
    """Where file names in a task start from: the recipe's folder, then the current one."""

    root: Path = Path(".")

    def find(self, path: str) -> Path:
        """The file that a task names.

        Raises:
            BadInput: there is no such file, with the places looked at and the nearest name.
        """
        given = Path(path).expanduser()
        places = [given] if given.is_absolute() else list(dict.fromkeys([(self.root / given).resolve(), given.resolve()]))
        for place in places:
            if place.is_file():
                return place
        looked = " and ".join(str(place) for place in places)
        folder = places[0].parent
        there = [entry.name for entry in folder.iterdir() if entry.is_file()][:200] if folder.is_dir() else []
        raise BadInput(f"no task file {path!r}: looked for {looked}{nearest(given.name, there) if there else ''}")


class Task(Method):
    """Base of every task."""

    if TYPE_CHECKING:
        mode: str  # "generate", "loglik" or "nll": a constant of the class, or an option

    metric: ClassVar[str] = "accuracy"  # name of the main score
    higher_is_better: ClassVar[bool] = True
    default_new_tokens: ClassVar[int] = 512
    runs_code: ClassVar[bool] = False  # scoring runs programs that the model wrote: refused unless `allow_code` is set

    label: str | None = Field(None, description="Name of the task in results (default: the method's name); unique in a run.")
    limit: PositiveInt | None = Field(None, description="At most this many items, drawn by the seed; the same ones for every model.")
    max_new_tokens: PositiveInt | None = Field(None, description="Longest generated answer; overrides the evaluation's setting.")

    def items(self, ctx: TaskContext) -> list[Item]:
        """All items, in the order of the file."""
        raise TypeError(f"task {type(self).__name__} does not define items()")

    def score(self, item: Item, output: Output) -> dict[str, Any]:
        """Judgement of one output: `correct` (0, 1 or between), other numbers (averaged into metrics) and text (kept beside the item)."""
        raise TypeError(f"task {type(self).__name__} does not define score()")

    def scores(self, answered: Sequence[tuple[Item, Output]]) -> list[dict[str, Any]]:
        """`score` of every pair, in order: for tasks that judge many at a time. Samples of one item stand one after another."""
        return [self.score(item, output) for item, output in answered]

    def deciding(self) -> dict[str, Any]:
        """The options that decide a result; the others (where a judge's server is, say) may change without a new evaluation."""
        return {key: value for key, value in self.spec().items() if key not in ("label", "limit", "max_new_tokens", "path")}

    def kept_text(self, output: Output) -> str:
        """What is kept of an output on disk."""
        return output.text

    def notes(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """Sentences that must be read beside the score; kept in the result and printed under the table."""
        return []

    def default_label(self) -> str:
        """What results are filed under when the user gives no label."""
        return self.name

    def scale(self, mean: float) -> float:
        """The score as it is reported, from the (token-weighted) mean of `correct`; monotonic."""
        return mean

    def same_answer(self, a: str, b: str) -> bool:
        """Whether two parsed answers (`answer` of a judgement) are one vote in maj@k."""
        return a == b

    def overall(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Further metrics over all items' result lines."""
        return {}

    def perfect(self, item: Item) -> Output | None:
        """The output that must score 1, when the data holds one."""
        return Output(text=item.gold) if item.gold is not None else None


def ask(prompt: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    """A user message, after a system message when there is one."""
    user = {"role": "user", "content": prompt}
    return ({"role": "system", "content": system}, user) if system else (user,)


def fill(template: str, row: Mapping[str, Any]) -> str:
    r"""The template with each `{column}` replaced; `{{` and `}}` are braces, and `\boxed{}` stays as it is.

    >>> fill(r"{question} Answer in \boxed{}.", {"question": "1+1?"})
    '1+1? Answer in \\boxed{}.'
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        return str(column(row, match[1]))

    return _HOLE.sub(value, template)


def column(row: Mapping[str, Any], name: str) -> Any:
    """A field of a row, `a.b` for one inside another.

    Raises:
        BadInput: it is not there, with the nearest name.
    """
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = [str(key) for key in value] if isinstance(value, Mapping) else []
            raise BadInput(f"no column {name!r}{nearest(part, there)}")
        value = value[part]
    return value


def breakdown(row: Mapping[str, Any], **columns: str | None) -> dict[str, Any]:
    """The `meta` of an item from named columns, those that are given and present."""
    return {key: row[name] for key, name in columns.items() if name is not None and row.get(name) is not None}


def read_rows(source: SourceSpec, ctx: TaskContext) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a data source.

    Raises:
        BadInput: nothing there, or a broken line (an evaluation never skips an item silently).
    """
    from guidetune.data.sources import Broken, read

    for line, row in read(source, ctx.root):
        if isinstance(row, Broken):
            raise BadInput(f"{source.path}, line {line}: {row.reason}: {row.detail}; mend or remove the line")
        yield line, row


class RowTask(Task):
    """A task whose items are the rows of one data source."""

    path: str = Field(description="Data file (jsonl, json, csv, parquet, .gz) from the recipe's folder or the current one; or a hub id.")
    split: str = Field("test", description="Split of a folder or hub data set.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        """The item of row `number` (from 0)."""
        raise TypeError(f"task {type(self).__name__} does not define item()")

    def items(self, ctx: TaskContext) -> list[Item]:
        from guidetune.data.sources import SourceSpec

        found = []
        for number, (line, row) in enumerate(read_rows(SourceSpec(path=self.path, split=self.split, subset=self.subset), ctx)):
            try:
                found.append(self.item(row, number))
            except BadInput as error:
                place = f"task {self.label or self.name}: {self.path}, line {line}"
                raise BadInput([f"{place}: {problem}" for problem in error.problems]) from None
        return found
