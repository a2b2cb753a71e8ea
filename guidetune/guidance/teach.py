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
from guidetune.engine.batching import assemble, micro_batches
from guidetune.engine.distributed import balanced, current
from guidetune.engine.forward import Forward, opened
from guidetune.errors import RunFailed
from guidetune.guidance.store import FILE, ROWS, offsets, summarise
from guidetune.progress import Bar, progress

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

    Finished chunks of rows survive a crash: a second call on the same `work` goes on after them. Several processes share the
    micro-batches of each chunk, which are those of a single process, and rank 0 writes: the file is the same to the last bit.

    Raises:
        RunFailed: a log-probability is not a number; the rows are named.
    """
    group = current()
    at = offsets(rows)
    done = group.once(lambda: _begin(work, at))
    total = int(at[-1])
    out = np.memmap(work / FILE, dtype=np.float16, mode="r+") if total and group.main else np.zeros(0, np.float16)
    training = model.training
    model.eval()
    layout = None if settings.layout == "auto" else settings.layout
    try:
        tokens = int(rows.lengths.sum())
        with (
            torch.inference_mode(),
            opened(model, layout, exact_head=True) as forward,
            progress(label, tokens, "tok", int(rows.lengths[:done].sum())) as bar,
        ):
            for first in range(done, len(rows), CHUNK_ROWS):
                last = min(first + CHUNK_ROWS, len(rows))
                for found in group.exchange_with_main(_chunk(forward, rows, np.arange(first, last), settings.batch_tokens, label, bar)):
                    for i, log_prob in found:
                        out[at[i] : at[i + 1]] = log_prob
                if group.main:
                    if total:
                        out.flush()
                    write_json(work / DONE, {"rows": last})
    finally:
        model.train(training)
    return group.once(lambda: _end(work, out))


def _begin(work: Path, at: np.ndarray) -> int:
    """Make the files, or find those of an interrupted pass; the number of rows that are finished."""
    total = int(at[-1])
    at.tofile(work / ROWS)
    path = work / FILE
    if (work / DONE).is_file() and path.is_file() and path.stat().st_size == 2 * total:
        return int(read_json(work / DONE)["rows"])
    with open(path, "wb") as file:
        file.truncate(2 * total)
    return 0


def _chunk(
    forward: Forward, rows: EncodedRows, indices: np.ndarray, batch_tokens: int, label: str, bar: Bar
) -> list[tuple[int, np.ndarray]]:
    """(row, fp16 log p of its targets) for this rank's micro-batches of a chunk of rows."""
    group = current()
    pieces = micro_batches(indices, rows.lengths, batch_tokens, forward.layout)
    owners = balanced([float(rows.lengths[p].sum()) for p in pieces], group.size)

    def own() -> list[tuple[int, np.ndarray]]:
        found = []
        for k, real in group.turns(owners):
            batch = assemble(rows, pieces[k], forward.layout, forward.device)
            with forward.documents(batch):
                log_prob = -forward.nll(batch).cpu().numpy()
            row_of = batch.row.cpu().numpy()
            failure = None
            if not np.isfinite(log_prob).all():
                bad = {rows.ids[int(batch.rows[r])] for r in row_of[~np.isfinite(log_prob)]}
                failure = RunFailed(f"{label}: the teacher's log-probabilities are not finite; rows: {', '.join(sorted(bad)[:8])}")
            if group.lockstep:
                group.agree(failure)
            elif failure is not None:
                raise failure
            if real:
                found += [(int(i), np.minimum(log_prob[row_of == j], 0.0).astype(np.float16)) for j, i in enumerate(batch.rows)]
                bar.advance(batch.tokens * group.size)  # the others keep about the same pace
        return found

    return own() if group.lockstep else group.agreed(own)


def _end(work: Path, out: np.ndarray) -> dict[str, Any]:
    if len(out):
        handle = os.open(work / FILE, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    summary = summarise(out)
    (work / DONE).unlink(missing_ok=True)
    return summary
