"""What a task is: items to put to a model, and a judgement of what comes back.

A task is one file in `guidetune/evaluation/tasks/` with one class. Its `mode` says how a model answers:

    generate   the model continues the chat prompt of `item.messages`; `score` reads `output.text`
    loglik     the model rates every one of `item.choices`; `score` reads `output.loglik`
    nll        the model rates the tokens of the item itself; `score` reads `output.nll` and `output.tokens`
    own        the task asks the model itself (`respond`); `score` reads what it gave

The chat template is always the model's own. Items with `text` instead of messages are put to the model as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput
from guidetune.registry import Method, nearest

if TYPE_CHECKING:
    from guidetune.data.sources import SourceSpec
    from guidetune.evaluation.evaluate import EvalSettings
    from guidetune.models.handle import ModelHandle

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
        contexts: plain text before each choice, where choices do not share one (WinoGrande); `text` is then only shown, and
            `reference` the place of the right one.
        prior: the same choices without the question (messages or text of this item), rated too, for mutual information.
        question: the question alone, where `messages` or `text` hold examples before it.
        gold: a perfect output, where the data holds one (tests feed it back: it must score 1).
        meta: `skill`, `difficulty` and `category` break the score down; anything else is kept beside the result.
        payload: an object that `score` needs; not written to disk.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    reference: Any = None
    choices: tuple[str, ...] | None = None
    contexts: tuple[str, ...] | None = None
    prior: Item | None = None
    question: str | None = None
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

    `prior_loglik` is `loglik` of the item's `prior`.

    `windows` are the (nll, tokens) of the parts of a long text. `finished`: generation met a stop token; `cut`: tokens removed from
    an item too long for the model. `responses`: what an `own` task got, as JSON values.
    """

    text: str = ""
    tokens: int = 0
    finished: bool = True
    cut: int = 0
    loglik: tuple[float, ...] | None = None
    prior_loglik: tuple[float, ...] | None = None
    nll: float | None = None
    windows: tuple[tuple[float, int], ...] = ()
    responses: tuple[Any, ...] = ()


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

    # Constants of a class that are text (`mode = "generate"`) need no annotation.
    model_config = ConfigDict(ignored_types=(str,))

    if TYPE_CHECKING:
        mode: str  # "generate", "loglik", "nll" or "own": a constant of the class, or an option

    metric: ClassVar[str] = "accuracy"  # name of the main score
    higher_is_better: ClassVar[bool] = True
    default_new_tokens: ClassVar[int] = 512
    shorthand: ClassVar[str | None] = None  # the option that a bare word means on a command line: `lm_eval:hellaswag`
    files: ClassVar[tuple[str, ...]] = ()  # names, besides the method's, under which its data is published (`--data DIR` looks for them)
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

    def respond(self, handle: ModelHandle, items: Sequence[Item], settings: EvalSettings) -> Iterator[tuple[Item, Output]]:
        """What a model gives for each item, in any order; only for mode `own`."""
        raise TypeError(f"task {type(self).__name__} does not define respond()")

    def outside(self) -> Any:
        """What decides the results of an `own` task besides items, options and this package's code: part of its key."""
        return None

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
        found = column(row, match[1])
        if found is None:
            raise BadInput(f"column {match[1]!r} is empty (null)")
        return str(found)

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


