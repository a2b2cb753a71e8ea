"""Stage 1: sources to encoded rows and a ledger."""

from __future__ import annotations

import gc
import hashlib
import json
import marshal
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from guidetune import registry
from guidetune.artefacts import StageResult, digest_file, stage
from guidetune.data import records, sources
from guidetune.data.chat import Chat, Encoded, Refused
from guidetune.data.keys import key_array
from guidetune.data.ledger import Ledger
from guidetune.data.operations import Operation, OperationContext
from guidetune.data.records import UNREAD, Dropped, Identifiers, Record, held, number_of
from guidetune.data.rows import FILE, EncodedRows, RowWriter
from guidetune.data.side import SideWriter
from guidetune.data.sources import Broken, LossOn, SourceSpec
from guidetune.errors import BadInput, RunFailed
from guidetune.models.fingerprints import fingerprint as model_fingerprint
from guidetune.progress import Bar, progress

VERSION = 3  # of what this stage writes: raise it when the same inputs give other files
RECORDS = "records.jsonl"
PROMPTS = "prompts.index"
PROMPT = np.dtype([("text", "<u8"), ("row", "<i4")])
"""Hash of a user turn, and the row that it is in."""
TOKENIZER = "tokenizer.json"
COLUMNS = "columns.parquet"
"""Side table of the used rows: scores, phases, templates and tags, where there are such."""
TOO_LONG = "longer than max_length"
_READ = 256  # rows that are normalised at a time
_CHUNK, _CHUNK_CHARACTERS = 1024, 1_000_000  # rows per tokenizer call, fewer of long ones
_SHOWN, _EXAMPLES = 5, 3
_REMEMBERED = 16  # first rows of each operation, to show what it did to them
_GLIMPSE = 8  # turns of such a row
_SCAN = 1 << 20
_LOOK_AHEAD = 50  # rows of a source that are tried before anything is written


