"""The account of every row: used, cut or dropped with its reason. `read + made == used + sum(dropped)`.

`made` are rows that an operation made of others (a second verbalisation, a repeated draw): their lines name the row they are `of`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as quoted  # a text as JSON, letters outside ASCII as they are
from pathlib import Path
from typing import Any

import numpy as np

from guidetune.artefacts import write_json
from guidetune.data.chat import Encoded
from guidetune.data.records import Record

FILE, LINES = "ledger.json", "ledger.jsonl"
_EXAMPLES = 3
_COUNTS = (
    "read",
    "made",
    "used",
    "cut",
    "tokens",
    "supervised_tokens",
    "tokens_cut",
    "ends_with_stop",
    "appended_eos",
    "trimmed_turns",
    "control_text",
)


@dataclass
class _Tally:
    read: int = 0
    made: int = 0
    used: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised_tokens: int = 0
    tokens_cut: int = 0
    ends_with_stop: int = 0
    appended_eos: int = 0
    trimmed_turns: int = 0
    control_text: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # rows of each length in tokens

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return counts | {"dropped": dict(self.dropped.most_common()), "lengths": _quantiles(self.lengths)}


class Ledger:
    """Streams one line per input row to `ledger.jsonl`; `finish` writes the totals to `ledger.json`."""

    def __init__(self, folder: Path, sources: list[str]) -> None:
        self._folder = folder
        self._sources = {name: _Tally() for name in sources}
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._file = (folder / LINES).open("w", encoding="utf-8", newline="\n", errors="backslashreplace")

    def read(self, source: str, rows: int = 1) -> None:
        self._sources[source].read += rows

    def made(self, source: str) -> None:
        """A row more, made of one of the source's."""
        self._sources[source].made += 1

    def drop(self, id: str, source: str, line: int, reason: str, why: str, of: str = "") -> None:
        self._sources[source].dropped[reason] += 1
        self._example(reason, id, source, line, why)
        values = {"id": id, "source": source, "line": line, "outcome": "dropped", "reason": reason, "why": why, "tokens_cut": 0}
        self._file.write(json.dumps(values | ({"of": of} if of else {}), ensure_ascii=False) + "\n")

    def use(self, records: Sequence[Record], encoded: Sequence[Encoded], cut: Sequence[int], control: Sequence[str | None]) -> None:
        """Rows that are used: `cut` are the tokens taken out of each, `control` the control token that its own text holds."""
        of_source: dict[str, list[int]] = {}
        lines = []
        for k, (record, count) in enumerate(zip(records, cut, strict=True)):
            of_source.setdefault(record.source, []).append(k)
            outcome = '"cut", "reason": "longer than max_length"' if count else '"used", "reason": null'
            of = f', "of": {quoted(record.of)}' if record.of else ""
            lines.append(
                f'{{"id": {quoted(record.id)}, "source": {quoted(record.source)}, "line": {record.line}, '
                f'"outcome": {outcome}, "tokens_cut": {count}{of}}}\n'
            )
            if control[k] is not None:
                self._sources[record.source].control_text += 1
                self._example("control token in the text", record.id, record.source, record.line, f"the text holds {control[k]!r}")
        self._file.write("".join(lines))
        for source, places in of_source.items():
            tally, rows = self._sources[source], [encoded[k] for k in places]
            lengths = np.array([len(row.input_ids) for row in rows])
            tally.used += len(rows)
            tally.cut += sum(cut[k] > 0 for k in places)
            tally.tokens += int(lengths.sum())
            tally.supervised_tokens += sum(row.supervised for row in rows)
            tally.tokens_cut += sum(cut[k] for k in places)
            tally.ends_with_stop += sum(row.ends_with_stop for row in rows)
            tally.appended_eos += sum(row.appended_eos for row in rows)
            tally.trimmed_turns += sum(records[k].meta.get("trimmed_turns", 0) for k in places)
            tally.lengths = _added(tally.lengths, np.bincount(lengths))

    def _example(self, reason: str, id: str, source: str, line: int, why: str) -> None:
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append({"id": id, "source": source, "line": line, "why": why})

    def totals(self) -> dict[str, Any]:
        whole = _Tally()
        for tally in self._sources.values():
            for name in _COUNTS:
                setattr(whole, name, getattr(whole, name) + getattr(tally, name))
            whole.dropped.update(tally.dropped)
            whole.lengths = _added(whole.lengths, tally.lengths)
        return whole.as_dict() | {
            "sources": {name: tally.as_dict() for name, tally in self._sources.items()},
            "examples": self._examples,
        }

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the files and return the totals, with `facts` beside them."""
        self.close()
        totals = self.totals() | facts
        text = json.loads(json.dumps(totals).encode("utf-8", "backslashreplace"))
        write_json(self._folder / FILE, text)
        return text

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def together(ledgers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The account of several sets of rows: counts and reasons add up, sources stand beside each other. Lengths are not told."""
    whole: dict[str, Any] = {name: sum(ledger.get(name, 0) for ledger in ledgers) for name in (*_COUNTS, "leaks")}
    dropped: Counter[str] = Counter()
    sources: dict[str, Any] = {}
    examples: dict[str, list[Any]] = {}
    for ledger in ledgers:
        dropped.update(ledger["dropped"])
        for name, tally in ledger["sources"].items():
            count = sum(name == known.partition(" (")[0] for known in sources)
            sources[f"{name} ({count + 1})" if count else name] = tally
        for reason, some in ledger["examples"].items():
            examples[reason] = [*examples.get(reason, []), *some][:_EXAMPLES]
    return whole | {"dropped": dict(dropped.most_common()), "sources": sources, "examples": examples}


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two histograms, of which one may be longer."""
    out = np.zeros(max(len(a), len(b)), dtype=np.int64)
    out[: len(a)] += a
    out[: len(b)] += b
    return out


def _quantiles(counts: np.ndarray) -> dict[str, int]:
    """Median, 95th percentile and maximum (each the length of some row) from the number of rows of each length."""
    total = int(counts.sum())
    if not total:
        return {"p50": 0, "p95": 0, "max": 0}
    upto = np.cumsum(counts)

    def at(hundredths: int) -> int:
        return int(np.searchsorted(upto, -(-hundredths * total // 100)))

    return {"p50": at(50), "p95": at(95), "max": int(np.flatnonzero(counts)[-1])}