def texts(value: Any, name: str) -> list[str]:
    """A text or number, or each of a list of them, as texts.

    Raises:
        BadInput: nothing there, or something else.
    """
    found = value if isinstance(value, list) else [value]
    if not found or any(isinstance(one, bool) or not isinstance(one, (str, int, float)) for one in found):
        raise BadInput(f"{name} = {str(value)[:60]!r} is neither a text nor a list of texts")
    return [str(one) for one in found]


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
    """A task whose items are the rows of one data source, with worked examples before the question where `shots` asks for them.

    In a chat an example is a turn of its own, in the model's own template; in plain text examples and question are set apart by an empty
    line. An item is never its own example.
    """

    default_shots: ClassVar[int] = 5  # when only shots_path is given

    path: str = Field(description="Data file (jsonl, json, csv, parquet, .gz) from the recipe's folder or the current one; or a hub id.")
    split: str = Field("test", description="Split of a folder or hub data set.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    where: dict[str, Any] = Field(default_factory=dict, description="Only rows whose columns have these values (of a list: one of them).")
    shots: NonNegativeInt | None = Field(None, description="Worked examples before each question (default: 0; with shots_path 5).")
    shots_path: str | None = Field(None, description="File or folder of the examples (default: that of the questions).")
    shots_split: str | None = Field(None, description="Split of the examples in a folder or hub data set (default: that of the questions).")
    shots_order: Literal["first", "random"] = Field("first", description="The first rows, or a draw that is the same for every question.")
    shots_seed: NonNegativeInt = Field(0, description="Seed of that draw.")
    shots_by: str | None = Field(None, description="Column in which examples equal their question, such as the subject.")
    header: str | None = Field(None, description="Text before the first example or the question; {column} is replaced.")

    def item(self, row: Mapping[str, Any], number: int) -> Item:
        """The item of row `number` (from 0)."""
        raise TypeError(f"task {type(self).__name__} does not define item()")

    def wanted(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is a question of this task; the others are skipped."""
        values = {name: one if isinstance(one, list) else [one] for name, one in self.where.items()}
        return all(column(row, name) in allowed for name, allowed in values.items())

    def chosen(self, *options: str) -> bool:
        """Whether one of these options has another value than its default: then it counts for every row."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in options)

    def identity(self, row: Mapping[str, Any], number: int) -> str:
        """The item's id: the column that the option `id` names; where it names none, or the usual one is not there, the row's number."""
        name = getattr(self, "id", None)
        return str(column(row, name)) if name is not None and (name in row or self.chosen("id")) else str(number)

    def demonstration(self, item: Item) -> str | None:
        """The answer that an example shows; None where the data holds none."""
        return item.gold

    def items(self, ctx: TaskContext) -> list[Item]:
        rows = self._read(self.path, self.split, ctx)
        shots = self.shots if self.shots is not None else self.default_shots if self.shots_path is not None else 0
        groups: dict[str, list[Item]] = {}
        if shots and rows:
            pool = self._read(self.shots_path or self.path, self.shots_split or self.split, ctx)
            if self.shots_order == "random":
                pool.sort(key=lambda one: derive_seed(self.shots_seed, "shots", one[1].id))
            for row, example in pool:
                groups.setdefault(self._group(row), []).append(example)
        found = []
        for row, item in rows:
            if shots:
                item = self._with_examples(item, groups.get(self._group(row), []), shots, self._group(row))
            found.append(item if self.header is None else _headed(item, fill(self.header, row)))
        return found

    def _group(self, row: Mapping[str, Any]) -> str:
        return str(column(row, self.shots_by)) if self.shots_by else ""

    def _with_examples(self, item: Item, pool: Iterable[Item], shots: int, group: str) -> Item:
        others = (one for one in pool if (one.messages, one.text) != (item.messages, item.text))
        examples = [(one, self.demonstration(one)) for one in islice(others, shots)]
        source = self.shots_path or self.path
        if len(examples) < shots:
            of = f" with {self.shots_by} = {group!r}" if self.shots_by else ""
            raise BadInput(f"task {self.label or self.name}: {shots} shots, and {source} has {len(examples)} examples{of}")
        if any(answer is None for _, answer in examples):
            raise BadInput(f"task {self.label or self.name}: {source} holds no answers that examples could show; set shots: 0")
        if item.messages:
            system = tuple(message for message in item.messages[:1] if message["role"] == "system")
            turns: list[Mapping[str, Any]] = []
            for one, answer in examples:
                turns += [*(m for m in one.messages if m["role"] != "system"), {"role": "assistant", "content": str(answer)}]
            return replace(item, messages=(*system, *turns, *item.messages[len(system) :]), question=item.prompt)
        before = "".join(f"{one.contexts[one.reference] if one.contexts else one.text} {answer}\n\n" for one, answer in examples)
        contexts = tuple(before + context for context in item.contexts) if item.contexts else None
        return replace(item, text=f"{before}{item.text}", contexts=contexts, question=item.prompt)

    def deciding(self) -> dict[str, Any]:
        # Files count by what is in them (the items and the class's code), not by where they are.
        return {key: value for key, value in super().deciding().items() if key != "shots_path"} | {"method": self.name}

    def _read(self, path: str, split: str, ctx: TaskContext) -> list[tuple[dict[str, Any], Item]]:
        from guidetune.data.sources import SourceSpec

        found = []
        for number, (line, row) in enumerate(read_rows(SourceSpec(path=path, split=split, subset=self.subset), ctx)):
            try:
                if self.wanted(row):
                    found.append((row, self.item(row, number)))
            except BadInput as error:
                place = f"task {self.label or self.name}: {path}, line {line}"
                raise BadInput([f"{place}: {problem}" for problem in error.problems]) from None
        return found


def _headed(item: Item, header: str) -> Item:
    """The item with a text before everything that a user says in it."""
    question = item.question if item.question is not None else item.prompt
    if item.messages:
        first = next(i for i, message in enumerate(item.messages) if message["role"] == "user")
        messages = [dict(message) for message in item.messages]
        messages[first]["content"] = f"{header}\n\n{messages[first]['content']}"
        return replace(item, messages=tuple(messages), question=question)
    contexts = tuple(f"{header}\n\n{context}" for context in item.contexts) if item.contexts else None
    return replace(item, text=f"{header}\n\n{item.text}", contexts=contexts, question=question)