class PrepareSettings(BaseModel):
    """Options of the prepare stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unlabelled: bool = Field(
        False, description="Keep of each row its prompt and the first token after it, the one target (see prompts.py)."
    )
    max_length: int = Field(2048, gt=1, description="Longest row in tokens.")
    over_length: Literal["cut", "drop", "refuse"] = Field(
        "cut", description="What to do with longer rows: cut the middle of the prompt, drop the row, or refuse to start."
    )
    cut_answer: bool = Field(False, description="Cut the tail of an answer that alone is too long (else such a row is dropped).")
    max_dropped: int | float | None = Field(
        None,
        ge=0,
        description="Refuse when more rows are dropped (but for those an operation was asked to leave out): a number of rows, "
        "or a share of them when it has a decimal point.",
    )
    seed: int = Field(42, description="Seed of the operations.")
    keep: list[str] = Field([], description="Columns and scores of the rows that stay beside them, for scorers.")
    loss_on: LossOn = Field(
        "assistant", description="Tokens that are learnt: of every assistant turn, of the last one (target), or all up to its end."
    )


def prepare(
    specs: Sequence[SourceSpec | Mapping[str, Any] | str],
    operations: Sequence[Operation | Mapping[str, Any] | str],
    chat: Chat,
    settings: PrepareSettings,
    out: Path,
    root: Path,
    models: Mapping[str, str] | None = None,
) -> StageResult:
    """Read, normalise, operate, encode; the result is the totals of the ledger.

    Writes rows.arrow and rows.index, records.jsonl, prompts.index, ledger.json, ledger.jsonl and tokenizer.json. Memory does not
    grow with the number of rows: one chunk is held, and what must be known of all rows is in files. `models`: what operations call
    `base` and `instruct`.

    Raises:
        BadInput: a source cannot be read or understood, no row is left, or a limit set by the user is passed.
    """
    specs = [spec if isinstance(spec, SourceSpec) else SourceSpec.model_validate(spec) for spec in specs]
    if not specs:
        raise BadInput("no data sources; add data: {train: [{path: …}]}")
    steps: list[Operation] = [registry.build("operation", operation) for operation in operations]
    names = sources.labels(specs)
    digests = _digests(specs, root)
    key = {
        "stage": "prepare",
        "version": VERSION,
        "sources": [
            {**spec.model_dump(exclude={"path", "name"}), "name": name, "digest": digest}
            for spec, name, digest in zip(specs, names, digests, strict=True)
        ],
        "operations": [
            {**step.spec(), "code": digest_file(registry.source_file(type(step))), "reads": step.digests(Path(root))} for step in steps
        ],
        "chat": chat.digest,
        "settings": settings.model_dump(exclude=None if settings.keep else {"keep"}),
    }
    known = dict(models or {})
    if run := {name: model_fingerprint(known.get(name, name)) for step in steps for name in step.models()}:
        key["models"] = run
    return stage(Path(out), key, lambda work: _build(work, specs, names, steps, chat, settings, Path(root), known))


def _digests(specs: list[SourceSpec], root: Path) -> list[str]:
    found, problems = [], []
    for spec in specs:
        try:
            found.append(sources.digest(spec, root))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return found


def _build(
    work: Path,
    specs: list[SourceSpec],
    names: list[str],
    steps: list[Operation],
    chat: Chat,
    settings: PrepareSettings,
    root: Path,
    models: Mapping[str, str],
) -> dict[str, Any]:
    wanted = sorted(set[str]().union(*(step.columns() for step in steps)))
    rendered = any(step.renders for step in steps)
    _check_columns(specs, root, wanted if rendered else ())
    aims = {name: spec.loss_on or settings.loss_on for spec, name in zip(specs, names, strict=True)}
    kept_columns = {name: str for name in settings.keep} | _column_types(specs, steps, root)
    account: list[dict[str, Any]] = []
    too_long: list[str] = []
    count = 0

    def drop(record: Record, refused: Refused, tokens: int = 0) -> None:
        nonlocal count
        if tokens and settings.over_length == "refuse":
            count += 1
            if count <= _SHOWN:
                too_long.append(f"{record.source} line {record.line} (id {record.id}): {tokens} tokens")
        reason, detail = record.meta[UNREAD] if not record.messages and UNREAD in record.meta else (refused.reason, refused.detail)
        ledger.drop(record.id, record.source, record.line, reason, detail, record.of)

    with (
        _rare_collections(),
        Ledger(work, names) as ledger,
        _Output(work, kept_columns) as output,
        progress("prepare", unit="rows") as bar,
    ):
        read = {*wanted, *(records.column_of(name) for name in settings.keep)}
        stream: Iterable[Record] = _records(specs, names, root, work, ledger, bar, sorted(read), rendered)
        for number, step in enumerate(steps):
            place = {"root": root, "chat": chat, "max_length": settings.max_length, "outputs": work, "models": models}
            # columns that only this operation reads, and nobody after it, go with it
            later = {*kept_columns, *map(records.column_of, settings.keep)}.union(*(after.columns() for after in steps[number + 1 :]))
            stream = _operate(step, stream, work / f".step{number}", settings.seed, ledger, account, place, step.columns() - later)
        for chunk in _chunks(stream):
            kept, encoded, cuts = _fitting(chunk, chat, settings, drop, aims)
            if kept:
                output.write(kept, encoded)
                ledger.use(kept, encoded, cuts, [chat.control_text(record.messages) for record in kept])
            pa.default_memory_pool().release_unused()  # what Arrow's allocator keeps for later grows with time, for no gain in speed
        totals = ledger.finish(template=chat.facts, max_length=settings.max_length, operations=account)
    _keep_tokenizer(chat, work)
    for scratch in work.glob(".step*"):
        shutil.rmtree(scratch)
    if too_long:
        shown = too_long + ([f"and {count - _SHOWN} more"] if count > _SHOWN else [])
        raise BadInput(
            [f"{count} rows are longer than max_length {settings.max_length} and over_length is refuse:", *shown]
            + ["raise max_length, or set over_length: cut or drop"]
        )
    _check_totals(totals, specs, names, settings)
    return totals


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Rows hold no cycles, but many objects: looking for cycles as often as usual, in all that is imported, takes a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Output:
    """The files of the used rows, written chunk by chunk: rows, conversations, and a hash of every user turn."""

    def __init__(self, work: Path, columns: dict[str, type]) -> None:
        self._rows = RowWriter(work / FILE)
        self._columns = columns
        self._side = SideWriter(work / COLUMNS, columns) if columns else None
        self._texts = open(work / RECORDS, "w", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
        self._prompts = open(work / PROMPTS, "wb")  # noqa: SIM115 (closed in __exit__)
        self._count = 0

    def write(self, records: Sequence[Record], encoded: Sequence[Encoded]) -> None:
        lengths = np.array([len(row.input_ids) for row in encoded], dtype=np.int64)
        total = int(lengths.sum())
        tokens = np.fromiter(chain.from_iterable(row.input_ids for row in encoded), dtype=np.int32, count=total)
        target = np.fromiter(chain.from_iterable(row.target for row in encoded), dtype=bool, count=total)
        weight = np.repeat(np.array([record.weight for record in records], dtype=np.float32), lengths)
        weight[~target] = 0
        self._rows.write_many([record.id for record in records], [record.source for record in records], lengths, tokens, weight)
        self._texts.write("".join([_line(record) for record in records]))
        if self._side is not None:
            columns = {name: [_typed(record.value(name), kind) for record in records] for name, kind in self._columns.items()}
            self._side.write([record.id for record in records], **columns)
        asked = [(k, m["content"]) for k, record in enumerate(records, self._count) for m in record.messages if m["role"] == "user"]
        index = np.empty(len(asked), dtype=PROMPT)
        index["row"] = [k for k, _ in asked]
        index["text"] = key_array([_text_key(text) for _, text in asked]).reshape(-1)
        self._prompts.write(index.tobytes())
        self._count += len(records)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._rows.close()
            if self._side is not None:
                self._side.__exit__(*error)
        finally:
            self._texts.close()
            self._prompts.close()


def _typed(value: Any, kind: type) -> Any:
    """A value as a side table's column has it; None where it cannot be."""
    if value is None or kind is str:
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    number = number_of(value)
    return None if number is None else kind(number) if kind is float or number == number else None


