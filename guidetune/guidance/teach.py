"""The teacher pass: one forward over all rows, the head at supervised positions only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from guidetune.artefacts import read_json, write_json
from guidetune.data.rows import EncodedRows
from guidetune.engine.batching import sorted_batches
from guidetune.engine.forward import opened
from guidetune.errors import RunFailed
from guidetune.guidance.store import FILE, ROWS, offsets, summarise
from guidetune.progress import progress

CHUNK_ROWS = 4096
DONE = "done.json"


class GuideSettings(BaseModel):
    """How the teacher pass runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Teacher weights; auto: as the engine chooses. The softmax is always fp32."
    )
    batch_tokens: int = Field(8192, ge=1, description="Tokens in one forward pass: memory and speed, not the result.")
    layout: Literal["auto", "varlen", "padded"] = Field("auto", description="As in tune.")


def teach(model: nn.Module, rows: EncodedRows, settings: GuideSettings, work: Path, label: str = "guide") -> dict[str, Any]:
    """Write log p of every supervised token of `rows` under `model` into `work`; returns the summary.

    Finished chunks of rows survive a crash: a second call on the same `work` goes on after them.

    Raises:
        RunFailed: a log-probability is not a number; the rows are named.
    """
    at = offsets(rows)
    total = int(at[-1])
    at.tofile(work / ROWS)
    path = work / FILE
    done = 0
    if (work / DONE).is_file() and path.is_file() and path.stat().st_size == 2 * total:
        done = int(read_json(work / DONE)["rows"])
    else:
        with open(path, "wb") as file:
            file.truncate(2 * total)
    out = np.memmap(path, dtype=np.float16, mode="r+") if total else np.zeros(0, np.float16)
    training = model.training
    model.eval()
    layout = None if settings.layout == "auto" else settings.layout
    try:
        tokens = int(rows.lengths.sum())
        with (
            torch.inference_mode(),
            opened(model, layout) as forward,
            forward.steady(),
            progress(label, tokens, "tok", int(rows.lengths[:done].sum())) as bar,
        ):
            for first in range(done, len(rows), CHUNK_ROWS):
                last = min(first + CHUNK_ROWS, len(rows))
                for batch in sorted_batches(rows, np.arange(first, last), settings.batch_tokens, forward.layout, forward.device):
                    with forward.documents(batch):
                        log_prob = -forward.nll(batch).cpu().numpy()
                    if not np.isfinite(log_prob).all():
                        bad = {rows.ids[int(batch.rows[r])] for r in batch.row.cpu().numpy()[~np.isfinite(log_prob)]}
                        raise RunFailed(f"{label}: the teacher's log-probabilities are not finite; rows: {', '.join(sorted(bad)[:8])}")
                    row_of = batch.row.cpu().numpy()
                    for k, i in enumerate(batch.rows):
                        out[at[i] : at[i + 1]] = np.minimum(log_prob[row_of == k], 0.0).astype(np.float16)
                    bar.advance(batch.tokens)
                if total:
                    out.flush()
                write_json(work / DONE, {"rows": last})
    finally:
        model.train(training)
    if total:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    summary = summarise(out)
    (work / DONE).unlink(missing_ok=True)
    return summary
