"""Stage 1: sources to encoded rows and a ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from guidetune import registry
from guidetune.artefacts import StageResult, digest_file, stage
from guidetune.data import records, sources
from guidetune.data.chat import Chat, Encoded, Refused
from guidetune.data.ledger import Ledger
from guidetune.data.operations import Operation, OperationContext
from guidetune.data.records import Dropped, Identifiers, Record
from guidetune.data.rows import RowWriter
from guidetune.data.sources import Broken, SourceSpec
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import Bar, progress

RECORDS = "records.jsonl"
TOKENIZER = "tokenizer.json"
TOO_LONG = "longer than max_length"
_CHUNK = 512  # rows per tokenizer call
_LOOK_AHEAD = 50  # rows of a source that are tried before anything is written


class PrepareSettings(BaseModel):
    """Options of the prepare stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_length: int = Field(2048, gt=1, description="Longest row in tokens.")
    over_length: Literal["cut", "drop", "refuse"] = Field(
        "cut", description="What to do with longer rows: cut the middle of the prompt, drop the row, or refuse to start."
    )
    cut_answer: bool = Field(False, description="Cut the tail of an answer that alone is too long (else such a row is dropped).")
    max_dropped: int | float | None = Field(
        None, ge=0, description="Refuse when more rows are dropped: a number of rows, or a share of them when it has a decimal point."
    )
    seed: int = Field(42, description="Seed of the operations.")


def prepare(
    specs: Sequence[SourceSpec | Mapping[str, Any] | str],
    operations: Sequence[Operation | Mapping[str, Any] | str],
    chat: Chat,
    settings: PrepareSettings,
    out: Path,
    root: Path,
) -> StageResult:
    """Read, normalise, operate, encode; the result is the totals of the ledger.

    Writes rows.arrow, records.jsonl, ledger.json, ledger.jsonl and tokenizer.json.

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
        "version": 1,
        "sources": [
            {**spec.model_dump(exclude={"path", "name"}), "name": name, "digest": digest}
            for spec, name, digest in zip(specs, names, digests, strict=True)
        ],
        "operations": [{**step.spec(), "code": digest_file(registry.source_file(type(step)))} for step in steps],
        "chat": chat.digest,
        "settings": settings.model_dump(),
    }
    return stage(Path(out), key, lambda work: _build(work, specs, names, steps, chat, settings, Path(root)))


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
    work: Path, specs: list[SourceSpec], names: list[str], steps: list[Operation], chat: Chat, settings: PrepareSettings, root: Path
) -> dict[str, Any]:
    _check_columns(specs, root)
    too_long: list[str] = []
    with (
        Ledger(work, names) as ledger,
        RowWriter(work / "rows.arrow") as rows,
        open(work / RECORDS, "w", encoding="utf-8", newline="\n") as texts,
        progress("prepare", unit="rows") as bar,
    ):
        stream: Iterable[Record] = _records(specs, names, root, ledger, bar)
        for number, step in enumerate(steps):
            stream = _operate(step, stream, work / f".step{number}", settings.seed, ledger)
        for record, encoded in _encoded(stream, chat, ledger):
            cut = 0
            if len(encoded.input_ids) > settings.max_length:
                shorter = _shorten(record, encoded, chat, settings)
                if isinstance(shorter, Refused):
                    if settings.over_length == "refuse":
                        too_long.append(f"{record.source} line {record.line} (id {record.id}): {len(encoded.input_ids)} tokens")
                    ledger.drop(record.id, record.source, record.line, shorter.reason, shorter.detail)
                    continue
                encoded, cut = shorter
            rows.write(record.id, record.source, encoded.input_ids, [record.weight if t else 0.0 for t in encoded.target])
            texts.write(json.dumps({"id": record.id, "source": record.source, "messages": record.messages}, ensure_ascii=False) + "\n")
            ledger.use(
                record.id,
                record.source,
                record.line,
                tokens=len(encoded.input_ids),
                supervised=encoded.supervised,
                tokens_cut=cut,
                ends_with_stop=encoded.ends_with_stop,
                appended_eos=encoded.appended_eos,
                trimmed_turns=record.meta.get("trimmed_turns", 0),
                control_text=chat.control_text(record.messages),
            )
        totals = ledger.finish(template=chat.facts, max_length=settings.max_length)
    _keep_tokenizer(chat, work)
    for spool in work.glob(".step*"):
        spool.unlink()
    if too_long:
        shown = too_long[:5] + ([f"and {len(too_long) - 5} more"] if len(too_long) > 5 else [])
        raise BadInput(
            [f"{len(too_long)} rows are longer than max_length {settings.max_length} and over_length is refuse:", *shown]
            + ["raise max_length, or set over_length: cut or drop"]
        )
    _check_totals(totals, specs, names, settings)
    return totals


def _keep_tokenizer(chat: Chat, work: Path) -> None:
    """The tokenizer beside the rows, so that they can be read as text without the model."""
    backend = getattr(chat.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.save(str(work / TOKENIZER))


def _check_columns(specs: list[SourceSpec], root: Path) -> None:
    """Look at the first rows of every source, so that a wrong map costs seconds."""
    problems: list[str] = []
    for spec in specs:
        broken: list[str] = []
        columns: dict[str, None] = {}
        try:
            for line, raw in islice(sources.read(spec, root), _LOOK_AHEAD):
                if isinstance(raw, Broken):
                    broken.append(f"line {line}: {raw.reason}: {raw.detail}")
                    continue
                if records.understood(raw, spec):
                    break
                columns |= dict.fromkeys(map(str, raw))
            else:
                if columns:
                    problems += records.explain_columns(spec, list(columns)).problems
                elif broken:
                    problems.append(f"{spec.path}: none of the first {len(broken)} rows can be read; {broken[0]}")
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)


def _records(specs: list[SourceSpec], names: list[str], root: Path, ledger: Ledger, bar: Bar) -> Iterator[Record]:
    identifiers = Identifiers()
    for spec, name in zip(specs, names, strict=True):
        for line, raw in sources.read(spec, root):
            ledger.read(name)
            bar.advance()
            result = Dropped(raw.reason, raw.detail) if isinstance(raw, Broken) else records.normalise(raw, spec, name, line, identifiers)
            if isinstance(result, Dropped):
                ledger.drop(f"{name}:{line}", name, line, result.reason, result.detail)
            else:
                yield result


def _operate(step: Operation, stream: Iterable[Record], spool: Path, seed: int, ledger: Ledger) -> Iterator[Record]:
    """Run one operation over records kept on disk, and check that it accounts for every row."""
    rows = _Spool(spool)
    rows.fill(stream)
    dropped = 0

    def drop(record: Record, reason: str, why: str) -> None:
        nonlocal dropped
        dropped += 1
        ledger.drop(record.id, record.source, record.line, reason, why)

    kept = 0
    for record in step.apply(rows, OperationContext(seed, drop)):
        kept += 1
        yield record
    if kept + dropped != rows.count:
        raise RunFailed(f"operation {step.name!r} got {rows.count} rows, kept {kept} and dropped {dropped}; it must account for all")
    spool.unlink()


class _Spool:
    """Records on disk that can be gone through again and again."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def fill(self, stream: Iterable[Record]) -> None:
        with open(self.path, "w", encoding="utf-8", newline="\n") as file:
            for record in stream:
                self.count += 1
                file.write(json.dumps([record.id, record.source, record.messages, record.line, record.weight, record.meta]) + "\n")

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                yield Record(*json.loads(line))


