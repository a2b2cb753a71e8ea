"""Scores, generations and other columns of a side table, joined to the rows by id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from guidetune.artefacts import digest_file
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record
from guidetune.data.side import SideTable
from guidetune.errors import BadInput
from guidetune.registry import method

_CHUNK = 1024  # records looked up at a time


@method(kind="operation", name="join", summary="Give rows the columns of a side table (scores, generations), by row id.")
class Join(Operation):
    """Numbers become scores, text becomes columns. An id that the table does not have, or a null in it, stays missing; NaN stays NaN.

    A row that was made of another (`<id>~…`) gets the values of its own id, else those of the row that was read.
    """

    path: str = Field(description="The Parquet file: `id` and further columns.")
    columns_as: dict[str, str] = Field(default_factory=dict, description="Column of the table: its name in the rows (default: all).")
    missing: Literal["keep", "drop", "refuse"] = Field("keep", description="What to do with rows that the table does not have.")

    streams = True

    def _table(self, root: Path) -> SideTable:
        return SideTable.open(self._place(root))

    def _place(self, root: Path) -> Path:
        place = Path(self.path).expanduser()
        return next((p for p in (Path(root) / place, place) if p.exists()), Path(root) / place)

    def _names(self, table: SideTable) -> dict[str, str]:
        return self.columns_as or {name: name for name in table.columns}

    def adds(self, root: Path) -> dict[str, type]:
        table = self._table(root)
        return {name: str if table._type(column) is str else float for column, name in self._names(table).items()}

    def digests(self, root: Path) -> list[str]:
        return [digest_file(self._place(root)) if self._place(root).is_file() else "none"]

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Joins by id. Memory: 12 bytes per row of the table, and 9 for each of its columns of numbers."""
        table = self._table(context.root)
        names = self._names(table)
        found: Counter[str] = Counter()
        rows = iter(rows)
        while chunk := list(islice(rows, _CHUNK)):
            own = table.places([record.id for record in chunk])
            ids = [record.id if place >= 0 else record.origin for record, place in zip(chunk, own.tolist(), strict=True)]
            known = table.places(ids)
            columns = {column: table.values(column, ids) for column in names}
            for k, record in enumerate(chunk):
                if known[k] < 0 and self.missing != "keep":
                    if self.missing == "refuse":
                        raise BadInput(f"join: {self.path} has no row {record.id!r} ({record.source} line {record.line})")
                    context.drop(record, "not in the side table", Path(self.path).name)
                    continue
                scores, fields = dict(record.scores), dict(record.fields)
                for column, name in names.items():
                    value: Any = columns[column][k]
                    if value is None:
                        continue
                    found[name] += 1
                    if isinstance(value, str):
                        fields[name] = value
                    else:
                        scores[name] = float(value)
                yield replace(record, scores=scores, fields=fields)
        context.note(joined=dict(found), table=table.facts)
