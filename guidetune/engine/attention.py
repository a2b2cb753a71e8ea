"""Attention without padding: documents lie one after another in one row, and each sees only itself.

Registered with transformers as `guidetune_varlen`. Per document one causal `scaled_dot_product_attention` call; neighbouring
documents of equal length share a call. Exact: a changed document leaves every other document's outputs bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guidetune.errors import BadInput

NAME = "guidetune_varlen"

# The layout of the micro-batch in work: runs of (start, documents, length). A module global, not a context variable: with
# gradient checkpointing the layers run again inside backward, possibly in another thread.
_layout: list[tuple[int, int, int]] = []


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
    global _layout
    before, _layout = _layout, runs(lengths)
    try:
        yield
    finally:
        _layout = before


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
    outputs = []
    for start, count, length in _layout:
        span = slice(start, start + count * length)
        # [1, H, count·L, D] → [count, H, L, D]
        q, k, v = (x[0, :, span].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        o = _one(q, k, v, scaling, dropout, sliding_window, softcap)
        outputs.append(o.transpose(1, 2).reshape(1, count * length, q.shape[1], v.shape[-1]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None


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
    windowed = window is not None and window < length
    grouped = q.shape[1] != k.shape[1]
    if softcap is None and not windowed:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
    i = torch.arange(length, device=q.device)
    allowed = i[:, None] >= i[None, :]
    if windowed:
        allowed &= i[:, None] - i[None, :] < window
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    p = F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), dropout, training=dropout > 0)
    return p @ v


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
