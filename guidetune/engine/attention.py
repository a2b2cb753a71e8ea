"""Attention without padding: documents lie one after another in one row, and each sees only itself.

On CPUs attention is written out: documents of similar length share two batched products and a softmax (a shorter one is filled up
with rows that nothing reads), long ones go tile by tile so that the masked half is mostly not computed. Forward and backward were
measured several times faster than `scaled_dot_product_attention` there. Elsewhere, and where dropout or a soft cap asks for it: one
causal `scaled_dot_product_attention` call per run of equal lengths, or on GPUs torch's variable-length attention for all at once.
Registered with transformers as `guidetune_varlen`. Exact: a changed document leaves every other document's outputs bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from guidetune.engine import scratch
from guidetune.errors import BadInput

NAME = "guidetune_varlen"

# Rows of a score tile; documents up to half as long again are one tile.
TILE = 160
# Scores kept for the backward pass: documents up to this length; longer ones compute theirs again.
KEPT_LENGTH = 512
# Wasted scores (of one head) up to which filling up a document is cheaper than a call of its own; scores of one call and head.
FILL, GROUP = 8192, 524_288
# Lengths are filled up to a multiple of this: oneDNN compiles a kernel for every shape it has not seen, about a millisecond each.
STEP = 16


class Group:
    """`count` neighbouring documents taken as `length` long each; where they are shorter, `gather` fills up and `back` undoes it."""

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        self.start, self.count, self.total = start, len(lengths), sum(lengths)
        self.length = rounded(max(lengths))
        self.gather: torch.Tensor | None = None
        self._masks: dict[Any, torch.Tensor] = {}
        if min(lengths) < self.length:
            each = np.asarray(lengths)
            row = np.arange(self.length)[None]
            inside = row < each[:, None]
            # what fills up is the document's own last row: finite, and no gradient comes back from it
            gather = (each.cumsum() - each)[:, None] + np.minimum(row, each[:, None] - 1)
            places = (gather.ravel(), np.flatnonzero(inside), np.flatnonzero(~inside))
            self.gather, self.back, self.fill = (torch.from_numpy(x).to(device) for x in places)

    def mask(self, a: int, b: int, window: int | None, device: torch.device) -> tuple[torch.Tensor, int]:
        """What is added to the scores of rows a … b, [b − a, 1, columns], and the first column it is for."""
        key = (a, b, window)
        if key not in self._masks:
            first = 0 if window is not None and window < b else a
            i, j = torch.arange(a, b, device=device)[:, None], torch.arange(first, b, device=device)[None]
            hidden = j > i if first else (j > i) | (j <= i - (window or b + 1))
            self._masks[key] = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))[:, None]
        mask = self._masks[key]
        return mask, b - mask.shape[-1]

    def lay(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype, gradient: bool = False) -> torch.Tensor:
        """`rows` of [N, H, D] → [count · Hkv, length · (H / Hkv), D]; filled-up rows of a gradient are zero."""
        if gradient and self.gather is not None:
            x.index_fill_(0, self.fill, 0)
        heads, dim = x.shape[1:]
        out = torch.empty(self.count * kv_heads, self.length * (heads // kv_heads), dim, dtype=dtype, device=x.device)
        part = x.unflatten(0, (self.count, self.length)).unflatten(2, (kv_heads, heads // kv_heads))
        out.view(self.count, kv_heads, self.length, heads // kv_heads, dim).copy_(part.transpose(1, 2))
        return out

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """This group's rows of x [N, ...], filled up: [count · length, ...]."""
        part = x[self.start : self.start + self.total]
        return part if self.gather is None else part.index_select(0, self.gather)

    def put(self, x: torch.Tensor, kv_heads: int, out: torch.Tensor) -> None:
        """The reverse of `lay`, into out [N, H, D]."""
        heads, dim = out.shape[1:]
        x = x.view(self.count, kv_heads, self.length, heads // kv_heads, dim).transpose(1, 2)
        part = out[self.start : self.start + self.total]
        if self.gather is None:
            part.unflatten(0, (self.count, self.length)).unflatten(2, (kv_heads, heads // kv_heads)).copy_(x)
        else:
            part.copy_(x.reshape(-1, heads, dim).index_select(0, self.back))

    def tiles(self) -> list[tuple[int, int]]:
        n = -(-self.length // (TILE + TILE // 2)) if self.length <= TILE + TILE // 2 else -(-self.length // TILE)
        step = -(-self.length // n // 8) * 8 if n > 1 else self.length
        return [(a, min(a + step, self.length)) for a in range(0, self.length, step)]


def rounded(length: int) -> int:
    return -(-length // STEP) * STEP


class Documents:
    """The documents of one pass, in groups that are computed together."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.total = sum(lengths)
        self.groups: list[Group] = []
        start, at = 0, 0
        while at < len(lengths):
            longest, end = lengths[at], at + 1
            longest = rounded(longest)
            while end < len(lengths):
                new = max(longest, rounded(lengths[end]))
                waste = new * new - rounded(lengths[end]) ** 2 + (end - at) * (new * new - longest * longest)
                if waste > FILL or (end - at + 1) * new * new > GROUP:
                    break
                longest, end = new, end + 1
            self.groups.append(Group(start, lengths[at:end], torch.device(device)))
            start += sum(lengths[at:end])
            at = end


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Rotary positions in fp32, halves paired: (x₁ c − x₂ s, x₂ c + x₁ s), or the transposed map. x, out [n, H, D]; cos, sin [n, 1, D]."""
    h = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    sign = -1 if transposed else 1
    out[..., :h].addcmul_(x[..., h:], sin[..., h:] if transposed else sin[..., :h], value=-sign)
    out[..., h:].addcmul_(x[..., :h], sin[..., :h] if transposed else sin[..., h:], value=sign)
    return out


def rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scaling: float,
    out: Sequence[torch.Tensor],
    transposed: bool = False,
) -> None:
    """q · scaling and k, rotated in fp32 and rounded once, into out. q [N, Hq, D], k [N, Hkv, D]; cos, sin [N, 1, D] (None: not rotated).

    A few rows at a time: see scratch.py.
    """  # fmt: skip
    (n, heads, dim), kv = q.shape, k.shape[1]
    for a, b in scratch.pieces(n, (heads + kv) * dim):
        x = scratch.block("rotary in", (b - a, heads + kv, dim), torch.float32, q.device)
        x[:, :heads], x[:, heads:] = q[a:b], k[a:b]
        if cos is not None and sin is not None:
            y = scratch.block("rotary out", (b - a, heads + kv, dim), torch.float32, q.device)
            x = _rotate(x, cos[a:b], sin[a:b], y, transposed)
        x[:, :heads] *= scaling
        out[0][a:b], out[1][a:b] = x[:, :heads], x[:, heads:]


def _weights(q: torch.Tensor, k: torch.Tensor, group: Group, a: int, b: int, per: int, window: int | None) -> torch.Tensor:
    """softmax(q kᵀ + causal mask) of rows a … b, in the dtype of q: [B, (b − a) · per, b]."""
    z = torch.bmm(q[:, a * per : b * per], k[:, :b].transpose(1, 2)).float()
    mask, first = group.mask(a, b, window, q.device)
    z.view(len(z), b - a, per, b)[..., first:] += mask
    return torch.softmax(z, -1, out=z).to(q.dtype)


def attend_documents(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    documents: Documents,
    scaling: float,
    window: int | None = None,
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Causal attention inside each document: q [N, Hq, D], k and v [N, Hkv, D] → [N, Hq · D], and what the backward pass needs.

    Rows behind the last document give zeros. cos, sin [N, 1, D] rotate q and k first (None: they come rotated). window: a row
    sees itself and the window − 1 before it.
    """
    n, heads, dim = q.shape
    kv, per, dtype = k.shape[1], heads // k.shape[1], v.dtype
    qk = torch.empty(n, heads + kv, dim, dtype=dtype, device=q.device)
    rotated(q, k, cos, sin, scaling, (qk[:, :heads], qk[:, heads:]))
    out = torch.empty(n, heads, dim, dtype=dtype, device=q.device)
    out[documents.total :] = 0
    kept = []
    for group in documents.groups:
        part = group.rows(qk)
        ql, kl, vl = group.lay(part[:, :heads], kv, dtype), group.lay(part[:, heads:], kv, dtype), group.lay(group.rows(v), kv, dtype)
        tiles, parts = group.tiles(), []
        ol = torch.empty_like(ql) if len(tiles) > 1 else None
        for a, b in tiles:
            p = _weights(ql, kl, group, a, b, per, window)
            if ol is None:
                ol = torch.bmm(p, vl)
            else:
                ol[:, a * per : b * per] = torch.bmm(p, vl[:, :b])
            parts.append(p if group.length <= KEPT_LENGTH else None)
        group.put(ol, kv, out)
        kept.append((ql, kl, vl, parts))
    return out.view(n, heads * dim), (kept, kv, per, scaling, window)


def attend_documents_backward(
    do: torch.Tensor, saved: tuple[Any, ...], cos: torch.Tensor | None, sin: torch.Tensor | None, documents: Documents, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q [N, Hq, D], k and v [N, Hkv, D] in `dtype`, from that of the output [N, Hq · D]."""
    kept, kv, per, scaling, window = saved
    n, dim, heads = len(do), kept[0][0].shape[-1], kv * per
    do = do.view(n, heads, dim)
    # the sums over several tiles are in fp32, and stay so until they are rotated back
    summed = torch.float32 if any(len(group.tiles()) > 1 for group in documents.groups) else dtype
    dqk = torch.empty(n, heads + kv, dim, dtype=summed, device=do.device)
    dv = torch.empty(n, kv, dim, dtype=dtype, device=do.device)
    dqk[documents.total :] = 0
    dv[documents.total :] = 0
    for group, (ql, kl, vl, parts) in zip(documents.groups, kept, strict=True):
        dol = group.lay(group.rows(do), kv, dtype, gradient=True)
        tiles = group.tiles()
        whole = len(tiles) == 1
        dql = None if whole else torch.empty_like(ql)
        dkl, dvl = (None, None) if whole else (torch.zeros_like(kl, dtype=torch.float32), torch.zeros_like(vl, dtype=torch.float32))
        for (a, b), p in zip(tiles, parts, strict=True):
            if p is None:
                p = _weights(ql, kl, group, a, b, per, window)
            g = dol[:, a * per : b * per]
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(g, vl[:, :b].transpose(1, 2)), p, -1, p.dtype)
            if whole:
                dql, dkl, dvl = torch.bmm(ds, kl), torch.bmm(ds.transpose(1, 2), ql), torch.bmm(p.transpose(1, 2), dol)
            else:
                dql[:, a * per : b * per] = torch.bmm(ds, kl[:, :b])
                dkl[:, :b] += torch.bmm(ds.transpose(1, 2), ql[:, a * per : b * per])
                dvl[:, :b] += torch.bmm(p.transpose(1, 2), g)
        group.put(dql, kv, dqk[:, :heads])
        group.put(dkl, kv, dqk[:, heads:])
        group.put(dvl, kv, dv)
    dq = torch.empty(n, heads, dim, dtype=dtype, device=do.device)
    dk = torch.empty(n, kv, dim, dtype=dtype, device=do.device)
    rotated(dqk[:, :heads], dqk[:, heads:], cos, sin, scaling, (dq, dk), transposed=True)
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    """The routine above inside autograd: q [N, Hq, D], k, v [N, Hkv, D] as they come, rotated or not."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scaling: float, window: int | None
    ) -> torch.Tensor:
        out, ctx.saved = attend_documents(q, k, v, None, None, documents, scaling, window)
        ctx.documents, ctx.dtype = documents, q.dtype
        return out

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return *attend_documents_backward(do.contiguous(), ctx.saved, None, None, ctx.documents, ctx.dtype), None, None, None


# The layout of the micro-batch in work: runs of (start, documents, length). A module global, not a context variable: with
# gradient checkpointing the layers run again inside backward, possibly in another thread.
_layout: list[tuple[int, int, int]] = []
_documents: Documents | None = None


def runs(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Neighbouring documents of equal length as (first position, number of documents, length)."""
    out: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if out and out[-1][2] == length:
            first, count, _ = out[-1]
            out[-1] = (first, count + 1, length)
        else:
            out.append((start, 1, length))
        start += length
    return out


@contextmanager
def documents(lengths: list[int]) -> Iterator[None]:
    """Set the document lengths for the forward and the backward pass inside the block."""
    global _layout, _documents
    before = _layout, _documents
    _layout, _documents = runs(lengths), Documents(lengths)
    try:
        yield
    finally:
        _layout, _documents = before


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
    """query [1, Hq, N, D], key and value [1, Hkv, N, D] → [1, N, Hq, D], documents of `_layout` isolated."""
    if other.get("s_aux") is not None:
        raise BadInput("attention sinks are not supported by the padding-free path; use `tune.layout: padded`")
    if sum(count * length for _, count, length in _layout) != query.shape[2]:
        raise RuntimeError("padding-free attention was called outside engine.forward")
    if query.is_cuda and softcap is None and not dropout and query.dtype != torch.float32:
        return _on_gpu(query, key, value, scaling, sliding_window), None
    if not query.is_cuda and softcap is None and not dropout and query.dtype == value.dtype:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return _Attention.apply(q, k, v, _documents, scale, sliding_window)[None].unflatten(-1, (query.shape[1], -1)), None
    outputs = []
    for start, count, length in _layout:
        span = slice(start, start + count * length)
        # [1, H, count·L, D] → [count, H, L, D]
        q, k, v = (x[0, :, span].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        o = _one(q, k, v, scaling, dropout, sliding_window, softcap)
        outputs.append(o.transpose(1, 2).reshape(1, count * length, q.shape[1], v.shape[-1]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None


def _on_gpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None) -> torch.Tensor:
    """torch's variable-length attention, all documents in one call: [1, H, N, D] → [1, N, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *(start + length * (i + 1) for start, count, length in _layout for i in range(count))], dtype=torch.int32)
    ends = ends.to(query.device, non_blocking=True)
    longest = max(length for _, _, length in _layout)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    left = -1 if window is None else window - 1
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=grouped)[None]


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of documents of one length: [count, H, L, D]."""
    length = q.shape[2]
    mask = None
    if window is not None and window < length:
        i = torch.arange(length, device=q.device)
        mask = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < window)
    return masked_attention(q, k, v, mask, scaling, softcap, dropout)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(cap · tanh(s q kᵀ / cap)) v over the keys that the bool `mask` allows; causal where there is no mask. [B, H, L, D]."""
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    p = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(p, dropout, training=dropout > 0) @ v


def supported(model: nn.Module) -> bool:
    """Whether a transformers model takes a registered attention function."""
    return bool(getattr(type(model), "_supports_attention_backend", False))


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """Give the transformers model our attention inside the block; what it had comes back afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "sdpa")
