"""Encoded rows on disk, memory-mapped: any number of rows, several readers at once, nothing held but what is looked at.

`rows.arrow` holds id, source, input_ids and loss_weight of each row; its last, empty batch carries the digest of the content.
`rows.index` holds 16 bytes per row (`INDEX`): what is needed of all rows at once, such as lengths, without touching their tokens.

`loss_weight` is aligned with `input_ids` (label position): a value above 0 at t means that token t is a target, predicted
from the tokens before it. Position 0 is never a target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from guidetune.errors import BadInput

FILE, INDEX_FILE = "rows.arrow", "rows.index"
SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("input_ids", pa.list_(pa.int32())), ("loss_weight", pa.list_(pa.float32()))]
)
INDEX = np.dtype([("length", "<i4"), ("supervised", "<i4"), ("content", "<u8")])
"""Tokens, supervised tokens, and a 64-bit hash of the row's tokens."""
BATCH_ROWS = 4096
BATCH_TOKENS = 1 << 22  # long rows make shorter batches: a batch is what the writer holds in memory
_DIGEST = b"digest"


@dataclass(frozen=True)
class EncodedRow:
    """One document: input_ids int32 [L], loss_weight float32 [L] (0 = not supervised)."""

    id: str
    source: str
    input_ids: np.ndarray
    loss_weight: np.ndarray


class _Digest:
    """Content hash of ids, lengths, tokens and weights, whatever batches they come in."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(4)]

    def update(self, ids: Sequence[str], lengths: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> None:
        text = "".join(f"{len(id)}\0{id}" for id in ids).encode("utf-8", "backslashreplace")
        for sha, data in zip(self._parts, (text, lengths.astype("<i8"), tokens.astype("<i4", copy=False), weights), strict=True):
            sha.update(data if isinstance(data, bytes) else np.ascontiguousarray(data).data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(sha.digest() for sha in self._parts)).hexdigest()[:32]


def _index(lengths: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The `INDEX` records of rows whose tokens lie one after the other."""
    ends = np.cumsum(lengths)
    counts = np.concatenate([[0], np.cumsum(weights > 0)])
    out = np.empty(len(lengths), dtype=INDEX)
    out["length"] = lengths
    out["supervised"] = counts[ends] - counts[ends - lengths]
    data, places = memoryview(np.ascontiguousarray(tokens)).cast("B"), [0, *(4 * ends).tolist()]
    blake = hashlib.blake2b
    hashes = b"".join([blake(data[a:b], digest_size=8).digest() for a, b in zip(places, places[1:], strict=False)])
    out["content"] = np.frombuffer(hashes, dtype="<u8")
    return out


