"""The guidance store: log p in fp16, two bytes per supervised token, memory-mapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from guidetune.artefacts import atomic_lines, finished
from guidetune.data.rows import EncodedRows
from guidetune.errors import BadInput

FILE = "log_prob.f16"
ROWS = "offsets.i64"
LOW = 0.05
BINS = 20


class Guidance:
    """Read access to one teacher's log-probabilities; rows in the order of the encoded rows they were made from."""

    def __init__(self, log_prob: np.ndarray, offsets: np.ndarray, summary: dict[str, Any] | None = None) -> None:
        self.log_prob, self.offsets, self.summary = log_prob, offsets, summary or {}

    @classmethod
    def open(cls, folder: Path) -> Guidance:
        """Map a finished guidance folder.

        Raises:
            BadInput: the folder is not a finished guidance artefact.
        """
        manifest = finished(Path(folder))
        if manifest is None:
            raise BadInput(f"{folder} is not a finished guidance folder; run `guidetune guide` on the recipe")
        offsets = _mapped(Path(folder) / ROWS, np.int64)
        log_prob = _mapped(Path(folder) / FILE, np.float16)
        if len(offsets) == 0 or offsets[-1] != len(log_prob):
            raise BadInput(f"{folder} is damaged ({len(log_prob)} values); delete it and run again")
        return cls(log_prob, offsets, manifest.get("result", {}))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> np.ndarray:
        """fp16 [n]: log p of the row's supervised tokens, in order of position."""
        return self.log_prob[self.offsets[i] : self.offsets[i + 1]]


def _mapped(path: Path, dtype: type) -> np.ndarray:
    """A file of numbers, read where it is asked for."""
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)


def offsets(rows: EncodedRows) -> np.ndarray:
    """Where each row's values begin, and where the last one's end: int64 [rows + 1]."""
    out = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(rows.supervised, out=out[1:])
    return out


def summarise(log_prob: np.ndarray) -> dict[str, Any]:
    """Mean confidence, share of tokens below 0.05, mean -log p, histogram of confidence in 20 equal bins."""
    counts = np.zeros(BINS, dtype=np.int64)
    total = low = nll = 0.0
    for a in range(0, len(log_prob), 1 << 20):
        part = np.asarray(log_prob[a : a + (1 << 20)], dtype=np.float32)
        q = np.exp(part)
        counts += np.histogram(q, bins=BINS, range=(0.0, 1.0 + 1e-6))[0]
        total += float(q.sum(dtype=np.float64))
        nll -= float(part.sum(dtype=np.float64))
        low += float((q < LOW).sum())
    n = max(len(log_prob), 1)
    return {
        "mean_confidence": total / n,
        "below_0.05": low / n,
        "mean_nll": nll / n,
        "supervised_tokens": len(log_prob),
        "histogram": {"edges": [round(i / BINS, 4) for i in range(BINS + 1)], "counts": counts.tolist()},
    }


def export(folder: Path, rows: EncodedRows, path: Path) -> int:
    """Write `id, positions, target_ids, log_prob` per row as JSON lines; returns the number of rows."""
    store = Guidance.open(folder)
    if len(store) != len(rows):
        raise BadInput(f"{folder} holds {len(store)} rows, the data {len(rows)}: they do not belong together")
    with atomic_lines(Path(path)) as write:
        for i, row in enumerate(rows):
            at = np.flatnonzero(row.loss_weight > 0)
            write(
                json.dumps(
                    {
                        "id": row.id,
                        "positions": at.tolist(),
                        "target_ids": row.input_ids[at].tolist(),
                        "log_prob": [round(float(v), 6) for v in store.row(i)],
                    }
                )
            )
    return len(rows)
