"""Rows of many shapes made into one: a conversation with an id.

Understood without a map: `messages` (OpenAI), `conversations` or `conversation` (ShareGPT), alpaca (`instruction`, `input`,
`output`), `prompt` with `completion` or `response`, `instruction` or `query` with `response`, `question` with `answer`.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from json.encoder import encode_basestring_ascii as quoted_ascii
from pathlib import Path
from typing import Any

import numpy as np

from guidetune import registry
from guidetune.data import sources
from guidetune.data.keys import KeyTable, key_array
from guidetune.data.sources import Broken, SourceSpec
from guidetune.errors import BadInput

SHAPES = (
    "messages: [{role, content}]",
    "conversations: [{from, value}]",
    "instruction, input, output",
    "prompt, completion (or response)",
    "instruction, response",
    "question, answer",
)
WRONG_COLUMNS, NOT_TEXT, EMPTY_ANSWER = "wrong columns", "content is not text", "empty answer"
EMPTY_PROMPT, BAD_ROLE, NO_ANSWER = "empty prompt", "unknown role", "no assistant turn"

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_PLAIN_ROLES = ("user", "assistant", "system", "tool")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "response"), ("query", "response"), ("question", "answer"))
_OPTION_COLUMNS = ("options", "choices", "context", "passage")
_OWN = ("id", "source", "phase", "weight", "line", "origin")
UNREAD = "unread"
"""Key in `meta` of a row that no shape fits: why. An operation that renders rows may still make a conversation of its columns."""
_READ = 256  # rows that are normalised at a time
_DEEPEST = 32  # levels of lists and objects in a column


@dataclass(frozen=True)
class Record:
    """One conversation. `messages` are {"role", "content"} with an optional "train"; `line` is its place in its source.

    `fields` are the columns of the row that an operation asked for, and the source's own `columns` and `tags` (category, language,
    level, references, …). A score that was never computed is not in `scores`; NaN is a number that a scorer gave. `of` is the id of
    the row that was read, where an operation made this one from it.
    """

    id: str
    source: str
    messages: list[dict[str, Any]]
    line: int = 0
    weight: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    phase: int = 0
    of: str = ""

    @property
    def origin(self) -> str:
        """The id of the row that was read."""
        return self.of or self.id

    def value(self, name: str) -> Any:
        """A score, a column (or a path into one: `options[A]`), or `id`, `source`, `phase`, `weight`, `user`, `assistant`, `system`.

        None: the row has no such value. Of several turns of a role the last is meant, and the first of `system`.
        """
        if name in self.scores:
            return self.scores[name]
        if name in _PLAIN_ROLES and self.messages:  # what the row says now, not a column of that name it was made from
            turns = self.messages if name == "system" else self.messages[::-1]
            return next((m["content"] for m in turns if m["role"] == name), None)
        if name in self.fields:
            return self.fields[name]
        if name in _OWN:
            return getattr(self, name)
        return self.meta[name] if name in self.meta else _lookup(self.fields, name)

    def kept(self) -> tuple[Any, ...]:
        """Every field, in order: what makes the same record again."""
        return (
            self.id, self.source, self.messages, self.line, self.weight, self.meta, self.fields, self.scores, self.phase, self.of
        )  # fmt: skip


@dataclass(frozen=True)
class Dropped:
    """A row that is not used: `reason` is one of few, `detail` says what is wrong with this one."""

    reason: str
    detail: str


class _Bad(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Identifiers:
    """Stable ids: the row's own where no earlier row has it, else a hash of source, content and occurrence number.

    With a `folder` the ids given so far (a 64-bit hash of each) are kept in scratch files there, else in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._taken = KeyTable(folder / ".ids" if folder else None)
        self._repeats = KeyTable(folder / ".repeats" if folder else None, values=1)

    def give(self, source: str, own: Any, content: str) -> str:
        """The id of one row."""
        return self.give_many(source, [own], [content])[0]

    def give_many(self, source: str, owns: Sequence[Any], contents: Sequence[str]) -> list[str]:
        """The ids of rows of one source, in order."""
        own_names = [_own_name(own) for own in owns]
        names = [own or _content_name(source, 1, content) for own, content in zip(own_names, contents, strict=True)]
        left = self._take(names)
        again = [k for k in left if own_names[k] is not None]
        if again:  # their own ids are taken; so far as anybody knows they are the first of their content
            for k in again:
                names[k] = _content_name(source, 1, contents[k])
            refused = {again[k] for k in self._take([names[k] for k in again])}
            left = [k for k in left if own_names[k] is None or k in refused]
        while left:
            numbers = self._repeats.count(key_array([_digest(f"{source}\0{contents[k]}") for k in left]))
            for k, number in zip(left, numbers.tolist(), strict=True):
                names[k] = _content_name(source, number + 1, contents[k])
            left = [left[k] for k in self._take([names[k] for k in left])]
        return names

    def _take(self, names: list[str]) -> list[int]:
        """Places of the names that an earlier row has."""
        _, new = self._taken.insert(key_array([_digest(name) for name in names]))
        return [] if new.all() else np.flatnonzero(~new).tolist()

    def close(self) -> None:
        """Give the scratch files back."""
        self._taken.close()
        self._repeats.close()