def _encoded(stream: Iterable[Record], chat: Chat, ledger: Ledger) -> Iterator[tuple[Record, Encoded]]:
    stream = iter(stream)
    while chunk := list(islice(stream, _CHUNK)):
        for record, result in zip(chunk, chat.encode_many([r.messages for r in chunk]), strict=True):
            if isinstance(result, Refused):
                ledger.drop(record.id, record.source, record.line, result.reason, result.detail)
            else:
                yield record, result


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
    dropped = totals["read"] - totals["used"]
    limit = settings.max_dropped
    if limit is not None and dropped > (limit * totals["read"] if isinstance(limit, float) else limit):
        raise BadInput(
            f"{dropped} of {totals['read']} rows are dropped, more than max_dropped {limit}: "
            f"{_reasons(totals['dropped'], totals['examples'])}; mend the rows or raise max_dropped"
        )


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


def leaks(train: Iterable[Record | Mapping[str, Any]], others: Iterable[str]) -> list[Leak]:
    """Training rows with a user turn that is exactly (up to outer white space) one of the `others` texts, such as test prompts."""
    known = {_text_key(text) for text in others if text.strip()}
    found = []
    for record in train:
        id, messages = (record.id, record.messages) if isinstance(record, Record) else (record["id"], record["messages"])
        for message in messages:
            if message["role"] == "user" and _text_key(message["content"]) in known:
                found.append(Leak(id, message["content"]))
                break
    return found


def _text_key(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The used records of a prepare folder: {"id", "source", "messages"}, in the order of its rows."""
    with open(Path(folder) / RECORDS, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
