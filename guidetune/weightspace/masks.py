"""Learned 0/1 masks over updates: their mathematics, and the files that keep them.

A mask decides value by value what of an update τ is added: τ̂ = m ⊙ τ / r, with r the mask's mean over the tensor (SOMF) or 1
(grafting). In a file it takes one bit per value; the streamed merge reads the bits of the rows at hand and no more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guidetune import artefacts
from guidetune.errors import BadInput
from guidetune.models.checkpoint import TensorFiles, read_header
from guidetune.weightspace.stages import Mask, ranges
from guidetune.weightspace.store import Entry, SafetensorsWriter

MANIFEST = "masks.json"
VERSION = 1
EMPTY = 1e-6  # a mask whose mean is below this keeps nothing: 0 / 0 is 0


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def pack(keep: torch.Tensor) -> bytes:
    """The bits of a boolean tensor in row-major order, eight to a byte, the first in the highest bit; the last byte is filled with 0."""
    return np.packbits(keep.flatten().numpy()).tobytes()


def unpack(data: bytes | bytearray, first: int, count: int) -> torch.Tensor:
    """`count` bits from bit `first` on: bool [count]."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(data, np.uint8))[first : first + count].astype(bool))


class MaskWriter:
    """Writes one file of masks, tensor by tensor in pieces of whole bytes, and counts what they keep."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        entries = [Entry(name, "U8", (-(-prod(shape) // 8),)) for name, shape in self.shapes.items()]
        self._writer = SafetensorsWriter(path, entries, {"format": "guidetune-masks", "bits": "row-major, highest first"})
        self._held: dict[str, tuple[int, torch.Tensor]] = {}
        self.kept = dict.fromkeys(self.shapes, 0)

    def write(self, name: str, keep: torch.Tensor) -> None:
        """The next values of a tensor, in order, however many."""
        done, rest = self._held.get(name, (0, torch.empty(0, dtype=torch.bool)))
        bits = torch.cat([rest, keep.flatten()])
        self.kept[name] += int(keep.sum())
        last = 8 * done + len(bits) == prod(self.shapes[name])
        whole = len(bits) if last else len(bits) // 8 * 8
        data = pack(bits[:whole])
        self._writer.write(name, done, data)
        self._held[name] = (done + len(data), bits[whole:].clone())

    def __enter__(self) -> MaskWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)


@dataclass
class MaskFile:
    """Masks of one update, by parameter: `shapes`, and how many values each keeps."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    kept: dict[str, int]
    files: TensorFiles = field(repr=False)

    @classmethod
    def open(cls, path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> MaskFile:
        """The file `path` as its manifest describes it.

        Raises:
            BadInput: the file is damaged or not the one that the manifest is of.
        """
        found = read_header(path)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        wrong = [name for name in {*found, *shapes} if name not in found or name not in shapes]
        wrong += [name for name in shapes if name in found and found[name].nbytes != -(-prod(shapes[name]) // 8)]
        if wrong:
            raise BadInput(f"{path} does not hold the masks that its manifest lists, first {sorted(wrong)[0]}")
        return cls(path, shapes, {name: int(entry["kept"]) for name, entry in tensors.items()}, TensorFiles(found))

    def bits(self, name: str, first: int, count: int) -> torch.Tensor:
        """Values [first, first + count) of the flattened mask: bool [count]."""
        start, stop = first // 8, -(-(first + count) // 8)
        return unpack(self.files.pread(self.files.tensors[name], start, stop - start), first - 8 * start, count)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The flattened mask, piece by piece."""
        width = prod(self.shapes[name][1:])
        for start, stop in ranges(self.shapes[name]):
            yield self.bits(name, start * width, (stop - start) * width)

    def share(self, name: str) -> float:
        """Mean of a tensor's mask."""
        return self.kept[name] / max(1, prod(self.shapes[name]))


@dataclass
class StoredMasks(Mask):
    """The masks of a merge's sources in a folder that `write_manifest` has closed; its files are opened when they are first asked.

    `rescale`: divide by the mask's mean over the tensor.

    Raises:
        BadInput: there is no manifest, or a file is missing or damaged.
    """

    folder: Path
    rescale: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def of(self) -> dict[str, MaskFile]:
        """Source -> its mask; several sources may share one."""
        with self._lock:
            return open_masks(self.folder)

    def apply(self, source: str, name: str, first: int, tau: torch.Tensor) -> torch.Tensor:
        """m ⊙ τ (/ mean m) of the values from `first` on; 0 where the mask does not know the tensor or keeps nothing of it."""
        mask = self.of[source]
        if name not in mask.shapes or (share := mask.share(name)) < EMPTY and self.rescale:
            return torch.zeros_like(tau)
        kept = torch.where(mask.bits(name, first, tau.numel()).view(tau.shape), tau, torch.zeros(()))
        return kept.div_(share) if self.rescale else kept


def write_manifest(folder: Path, files: Mapping[str, MaskWriter], sources: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """`masks.json` beside the mask files (name -> what was written): share kept per tensor and in all, and overlaps of several.

    sources: source's id -> the file of its mask. Returns what was written, without the tensors.
    """
    listed: dict[str, Any] = {}
    for name, writer in files.items():
        total, kept = sum(map(prod, writer.shapes.values())), sum(writer.kept.values())
        tensors = {
            key: {"shape": list(shape), "kept": writer.kept[key], "share": writer.kept[key] / max(1, prod(shape))}
            for key, shape in writer.shapes.items()
        }
        listed[name] = {"kept": kept, "values": total, "share": kept / max(1, total), "tensors": tensors}
    report: dict[str, Any] = {"version": VERSION, **more, "sources": dict(sources), "files": listed}
    artefacts.write_json(folder / MANIFEST, report)
    if len(files) > 1:
        opened = {name: MaskFile.open(folder / name, entry["tensors"]) for name, entry in listed.items()}
        report["overlap"] = overlap(list(opened.values()))
        for mask in opened.values():
            mask.files.close()
        artefacts.write_json(folder / MANIFEST, report)
    return {**report, "files": {name: {k: v for k, v in entry.items() if k != "tensors"} for name, entry in listed.items()}}


def open_masks(folder: Path) -> dict[str, MaskFile]:
    """Source -> its mask, of a folder that `write_manifest` has closed.

    Raises:
        BadInput: there is no manifest, or a file is missing or damaged.
    """
    try:
        manifest = artefacts.read_json(folder / MANIFEST)
        listed, sources = manifest["files"], manifest["sources"]
        files = {name: MaskFile.open(folder / name, entry["tensors"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{MANIFEST}: {error or type(error).__name__}"
        raise BadInput(f"{folder} holds no masks ({why}); give the folder of what a merge has learnt") from None
    return {source: files[name] for source, name in sources.items()}


def overlap(masks: Sequence[MaskFile]) -> list[list[float | None]]:
    """|m_i ∩ m_j| / |m_j| for every pair [i][j] (2302.06600's region overlap); None where m_j keeps nothing."""
    count = np.zeros((len(masks), len(masks)), dtype=np.int64)
    for name in dict.fromkeys(name for mask in masks for name in mask.shapes):
        having = [i for i, mask in enumerate(masks) if name in mask.shapes]
        for parts in zip(*(masks[i].pieces(name) for i in having), strict=True):
            for a, one in zip(having, parts, strict=True):
                for b, other in zip(having, parts, strict=True):
                    count[a, b] += int((one & other).sum())
    sizes = np.diag(count)
    return [[float(count[i, j] / sizes[j]) if sizes[j] else None for j in range(len(masks))] for i in range(len(masks))]


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics


def concrete(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """A relaxed Bernoulli draw (binary Concrete, arXiv 1611.00712): σ((log u − log(1 − u) + Λ) / t), with P(m > ½) = σ(Λ).

    logits, uniform (in (0, 1)): equal shapes.
    """
    return torch.sigmoid((torch.log(uniform) - torch.log1p(-uniform) + logits) / temperature)


def mean_rescaled(mask: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """m ⊙ τ / mean(m) over the tensor; 0 where the mask keeps nothing."""
    mean = mask.mean()
    return tau * 0.0 if float(mean) < EMPTY else mask * tau / mean


def relaxed_graft(scores: torch.Tensor, base: torch.Tensor, bias: float) -> torch.Tensor:
    """γ(S) = γ_b + (1 − 2 γ_b) σ(S − b): near the 0/1 mask γ_b while S is well below b, on the other side of ½ once S > b."""
    return base + (1 - 2 * base) * torch.sigmoid(scores - bias)


def graft_slope(scores: torch.Tensor, base: torch.Tensor, bias: float) -> torch.Tensor:
    """dγ/dS = (1 − 2 γ_b) σ (1 − σ)."""
    gate = torch.sigmoid(scores - bias)
    return (1 - 2 * base) * gate * (1 - gate)