def _column_types(specs: list[SourceSpec], steps: list[Operation], root: Path) -> dict[str, type]:
    """The columns kept beside the rows: those of the sources (text), and what the operations add."""
    out: dict[str, type] = {name: str for spec in specs for name in [*spec.columns, *spec.tags]}
    for step in steps:
        out |= step.adds(root)
    return out


def _line(record: Record) -> str:
    """The record as one line of JSON."""
    if all(len(message) == 2 for message in record.messages):  # as `json.dumps` writes it, in a third of the time
        turns = [f'{{"role": {quoted(message["role"])}, "content": {quoted(message["content"])}}}' for message in record.messages]
        return f'{{"id": {quoted(record.id)}, "source": {quoted(record.source)}, "messages": [{", ".join(turns)}]}}\n'
    return json.dumps({"id": record.id, "source": record.source, "messages": record.messages}, ensure_ascii=False) + "\n"


def _keep_tokenizer(chat: Chat, work: Path) -> None:
    """The tokenizer beside the rows, so that they can be read as text without the model."""
    backend = getattr(chat.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.save(str(work / TOKENIZER))


def _check_columns(specs: list[SourceSpec], root: Path, rendered: Sequence[str]) -> None:
    """Look at the first rows of every source, so that a wrong map costs seconds. `rendered`: columns that conversations are made of."""
    problems: list[str] = []
    for spec in specs:
        broken: list[str] = []
        columns: dict[str, None] = {}
        seen = []
        try:
            for line, raw in islice(sources.read(spec, root), _LOOK_AHEAD):
                if isinstance(raw, Broken):
                    broken.append(f"line {line}: {raw.reason}: {raw.detail}")
                    continue
                seen.append(raw)
                if records.understood(raw, spec, rendered):
                    break
                columns |= dict.fromkeys(map(str, raw))
            else:
                if columns:
                    problems += records.explain_columns(spec, list(columns)).problems
                elif broken:
                    problems.append(f"{spec.path}: none of the first {len(broken)} rows can be read; {broken[0]}")
            if spec.columns:
                first = [raw for _, raw in islice(sources.read(spec, root), _LOOK_AHEAD) if not isinstance(raw, Broken)]
                problems += [f"{spec.path}: {why}" for why in records.absent_columns(first, spec)]
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)


