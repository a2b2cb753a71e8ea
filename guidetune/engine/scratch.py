"""Blocks of memory that a thread uses again and again for values that die at once.

A fresh block of some megabytes costs more in page faults and zero filling than the arithmetic on it, so what lives only for a
moment goes through one block per thread, a few rows at a time: small enough that the next operation finds them in the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch

# Values of one block that is gone through row by row. Smaller blocks stay nearer to the core but take more calls: on small
# micro-batches a quarter of this was measured one or two percent slower.
ELEMENTS = 524_288


class _Blocks(threading.local):
    def __init__(self) -> None:
        self.held: dict[Any, torch.Tensor] = {}


_blocks = _Blocks()


def block(use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The calling thread's block for `use`, of the given shape and with anything in it; the next call with the same use takes it over."""
    # a tensor made in inference mode may not be written to outside of it
    key = (use, dtype, device, torch.is_inference_mode_enabled())
    size = torch.Size(shape).numel()
    have = _blocks.held.get(key)
    if have is None or len(have) < size:
        _blocks.held.pop(key, None)
        have = _blocks.held[key] = torch.empty(size, dtype=dtype, device=device)
    return have[:size].view(shape)


def release() -> None:
    """Give the calling thread's blocks back."""
    _blocks.held.clear()


def pieces(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """0 … rows in pieces of at most ELEMENTS values (16 rows at least), for rows of `width` values."""
    step = max(16, ELEMENTS // max(width, 1))
    for a in range(0, rows, step):
        yield a, min(a + step, rows)
