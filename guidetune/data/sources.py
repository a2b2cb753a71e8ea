"""Where rows come from: jsonl, json, csv and parquet files (also gzipped), patterns such as `data/*.parquet`, folders and hub ids.

Rows are streamed, file after file in the order of their names. Memory grows with the rows only where a format leaves no choice: a
`.json` list is read whole, and so is a gzipped parquet file.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from guidetune.artefacts import digest_file, fingerprint
from guidetune.errors import BadInput

Format = Literal["auto", "jsonl", "json", "csv", "parquet", "dataset"]
LossOn = Literal["target", "assistant", "all"]
MAP_KEYS = ("user", "assistant", "system", "messages", "id")
RESERVED = ("id", "source", "line", "weight", "phase", "origin", "user", "assistant", "system", "tool")
"""Names that every row has: no column or tag can be called so."""
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
BROKEN_JSON, BAD_UTF8, NOT_A_ROW, BROKEN_CSV = "broken JSON", "bad UTF-8", "not a row", "broken CSV"


_BUFFER = 1 << 18  # bytes of a parquet column that are read at a time

WORLD = "world:"  # a set of the embedded world


class SourceSpec(BaseModel):
    """One source of conversations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="A file, a pattern such as `data/*.parquet`, a folder, or a hub id for `datasets`.")
    format: Format = Field("auto", description="How to read it; auto goes by the name and, for json, by the content.")
    split: str = Field("train", description="Split of a folder or hub data set.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    name: str | None = Field(None, description="Name in ids, ledger and reports; default: the file's name.")
    map: dict[str, str] = Field(
        default_factory=dict,
        description="Columns by part: user, assistant, system, id; or messages. A value is a column or text with {column} in it.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Further columns for operations (category, language, score, …): name: column, a path into one, or text with {column}.",
    )
    tags: dict[str, str | int | float] = Field(
        default_factory=dict, description="The same for every row of the source, such as {group: flan, language: es}; read like columns."
    )
    loss_on: LossOn | None = Field(None, description="As in data, for this source alone: target, assistant or all.")
    system: str | None = Field(None, description="System prompt for rows that have none.")
    weight: float = Field(1.0, gt=0, description="Loss weight of every supervised token of this source.")
    limit: int | None = Field(None, gt=0, description="Read only the first rows.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, (str, Path)) else value

    @field_validator("path", mode="before")
    @classmethod
    def _path_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("map")
    @classmethod
    def _known_parts(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            if key not in MAP_KEYS:
                near = difflib.get_close_matches(key, MAP_KEYS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"map has no part {key!r}{hint} (parts: {', '.join(MAP_KEYS)})")
        if "messages" in value and ("user" in value or "assistant" in value):
            raise ValueError("map gives messages and also user or assistant; keep one")
        if value and "messages" not in value and "assistant" not in value and ("user" in value):
            raise ValueError("map gives user but no assistant column; add assistant: <column>")
        if "assistant" in value and "user" not in value:
            raise ValueError("map gives assistant but no user column; add user: <column>")
        return value

    @model_validator(mode="after")
    def _own_names(self) -> SourceSpec:
        for name in [*self.columns, *self.tags]:
            if name in RESERVED or not name or "." in name or "[" in name:
                raise ValueError(f"a column or tag cannot be called {name!r}")
        if both := sorted(set(self.columns) & set(self.tags)):
            raise ValueError(f"{both[0]!r} is both a column and a tag; keep one")
        return self

    @property
    def label(self) -> str:
        """The source's name in reports."""
        if self.name:
            return self.name
        name = Path(self.path).name
        if name.endswith(".gz"):
            name = name[:-3]
        stem = Path(name).stem if Path(name).suffix in _SUFFIXES else name
        if is_pattern(self.path):  # what the names have in common, or the folder's
            plain = [part for part in Path(self.path).parts if not is_pattern(part)]
            stem = re.split(r"[*?\[]", stem)[0].strip("-_. ") or (plain[-1] if plain else "")
        return stem or self.path


@dataclass(frozen=True)
class Broken:
    """A row that could not be read at all."""

    reason: str
    detail: str


def labels(specs: list[SourceSpec]) -> list[str]:
    """A distinct name for each source: a repeated one gets `-2`, `-3`."""
    out: list[str] = []
    for spec in specs:
        name, number = spec.label, 1
        while name in out:
            number += 1
            name = f"{spec.label}-{number}"
        out.append(name)
    return out


def is_pattern(path: str) -> bool:
    """The path stands for several files."""
    return any(c in path for c in "*?[")


def matches(pattern: Path) -> list[Path]:
    """The files of a pattern, by name; `**` goes through sub-folders, hidden files are left out."""
    import glob

    return sorted(Path(found) for found in glob.glob(str(pattern), recursive=True) if Path(found).is_file())


def locate(spec: SourceSpec, root: Path) -> Path | None:
    """The file, folder or pattern of a source: relative to the recipe's folder, then to the current one. None: a hub id.

    Raises:
        BadInput: there is nothing there and it does not look like a hub id; names the nearest existing file.
    """
    if spec.path.startswith(WORLD):
        from guidetune.world import rows_file

        return rows_file(spec.path.removeprefix(WORLD), spec.split or "train")
    given = Path(spec.path).expanduser()
    places = [given] if given.is_absolute() else [Path(root) / given, Path.cwd() / given]
    for place in places:
        if place.exists() or (is_pattern(spec.path) and matches(place)):
            return place
    if is_pattern(spec.path):
        looked = " and ".join(dict.fromkeys(str(p.parent) for p in places))
        raise BadInput(f"no file matches {spec.path!r} (looked in {looked})")
    parts = spec.path.split("/")
    suffixes = {Path(spec.path).suffix, Path(spec.path.removesuffix(".gz")).suffix}
    hub_like = len(parts) <= 2 and all(parts) and not given.is_absolute() and not suffixes & {*_SUFFIXES, ".gz", ".txt"}
    if spec.format == "dataset" or (hub_like and len(parts) == 2 and spec.path[0] not in ".~" and not places[0].parent.is_dir()):
        return None
    folder = next((p.parent for p in places if p.parent.is_dir()), None)
    near = difflib.get_close_matches(given.name, [p.name for p in folder.iterdir()], 1, 0.5) if folder else []
    hint = f"; did you mean {(folder / near[0]).name!r} there?" if folder and near else ""
    if folder is None:
        hint = f"; the folder {given.parent} does not exist either"
    if hub_like and len(parts) == 1:
        hint += "; for a hub id without an owner add format: dataset"
    looked = " and ".join(dict.fromkeys(str(p.parent) for p in places))
    raise BadInput(f"no data at {spec.path!r} (looked in {looked}){hint}")


def detect(path: Path, spec: SourceSpec) -> Format:
    """The format of a file by its extension, and for JSON by its first bytes.

    Raises:
        BadInput: the extension says nothing.
    """
    if spec.format != "auto":
        return spec.format
    if path.is_dir():
        return "dataset"
    found = _SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix.lower())
    if found is None:
        with _open_binary(path) as file:
            head = file.read(4).lstrip()
        if head.startswith(b"PAR1"):
            return "parquet"
        if head[:1] in (b"{", b"["):
            found = "json"
        else:
            raise BadInput(f"cannot tell the format of {path.name}; add format: jsonl, json, csv or parquet")
    if found in ("json", "jsonl"):
        return _json_kind(path, found)
    return found


def _json_kind(path: Path, named: Format) -> Format:
    """Many `.json` files hold one object per line, and some `.jsonl` files hold one array."""
    with _open_binary(path) as file:
        first = b""
        for line in file:
            first = line.strip()
            if first.startswith(b"\xef\xbb\xbf"):
                first = first[3:].strip()
            if first:
                break
    if first.startswith(b"["):
        return "json"
    if named == "json" and first.startswith(b"{"):
        try:
            whole = json.loads(first)
        except ValueError:
            return "json"
        return "json" if isinstance(whole, dict) and isinstance(whole.get("data"), list) else "jsonl"
    return named


def read(spec: SourceSpec, root: Path) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    """(line or row number from 1, row) of a source, in order; rows that cannot be parsed come as `Broken`.

    Raises:
        BadInput: nothing there, an empty file, or a file that is not of its format at all.
    """
    path = locate(spec, root)
    rows = _read_path(path, spec) if path is not None else _read_dataset(spec.path, spec)
    count = 0
    for number, row in rows:
        count += 1
        yield number, row
        if spec.limit is not None and count >= spec.limit:
            return
    if not count:
        raise BadInput(f"{spec.path} has no rows")


def _read_path(path: Path, spec: SourceSpec) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    files = [path] if path.is_file() else matches(path) if is_pattern(spec.path) and not path.exists() else None
    if files is None:
        if spec.format not in ("auto", "dataset"):
            raise BadInput(f"{spec.path} is a folder, not a {spec.format} file; leave format out to read it through `datasets`")
        files = _files_of(path, spec)
    if files is None:
        yield from _read_dataset(str(path), spec)
        return
    yield from _read_files(files, spec)


def _read_files(files: list[Path], spec: SourceSpec) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    """The rows of files one after the other; numbers go on from file to file, and what is broken is named by file and line."""
    before = 0
    for file in files:
        last = 0
        for last, row in _read_file(file, spec):
            if len(files) > 1 and isinstance(row, Broken):
                row = Broken(row.reason, f"{file.name} line {last}: {row.detail}")
            yield before + last, row
        before += last


def _read_file(path: Path, spec: SourceSpec) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    name = spec.path if path.name == Path(spec.path).name else path.name
    if path.stat().st_size == 0:
        raise BadInput(f"{name} is an empty file")
    try:
        kind = detect(path, spec)
        if kind == "dataset":
            raise BadInput(f"{name} is a file, and format: dataset is for folders and hub ids; leave format out")
        yield from {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}[kind](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{name} is not a complete gzip file: {error}; fetch it again") from None
    except PermissionError:
        raise BadInput(f"{name} may not be read: permission denied") from None


def _open_binary(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if path.name.endswith(".gz") or packed:
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    with _open_binary(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | Broken:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(BAD_UTF8, f"byte 0x{line[error.start]:02x} at {error.start}")
    except json.JSONDecodeError as error:
        return Broken(BROKEN_JSON, f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or brackets without end
        return Broken(BROKEN_JSON, str(error))
    return row if isinstance(row, dict) else Broken(NOT_A_ROW, f"a JSON {_json_name(row)}, not an object")


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    with _open_binary(path) as file:
        data = file.read()
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path.name} is not UTF-8: byte 0x{data[error.start]:02x} on line {line}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path.name}: broken JSON on line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path.name}: broken JSON: {error}") from None
    rows = content
    if isinstance(content, dict):
        lists = [k for k, v in content.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        key = "data" if isinstance(content.get("data"), list) else lists[0] if len(lists) == 1 else None
        if key in ("messages", "conversations"):
            key = None
        rows = _instances(content, path.stem) or (content[key] if key else [content])
    if not isinstance(rows, list):
        raise BadInput(f"{path.name} holds a JSON {_json_name(content)}; a list of objects is needed")
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else Broken(NOT_A_ROW, f"a JSON {_json_name(row)}, not an object")


def _instances(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The instances of a task file of Super-NaturalInstructions, each with what the file says of their task; of other files none."""
    if not isinstance(content.get("Instances"), list) or "Definition" not in content:
        return []
    category, definition = content.get("Categories"), content["Definition"]
    task = {
        "task": name,
        "definition": definition[0] if isinstance(definition, list) and definition else definition,
        "category": category[0] if isinstance(category, list) and category else category,
        "positive_examples": content.get("Positive Examples", []),
        "negative_examples": content.get("Negative Examples", []),
    }
    return [{**task, **one} if isinstance(one, dict) else one for one in content["Instances"]]


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names[type(value)]


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with _open_binary(path) as binary:
        # Undecodable bytes become lone surrogates, so that one bad cell costs one row and not the file.
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise BadInput(f"{path.name}: the header is not CSV: {error}") from None
        if not header:
            raise BadInput(f"{path.name} has no header line")
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise BadInput(f"{path.name} has the column {repeated[0]!r} more than once; rename one")
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, Broken(BROKEN_CSV, str(error))
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield reader.line_num, Broken(BROKEN_CSV, f"{len(cells)} cells where the header has {len(header)}")
            elif any("\udc80" <= c <= "\udcff" for cell in cells if not cell.isascii() for c in cell):
                yield reader.line_num, Broken(BAD_UTF8, "bytes that are not UTF-8")
            else:
                yield reader.line_num, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open_binary(path) as file:
        # A gzipped parquet file cannot be read in parts.
        origin: Any = str(path) if not isinstance(file, gzip.GzipFile) else pa.BufferReader(file.read())
    try:
        # What is read ahead (`pre_buffer`) stays in memory until the file is closed: all of it, in the end.
        table = pq.ParquetFile(origin, pre_buffer=False, buffer_size=_BUFFER)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path.name} is not a parquet file: {error}") from None
    number = 0
    try:
        for batch in table.iter_batches(batch_size=1024):
            for row in _arrow_rows(batch):
                number += 1
                yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path.name} is damaged after row {number}: {error}") from None


def _arrow_rows(batch: Any) -> Iterable[dict[str, Any] | Broken]:
    """The rows of an Arrow batch; text that is not UTF-8 costs its row alone."""
    import pyarrow as pa

    try:
        columns = [_values(column) for column in batch.columns]
    except (UnicodeDecodeError, ValueError, pa.ArrowException):
        return _one_by_one(batch)
    names = batch.schema.names
    if len(set(names)) < len(names):
        return batch.to_pylist()
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)] if columns else [{}] * batch.num_rows


def _one_by_one(batch: Any) -> Iterator[dict[str, Any] | Broken]:
    for k in range(batch.num_rows):  # find the row to blame
        try:
            yield batch.slice(k, 1).to_pylist()[0]
        except (UnicodeDecodeError, ValueError) as error:
            yield Broken(BAD_UTF8, str(error))


def _values(array: Any) -> list[Any]:
    """An Arrow array as Python values. Text, and lists of records of text, go by whole columns: many times faster than value by value."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array.to_numpy(zero_copy_only=False).tolist()
    if pa.types.is_struct(kind) and not array.null_count and kind.num_fields:
        names = [kind.field(k).name for k in range(kind.num_fields)]
        if len(set(names)) == len(names):
            return [dict(zip(names, values, strict=True)) for values in zip(*map(_values, array.flatten()), strict=True)]
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not array.null_count:
        ends = array.offsets.to_pylist()
        first = ends[0] if ends else 0
        inner = _values(array.flatten())  # flatten() leaves out what a slice does not show
        return [inner[a - first : b - first] for a, b in zip(ends, ends[1:], strict=False)]
    return array.to_pylist()


def _read_dataset(name: str, spec: SourceSpec) -> Iterator[tuple[int, dict[str, Any] | Broken]]:
    """Rows through `datasets`: a saved set is mapped, anything else is streamed without a copy in its cache (but for a part of a split)."""
    rows = _saved(Path(name), spec)
    if rows is None:
        import datasets

        part = "[" in spec.split or "+" in spec.split
        rows = _or_bad_input(spec, lambda: datasets.load_dataset(name, spec.subset, split=spec.split, streaming=not part))
    number = 0
    batches = iter(rows.with_format("arrow").iter(batch_size=1024))
    while True:
        table = _or_bad_input(spec, lambda: next(batches, None))
        if table is None:
            return
        for batch in table.to_batches():
            for row in _arrow_rows(batch):
                number += 1
                yield number, row


def _saved(folder: Path, spec: SourceSpec) -> Any:
    """A folder written by `save_to_disk`, memory-mapped; None for anything else."""
    import datasets

    if (folder / "dataset_info.json").is_file():
        return datasets.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(folder))
        if spec.split not in splits:
            raise BadInput(f"{spec.path} has no split {spec.split!r}; it has {', '.join(splits)}")
        return splits[spec.split]
    return None


def _files_of(folder: Path, spec: SourceSpec) -> list[Path] | None:
    """The files of a folder's split, as `datasets` sorts them out, when the readers here understand them all."""
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return None
    import datasets

    builder = _or_bad_input(spec, lambda: datasets.load_dataset_builder(str(folder), spec.subset))
    splits = builder.config.data_files or {}
    if spec.split not in splits:
        return None  # parts of a split (`train[:10%]`), or none of that name: theirs to read, or to say so
    files = sorted(Path(str(file)) for file in splits[spec.split])
    known = all(file.is_file() and Path(file.name.removesuffix(".gz")).suffix.lower() in _SUFFIXES for file in files)
    return files if known and files else None


def _or_bad_input(spec: SourceSpec, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # the library raises many kinds: no network, no such set, no such split, unreadable files
        text = str(error).strip().split("\n")[0]
        raise BadInput(
            f"`datasets` could not read {spec.path!r} (split {spec.split!r}): {type(error).__name__}: {text}; "
            "check the name, the split and the network, or give a local file"
        ) from None


def digest(spec: SourceSpec, root: Path) -> str:
    """Fingerprint of a source's content: the bytes of its file or files, or the version of each file of a hub data set."""
    path = locate(spec, root)
    if path is None:
        import datasets

        builder = _or_bad_input(spec, lambda: datasets.load_dataset_builder(spec.path, spec.subset))
        files = {split: [list(map(str, files)), list(files.origin_metadata)] for split, files in (builder.config.data_files or {}).items()}
        return fingerprint(["dataset", spec.path, spec.subset, spec.split, files, builder.hash])
    if path.is_file():
        return digest_file(path)
    if is_pattern(spec.path) and not path.exists():
        return fingerprint([[file.name, digest_file(file)] for file in matches(path)])
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return fingerprint([[str(p.relative_to(path)), digest_file(p)] for p in files])