class RowWriter:
    """Streams rows into `rows.arrow` and its index; memory does not grow with the number of rows."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._index = open(Path(path).with_name(INDEX_FILE), "wb")  # noqa: SIM115 (closed with the writer)
        self._digest = _Digest()
        self._clear()

    def _clear(self) -> None:
        self._ids: list[str] = []
        self._sources: list[str] = []
        self._lengths: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._held = 0

    def write(self, id: str, source: str, input_ids: Sequence[int], loss_weight: Sequence[float]) -> None:
        """One row."""
        if len(input_ids) != len(loss_weight):
            raise ValueError(f"row {id}: {len(input_ids)} ids but {len(loss_weight)} loss weights")
        self.write_many([id], [source], np.array([len(input_ids)]), np.asarray(input_ids, np.int32), np.asarray(loss_weight, np.float32))

    def write_many(
        self, ids: Sequence[str], sources: Sequence[str], lengths: np.ndarray, input_ids: np.ndarray, loss_weight: np.ndarray
    ) -> None:
        """Rows whose tokens (int32) and weights (float32) lie one after the other; lengths: int [rows]."""
        total = int(lengths.sum())
        if not (len(ids) == len(sources) == len(lengths) and total == len(input_ids) == len(loss_weight)):
            raise ValueError(f"{len(ids)} rows of {total} tokens: {len(input_ids)} ids and {len(loss_weight)} loss weights do not fit")
        self._ids += ids
        self._sources += sources
        self._lengths.append(lengths)
        self._tokens.append(input_ids)
        self._weights.append(loss_weight)
        self._held += total
        if len(self._ids) >= BATCH_ROWS or self._held >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._ids:
            return
        lengths = np.concatenate(self._lengths).astype(np.int64)
        tokens = np.concatenate(self._tokens).astype(np.int32, copy=False)
        weights = np.concatenate(self._weights).astype(np.float32, copy=False)
        self._writer.write_batch(_batch(self._ids, self._sources, lengths, tokens, weights))
        self._index.write(_index(lengths, tokens, weights).tobytes())
        self._digest.update(self._ids, lengths, tokens, weights)
        self._clear()

    def close(self) -> None:
        try:
            self._flush()
            empty = pa.RecordBatch.from_arrays([pa.array([], type=field.type) for field in SCHEMA], schema=SCHEMA)
            self._writer.write_batch(empty, custom_metadata={_DIGEST: self._digest.hexdigest().encode()})
            self._writer.close()
        finally:
            self._index.close()
            self._sink.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _batch(ids: Sequence[str], sources: Sequence[str], lengths: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = [
        pa.array(ids, pa.string()),
        pa.array(sources, pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(tokens)),
        pa.ListArray.from_arrays(offsets, pa.array(weights)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


class Texts(Sequence[str]):
    """A text column of the rows: read where it is asked for, compared and gone through like a list."""

    def __init__(self, batches: list[pa.RecordBatch], starts: np.ndarray, rows: int, column: str) -> None:
        self._columns = [batch.column(column) for batch in batches]
        self._starts, self._rows = starts, rows

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(self._rows))]
        k = int(i)
        k += self._rows if k < 0 else 0
        if not 0 <= k < self._rows:
            raise IndexError(i)
        chunk = int(np.searchsorted(self._starts, k, side="right")) - 1
        return self._columns[chunk][k - int(self._starts[chunk])].as_py()

    def __iter__(self) -> Iterator[str]:
        for column in self._columns:
            yield from column.to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._rows} texts>" if self._rows > 20 else repr(list(self))


class EncodedRows:
    """Random access to encoded rows without loading them. Several processes may have the same folder open."""

    def __init__(self, batches: list[pa.RecordBatch], index: np.ndarray, digest: str) -> None:
        self._batches = [batch for batch in batches if batch.num_rows]
        counts = [batch.num_rows for batch in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(counts)])[: len(counts)].astype(np.int64)
        self._rows = sum(counts)
        self._views: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None] = [None] * len(counts)
        self.index = index
        """`INDEX` records [rows]."""
        self.digest = digest
        """Content hash of ids, tokens and weights: 32 hex digits."""

    @classmethod
    def open(cls, folder: Path) -> EncodedRows:
        """Map the rows of a prepare folder.

        Raises:
            BadInput: there is no `rows.arrow`, or it is not a complete Arrow file, or its index does not belong to it.
        """
        path = Path(folder) / FILE
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
            batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
            last = reader.get_batch_with_custom_metadata(len(batches) - 1) if batches else None
        except FileNotFoundError:
            raise BadInput(f"no encoded rows at {path}; run `guidetune data` on the recipe first") from None
        except pa.ArrowInvalid as error:
            raise BadInput(f"{path} is not a complete Arrow file ({error}); delete the folder and run again") from None
        digest = (last.custom_metadata or {}).get(_DIGEST) if last is not None else None
        rows = sum(batch.num_rows for batch in batches)
        beside = path.with_name(INDEX_FILE)
        size = beside.stat().st_size if beside.is_file() else -1
        if digest is None or size != rows * INDEX.itemsize:
            raise BadInput(f"{path} and {INDEX_FILE} are damaged or do not belong together; delete the folder and run again")
        index = np.memmap(beside, dtype=INDEX, mode="r").view(np.ndarray) if rows else np.zeros(0, INDEX)
        return cls(batches, index, digest.decode())

    @classmethod
    def from_rows(cls, rows: Sequence[EncodedRow]) -> EncodedRows:
        """Rows in memory, as few as a test needs."""
        ids, sources = [row.id for row in rows], [row.source for row in rows]
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        tokens = np.concatenate([np.asarray(row.input_ids, np.int32) for row in rows] or [np.zeros(0, np.int32)])
        weights = np.concatenate([np.asarray(row.loss_weight, np.float32) for row in rows] or [np.zeros(0, np.float32)])
        digest = _Digest()
        digest.update(ids, lengths, tokens, weights)
        return cls([_batch(ids, sources, lengths, tokens, weights)], _index(lengths, tokens, weights), digest.hexdigest())

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, i: int) -> EncodedRow:
        if not 0 <= i < self._rows:
            raise IndexError(i)
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        offsets, ids, weights = self._views[chunk] or self._view(chunk)
        k = int(i) - int(self._starts[chunk])
        a, b = offsets[k], offsets[k + 1]
        batch = self._batches[chunk]
        return EncodedRow(batch.column(0)[k].as_py(), batch.column(1)[k].as_py(), ids[a:b], weights[a:b])

    def _view(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offsets, tokens and weights of a batch: views of the map, no copies."""
        batch = self._batches[chunk]
        ids, weights = batch.column("input_ids"), batch.column("loss_weight")
        offsets = ids.offsets.to_numpy()
        first = int(self._starts[chunk])
        lengths = np.diff(offsets)
        if not np.array_equal(offsets, weights.offsets.to_numpy()) or not np.array_equal(
            lengths, self.index["length"][first : first + len(lengths)]
        ):
            raise BadInput("rows.arrow is damaged: columns and index differ in length; delete the folder and run again")
        self._views[chunk] = view = (offsets, ids.values.to_numpy(), weights.values.to_numpy())
        return view

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[i] for i in range(self._rows))

    @cached_property
    def ids(self) -> Texts:
        return Texts(self._batches, self._starts, self._rows, "id")

    @cached_property
    def sources(self) -> Texts:
        return Texts(self._batches, self._starts, self._rows, "source")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int32 [rows], mapped."""
        return self.index["length"]

    @property
    def supervised(self) -> np.ndarray:
        """Supervised tokens per row, int32 [rows], mapped."""
        return self.index["supervised"]

    @property
    def duplicates(self) -> int:
        """How many rows have the tokens of an earlier row (by a 64-bit hash of them; 8 bytes per row while it counts)."""
        return self._rows - len(np.unique(self.index["content"]))

    def take(self, places: np.ndarray) -> EncodedRows:
        """Some of the rows, in the order of `places` (int [n]): a view that copies 24 bytes per row and no tokens."""
        return _Taken(self, np.asarray(places, dtype=np.int64))


class _TakenTexts(Sequence[str]):
    """A text column of some of the rows."""

    def __init__(self, texts: Texts, places: np.ndarray) -> None:
        self._texts, self._places = texts, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: Any) -> Any:
        return [self._texts[k] for k in self._places[i]] if isinstance(i, slice) else self._texts[int(self._places[i])]


class _Taken(EncodedRows):
    """`EncodedRows.take`."""

    def __init__(self, rows: EncodedRows, places: np.ndarray) -> None:
        digest = hashlib.sha256(f"{rows.digest}|{len(places)}|".encode() + places.astype("<i8").tobytes()).hexdigest()[:32]
        super().__init__([], rows.index[places], digest)
        self._of, self._places, self._rows = rows, places, len(places)

    def __getitem__(self, i: int) -> EncodedRow:
        if not 0 <= i < self._rows:
            raise IndexError(i)
        return self._of[int(self._places[i])]

    @cached_property
    def ids(self) -> Any:
        return _TakenTexts(self._of.ids, self._places)

    @cached_property
    def sources(self) -> Any:
        return _TakenTexts(self._of.sources, self._places)
