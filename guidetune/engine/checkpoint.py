"""One file holds all that a run needs to go on: trainable tensors, optimiser moments, cursor. Safetensors, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from guidetune.artefacts import write_bytes_atomic
from guidetune.engine.distributed import current, part_of, whole

FILE = "checkpoint.safetensors"


def save_checkpoint(work: Path, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, cursor: dict[str, Any]) -> None:
    """Order, dropout and schedule follow from (seed, step), so the cursor replaces generator states.

    Written whole by rank 0, so that any number of processes can go on; where tensors are sharded every rank must call it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, p in params.items():
        tensors[f"param/{name}"] = whole(p.detach()).cpu().contiguous()
        for key, value in optimiser.state.get(p, {}).items():
            tensors[f"state/{key}/{name}"] = whole(torch.as_tensor(value).detach()).cpu().contiguous()
    if not current().main:
        return
    # clones: tied tensors must not share memory in a safetensors file
    write_bytes_atomic(work / FILE, save({k: v.clone() for k, v in tensors.items()}, metadata={"cursor": json.dumps(cursor)}))


def load_checkpoint(work: Path, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore in place; the cursor, or None when there is no usable checkpoint."""
    path = work / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}
            cursor = json.loads(file.metadata()["cursor"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if {k.removeprefix("param/") for k in stored if k.startswith("param/")} != set(params):
        return None
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(part_of(stored[f"param/{name}"], p))
            keys = [k.split("/", 2)[1] for k in stored if k.startswith("state/") and k.split("/", 2)[2] == name]
            if keys:
                # the step counter stays a CPU tensor, the moments follow the parameter
                optimiser.state[p] = {k: (v if k == "step" else part_of(v, p)) for k in keys for v in [stored[f"state/{k}/{name}"]]}
    return cursor
