"""The teacher pass: one forward over all rows, the head at supervised positions only."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
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

WINDOW_ROWS = 32_768  # sorted by length together: the longer the runs of equal length, the fewer the attention calls
SECTION = 16  # micro-batches of one process between two exchanges
KEEP_SECONDS = 30.0
DONE = "done.json"


class GuideSettings(BaseModel):
    """How the teacher pass runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="Teacher weights; auto: as the engine chooses. int8 is an approximation (docs/gift.md). The softmax is always fp32.",
    )
    batch_tokens: int = Field(8192, ge=1, description="Tokens in one forward pass: memory and speed, not the result.")
    layout: Literal["auto", "varlen", "padded"] = Field("auto", description="As in tune.")


def teach(model: nn.Module, rows: EncodedRows, settings: GuideSettings, work: Path, label: str = "guide") -> dict[str, Any]:
    """Write log p of every supervised token of `rows` under `model` into `work`; returns the summary.

    What was finished survives a crash: a second call on the same `work` goes on after it. Several processes share the
    micro-batches, which are those of a single process, and rank 0 writes: the file is the same to the last bit.

    Raises:
        RunFailed: a log-probability is not a number; the rows are named.
    """
    group = current()
    at = offsets(rows)
    total = int(at[-1])
    training = model.training
    model.eval()
    layout = None if settings.layout == "auto" else settings.layout
    out = np.zeros(0, np.float16)
    try:
        with torch.inference_mode(), opened(model, layout) as forward, forward.steady():
            # which batches there are depends on these; after a change the window in work starts again
            budget = settings.batch_tokens // forward.lanes
            way = {"batch_tokens": budget, "layout": forward.layout, "window": WINDOW_ROWS}
            done, batches = group.once(lambda: _begin(work, at, way))
            if total and group.main:
                out = np.memmap(work / FILE, dtype=np.float16, mode="r+")

            def keep(rows_done: int, batches_done: int) -> None:
                if total:
                    out.flush()
                write_json(work / DONE, {"rows": rows_done, "batches": batches_done, **way})

            kept = time.monotonic()
            with progress(label, int(rows.lengths.sum()), "tok", int(rows.lengths[:done].sum())) as bar:
                for first in range(done, len(rows), WINDOW_ROWS):
                    last = min(first + WINDOW_ROWS, len(rows))
                    pieces = micro_batches(np.arange(first, last), rows.lengths, budget, forward.layout)
                    bar.advance(int(sum(rows.lengths[p].sum() for p in pieces[:batches])))
                    section = SECTION * group.size
                    for start in range(batches, len(pieces), section):
                        part = pieces[start : start + section]
                        for found in group.exchange_with_main(_section(forward, rows, part, label, bar)):
                            for k, log_prob in found:
                                out[_places(at, part[k])] = log_prob
                        if group.main and time.monotonic() - kept > KEEP_SECONDS:
                            keep(first, start + len(part))
                            kept = time.monotonic()
                    batches = 0
                    if group.main:
                        keep(last, 0)
    finally:
        model.train(training)
    return group.once(lambda: _end(work, out))


def _begin(work: Path, at: np.ndarray, way: dict[str, Any]) -> tuple[int, int]:
    """Make the files, or find those of an interrupted pass: (rows of finished windows, batches finished in the next one)."""
    total = int(at[-1])
    at.tofile(work / ROWS)
    path = work / FILE
    done, batches = _cursor(work, way) if path.is_file() and path.stat().st_size == 2 * total else (0, 0)
    if not (done or batches):
        with open(path, "wb") as file:
            file.truncate(2 * total)
    return done, batches


def _section(forward: Forward, rows: EncodedRows, pieces: list[np.ndarray], label: str, bar: Bar) -> list[tuple[int, np.ndarray]]:
    """(index of the micro-batch, fp16 log p of its targets) for this rank's share of `pieces`."""
    group = current()
    owners = balanced([float(rows.lengths[p].sum()) for p in pieces], group.size)

    def own() -> list[tuple[int, np.ndarray]]:
        if group.lockstep or forward.lanes == 1:
            return run(group.turns(owners))
        # on a thread of its own, each with its share of the budget: what is written does not depend on who is ready first
        turns, lanes = group.turns(owners), min(forward.lanes, len(pieces))
        jobs = [partial(run, turns[lane::lanes]) for lane in range(lanes) if turns[lane::lanes]]
        return [one for part in forward.at_once(jobs) for one in part] if jobs else []

    def run(turns: Sequence[tuple[int, bool]]) -> list[tuple[int, np.ndarray]]:
        found = []
        for k, real in turns:
            batch = assemble(rows, pieces[k], forward.layout, forward.device)
            with forward.documents(batch):
                log_prob = -forward.nll(batch).cpu().numpy()
            failure = None
            if not np.isfinite(log_prob).all():
                bad = {rows.ids[int(batch.rows[r])] for r in batch.row.cpu().numpy()[~np.isfinite(log_prob)]}
                failure = RunFailed(f"{label}: the teacher's log-probabilities are not finite; rows: {', '.join(sorted(bad)[:8])}")
            if group.lockstep:
                group.agree(failure)
            elif failure is not None:
                raise failure
            if real:
                found.append((k, np.minimum(log_prob, 0.0).astype(np.float16)))
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


def _cursor(work: Path, way: dict[str, Any]) -> tuple[int, int]:
    """(rows of finished windows, batches finished in the next one) of an earlier call that went the same way."""
    try:
        known = read_json(work / DONE)
        rows, batches = int(known.pop("rows")), int(known.pop("batches"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0, 0
    if known == way:
        return rows, batches
    return (rows, 0) if known.get("window") == way["window"] else (0, 0)


def _places(at: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the targets of these rows, one row after another, lie in the store: int64 [n]."""
    counts = at[rows + 1] - at[rows]
    before = np.cumsum(counts) - counts
    return np.repeat(at[rows] - before, counts) + np.arange(counts.sum())