def _records(
    specs: list[SourceSpec],
    names: list[str],
    root: Path,
    work: Path,
    ledger: Ledger,
    bar: Bar,
    columns: Sequence[str],
    rendered: bool,
) -> Iterator[Record]:
    identifiers = Identifiers(work)
    try:
        for spec, name in zip(specs, names, strict=True):
            rows = sources.read(spec, root)
            while chunk := list(islice(rows, _READ)):
                ledger.read(name, len(chunk))
                bar.advance(len(chunk))
                made = records.normalise_many(chunk, spec, name, identifiers, columns, rendered)
                for (line, _), result in zip(chunk, made, strict=True):
                    if isinstance(result, Dropped):
                        ledger.drop(f"{name}:{line}", name, line, result.reason, result.detail)
                    else:
                        yield result
    finally:
        identifiers.close()


def _operate(
    step: Operation,
    stream: Iterable[Record],
    scratch: Path,
    seed: int,
    ledger: Ledger,
    account: list[dict[str, Any]],
    place: Mapping[str, Any],
    spent: Set[str] = frozenset(),
) -> Iterator[Record]:
    """Run one operation and check that it accounts for every row; what it did is added to `account`.

    Its rows are kept on disk, in the folder `scratch`, unless one pass over them is enough for it. Columns that are `spent` go.
    """
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    rows: _Spool | _Once = _Once(stream) if step.streams else _Spool(scratch / ".rows")
    if isinstance(rows, _Spool):
        rows.fill(stream)
    dropped: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    facts: dict[str, Any] = {}
    made = kept = 0

    def drop(record: Record, reason: str, why: str) -> None:
        dropped[reason] += 1
        ledger.drop(record.id, record.source, record.line, reason, why, record.of)

    def copied(record: Record) -> None:
        nonlocal made
        made += 1
        ledger.made(record.source)

    examples: list[dict[str, Any]] = []
    context = OperationContext(seed, drop, scratch, note=facts.update, copied=copied, **place)
    for record in step.apply(rows, context):
        kept += 1
        sources[record.source] += 1
        if len(examples) < _EXAMPLES and (before := rows.first.get(record.id) or rows.first.get(record.id.rpartition("~")[0])) is not None:
            examples += _change(before, record)
        if spent and not spent.isdisjoint(record.fields):
            record = replace(record, fields={name: value for name, value in record.fields.items() if name not in spent})
        yield record
    if isinstance(rows, _Once):
        rows.exhaust()  # rows that it did not ask for are not accounted for
    out = sum(dropped.values())
    if kept + out != rows.count + made:
        raise RunFailed(
            f"operation {step.name!r} got {rows.count} rows and made {made}, kept {kept} and dropped {out}; it must account for all"
        )
    if isinstance(rows, _Spool):
        rows.path.unlink()
    leftovers = sorted(path.name for path in scratch.iterdir())
    if leftovers:
        raise RunFailed(f"operation {step.name!r} leaves scratch files behind: {', '.join(leftovers)}")
    scratch.rmdir()
    numbers = {"in": rows.count, "made": made, "dropped": dict(dropped.most_common()), "out": kept, "sources": dict(sources)}
    account.append({"method": step.name, "chooses": step.chooses, **numbers, "facts": facts, "examples": examples})


