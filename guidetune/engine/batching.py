"""Which rows make an optimiser batch, and how they are laid out in micro-batches.

The rows of optimiser batch `step` follow from (seed, epoch, step) alone. Inside it micro-batches are formed by length under a
token budget: a matter of speed, not of result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from guidetune.artefacts import derive_seed
from guidetune.data.rows import EncodedRows

Layout = Literal["varlen", "padded"]


def steps_per_epoch(rows: int, batch: int) -> int:
    return -(-rows // batch)


@lru_cache(maxsize=1)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in their order, read-only. Drawn once per epoch and kept: 4 bytes per row (8 from 2^31 rows on)."""
    order = np.arange(rows, dtype=np.int32 if rows <= np.iinfo(np.int32).max else np.int64)
    np.random.default_rng(derive_seed(seed, "order", epoch)).shuffle(order)  # as `permutation(rows)` orders them, without its 8 bytes
    order.flags.writeable = False
    return order


def optimiser_batch(rows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Row indices of optimiser batch `step` (counted over all epochs), int64 [batch]."""
    epoch, within = divmod(step, steps_per_epoch(rows, batch))
    return epoch_order(rows, seed, epoch)[within * batch : (within + 1) * batch].astype(np.int64)


def micro_batches(indices: np.ndarray, lengths: np.ndarray, max_tokens: int, layout: Layout) -> list[np.ndarray]:
    """Split rows into groups of at most `max_tokens` tokens (padding counted in the padded layout), longest first.

    A row longer than the budget makes a group of its own.
    """
    # stable sort: the layout, like the batch, is a function of its inputs alone
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    groups: list[np.ndarray] = []
    start, cost = 0, 0
    for i, row in enumerate(ordered):
        length = int(lengths[row])
        longest = int(lengths[ordered[start]])
        new = cost + length if layout == "varlen" else longest * (i - start + 1)
        if i > start and new > max_tokens:
            groups.append(ordered[start:i])
            start, new = i, length
        cost = new
    if len(ordered) > start:
        groups.append(ordered[start:])
    return groups


@dataclass
class MicroBatch:
    """Rows as tensors. `predicts` are flat positions whose hidden state predicts a target; n of them.

    input_ids, position_ids: int64 [1, N] (varlen) or [B, T] (padded); attention_mask: [B, T] or None;
    targets int64 [n]; loss_weight fp32 [n]; row int64 [n] (which row of `rows` the target belongs to).
    """

    rows: np.ndarray
    lengths: list[int]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    predicts: torch.Tensor
    targets: torch.Tensor
    loss_weight: torch.Tensor
    row: torch.Tensor

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def assemble(data: EncodedRows, rows: np.ndarray, layout: Layout, device: torch.device | str = "cpu", pad: int = 0) -> MicroBatch:
    """Lay the given rows out as one micro-batch."""
    docs = [data[int(i)] for i in rows]
    lengths = [len(d.input_ids) for d in docs]
    ids = np.concatenate([d.input_ids for d in docs]).astype(np.int64)
    weight = np.concatenate([d.loss_weight for d in docs]).astype(np.float32)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    weight[starts] = 0.0  # nothing predicts a document's first token
    at = np.flatnonzero(weight > 0)
    row = np.repeat(np.arange(len(docs)), lengths)[at]
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    if layout == "varlen":
        flat_ids, flat_pos, mask, predicts = ids[None], positions[None], None, at - 1
    else:
        width = max(lengths)
        flat_ids = np.full((len(docs), width), pad, dtype=np.int64)
        flat_pos = np.zeros_like(flat_ids)
        mask = np.zeros_like(flat_ids)
        inside = np.arange(width)[None] < np.array(lengths)[:, None]
        flat_ids[inside], flat_pos[inside], mask[inside] = ids, positions, 1
        predicts = row * width + positions[at] - 1

    def move(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return MicroBatch(
        rows=rows,
        lengths=lengths,
        input_ids=move(flat_ids),
        position_ids=move(flat_pos),
        attention_mask=None if mask is None else move(mask),
        predicts=move(predicts),
        targets=move(ids[at]),
        loss_weight=move(weight[at]),
        row=move(row),
    )


def sorted_batches(
    data: EncodedRows, indices: np.ndarray, max_tokens: int, layout: Layout, device: torch.device | str
) -> Iterator[MicroBatch]:
    """Micro-batches over `indices`, for passes without an optimiser (guidance, validation)."""
    for group in micro_batches(indices, data.lengths, max_tokens, layout):
        yield assemble(data, group, layout, device)
