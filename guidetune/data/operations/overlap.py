"""Rows that share a run of words with a test set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from guidetune.data.ngrams import ngrams, words
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Dropped, Record, column_of, load
from guidetune.data.sources import SourceSpec
from guidetune.errors import BadInput
from guidetune.registry import method

_SHOWN = 5


@method(kind="operation", name="overlap", paper="2212.12017", summary="Find rows that share a run of words with test rows.")
class Overlap(Operation):
    """A row leaks when a run of `n` words of its text is also in a test row's (words: letters and digits, case folded).

    A test text of fewer than `n` words leaks only as a whole: when it is all of a text of the row. The ledger has, for every source
    and test set, how many test rows are met and their share. Leaks are an error unless `on_hit` says otherwise: take the rows out
    with `drop`, or go on with `report`.
    """

    against: list[SourceSpec] = Field(min_length=1, description="Test sets: [{path, map, …}], as sources are written.")
    n: int = Field(13, gt=0, description="Words in a run.")
    on_hit: Literal["refuse", "drop", "report"] = Field("refuse", description="What to do with rows that leak.")
    texts: list[str] = Field(["user", "assistant"], min_length=1, description="What is compared: user, assistant (all turns), or columns.")

    chooses = True

    def columns(self) -> set[str]:
        return {column_of(name) for name in self.texts}

    def sources(self) -> list[SourceSpec]:
        return self.against

    @property
    def streams(self) -> bool:  # type: ignore[override]
        return self.on_hit != "refuse"

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Memory: 12 bytes per n-gram of the test sets. An error comes before any row goes on.

        Raises:
            BadInput: rows leak and `on_hit` is refuse, or a test set has no text to compare.
        """
        index = _Index(self, context.root)
        hits: Counter[str] = Counter()
        shown: list[str] = []
        met: dict[tuple[str, str], set[int]] = {}
        for record in rows:
            test = index.first(self._texts(record))
            if test is None:
                if self.on_hit != "refuse":
                    yield record
                continue
            name, line = index.name(test)
            hits[record.source] += 1
            met.setdefault((record.source, name), set()).update(index.all(self._texts(record), name))
            if len(shown) < _SHOWN:
                shown.append(f"{record.source} line {record.line} (id {record.id}) and {name} line {line}")
            if self.on_hit == "drop":
                context.drop(record, "leaks test text", f"{self.n} words of {name} line {line}")
            elif self.on_hit == "report":
                yield record
        shares = {f"{source} / {name}": _share(len(tests), index.rows[name]) for (source, name), tests in met.items()}
        context.note(leaking_rows=dict(hits), test_rows_met=shares, test_rows=dict(index.rows), too_short=dict(index.short))
        if self.on_hit == "refuse":
            if hits:
                raise BadInput(
                    [f"{sum(hits.values())} rows share {self.n} words in a row with a test set:", *shown]
                    + ["take them out with overlap's on_hit: drop, or go on with on_hit: report"]
                )
            yield from rows

    def _texts(self, record: Record) -> list[str]:
        out = []
        for name in self.texts:
            if name in ("user", "assistant"):
                out += [m["content"] for m in record.messages if m["role"] == name]
            elif isinstance(value := record.value(name), str):
                out.append(value)
        return out


class _Index:
    """The n-grams of the test sets: hashes, sorted, and the test row that each is first in."""

    def __init__(self, step: Overlap, root: Path) -> None:
        self.n = step.n
        self.rows: Counter[str] = Counter()
        self.short: Counter[str] = Counter()
        grams: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        self._names: list[str] = []
        self._lines: list[int] = []
        for spec in step.against:
            for line, found in load(spec, root, sorted(step.columns()), rendered=bool(set(step.texts) - {"user", "assistant"})):
                if isinstance(found, Dropped):
                    continue
                texts = step._texts(found)
                parts = [ngrams(text, self.n) for text in texts]
                self.short[spec.label] += all(len(words(text)) < self.n for text in texts)
                self.rows[spec.label] += 1
                grams += parts
                owners.append(np.full(sum(map(len, parts)), len(self._lines), dtype=np.int32))
                self._names.append(spec.label)
                self._lines.append(line)
        if not grams or not sum(map(len, grams)):
            raise BadInput(f"overlap: no text to compare with in {', '.join(spec.path for spec in step.against)}")
        every, owner = np.concatenate(grams), np.concatenate(owners)
        order = np.argsort(every, kind="stable")
        self._grams, self._owner = every[order], owner[order]

    def _found(self, texts: Sequence[str]) -> Iterator[int]:
        """Places in the index of the n-grams of texts."""
        for text in texts:
            wanted = ngrams(text, self.n)
            at = np.minimum(np.searchsorted(self._grams, wanted), len(self._grams) - 1)
            yield from np.unique(at[self._grams[at] == wanted]).tolist()

    def first(self, texts: Sequence[str]) -> int | None:
        """A test row that shares an n-gram, or None."""
        place = next(self._found(texts), None)
        return None if place is None else int(self._owner[place])

    def all(self, texts: Sequence[str], name: str) -> set[int]:
        """The rows of a test set that share an n-gram."""
        out: set[int] = set()
        for place in self._found(texts):
            end = int(np.searchsorted(self._grams, self._grams[place], side="right"))
            out.update(k for k in self._owner[place:end].tolist() if self._names[k] == name)
        return out

    def name(self, row: int) -> tuple[str, int]:
        return self._names[row], self._lines[row]


def _share(met: int, rows: int) -> dict[str, Any]:
    return {"met": met, "share": round(met / rows, 6) if rows else 0.0}
