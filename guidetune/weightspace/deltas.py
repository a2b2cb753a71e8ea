"""A joined update written by itself, to be a source of other plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from guidetune.artefacts import StageResult
from guidetune.errors import BadInput, RunFailed
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.fingerprints import fingerprint
from guidetune.models.sources import resolve
from guidetune.progress import progress
from guidetune.weightspace.apply import STORED, check_origin, check_place, dtype_of, published, read_folders
from guidetune.weightspace.sources import DELTA_FILES, Delta
from guidetune.weightspace.stages import ranges
from guidetune.weightspace.store import Entry, SafetensorsWriter, parse_size, plan_shards

VERSION = 1


def write_delta(
    delta: Delta,
    anchor: str | Path,
    out: str | Path,
    scale: float = 1.0,
    dtype: str = "float32",
    max_shard: int | str = "5GB",
    allow_mismatch: bool = False,
) -> StageResult:
    """Write `scale` * update as `delta-*.safetensors`, by the names of the parameters.

    Raises:
        BadInput: the update does not fit the anchor; or the place cannot be written.
        RunFailed: the disk filled up, or a value is not finite.
    """
    out, target = Path(out), resolve(anchor)
    check_place(out, [target.path, *read_folders(delta)])
    warnings = check_origin(delta, target, allow_mismatch)
    with Checkpoint(target.path) as checkpoint:
        if problems := [*delta.fit(checkpoint.names), *delta.checks()]:
            raise BadInput(problems[:12])
        entries = [Entry(name, STORED[dtype], shape) for name, shape in delta.shapes.items()]
        key = {"delta": VERSION, "anchor": fingerprint(target), "update": delta.describe(), "scale": scale, "dtype": dtype}

        def build(work: Path) -> dict[str, Any]:
            delta.begin()
            with progress("delta", total=sum(entry.nbytes for entry in entries) / 1e6, unit="MB") as bar:
                for k, shard in enumerate(plan_shards(entries, parse_size(max_shard)), 1):
                    with SafetensorsWriter(work / DELTA_FILES.replace("*", f"{k:05d}"), shard) as writer:
                        for entry in shard:
                            _write(delta, entry, scale, writer)
                            bar.advance(entry.nbytes / 1e6)
            return {"base": target.spec, "base_fingerprint": fingerprint(target), "tensors": len(entries), "warnings": warnings}

        return published(out, key, build, sum(entry.nbytes for entry in entries))


def _write(delta: Delta, entry: Entry, scale: float, writer: SafetensorsWriter) -> None:
    offset = 0
    for start, stop in ranges(entry.shape):
        rows = (delta.rows(entry.name, start, stop) * scale).to(dtype_of(entry))
        if not bool(torch.isfinite(rows).all()):
            raise RunFailed(f"the update of {entry.name} is not finite; nothing was published")
        data = memoryview(rows.contiguous().flatten().view(torch.uint8).numpy())
        writer.write(entry.name, offset, data)
        offset += len(data)
    delta.done(entry.name)
