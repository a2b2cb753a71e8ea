"""Artefact folders: fingerprints, atomic writes, stages that continue where they were killed.

A stage writes one folder. The folder gets its final name only when it is complete, and holds a `manifest.json` with the
key (inputs, options, code version) it was made from; a stage whose manifest matches is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidetune.errors import BadInput

MANIFEST = "manifest.json"


def canonical(obj: Any) -> str:
    """JSON with sorted keys and no spaces; paths and pydantic models are allowed."""

    def default(value: Any) -> Any:
        if hasattr(value, "model_dump"):
            return value.model_dump(mode="json")
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        raise TypeError(f"cannot fingerprint {type(value).__name__}")

    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=default)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of nested settings; lists of methods by their names, other lists as they are."""
    if isinstance(value, Mapping):  # an empty one has no leaf
        for key, part in value.items():
            yield from leaves(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        for i, part in enumerate(value):
            name = part.get("method") or part.get("name") or part.get("path")
            yield from leaves(part, f"{prefix}[{name if isinstance(name, str) and len(value) > 1 else i}]")
    elif value not in (None, []):  # unset, empty and absent are the same thing in a recipe
        yield prefix, value


def fingerprint(obj: Any) -> str:
    """32 hex digits of the SHA-256 of the canonical JSON of `obj`."""
    return hashlib.sha256(canonical(obj).encode()).hexdigest()[:32]


def digest_file(path: Path) -> str:
    """32 hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def derive_seed(seed: int, *purpose: Any) -> int:
    """An independent 63-bit seed for each (seed, purpose, ...): every random draw names what it is for."""
    text = canonical([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    # Model outputs may hold lone surrogates, which UTF-8 cannot carry: they are written as escapes, never lost in a crash.
    write_bytes_atomic(path, text.encode("utf-8", errors="backslashreplace"))


@contextmanager
def atomic_lines(path: Path) -> Iterator[Callable[[str], None]]:
    """A function that adds a line to a file of any length; the file has its name only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n", errors="backslashreplace") as file:
            yield lambda line: print(line, file=file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, obj: Any) -> None:
    write_text_atomic(path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class StageResult:
    """A finished artefact folder; `manifest["result"]` is what the stage's function returned."""

    path: Path
    reused: bool
    manifest: dict[str, Any]

    @property
    def result(self) -> dict[str, Any]:
        return self.manifest.get("result") or {}

    @property
    def seconds(self) -> float:
        return float(self.manifest.get("seconds", 0.0))


def finished(folder: Path, key: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The manifest of a complete artefact folder (made from `key`, when given), else None."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or (key is not None and manifest.get("fingerprint") != fingerprint(key)):
        return None
    return manifest


def stage(folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any] | None]) -> StageResult:
    """Make `folder` with `build(work)`, or reuse it when its manifest has this `key`.

    `build` gets a work folder beside the final one. After a crash the work folder of the same key is handed out again with
    what it holds, so a long stage can go on from its own checkpoints; a work folder of another key is emptied.

    Raises:
        BadInput: the place cannot be written to.
    """
    folder = Path(folder)
    manifest = finished(folder, key)
    if manifest is not None:
        return StageResult(folder, True, manifest)
    work = folder.with_name(f".{folder.name}.partial")
    mark = fingerprint(key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if work.exists() and _mark(work) != mark:
            shutil.rmtree(work)
        work.mkdir(exist_ok=True)
        for torn in work.rglob(".*.part"):  # a write that a kill cut short
            torn.unlink(missing_ok=True)
        write_text_atomic(work / ".key", mark)
    except OSError as error:
        raise BadInput(f"cannot write to {folder.parent}: {error.strerror or error}; choose another --out") from None
    spent = _spent(work)
    start = time.monotonic()
    try:
        result = build(work)
    except BaseException:
        # The time of an interrupted attempt belongs to the stage's cost.
        if work.exists():
            _note_spent(work, spent + time.monotonic() - start)
        raise
    manifest = {
        "fingerprint": mark,
        "key": json.loads(canonical(key)),
        "result": result or {},
        "seconds": round(spent + time.monotonic() - start, 3),
    }
    (work / ".key").unlink(missing_ok=True)
    (work / ".spent").unlink(missing_ok=True)
    write_json(work / MANIFEST, manifest)
    publish(work, folder)
    return StageResult(folder, False, manifest)


def shared_stage(shared: Path, folder: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> StageResult:
    """A stage kept in a store beside the runs, so that other runs find it, and shown in this run's folder."""
    manifest = finished(folder, key)
    if manifest is not None:
        return StageResult(folder, True, manifest)
    done = stage(shared, key, build)
    copied(done.path, folder.parent, folder.name)
    return StageResult(folder, done.reused, done.manifest)


def copied(source: Path, parent: Path, name: str, beside: Sequence[str] = ()) -> None:
    """A finished folder under another name as well, by links where there are such; files `beside` it come along first."""
    for file in beside:
        if (source.parent / file).is_file():
            shutil.copy2(source.parent / file, parent / file)
    work = parent / f".{name}.partial"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, work / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, work / file.name)
    publish(work, parent / name)


def publish(work: Path, folder: Path) -> None:
    """Give a complete work folder its final name; an older folder of that name is replaced."""
    sync_folder(work)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        if old.exists():
            shutil.rmtree(old)
        os.rename(folder, old)
        os.rename(work, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(work, folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entry, where the platform can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems cannot sync a directory
    finally:
        os.close(handle)


def _mark(work: Path) -> str | None:
    try:
        return (work / ".key").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _spent(work: Path) -> float:
    try:
        return float((work / ".spent").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _note_spent(work: Path, seconds: float) -> None:
    try:
        write_text_atomic(work / ".spent", f"{seconds:.3f}")
    except OSError:
        pass  # a full disk must not hide the error that ended the stage
