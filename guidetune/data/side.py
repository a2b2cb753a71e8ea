"""Side tables: what is known of rows beside their text, in files of their own, joined to the rows by id and never by position.

| what | file |
|---|---|
| scores, generations | one Parquet file: `id` and named columns of numbers or text |
| embeddings | `vectors.npy` (fp16 [rows, dimension], mapped) and `vectors.parquet` (their ids in the same order) |

A value that was never computed is missing (null, `None`); NaN is what a scorer answered. The two are never mixed up, and nothing is
filled in. `facts` (which scorer, which model, which prompt) are written into the file, so scoring again never touches the rows.

    with SideWriter(folder / "scores.parquet", {"ifd": float}, facts={"scorer": "ifd", "model": fingerprint}) as table:
        table.write(ids, ifd=values)
    SideTable.open(folder / "scores.parquet").values("ifd", ids)     # [0.41, None, nan, …]
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guidetune.data.keys import KeyTable, key_array
from guidetune.errors import BadInput

GROUP_ROWS = 4096  # rows that are written, and read, at a time
VECTORS, VECTOR_IDS = "vectors.npy", "vectors.parquet"
_FACTS = b"guidetune"
_TYPES: dict[type, pa.DataType] = {float: pa.float64(), int: pa.int64(), str: pa.string()}
_HELD_GROUPS = 4  # row groups of text that stay decoded


class SideWriter:
    """Streams a side table; the file has its name only when the block ends without an error.

    Args:
        path: the Parquet file.
        columns: name → `float`, `int` or `str`.
        facts: what the values were made from, as JSON values.

    Raises:
        BadInput: an id is given twice.
        ValueError: columns are missing, unknown or of another length than the ids.
    """

    def __init__(self, path: Path, columns: Mapping[str, type], facts: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        fields = [pa.field("id", pa.string(), nullable=False), *(pa.field(name, _TYPES[kind]) for name, kind in columns.items())]
        if "id" in columns:
            raise ValueError("a side table's own column cannot be called id")
        self._schema = pa.schema(fields, metadata={_FACTS: json.dumps(dict(facts or {}), sort_keys=True).encode()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._writer = pq.ParquetWriter(self._part, self._schema, compression="zstd")
        self._taken = KeyTable(self.path.with_name(f".{self.path.name}.ids"))
        self._held: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._count = 0

    def write(self, ids: Sequence[str], **columns: Sequence[Any] | np.ndarray) -> None:
        """Add rows: one value (or None: missing) per id and column."""
        if set(columns) != set(self._schema.names[1:]):
            raise ValueError(f"the table has the columns {self._schema.names[1:]}, not {sorted(columns)}")
        ids = list(ids)
        for name, values in columns.items():
            if len(values) != len(ids):
                raise ValueError(f"{len(values)} values of {name!r} for {len(ids)} ids")
        if not ids:
            return
        _, new = self._taken.insert(_keys(ids))
        if not new.all():
            raise BadInput(f"{self.path.name}: the id {ids[int(np.flatnonzero(~new)[0])]!r} is given twice")
        self._held["id"] += ids
        for name, values in columns.items():
            self._held[name] += values.tolist() if isinstance(values, np.ndarray) else list(values)
        if len(self._held["id"]) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held["id"]:
            arrays = [pa.array(self._held[field.name], field.type) for field in self._schema]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._count += len(self._held["id"])
            self._held = {name: [] for name in self._schema.names}

    def __enter__(self) -> SideWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                with open(self._part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(self._part, self.path)
        finally:
            self._taken.close()
            self._part.unlink(missing_ok=True)


class SideTable:
    """Read access to a side table by row id. Memory: 12 bytes per row, 9 more for each column of numbers that is asked for."""

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self.path, self._file = path, file
        schema = file.schema_arrow
        self.columns: dict[str, type] = {field.name: _python_type(field.type) for field in schema if field.name != "id"}
        """Name → `float`, `int` or `str`."""
        raw = (schema.metadata or {}).get(_FACTS)
        self.facts: dict[str, Any] = json.loads(raw) if raw else {}
        self._numbers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._groups: dict[tuple[str, int], list[Any]] = {}

    @classmethod
    def open(cls, path: Path) -> SideTable:
        """Open a table, ours or any Parquet file with an `id` column of text.

        Raises:
            BadInput: no such file, not Parquet, no `id` column of text, or an id that is there twice or missing.
        """
        path = Path(path)
        try:
            file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise BadInput(f"no side table at {path}") from None
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"{path} is not a Parquet file: {error}") from None
        kind = file.schema_arrow.field("id").type if "id" in file.schema_arrow.names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise BadInput(f"{path}: a side table needs a column `id` of text; it has {', '.join(file.schema_arrow.names) or 'no column'}")
        table = cls(path, file)
        hashes, _ = table._index
        twice = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(twice):
            place = int(table._index[1][twice[0]])
            raise BadInput(f"{path}: the id {next(id for k, id in enumerate(table.ids()) if k == place)!r} is there twice")
        return table

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def ids(self) -> Iterator[str]:
        """The ids in the table's order."""
        for batch in self._file.iter_batches(GROUP_ROWS, columns=["id"]):
            if batch.column(0).null_count:
                raise BadInput(f"{self.path}: a row has no id")
            yield from batch.column(0).to_pylist()

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the ids, sorted (uint64 [n]), and their places (int32 or int64 [n])."""
        parts: list[np.ndarray] = []
        chunk: list[str] = []
        for id in self.ids():
            chunk.append(id)
            if len(chunk) == GROUP_ROWS:
                parts.append(_keys(chunk).reshape(-1))
                chunk = []
        parts.append(_keys(chunk).reshape(-1))
        hashes = np.concatenate(parts)
        order = np.argsort(hashes, kind="stable").astype(np.int32 if len(hashes) < 2**31 else np.int64)
        return hashes[order], order

    def places(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers of ids in the table, int64 [n]; -1 where the table does not have the id."""
        return _find(self._index, ids)

    def numbers(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(values float64 [rows], present bool [rows]) of a column of numbers, in the table's order.

        Raises:
            BadInput: there is no such column, or it holds text.
        """
        if self._type(column) is str:
            raise BadInput(f"{self.path}: the column {column!r} holds text, not numbers")
        if column not in self._numbers:
            data = self._file.read([column]).column(0)
            present = ~data.is_null().to_numpy()
            self._numbers[column] = (data.cast(pa.float64()).fill_null(0.0).to_numpy(), present)
        return self._numbers[column]

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column in the table's order, one row group after another.

        Raises:
            BadInput: there is no such column.
        """
        self._type(name)
        for batch in self._file.iter_batches(GROUP_ROWS, columns=[name]):
            yield from batch.column(0).to_pylist()

    def values(self, column: str, ids: Sequence[str]) -> list[Any]:
        """The values of a column for ids, in their order; None where the id or the value is missing.

        Raises:
            BadInput: there is no such column.
        """
        places, kind = self.places(ids), self._type(column)
        if kind is str:
            return [self._text(column, place) if place >= 0 else None for place in places.tolist()]
        values, present = self.numbers(column)
        if not len(values):
            return [None] * len(ids)
        known = (places >= 0) & present[places]
        return [kind(v) if ok else None for v, ok in zip(values[places].tolist(), known.tolist(), strict=True)]

    def _type(self, column: str) -> type:
        if column not in self.columns:
            from guidetune.registry import nearest

            raise BadInput(f"{self.path} has no column {column!r}{nearest(column, list(self.columns))}")
        return self.columns[column]

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each row group, and the number of rows."""
        meta = self._file.metadata
        return np.cumsum([0, *(meta.row_group(k).num_rows for k in range(meta.num_row_groups))])

    def _text(self, column: str, place: int) -> str | None:
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        if (column, group) not in self._groups:
            while len(self._groups) >= _HELD_GROUPS * max(1, len(self.columns)):
                del self._groups[next(iter(self._groups))]
            self._groups[column, group] = self._file.read_row_group(group, [column]).column(0).to_pylist()
        return self._groups[column, group][place - int(self._starts[group])]


def _python_type(kind: pa.DataType) -> type:
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return int
    return float if pa.types.is_floating(kind) or pa.types.is_decimal(kind) else str


def _keys(ids: Sequence[str]) -> np.ndarray:
    """64-bit hashes of ids, uint64 [n, 1]."""
    return key_array([hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest() for id in ids])


def _find(index: tuple[np.ndarray, np.ndarray], ids: Sequence[str]) -> np.ndarray:
    hashes, order = index
    wanted = _keys(ids).reshape(-1)
    if not len(hashes):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    return np.where(hashes[at] == wanted, order[at], -1).astype(np.int64)


class EmbeddingsWriter:
    """Streams one vector per row into `vectors.npy` and its id into `vectors.parquet` of an existing folder.

    Raises:
        BadInput: an id is given twice.
        ValueError: vectors of another dimension, or with numbers that fp16 cannot hold.
    """

    def __init__(self, folder: Path, dimension: int, facts: Mapping[str, Any] | None = None) -> None:
        self._folder, self.dimension, self._rows = Path(folder), dimension, 0
        self._file: IO[bytes] = open(self._folder / VECTORS, "wb")  # noqa: SIM115 (closed in __exit__)
        self._header()
        self._ids = SideWriter(self._folder / VECTOR_IDS, {}, facts)

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow, so it can be written again with the final number of rows
        header = {"descr": "<f2", "fortran_order": False, "shape": (self._rows, self.dimension)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Add vectors [n, dimension] of n ids."""
        vectors = np.asarray(vectors)
        if vectors.shape != (len(ids), self.dimension):
            raise ValueError(f"vectors of shape {vectors.shape} for {len(ids)} ids of dimension {self.dimension}")
        with np.errstate(over="ignore"):
            half = vectors.astype("<f2")
        if not np.isfinite(half).all():
            raise ValueError(f"row {ids[int(np.flatnonzero(~np.isfinite(half).all(1))[0])]}: an embedding is not finite in fp16")
        self._ids.write(ids)
        self._file.write(half.tobytes())
        self._rows += len(ids)

    def __enter__(self) -> EmbeddingsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()
        self._ids.__exit__(kind, *error)


class Embeddings:
    """Vectors of rows by id: `vectors` is fp16 [rows, dimension], mapped."""

    def __init__(self, vectors: np.ndarray, table: SideTable) -> None:
        self.vectors, self._table = vectors, table
        self.facts = table.facts

    @classmethod
    def open(cls, folder: Path) -> Embeddings:
        """Map the embeddings of a folder.

        Raises:
            BadInput: they are not there, damaged, or of another number of rows than their ids.
        """
        folder = Path(folder)
        table = SideTable.open(folder / VECTOR_IDS)
        try:
            vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder / VECTORS} is not a complete file of vectors: {error}") from None
        if vectors.ndim != 2 or vectors.dtype != np.float16 or len(vectors) != len(table):
            raise BadInput(f"{folder}: {len(table)} ids but vectors {vectors.dtype} {vectors.shape}; they do not belong together")
        return cls(vectors, table)

    def __len__(self) -> int:
        return len(self.vectors)

    def ids(self) -> Iterator[str]:
        """The ids in the order of the vectors."""
        return self._table.ids()

    def places(self, ids: Sequence[str]) -> np.ndarray:
        """Rows of the ids in `vectors`, int64 [n]; -1 where there is none."""
        return self._table.places(ids)

    def take(self, ids: Sequence[str]) -> np.ndarray:
        """The vectors of ids, float32 [n, dimension].

        Raises:
            BadInput: an id has no vector.
        """
        places = self.places(ids)
        if (places < 0).any():
            missing = [id for id, place in zip(ids, places.tolist(), strict=True) if place < 0]
            raise BadInput(f"{self._table.path.parent}: {len(missing)} of {len(ids)} rows have no embedding, e.g. {missing[0]!r}")
        return np.asarray(self.vectors[places], dtype=np.float32)