def _change(before: Record, after: Record) -> list[dict[str, Any]]:
    """One example of what an operation did to a row, shortened; none when it left its text alone."""
    if before.messages == after.messages:
        return []
    return [{"id": after.id, "before": _glimpse(before.messages), "after": _glimpse(after.messages)}]


def _glimpse(messages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    shown = [[m["role"], m["content"]] for m in messages[-_GLIMPSE:]]
    return [[role, text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"] for role, text in shown]


class _Once:
    """Records that are gone through once, counted as they pass."""

    def __init__(self, stream: Iterable[Record]) -> None:
        self._stream: Iterator[Record] | None = iter(stream)
        self._rest = self._stream
        self.count = 0
        self.first: dict[str, Record] = {}

    def __iter__(self) -> Iterator[Record]:
        if self._stream is None:
            raise RuntimeError("an operation that streams goes through its rows once")
        stream, self._stream = self._stream, None
        for record in stream:
            self.count += 1
            if self.count <= _REMEMBERED:
                self.first[record.id] = record
            yield record

    def exhaust(self) -> None:
        """Count what was not gone through."""
        self.count += sum(1 for _ in self._rest)


class _Spool:
    """Records on disk that can be gone through again and again."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.first: dict[str, Record] = {}

    def fill(self, stream: Iterable[Record]) -> None:
        with open(self.path, "wb") as file:
            for chunk in _chunks(stream):
                for record in chunk[: max(0, _REMEMBERED - self.count)]:
                    self.first[record.id] = record
                self.count += len(chunk)
                # our own scratch file, read by the process that wrote it
                marshal.dump([record.kept() for record in chunk], file)

    def __iter__(self) -> Iterator[Record]:
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            while file.tell() < size:
                for values in marshal.load(file):
                    yield Record(*values)


def _chunks(stream: Iterable[Record]) -> Iterator[list[Record]]:
    """Records in lists that are short enough to hold, whatever their length."""
    chunk: list[Record] = []
    size = 0
    for record in stream:
        chunk.append(record)
        size += sum([len(message["content"]) for message in record.messages]) + (held(record.fields) if record.fields else 0)
        if len(chunk) == _CHUNK or size > _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _fitting(
    chunk: list[Record], chat: Chat, settings: PrepareSettings, drop: Callable[[Record, Refused, int], None], aims: Mapping[str, LossOn]
) -> tuple[list[Record], list[Encoded], list[int]]:
    """The records that can be used, their tokens, and how many were cut out of each."""
    kept: list[Record] = []
    rows: list[Encoded] = []
    cuts: list[int] = []
    if "target" in aims.values():
        chunk = [_last_turn_alone(record) if aims[record.source] == "target" else record for record in chunk]
    for record, encoded in zip(chunk, chat.encode_many([record.messages for record in chunk]), strict=True):
        cut = 0
        if isinstance(encoded, Refused):
            drop(record, encoded, 0)
            continue
        if len(encoded.input_ids) > settings.max_length:
            shorter = _shorten(record, encoded, chat, settings)
            if isinstance(shorter, Refused):
                drop(record, shorter, len(encoded.input_ids))
                continue
            encoded, cut = shorter
        if aims[record.source] == "all":
            encoded = _all_learnt(encoded)
        kept.append(record)
        rows.append(encoded.prompt_only() if settings.unlabelled else encoded)
        cuts.append(cut)
    return kept, rows, cuts


def _last_turn_alone(record: Record) -> Record:
    """The record with its last assistant turn as the only one that is learnt."""
    turns = [k for k, message in enumerate(record.messages) if message["role"] == "assistant"]
    messages = [{**m, "train": False} if k in turns[:-1] else m for k, m in enumerate(record.messages)]
    return replace(record, messages=messages) if turns[:-1] else record


def _all_learnt(encoded: Encoded) -> Encoded:
    """The row with every token up to its last target as a target, but for the first, which nothing comes before."""
    last = len(encoded.target) - 1 - encoded.target[::-1].index(True)
    return replace(encoded, target=[False] + [True] * last + [False] * (len(encoded.target) - last - 1))


def _shorten(record: Record, encoded: Encoded, chat: Chat, settings: PrepareSettings) -> tuple[Encoded, int] | Refused:
    if settings.over_length != "cut":
        return Refused(TOO_LONG, f"{len(encoded.input_ids)} tokens")
    return chat.cut(record.messages, encoded, settings.max_length, settings.cut_answer)


def _check_totals(totals: dict[str, Any], specs: list[SourceSpec], names: list[str], settings: PrepareSettings) -> None:
    problems = []
    for spec, name in zip(specs, names, strict=True):
        tally = totals["sources"][name]
        if tally["read"] and not tally["used"] and not totals["used"]:
            problems.append(f"{spec.path}: all {tally['read']} rows are dropped: {_reasons(tally['dropped'], totals['examples'])}")
    if not totals["used"]:
        raise BadInput(problems or ["no rows are left to train on"])
    dropped = faults(totals)
    limit = settings.max_dropped
    if limit is not None and dropped > (limit * (totals["read"] + totals["made"]) if isinstance(limit, float) else limit):
        raise BadInput(
            f"{dropped} of {totals['read'] + totals['made']} rows are dropped, more than max_dropped {limit}: "
            f"{_reasons(totals['dropped'], totals['examples'])}; mend the rows or raise max_dropped"
        )


def faults(totals: Mapping[str, Any]) -> int:
    """Dropped rows but for those that an operation was asked to leave out."""
    aimed = sum(sum(part["dropped"].values()) for part in totals.get("operations", []) if part.get("chooses"))
    return sum(totals["dropped"].values()) - aimed


def _reasons(dropped: dict[str, int], examples: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    for reason, count in dropped.items():
        example = next(iter(examples.get(reason, [])), None)
        parts.append(f"{reason} ({count})" + (f", e.g. {example['source']} line {example['line']}: {example['why']}" if example else ""))
    return "; ".join(parts)


class Leak(NamedTuple):
    """A training row whose prompt is also a test text."""

    id: str
    text: str


class Leaks(NamedTuple):
    """How many rows have a prompt of the test set, and the first of them."""

    rows: int
    examples: list[Leak]


def leaks(folder: Path, others: Iterable[str]) -> Leaks:
    """Rows of a prepare folder with a user turn that is exactly (up to outer white space) one of `others`, such as test prompts.

    Texts are compared by 64-bit hashes that were written with the rows: 12 bytes per user turn are read, and no text.
    """
    known = {_text_key(text): text.strip() for text in others if text.strip()}
    path = Path(folder) / PROMPTS
    if not known or not path.stat().st_size:
        return Leaks(0, [])
    wanted = np.sort(key_array(list(known)).reshape(-1))
    index = np.memmap(path, dtype=PROMPT, mode="r").view(np.ndarray)
    count, last, first = 0, -1, []
    for start in range(0, len(index), _SCAN):
        part = index[start : start + _SCAN]
        hits = part[np.isin(part["text"], wanted)]
        rows = np.unique(hits["row"])
        count += len(rows) - int(last in rows[:1])  # a row's turns may lie in two parts
        last = int(rows[-1]) if len(rows) else last
        first += hits[: _EXAMPLES - len(first)].tolist() if len(first) < _EXAMPLES else []
    ids = EncodedRows.open(folder).ids if first else []
    return Leaks(count, [Leak(ids[row], known[int(key).to_bytes(8, "little")]) for key, row in first])


def _text_key(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The used records of a prepare folder: {"id", "source", "messages"}, in the order of its rows."""
    with open(Path(folder) / RECORDS, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
