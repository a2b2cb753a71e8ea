"""Write safetensors files: the header first, then every tensor's bytes to their place, in any order and in pieces."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

from guidetune import artefacts
from guidetune.errors import BadInput
from guidetune.models.checkpoint import ITEM_BITS

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor to write; `dtype` as safetensors calls it ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BITS[self.dtype] * prod(self.shape) // 8


def parse_size(size: int | str) -> int:
    """Bytes of "5GB" (10^9), "512MiB" (2^20) or a plain number. Raises BadInput."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(size).upper())
    value = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if value <= 0:
        raise BadInput(f"size {size!r} is not understood; write it like 5GB, 512MiB or 1000000")
    return value


def plan_shards(entries: Sequence[Entry], max_shard: int) -> list[list[Entry]]:
    """Cut the entries, in order, into files of at most `max_shard` bytes; a larger tensor gets a file of its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.nbytes > room:
            shards.append([])
            room = max_shard
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and so on."""
    if count <= 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """The index of a sharded model: exact total size, every tensor named once. A single file needs none."""
    names = shard_names(len(shards))
    if len(shards) <= 1:
        return
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    artefacts.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


class SafetensorsWriter:
    """One file. Its space is reserved when it is opened, so a full disk shows before the work; `close` checks that no byte is missing."""

    def __init__(self, path: Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> None:
        # Wide types first, as the reference writer has it: every tensor then starts at a multiple of its item size.
        self.entries = sorted(entries, key=lambda entry: (-ITEM_BITS[entry.dtype], entry.name))
        header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
        self.start: dict[str, int] = {}
        end = 0
        for entry in self.entries:
            if entry.name in self.start or entry.name == "__metadata__":
                raise ValueError(f"tensor {entry.name!r} is listed twice or has a reserved name")
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
            self.start[entry.name] = end
            end += entry.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._left = {entry.name: entry.nbytes for entry in self.entries}
        self._data = 8 + len(text)
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
        try:
            if hasattr(os, "posix_fallocate") and end:
                os.posix_fallocate(self._handle, 0, self._data + end)
            else:
                os.truncate(self._handle, self._data + end)
            self._write_at(len(text).to_bytes(8, "little") + text, 0)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            os.close(self._handle)

    def write(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes at `offset` of a tensor. Every byte is to be written once."""
        data = memoryview(data).cast("B")
        self._left[name] -= len(data)
        self._write_at(data, self._data + self.start[name] + offset)

    def close(self) -> None:
        """Flush to disk. Raises ValueError when a tensor is not written in full."""
        try:
            short = [name for name, left in self._left.items() if left]
            if short:
                raise ValueError(f"{self.path.name}: tensor {short[0]} was not written exactly once in full")
            os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def _write_at(self, data: bytes | memoryview, position: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            if hasattr(os, "pwrite"):
                done += os.pwrite(self._handle, view[done:], position + done)
            else:
                os.lseek(self._handle, position + done, os.SEEK_SET)
                done += os.write(self._handle, view[done:])
