"""Attention for rows that begin alike: what they share runs once.

A batch is one packed row of tokens without padding, in three levels: headers (a few-shot preamble that several questions begin with),
prompts (a question), tails (its options). A token sees its own segment up to itself and the whole of the segments above it:

    header token   keys = header[<= t]
    prompt token   keys = header, prompt[<= t]
    tail token     keys = header, prompt, own tail[<= t]

Positions restart at each segment where its parent ends, so every token has the keys and the position that it has in a row of its own, and
the result is that of the rows one by one but for rounding. Registered with transformers as `guidetune_prefix`; sliding windows and
soft-capped scores are kept. Hydragen (arXiv 2402.05099) and cascade attention are the same idea on a GPU's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from guidetune.engine.attention import masked_attention

NAME = "guidetune_prefix"
FILL = 0.8  # the least share of real tokens in a block of segments that are padded to one length


class NotShareable(Exception):
    """The model's attention has a term that this routine does not know."""


@dataclass(frozen=True)
class Tree:
    """A prompt after `header` (a place in the list of headers, or None), and the input tokens of what may follow it."""

    header: int | None
    prompt: Sequence[int]
    tails: Sequence[Sequence[int]] = ()


@dataclass
class Block:
    """C segments of one level, padded to Lq queries and Lk keys.

    queries: places of the real queries in the packed row. Contiguous segments of equal length have `span` instead of gathered indices.
    mask: bool [C or 1, 1, Lq, Lk], or None for plain causal attention (padding at the end of a causal segment is never seen).
    """

    count: int
    query_index: torch.Tensor  # [C * Lq]
    key_index: torch.Tensor  # [C * Lk]
    real: torch.Tensor | None  # places of [C * Lq] that are no padding; None: all
    mask: torch.Tensor | None
    span: slice | None = None
    _windowed: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def mask_of(self, window: int | None, positions: torch.Tensor) -> torch.Tensor | None:
        """`mask`, and keys no more than `window - 1` positions before their query."""
        if window is None:
            return self.mask
        if window not in self._windowed:
            at, of = positions[self.query_index].view(self.count, -1, 1), positions[self.key_index].view(self.count, 1, -1)
            mask = self.mask
            if int(at.max()) >= window:
                near = at - of < window  # [C, Lq, Lk]
                mask = (torch.ones_like(near[0]).tril() if mask is None else mask) & near[:, None]
            self._windowed[window] = mask
        return self._windowed[window]


@dataclass
class Packed:
    """A batch of trees as one row: `ids` and `positions` [N], where each segment starts, and the attention blocks."""

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: list[Block]
    header_starts: dict[int, int]
    prompt_starts: list[int]
    tail_starts: list[list[int]]
    windows: set[int] = field(default_factory=set)  # the sliding windows that the model's layers asked for


# The batch in work: transformers calls the attention function by its name, with no place for it.
_packed: Packed | None = None