def _own_name(own: Any) -> str | None:
    """A row's own id as text, where it can be one."""
    if not isinstance(own, (str, int)) or isinstance(own, bool):
        return None
    name = str(own)
    if not name.strip():
        return None
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            return None
    return name


def _content_name(source: str, number: int, content: str) -> str:
    return hashlib.sha256(f"{source}\0{number}\0{content}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def content_key(messages: list[dict[str, Any]]) -> str:
    """The conversation as one string: equal for exact duplicates only."""
    # json.dumps([[role, content], …]), in a quarter of its time
    return "[" + ", ".join([f"[{quoted_ascii(m['role'])}, {quoted_ascii(m['content'])}]" for m in messages]) + "]"


def normalise(raw: Mapping[str, Any], spec: SourceSpec, source: str, line: int, identifiers: Identifiers) -> Record | Dropped:
    """One row as a `Record`, or why not."""
    return normalise_many([(line, raw)], spec, source, identifiers)[0]


def normalise_many(
    rows: Sequence[tuple[int, Mapping[str, Any] | Broken]],
    spec: SourceSpec,
    source: str,
    identifiers: Identifiers,
    columns: Collection[str] = (),
    rendered: bool = False,
) -> list[Record | Dropped]:
    """(line, row) of one source as records, or why not; in order.

    Args:
        columns: columns of the rows to keep in `fields` where a row has them.
        rendered: an operation will write the conversations: a row without a map that fits no shape is kept with its columns.
    """
    out: list[Any] = []
    good, owns, contents = [], [], []
    mapped = bool(spec.map.keys() - {"id"})
    plain = not (columns or spec.columns or spec.tags)
    for line, raw in rows:
        if isinstance(raw, Broken):
            out.append(Dropped(raw.reason, raw.detail))
            continue
        try:
            fields = {} if plain else _fields(raw, spec, columns)
            try:
                messages, trimmed = _conversation(raw, spec, mapped)
                meta, content = {"trimmed_turns": trimmed} if trimmed else {}, content_key(messages)
            except _Bad as bad:
                if not rendered or mapped:
                    raise
                messages, meta = [], {UNREAD: [bad.reason, bad.detail]}
                content = json.dumps(_plain(raw, ""), sort_keys=True)
        except _Bad as bad:
            out.append(Dropped(bad.reason, bad.detail))
            continue
        good.append(len(out))
        owns.append(_lookup(raw, spec.map["id"]) if "id" in spec.map else next((raw[k] for k in ("id", "unique_id") if k in raw), None))
        contents.append(content)
        out.append((messages, line, meta, fields))
    for place, id in zip(good, identifiers.give_many(source, owns, contents), strict=True):
        messages, line, meta, fields = out[place]
        out[place] = Record(id, source, messages, line, spec.weight, meta, fields)
    return out


def _fields(raw: Mapping[str, Any], spec: SourceSpec, columns: Collection[str]) -> dict[str, Any]:
    """The columns to keep of a row, its source's own columns and tags: text, numbers, lists and objects of them."""
    out = {name: _plain(raw[name], name) for name in columns if name in raw}
    for name, how in spec.columns.items():
        value = raw[how] if how in raw else _fill(how, raw) if "{" in how else _lookup(raw, how)
        if value is not None:
            out[name] = _plain(value, name)
    return {**out, **spec.tags}


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A value as JSON has it; what JSON does not know (dates, decimals) as text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if depth == _DEEPEST:
        raise _Bad(NOT_TEXT, f"{name} is nested more than {_DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(part, name, depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, name, depth + 1) for part in value]
    return str(value)


def _conversation(raw: Mapping[str, Any], spec: SourceSpec, mapped: bool) -> tuple[list[dict[str, Any]], int]:
    """The messages of a row and the number of turns that were taken off its end."""
    messages = _mapped(raw, spec.map) if mapped else _shaped(raw)
    extra = _system_parts(raw, spec, mapped)
    if extra and messages[:1] and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": "\n\n".join([messages[0]["content"], *extra[1:]])} if extra[1:] else messages[0]
    elif any(extra):
        messages = [{"role": "system", "content": "\n\n".join(e for e in extra if e)}, *messages]
    return _checked(messages)


def load(
    spec: SourceSpec, root: Path, columns: Collection[str] = (), rendered: bool = False, identifiers: Identifiers | None = None
) -> Iterator[tuple[int, Record | Dropped]]:
    """(line, record or why there is none) of every row of one source, in order."""
    rows, identifiers, source = sources.read(spec, root), identifiers or Identifiers(), spec.label
    while chunk := list(islice(rows, _READ)):
        made = normalise_many(chunk, spec, source, identifiers, columns, rendered)
        yield from zip([line for line, _ in chunk], made, strict=True)


def understood(raw: Mapping[str, Any], spec: SourceSpec, columns: Collection[str] = ()) -> bool:
    """The row's columns fit the map or a known shape (whatever is in them), or it has one of the `columns` to render it from."""
    if not spec.map and any(column in raw for column in columns):
        return True
    try:
        _ = _mapped(raw, spec.map) if spec.map.keys() - {"id"} else _shaped(raw)
    except _Bad as bad:
        return bad.reason != WRONG_COLUMNS
    return True


def absent_columns(first: Sequence[Mapping[str, Any]], spec: SourceSpec) -> list[str]:
    """One line for each of the source's `columns` that none of its first rows has."""
    if not first:
        return []
    missing = []
    for name, how in spec.columns.items():
        if "{" not in how and all(raw.get(how) is None and _lookup(raw, how) is None for raw in first):
            found = list(dict.fromkeys(str(column) for raw in first for column in raw))
            missing.append(f"columns: {name}: no {how!r} in the first {len(first)} rows{registry.nearest(how, found)}")
        elif "{" in how:
            slots(how)
    return missing


def number_of(value: Any) -> float | None:
    """A number, or text that is one (scores in released files often are); None for anything else. NaN is a number."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value.strip())
        except ValueError:
            return None
    try:
        return float(value) if isinstance(value, (int, float)) else None
    except OverflowError:
        return None


def held(value: Any) -> int:
    """About how many characters a value holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(held(part) for part in value.values())
    return sum(held(part) for part in value) if isinstance(value, (list, tuple)) else 8


def explain_columns(spec: SourceSpec, columns: list[str]) -> BadInput:
    """The error for a source of which no row is understood."""
    found = ", ".join(columns) or "none"
    if spec.map:
        return BadInput(f"{spec.path}: the map {spec.map} does not fit its columns; columns found: {found}")
    hint = ""
    if {"question", "answer"} <= set(columns):
        hint = ' For a question with options write e.g. map: {user: "{question}\\nA. {options[A]}", assistant: answer}.'
    elif {"chosen", "rejected"} <= set(columns):
        hint = " This is preference data (chosen, rejected); map the answer you want to learn."
    return BadInput(
        f"{spec.path}: no known shape in its columns ({found}); understood: {'; '.join(SHAPES)}. "
        f"Else name the columns: map: {{user: <column>, assistant: <column>}}.{hint}"
    )


def _checked(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Trailing turns that no answer follows are taken off (they teach nothing); the rest must be usable."""
    last = next((k for k in range(len(messages) - 1, -1, -1) if messages[k]["role"] == "assistant"), None)
    if last is None:
        raise _Bad(NO_ANSWER, f"roles: {', '.join(m['role'] for m in messages) or 'none'}")
    kept = messages[: last + 1]
    asked, first = False, None
    for number, message in enumerate(kept, 1):
        role = message["role"]
        if role == "assistant":
            if not message["content"].strip() and message.get("train", True):
                raise _Bad(EMPTY_ANSWER, f"assistant turn {number} of {len(kept)} is empty")
        elif role == "user":
            asked, first = True, first or message
        elif role == "tool":
            asked = True
    if not asked:
        raise _Bad(EMPTY_PROMPT, "no user turn before the answer")
    if first is not None and not first["content"].strip():
        raise _Bad(EMPTY_PROMPT, "the first user turn is empty")
    return kept, len(messages) - len(kept)


def _system_parts(raw: Mapping[str, Any], spec: SourceSpec, mapped: bool) -> list[str]:
    """[system prompt, tool list]: from the map, the row's own `system` column, or the source's default."""
    if spec.map.get("system"):
        system = _text(_value(raw, spec.map["system"]), spec.map["system"])
    elif not mapped and isinstance(raw.get("system"), str):
        system = raw["system"]
    else:
        system = ""
    parts = [system if system.strip() else spec.system or ""]
    tools = None if mapped else raw.get("tools")
    if tools:
        text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        if text.strip() not in ("", "[]", "{}"):
            parts.append(f"Available tools:\n{text}")
    return parts if any(parts) else []


# Rows with a map


def _mapped(raw: Mapping[str, Any], mapping: Mapping[str, str]) -> list[dict[str, Any]]:
    if "messages" in mapping:
        return _turns(_value(raw, mapping["messages"]), mapping["messages"])
    user, answer = _value(raw, mapping["user"]), _value(raw, mapping["assistant"])
    if isinstance(answer, list):
        raise _Bad(NOT_TEXT, f"{mapping['assistant']} is a list; pick one, e.g. {{{mapping['assistant']}[0]}}")
    return [
        {"role": "user", "content": _text(user, mapping["user"])},
        {"role": "assistant", "content": _text(answer, mapping["assistant"])},
    ]


def _value(raw: Mapping[str, Any], how: str) -> Any:
    """A column's value, or text made from `how` when it has {columns} in it."""
    if how in raw:
        return raw[how]
    if "{" in how:
        return _fill(how, raw)
    return _lookup(raw, how, required=True)


@lru_cache(maxsize=1024)
def slots(template: str) -> tuple[tuple[str, str | None], ...]:
    """The parts of a text with {columns} in it: (literal text, column after it or None).

    Raises:
        BadInput: braces that do not belong together, or something else than a column in them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise BadInput(f"{template!r}: {error}; write {{{{ and }}}} for braces that are text") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion):
            raise BadInput(f"{template!r}: a part in braces is a column, such as {{question}} or {{options[A]}}")
    return tuple((literal, name) for literal, name, _, _ in parts)


def column_of(path: str) -> str:
    """The column that a path such as `options[A]` goes into."""
    return re.split(r"[.\[]", path, maxsplit=1)[0] or path


def _fill(template: str, raw: Mapping[str, Any]) -> str:
    out = []
    for literal, name in slots(template):
        out.append(literal)
        if name is None:
            continue
        value = _lookup(raw, name, required=True)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise _Bad(NOT_TEXT, f"{name} is {_kind(value)}")
        out.append(str(value))
    return "".join(out)


_STEP = re.compile(r"\[([^\[\]]*)\]|\.([^.\[\]]+)")


def _lookup(raw: Mapping[str, Any], name: str, required: bool = False) -> Any:
    """`column`, `column[key]`, `column[0]` or `column.key`."""
    if name in raw:
        return raw[name]
    head = re.match(r"[^.\[\]]+", name)
    value: Any = raw
    steps = [head.group(0)] if head else []
    at = head.end() if head else 0
    while at < len(name):
        step = _STEP.match(name, at)
        if step is None:
            break
        steps.append(step.group(1) if step.group(1) is not None else step.group(2))
        at = step.end()
    try:
        if not steps or at < len(name):
            raise KeyError(name)
        for step in steps:
            value = value[int(step)] if isinstance(value, list) else value[step] if isinstance(value, Mapping) else _no_step(step)
    except (KeyError, IndexError, ValueError):
        if not required:
            return None
        raise _Bad(WRONG_COLUMNS, f"no {name!r}; columns: {', '.join(map(str, raw))}") from None
    return value


def _no_step(step: str) -> Any:
    raise KeyError(step)


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(_text(p.get("text"), name) for p in value)
    hint = f"; write {{{name}}} in braces to take it as text" if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
    raise _Bad(NOT_TEXT, f"{name} is {_kind(value)}{hint}")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown[:40]}{'…' if len(shown) > 40 else ''}"


# Rows of a known shape


def _shaped(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    for column in ("messages", "conversations", "conversation"):
        if column in raw and (isinstance(raw[column], list) or len(raw) == 1):
            return _turns(raw[column], column)
    if "instruction" in raw and "output" in raw:
        return _alpaca(raw)
    for asked, answered in _PAIRS:
        if asked in raw and answered in raw and not (asked == "question" and any(c in raw for c in _OPTION_COLUMNS)):
            return _pair(raw[asked], raw[answered], asked, answered)
    raise _Bad(WRONG_COLUMNS, f"columns: {', '.join(map(str, raw)) or 'none'}")


def _alpaca(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for number, earlier in enumerate(raw.get("history") or []):
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise _Bad(NOT_TEXT, f"history[{number}] is {_kind(earlier)}, not [question, answer]")
        turns += _pair(earlier[0], earlier[1], "history", "history")
    instruction, context = _text(raw["instruction"], "instruction"), raw.get("input")
    if context is not None and _text(context, "input").strip():
        instruction = f"{instruction}\n\n{context}"
    return [*turns, *_pair(instruction, raw["output"], "instruction", "output")]


def _pair(asked: Any, answered: Any, asked_name: str, answered_name: str) -> list[dict[str, Any]]:
    """prompt and completion, each a string or a list of messages."""
    before = _turns(asked, asked_name) if _is_turns(asked) else [{"role": "user", "content": _text(asked, asked_name)}]
    # What the prompt holds is given; only the completion is learnt.
    before = [{**m, "train": False} if m["role"] == "assistant" else m for m in before] if _is_turns(asked) else before
    after = _turns(answered, answered_name) if _is_turns(answered) else [{"role": "assistant", "content": _text(answered, answered_name)}]
    return [*before, *after]


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and ("role" in value[0] or "from" in value[0])


def _turns(value: Any, column: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # csv files carry the list as JSON text
        try:
            value = json.loads(value)
        except ValueError:
            raise _Bad(NOT_TEXT, f"{column} is text that is not a JSON list") from None
    if not isinstance(value, list):
        raise _Bad(NOT_TEXT, f"{column} is {_kind(value)}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        if type(turn) is dict and len(turn) == 2 and type(turn.get("content")) is str and turn.get("role") in _PLAIN_ROLES:
            turns.append({"role": turn["role"], "content": turn["content"]})  # most turns of most data
            continue
        if not isinstance(turn, Mapping):
            raise _Bad(NOT_TEXT, f"{column}: turn {number} is {_kind(turn)}, not an object")
        role = turn.get("role", turn.get("from"))
        known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None:
            raise _Bad(BAD_ROLE, f"{column}: turn {number} has role {_kind(role)}")
        content = turn.get("content", turn.get("value"))
        calls = turn.get("tool_calls")
        if calls:  # learnt as text, one JSON object per line
            lines = [json.dumps(c.get("function", c) if isinstance(c, Mapping) else c, ensure_ascii=False) for c in calls]
            content = "\n".join([content, *lines] if content else lines)
        message = {"role": known, "content": _text(content, f"{column}: turn {number}")}
        train = turn.get("train", turn.get("weight"))
        if train is not None and known == "assistant" and not train:
            message["train"] = False
        turns.append(message)
    return turns
