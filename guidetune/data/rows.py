"""Encoded rows on disk: memory-mapped Arrow, one record per row.

`loss_weight` is aligned with `input_ids` (label position): a value above 0 at t means that token t is a target, predicted
from the tokens before it. Position 0 is never a target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guidetune.errors import BadInput

FILE = "rows.arrow"
SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("input_ids", pa.list_(pa.int32())), ("loss_weight", pa.list_(pa.float32()))]
)
BATCH_ROWS = 4096


@dataclass(frozen=True)
class EncodedRow:
    """One document: input_ids int32 [L], loss_weight float32 [L] (0 = not supervised)."""

    id: str
    source: str
    input_ids: np.ndarray
    loss_weight: np.ndarray


class RowWriter:
    """Streams rows into `rows.arrow`; memory does not grow with the number of rows."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._buffer: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def write(self, id: str, source: str, input_ids: Sequence[int], loss_weight: Sequence[float]) -> None:
        if len(input_ids) != len(loss_weight):
            raise ValueError(f"row {id}: {len(input_ids)} ids but {len(loss_weight)} loss weights")
        for name, value in zip(SCHEMA.names, (id, source, input_ids, loss_weight), strict=True):
            self._buffer[name].append(value)
        if len(self._buffer["id"]) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._buffer["id"]:
            self._writer.write_batch(pa.record_batch(self._buffer, schema=SCHEMA))
            self._buffer = {name: [] for name in SCHEMA.names}

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class EncodedRows:
    """Random access to encoded rows without loading them."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        # Per record batch: (first row, offsets, ids, weights); flat views of the memory map, no copies.
        self._chunks: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        first = 0
        for batch in table.to_batches():
            ids, weights = batch.column("input_ids"), batch.column("loss_weight")
            offsets = ids.offsets.to_numpy()
            if not np.array_equal(np.diff(offsets), np.diff(weights.offsets.to_numpy())):
                raise BadInput("rows.arrow is damaged: input_ids and loss_weight differ in length; delete the folder and run again")
            shift = int(weights.offsets[0].as_py()) - int(offsets[0]) if len(batch) else 0
            if shift:
                raise BadInput("rows.arrow is damaged: columns are not aligned; delete the folder and run again")
            self._chunks.append((first, offsets, ids.values.to_numpy(), weights.values.to_numpy()))
            first += len(batch)
        self._starts = np.array([c[0] for c in self._chunks], dtype=np.int64)

    @classmethod
    def open(cls, folder: Path) -> EncodedRows:
        """Map the rows of a prepare folder.

        Raises:
            BadInput: there is no `rows.arrow`, or it is not a complete Arrow file.
        """
        path = Path(folder) / FILE
        try:
            return cls(pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all())
        except FileNotFoundError:
            raise BadInput(f"no encoded rows at {path}; run `guidetune data` on the recipe first") from None
        except pa.ArrowInvalid as error:
            raise BadInput(f"{path} is not a complete Arrow file ({error}); delete the folder and run again") from None

    @classmethod
    def from_rows(cls, rows: Sequence[EncodedRow]) -> EncodedRows:
        columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
        return cls(pa.Table.from_batches([pa.record_batch(columns, schema=SCHEMA)]))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> EncodedRow:
        if not 0 <= i < len(self):
            raise IndexError(i)
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        first, offsets, ids, weights = self._chunks[chunk]
        a, b = offsets[i - first], offsets[i - first + 1]
        return EncodedRow(self.ids[i], self.sources[i], ids[a:b], weights[a:b])

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def ids(self) -> list[str]:
        return self._table.column("id").to_pylist()

    @cached_property
    def sources(self) -> list[str]:
        return self._table.column("source").to_pylist()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64 [rows]."""
        return np.concatenate([np.diff(c[1]) for c in self._chunks] or [np.zeros(0)]).astype(np.int64)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Supervised tokens per row, int64 [rows]."""
        counts = []
        for _, offsets, _, weights in self._chunks:
            total = np.concatenate([[0], np.cumsum(weights > 0)])
            counts.append(total[offsets[1:]] - total[offsets[:-1]])
        return np.concatenate(counts or [np.zeros(0)]).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Content hash of ids, tokens and weights: 32 hex digits."""
        sha = hashlib.sha256()
        for i, row in enumerate(self):
            sha.update(f"{i}\0{row.id}\0{len(row.input_ids)}\0".encode("utf-8", "backslashreplace"))
            sha.update(np.ascontiguousarray(row.input_ids).tobytes())
            sha.update(np.ascontiguousarray(row.loss_weight).tobytes())
        return sha.hexdigest()[:32]
