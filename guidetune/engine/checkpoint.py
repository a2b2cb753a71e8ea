"""One file holds all that a run needs to go on: trainable tensors, optimiser moments, cursor. Safetensors, written atomically.

Written and read tensor by tensor: a checkpoint of full fine-tuning takes no memory beside the model's own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from guidetune.artefacts import sync_folder
from guidetune.engine.distributed import current, part_of, whole
from guidetune.models.checkpoint import TORCH_DTYPES
from guidetune.weightspace.store import Entry, SafetensorsWriter

FILE = "checkpoint.safetensors"
_NAMES = {getattr(torch, name): code for code, name in TORCH_DTYPES.items()}


def save_checkpoint(work: Path, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, cursor: dict[str, Any]) -> None:
    """Order, dropout and schedule follow from (seed, step), so the cursor replaces generator states.

    Written whole by rank 0, so that any number of processes can go on; where tensors are sharded every rank must call it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, p in params.items():
        tensors[f"param/{name}"] = p.detach()
        for key, value in optimiser.state.get(p, {}).items():
            tensors[f"state/{key}/{name}"] = torch.as_tensor(value).detach()
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    if not current().main:
        for _ in gathered:
            pass
        return
    entries = [Entry(name, _NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    part = work / f".{FILE}.{os.getpid()}.part"
    try:
        with SafetensorsWriter(part, entries, {"cursor": json.dumps(cursor)}) as file:
            for name, tensor in gathered:
                file.write(name, 0, memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        os.replace(part, work / FILE)
        sync_folder(work)
    finally:
        for _ in gathered:  # after an error: the other ranks still gather
            pass
        part.unlink(missing_ok=True)


def load_checkpoint(work: Path, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore in place; the cursor, or None when there is no usable checkpoint."""
    path = work / FILE
    if not path.is_file():
        return None
    try:
        file = safe_open(str(path), framework="pt")
        cursor = json.loads(file.metadata()["cursor"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None  # damaged, or of another format: the run starts again
    stored = list(file.keys())
    if {k.removeprefix("param/") for k in stored if k.startswith("param/")} != set(params):
        return None
    with torch.no_grad():
        for key in stored:
            kind, _, rest = key.partition("/")
            tensor = file.get_tensor(key)
            if kind == "param":
                params[rest].copy_(part_of(tensor, params[rest]))
            else:
                slot, _, name = rest.partition("/")
                p = params[name]
                # the step counter stays a CPU tensor, the moments follow the parameter; a copy, for the file is only mapped
                optimiser.state[p][slot] = tensor.clone() if slot == "step" else part_of(tensor.to(p.device, copy=True), p)
    return cursor
