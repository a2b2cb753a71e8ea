"""Held-out rows: by shares, by the first rows of each group, by whole groups, and with the level of generalisation they test."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from guidetune.artefacts import atomic_lines
from guidetune.data.draws import Numbers
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, column_of
from guidetune.registry import method

FILE = "held_out.jsonl"
LEVELS = ("train", "fully_supervised", "partially_supervised", "fully_held_out")


@method(kind="operation", name="split", paper="2212.12017", summary="Hold rows out: by share, group, task or category.")
class Split(Operation):
    """Rows of the parts `keep` go on; the others are dropped here and written to `held_out.jsonl` beside the rows.

    `sizes` are shares, each row (or each value of `group`, whole) drawn from (seed, its name): rows that come or go move no others.
    Or they are numbers of rows with one `rest`: of each value of `per` the first rows in the order of the parts, as they stand or
    `shuffled`; a group that is too small has none for the later parts, and no row is in two.

    Rows of a held-out category or task are in the part `test`. The column `level` says what a row of another part tests: its
    category occurs in no kept row (fully_held_out), its category does but its task does not (partially_supervised), its task does
    (fully_supervised); kept rows have `train`.
    """

    sizes: dict[str, float | int | Literal["rest"]] = Field(
        {"train": "rest"}, min_length=1, description="{test: 0.1, train: rest} or {test: 100, validation: 10, train: rest}."
    )
    keep: list[str] = Field(["train"], min_length=1, description="Parts that go on.")
    group: str | None = Field(None, description="With shares: rows that are equal in this column stay together.")
    per: str | None = Field(None, description="With numbers of rows: in each group of rows that are equal in this column.")
    shuffled: bool = Field(False, description="With numbers of rows: an order drawn from (seed, row id) in place of the rows' own.")
    held_out_categories: list[str] = Field([], description="Categories of which no row is kept.")
    held_out_tasks: list[str] = Field([], description="Tasks of which no row is kept.")
    category: str = Field("category", description="Column of the category.")
    task: str = Field("task", description="Column of the task.")

    chooses = True

    @model_validator(mode="after")
    def _makes_sense(self) -> Split:
        rest = [name for name, size in self.sizes.items() if size == "rest"]
        numbers = [size for size in self.sizes.values() if not isinstance(size, str)]
        shares = [size for size in numbers if isinstance(size, float)]
        if len(rest) > 1:
            raise ValueError(f"only one part can be the rest, not {' and '.join(rest)}")
        if shares and len(shares) < len(numbers):
            raise ValueError("sizes are all shares (0.1) or all numbers of rows (100)")
        if any(size < 0 for size in numbers):
            raise ValueError("sizes are at least 0")
        if shares and (sum(shares) > 1 + 1e-9 or (not rest and sum(shares) < 1 - 1e-9)):
            raise ValueError(f"shares add up to {sum(shares):g}; they must make 1, or leave a part as rest")
        if numbers and not shares and not rest:
            raise ValueError("of numbers of rows one part must be the rest")
        if unknown := set(self.keep) - set(self.sizes):
            raise ValueError(f"keep names {', '.join(sorted(unknown))}, which is no part of sizes ({', '.join(self.sizes)})")
        return self

    def columns(self) -> set[str]:
        used = [self.group, self.per]
        if self._levels:
            used += [self.category, self.task]
        return {column_of(name) for name in used if name is not None}

    @property
    def _levels(self) -> bool:
        return bool(self.held_out_categories or self.held_out_tasks)

    def adds(self, root: Path) -> dict[str, type]:
        return {"split": str} | ({"level": str} if self._levels else {})

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Two passes: which part each row is in, and what tasks and categories are kept; then the rows. Memory: 1 byte per row, a
        count per group; with `shuffled`, 24 bytes per row."""
        names = [*dict.fromkeys([*self.sizes, "test"])]
        parts = bytearray()
        kept: Counter[tuple[str, str]] = Counter()
        for record, part in self._parted(rows, context.seed):
            if str(record.value(self.category)) in self.held_out_categories or str(record.value(self.task)) in self.held_out_tasks:
                part = "test"
            parts.append(names.index(part))
            if part in self.keep:
                kept["category", str(record.value(self.category))] += 1
                kept["task", str(record.value(self.task))] += 1
        counts: Counter[str] = Counter()
        levels: Counter[str] = Counter()
        place = (context.outputs or context.scratch or Path()) / FILE
        with atomic_lines(place) as write:
            for k, record in enumerate(rows):
                part = names[parts[k]]
                counts[part] += 1
                fields = {**record.fields, "split": part}
                if self._levels:
                    fields["level"] = self._level(record, part, kept)
                    levels[fields["level"]] += 1
                if part in self.keep:
                    yield replace(record, fields=fields)
                    continue
                values = {"id": record.id, "source": record.source, **fields, "messages": record.messages}
                write(json.dumps(values, ensure_ascii=False))
                context.drop(record, "held out", part)
        context.note(parts=dict(counts), **({"levels": dict(levels)} if self._levels else {}), file=FILE)

    def _level(self, record: Record, part: str, kept: Counter[tuple[str, str]]) -> str:
        if part in self.keep:
            return "train"
        if kept["task", str(record.value(self.task))]:
            return "fully_supervised"
        return "partially_supervised" if kept["category", str(record.value(self.category))] else "fully_held_out"

    def _parted(self, rows: Rows, seed: int) -> Iterator[tuple[Record, str]]:
        """(record, part)."""
        if any(isinstance(size, int) for size in self.sizes.values()):
            yield from self._by_number(rows, seed)
            return
        numbers = Numbers(seed, "split")
        left = 1.0 - sum(size for size in self.sizes.values() if isinstance(size, float))
        shares = {name: left if isinstance(size, str) else float(size) for name, size in self.sizes.items()}
        last = [name for name, share in shares.items() if share > 0][-1]
        for record in rows:
            at = numbers.share(record.origin if self.group is None else str(record.value(self.group)))
            yield record, next((name for name, edge in _edges(shares) if at < edge), last)

    def _by_number(self, rows: Rows, seed: int) -> Iterator[tuple[Record, str]]:
        seen: Counter[str] = Counter()
        rank: dict[str, dict[int, int]] = {}
        numbers = Numbers(seed, "split order")
        if self.shuffled:
            drawn: dict[str, list[int]] = {}
            for record in rows:
                drawn.setdefault(str(record.value(self.per)) if self.per else "", []).append(numbers.of(record.id))
            rank = {name: {k: r for r, k in enumerate(sorted(range(len(of)), key=of.__getitem__))} for name, of in drawn.items()}
        rest = next(name for name, size in self.sizes.items() if size == "rest")
        for record in rows:
            name = str(record.value(self.per)) if self.per else ""
            at = rank[name][seen[name]] if self.shuffled else seen[name]
            seen[name] += 1
            part = rest
            for candidate, size in self.sizes.items():
                if isinstance(size, str):
                    continue
                if at < size:
                    part = candidate
                    break
                at -= int(size)
            yield record, part


def _edges(shares: dict[str, float]) -> Iterator[tuple[str, float]]:
    edge = 0.0
    for name, share in shares.items():
        edge += share
        yield name, edge
