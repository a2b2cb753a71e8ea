"""A model folder's tensors, read from the safetensors files in pieces.

Reads are positioned (`pread`) rather than memory-mapped: a failing disk then is an exception instead of a killed process,
and the memory in use is the piece that was asked for.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune.errors import BadInput
from guidetune.models.sources import read_config, weight_files

if TYPE_CHECKING:
    import torch

    from guidetune.models.names import ParameterNames

MAX_HEADER = 100 << 20
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "I16": "int16",
    "F16": "float16", "BF16": "bfloat16", "I32": "int32", "F32": "float32", "F64": "float64", "I64": "int64",
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64")
COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` is the absolute byte offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in file order.

    Raises:
        BadInput: the file is cut short or is not safetensors.
    """

    def damaged(why: str) -> BadInput:
        return BadInput(f"{path} is damaged or not a safetensors file ({why}); download or write it again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise damaged(f"its header claims {length} bytes, the file has {size}")
            header: Any = json.loads(file.read(length))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise damaged("unreadable header") from None
    if not isinstance(header, dict):
        raise damaged("unreadable header")
    infos = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bits = ITEM_BITS[dtype] * prod(shape)
        except (KeyError, TypeError, ValueError):
            raise damaged(f"bad entry for tensor {name}") from None
        if not 0 <= begin <= end or (end - begin) * 8 != bits:
            raise damaged(f"tensor {name} has {end - begin} bytes for {dtype}{list(shape)}")
        infos.append(TensorInfo(name, dtype, shape, path, 8 + length + begin, end - begin))
    infos.sort(key=lambda info: (info.start, info.name))
    end = max((info.start + info.nbytes for info in infos), default=8 + length)
    if end > size:
        raise damaged(f"it should have {end} bytes and has {size}: the download was probably cut")
    return {info.name: info for info in infos}


class _Recent(threading.local):
    key: tuple[Any, ...] | None = None
    rows: torch.Tensor | None = None


_recent = _Recent()


@dataclass
class TensorFiles:
    """Named tensors in a set of safetensors files. Use as a context manager, or call `close`."""

    tensors: dict[str, TensorInfo]
    _handles: dict[Path, int] = field(default_factory=dict, repr=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __del__(self) -> None:
        if hasattr(self, "_handles"):  # a constructor that refused has none
            self.close()

    def pread(self, info: TensorInfo, offset: int, length: int) -> bytearray:
        """`length` bytes of a tensor from byte `offset` of it."""
        buffer = bytearray(length)
        self._fill(memoryview(buffer), info, offset)
        return buffer

    def _fill(self, view: memoryview, info: TensorInfo, offset: int) -> None:
        """Read into all of `view`, from byte `offset` of a tensor."""
        handle = self._handle(info)
        done = 0
        while done < len(view):
            got = _read_at(handle, view[done:], info.start + offset + done)
            if got == 0:
                raise BadInput(f"{info.file} ended inside tensor {info.name}: it was changed while being read")
            done += got

    def _handle(self, info: TensorInfo) -> int:
        handle = self._handles.get(info.file)
        if handle is None:
            with self._opening:  # one handle, however many threads come at once
                if (handle := self._handles.get(info.file)) is None:
                    handle = self._handles[info.file] = os.open(info.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return handle

    def raw(self, name: str, piece: int = COPY_BYTES) -> Iterator[bytearray]:
        """The tensor's bytes, in pieces."""
        info = self.tensors[name]
        for offset in range(0, info.nbytes, piece):
            yield self.pread(info, offset, min(piece, info.nbytes - offset))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in its stored dtype. A scalar counts as one row and comes back as shape []."""
        import torch

        info = self.tensors[name]
        dtype = getattr(torch, TORCH_DTYPES.get(info.dtype, ""), None)
        if dtype is None:
            raise BadInput(f"tensor {name} in {info.file} has dtype {info.dtype}, which has no arithmetic here")
        stop = info.rows if stop is None else min(stop, info.rows)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        if prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        values = torch.empty(prod(shape), dtype=dtype)  # not filled with zeros first, as a bytearray would be
        self._fill(memoryview(values.view(torch.uint8).numpy()), info, start * info.row_bytes)
        return values.view(shape)

    def float_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """`rows` in float32 (float64 as it is), not to be changed: the calling thread's last ones are kept.

        A merge asks for the same rows of the base once for every source and once for the sum.
        """
        info = self.tensors[name]
        stat = os.fstat(self._handle(info))
        key = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size, info.start, start, stop)
        if _recent.key != key or _recent.rows is None:
            rows = self.rows(name, start, stop)
            _recent.rows = rows if info.dtype == "F64" else rows.float()
            _recent.key = key
        return _recent.rows


class Checkpoint(TensorFiles):
    """A model folder: its config and its tensors by the names they have in the files."""

    def __init__(self, folder: Path) -> None:
        files = weight_files(folder)
        if not files:
            raise BadInput(f"{folder} has no safetensors weights")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(file).items():
                if name in tensors:
                    raise BadInput(f"{folder}: tensor {name} is in two files, {tensors[name].file.name} and {file.name}")
                tensors[name] = info
        super().__init__(tensors)
        self.folder = folder
        self.files = files
        self.config = read_config(folder / "config.json")

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def names(self) -> ParameterNames:
        """How the tensors in the files map to the parameters of the model that transformers builds."""
        from guidetune.models.names import parameter_names

        return parameter_names(self)

    @property
    def dtype(self) -> str:
        """The dtype that most of the stored float bytes have, as torch calls it ("bfloat16")."""
        total: dict[str, int] = {}
        for info in self.tensors.values():
            if info.dtype in FLOATS:
                total[info.dtype] = total.get(info.dtype, 0) + info.nbytes
        return TORCH_DTYPES[max(total, key=lambda dtype: total[dtype])] if total else "float32"

    @property
    def quantization(self) -> str | None:
        """The quantisation method named by the config, if the weights are quantised."""
        found = self.config.get("quantization_config") or (self.config.get("text_config") or {}).get("quantization_config")
        return str(found.get("quant_method", "unnamed")) if isinstance(found, dict) else None

    def fitted(self, model: Any) -> Any:
        """A model loaded from this folder, with the shapes that this checkpoint gives its tensors."""
        return model

    def parameter(self, name: str) -> TensorInfo:
        return self.tensors[self.names.file_of[name]]

    def parameter_rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a parameter by its name in the model; a tied one is read from the tensor that is stored."""
        return self.rows(self.names.file_of[name], start, stop)


def _read_at(handle: int, view: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, [view], position)
    os.lseek(handle, position, os.SEEK_SET)
    data = os.read(handle, len(view))
    view[: len(data)] = data
    return len(data)
