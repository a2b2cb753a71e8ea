"""Texts as vectors of hashed character n-grams, and exact nearest neighbours in blocks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from guidetune.data.ngrams import normal_text

DIMENSION = 256
_SIZES = (3, 4, 5)
_CUT = 4000  # characters of a text that are looked at
_BLOCK = 1 << 24  # distances held at a time


def embed(texts: Sequence[str], dimension: int = DIMENSION) -> np.ndarray:
    """Character 3- to 5-grams hashed to `dimension` signed counts, each count c as sign·log(1 + |c|), length 1: float32 [n, dimension].

    A lexical likeness that needs no model: fuzzy matches of sentences, not paraphrases. A text without letters gives zeros.
    """
    out = np.zeros((len(texts), dimension), dtype=np.float32)
    for row, text in enumerate(texts):
        data = f" {normal_text(text[:_CUT])} ".encode("utf-8", "surrogatepass")
        codes = [zlib.crc32(data[k : k + n]) for n in _SIZES for k in range(len(data) - n + 1)]
        if not codes:
            continue
        hashes = np.array(codes, dtype=np.uint32)
        signs = np.where(hashes >> 31, 1.0, -1.0)
        counts = np.bincount((hashes & 0x7FFFFFFF) % dimension, weights=signs, minlength=dimension)
        vector = np.sign(counts) * np.log1p(np.abs(counts))
        length = np.linalg.norm(vector)
        out[row] = vector / length if length else 0
    return out


def nearest(
    queries: np.ndarray,
    pool: np.ndarray,
    k: int,
    metric: Literal["l2", "cosine"] = "l2",
    allowed: Callable[[int, int], np.ndarray] | None = None,
    min_distance: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest vectors of the pool: places int64 [queries, k] (-1: no more) and distances float64 [queries, k].

    Exact: every pair is compared; equal distances go by the lower place. l2 is the squared Euclidean distance, cosine is 1 − cos.

    Args:
        queries, pool: [q, d] and [p, d], any float type; read block by block, so the pool may be a mapped file.
        allowed: (start, end) of some queries → bool [end − start, p], False where a pair is out.
        min_distance: nearer vectors are out.
    """
    places = np.full((len(queries), k), -1, dtype=np.int64)
    distances = np.full((len(queries), k), np.inf)
    if not len(pool) or not k:
        return places, distances
    step = max(1, _BLOCK // len(pool))
    for a in range(0, len(queries), step):
        b = min(a + step, len(queries))
        block = _unit(np.asarray(queries[a:b], np.float32)) if metric == "cosine" else np.asarray(queries[a:b], np.float32)
        rough = np.empty((b - a, len(pool)), dtype=np.float32)
        for c in range(0, len(pool), 1 << 16):
            part = np.asarray(pool[c : c + (1 << 16)], np.float32)
            part = _unit(part) if metric == "cosine" else part
            rough[:, c : c + len(part)] = (block**2).sum(1)[:, None] + (part**2).sum(1) - 2 * block @ part.T
        if allowed is not None:
            rough[~allowed(a, b)] = np.inf
        for row in range(b - a):
            found, exact = _exact(block[row], pool, rough[row], k, metric, min_distance)
            places[a + row, : len(found)] = found
            distances[a + row, : len(found)] = exact
    return places, distances


def _exact(
    query: np.ndarray, pool: np.ndarray, rough: np.ndarray, k: int, metric: str, min_distance: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The rough distances of fp32 only say which vectors to look at; those are compared in fp64."""
    margin = 1e-4 * (1.0 + float(query @ query))
    wanted = k
    while True:
        if wanted >= len(rough):
            candidates = np.flatnonzero(np.isfinite(rough))
        else:
            limit = np.partition(rough, wanted - 1)[wanted - 1]
            candidates = np.flatnonzero(rough <= limit + margin * (1.0 + abs(float(limit)))) if np.isfinite(limit) else None
            candidates = np.flatnonzero(np.isfinite(rough)) if candidates is None else candidates
        vectors = np.asarray(pool[candidates], np.float64)
        vectors = _unit(vectors) if metric == "cosine" else vectors
        exact = ((vectors - query.astype(np.float64)) ** 2).sum(1) / (2 if metric == "cosine" else 1)
        far = exact >= min_distance if min_distance is not None else np.ones(len(exact), dtype=bool)
        if far.sum() >= k or wanted >= len(rough) or len(candidates) == np.isfinite(rough).sum():
            candidates, exact = candidates[far], exact[far]
            order = np.lexsort((candidates, exact))[:k]
            return candidates[order], exact[order]
        wanted *= 4


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