def pack(trees: Sequence[Tree], headers: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Lay the trees out, headers first, then all prompts, then all tails."""
    ids: list[int] = []
    positions: list[np.ndarray] = []

    def put(tokens: Sequence[int], first: int) -> int:
        start = len(ids)
        ids.extend(tokens)
        positions.append(np.arange(first, first + len(tokens)))
        return start

    used = dict.fromkeys(tree.header for tree in trees if tree.header is not None)
    header_starts = {h: put(headers[h], 0) for h in used}
    length = {None: 0, **{h: len(headers[h]) for h in used}}
    prompt_starts = [put(tree.prompt, length[tree.header]) for tree in trees]
    tail_starts = [[put(tail, length[tree.header] + len(tree.prompt)) for tail in tree.tails] for tree in trees]

    # Segments as (parts they see whole, own start, lengths of their tails); a prompt or a header is one tail of nothing.
    levels: list[list[_Segment]] = [
        [_Segment((), header_starts[h], (length[h],)) for h in used],
        [
            _Segment(_part(header_starts, tree.header, length[tree.header]), start, (len(tree.prompt),))
            for tree, start in zip(trees, prompt_starts, strict=True)
            if len(tree.prompt)
        ],
        [
            _Segment(
                (*_part(header_starts, tree.header, length[tree.header]), (start, len(tree.prompt))),
                starts[0],
                tuple(len(tail) for tail in tree.tails if len(tail)),
            )
            for tree, start, starts in zip(trees, prompt_starts, tail_starts, strict=True)
            if any(len(tail) for tail in tree.tails)
        ],
    ]
    blocks = [_block(group, device) for level in levels for group in _groups(level)]
    return Packed(
        torch.tensor(ids, device=device),
        torch.from_numpy(np.concatenate(positions)).to(device),
        blocks,
        header_starts,
        prompt_starts,
        tail_starts,
    )


@dataclass(frozen=True)
class _Segment:
    above: tuple[tuple[int, int], ...]  # (start, length) of what it sees whole
    start: int
    tails: tuple[int, ...]  # lengths of the parts that do not see each other

    @property
    def seen(self) -> int:
        return sum(length for _, length in self.above)

    @property
    def length(self) -> int:
        return sum(self.tails)


def _part(starts: dict[int, int], header: int | None, length: int) -> tuple[tuple[int, int], ...]:
    return () if header is None else ((starts[header], length),)


def _groups(level: list[_Segment]) -> Iterator[list[_Segment]]:
    """Segments of similar size, neighbours after sorting, that together waste little when they are padded to one shape."""
    group: list[_Segment] = []
    real = seen = length = 0
    for segment in sorted(level, key=lambda s: (s.seen > 0, -(s.seen + s.length), -s.length, s.start)):
        size = segment.seen + segment.length
        widest = max(seen, segment.seen) + max(length, segment.length)
        if group and ((segment.seen > 0) != (group[0].seen > 0) or real + size < FILL * (len(group) + 1) * widest):
            yield group
            group, real, seen, length = [], 0, 0, 0
        group.append(segment)
        real, seen, length = real + size, max(seen, segment.seen), max(length, segment.length)
    if group:
        yield group


def _block(group: list[_Segment], device: torch.device) -> Block:
    count, seen, length = len(group), max(s.seen for s in group), max(s.length for s in group)
    # Padding repeats a place that exists; nothing real sees it, and what it gives is thrown away.
    queries = np.zeros((count, length), dtype=np.int64)
    keys = np.zeros((count, seen + length), dtype=np.int64)
    real = np.zeros((count, length), dtype=bool)
    branch = np.full((count, length), -1, dtype=np.int64)
    above = np.zeros((count, seen), dtype=bool)
    for row, segment in enumerate(group):
        own = np.arange(segment.start, segment.start + segment.length)
        queries[row] = segment.start
        queries[row, : len(own)] = own
        real[row, : len(own)] = True
        branch[row, : len(own)] = np.repeat(np.arange(len(segment.tails)), segment.tails)
        place = 0
        for start, size in segment.above:
            keys[row, place : place + size] = np.arange(start, start + size)
            place += size
        above[row, :place] = True
    keys[:, seen:] = queries
    mask = None
    if seen or any(len(segment.tails) > 1 for segment in group):
        causal = np.tri(length, dtype=bool)
        same = (branch[:, :, None] == branch[:, None, :]) & causal
        mask = np.concatenate([np.broadcast_to(above[:, None, :], (count, length, seen)), same], axis=-1)[:, None]
        if bool((mask == mask[:1]).all()):
            mask = mask[:1]
    flat = queries.ravel()
    contiguous = bool(real.all()) and bool((np.diff(flat) == 1).all())
    return Block(
        count,
        torch.from_numpy(flat).to(device),
        torch.from_numpy(keys.ravel()).to(device),
        None if real.all() else torch.from_numpy(real.ravel().nonzero()[0]).to(device),
        None if mask is None else torch.from_numpy(np.ascontiguousarray(mask)).to(device),
        slice(int(flat[0]), int(flat[-1]) + 1) if contiguous else None,
    )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, N, D], key and value [1, Hkv, N, D] → [1, N, Hq, D], each token attending as the packed batch says."""
    if _packed is None or len(_packed.ids) != query.shape[2]:
        raise RuntimeError("prefix attention was called outside `running`")
    if unknown := [name for name in ("s_aux", "position_bias") if other.get(name) is not None]:
        raise NotShareable(unknown[0])
    if sliding_window is not None:
        _packed.windows.add(int(sliding_window))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    for block in _packed.blocks:
        qb = _take(q, block.query_index, block.span, block.count)
        own = block.span if block.mask is None else None  # without a mask the keys are the queries' own places
        kb, vb = (_take(x, block.key_index, own, block.count) for x in (k, v))
        o = masked_attention(qb, kb, vb, block.mask_of(sliding_window, _packed.positions), scaling, softcap)
        o = o.transpose(1, 2).reshape(-1, *out.shape[1:])  # [C * Lq, H, D]
        if block.span is not None:
            out[block.span] = o
        elif block.real is None:
            out[block.query_index] = o
        else:
            out[block.query_index[block.real]] = o[block.real]
    return out[None], None


def _take(x: torch.Tensor, index: torch.Tensor, span: slice | None, count: int) -> torch.Tensor:
    """[N, H, D] → [C, H, L, D]."""
    rows = x[span] if span is not None else x.index_select(0, index)
    return rows.unflatten(0, (count, -1)).transpose(1, 2)


@contextmanager
def running(packed: Packed) -> Iterator[None]:
    """The batch that the forward pass inside the block works on."""
    global _packed
    before, _packed = _packed, packed
    try:
        yield
    finally:
        _packed = before


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """Give the transformers model this attention inside the block; what it had comes back afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "sdpa")


def declared(model: nn.Module) -> bool:
    """Whether the model takes a registered attention function, and has no layer but full and sliding attention."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return bool(getattr(type(model), "_supports_attention_backend", False)) and set(kinds) <= {"full_attention", "sliding_attention"}


def windows_declared(model: nn.Module) -> set[int]:
    """The sliding windows that the model's config names for its layers."""
    config = model.config.get_text_config(decoder=True)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return {int(window)} if isinstance(window, int) and (not kinds or "sliding_attention" in kinds) else set()
