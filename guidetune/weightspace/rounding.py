"""The one rounding of a merge, and what it does to the update."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
import torch

ERROR_WARNING = 0.10
GAIN_PROBLEM = 0.90
ROUNDINGS = ("nearest", "stochastic")


def round_to(values: torch.Tensor, dtype: torch.dtype, rounding: str, stream: tuple[int, str], start: int) -> torch.Tensor:
    """Round float32 values to `dtype`: to the nearest, or up and down at random with the exact value as the mean.

    The random number of an element depends only on `stream` = (seed, tensor name) and its place `start` + i in the tensor,
    so pieces and threads do not change the result.
    """
    nearest = values.to(dtype)
    if rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16):
        return nearest
    rest = values.float() - nearest.float()
    bits = nearest.view(torch.int16)
    away = torch.sign(rest) == torch.sign(nearest.float())
    # Neighbours of a float are neighbours as integers; from zero the next one takes the sign of the rest.
    zero = nearest == 0
    tiny = torch.where(rest < 0, torch.tensor(-32767, dtype=torch.int16), torch.tensor(1, dtype=torch.int16))
    other = torch.where(zero, tiny, torch.where(away, bits + 1, bits - 1)).view(dtype)
    gap = (other.float() - nearest.float()).abs()
    take = uniform(stream, start, values.numel()).view(values.shape) * gap < rest.abs()
    return torch.where(take & (rest != 0) & torch.isfinite(other), other, nearest)


def uniform(stream: tuple[int, str], start: int, count: int) -> torch.Tensor:
    """`count` float32 numbers in [0, 1) for the counters start, start + 1, ... of a stream (splitmix64 of the counter)."""
    key = int.from_bytes(hashlib.sha256(f"{stream[0]}/rounding/{stream[1]}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.arange(start, start + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(40)).astype(np.float32)) * 2.0**-24


@dataclass
class Rounding:
    """Sums over the elements of one tensor: old weights W, update D, exact result T = W + D, stored result Y = round(T)."""

    values: int = 0
    unchanged: int = 0
    w2: float = 0.0
    d2: float = 0.0
    e2: float = 0.0
    yd: float = 0.0

    def add(self, w: torch.Tensor, d: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
        error = y.to(t.dtype).flatten()
        w, d, t = (x.flatten() for x in (w, d, t))
        moved = error - w
        error = error - t if y.dtype == t.dtype else error.sub_(t)  # in the same dtype `error` is y itself
        self.values += t.numel()
        self.unchanged += int(np.count_nonzero((moved == 0).numpy()))  # of bools numpy counts many times faster
        self.w2 += float(w.dot(w))
        self.d2 += float(d.dot(d))
        self.e2 += float(error.dot(error))
        self.yd += float(moved.dot(d))

    @property
    def finite(self) -> bool:
        """False when a stored value may be infinite or not a number."""
        return isfinite(self.e2) and isfinite(self.yd)

    def __iadd__(self, other: Rounding) -> Rounding:
        for name in ("values", "unchanged", "w2", "d2", "e2", "yd"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def report(self) -> dict[str, Any]:
        """ratio = ||D|| / ||W||, error = ||Y - T|| / ||D||, gain = <Y - W, D> / ||D||^2, unchanged = share of elements with Y = W."""
        some = self.d2 > 0
        return {
            "ratio": sqrt(self.d2 / self.w2) if self.w2 else None,
            "error": sqrt(self.e2 / self.d2) if some else 0.0,
            "gain": self.yd / self.d2 if some else 1.0,
            "unchanged": self.unchanged / self.values if self.values else 1.0,
            "values": self.values,
        }


def judge(overall: dict[str, Any], tensors: dict[str, dict[str, Any]], dtype: str) -> tuple[list[str], list[str]]:
    """(warnings, problems) of a rounding report: a warning above 10 % error, a problem below a gain of 0.9."""
    remedy = "keep the adapter separate (exact)"
    remedy += {"bfloat16": ", write float16 (8 times finer) or float32", "float16": ", or write float32"}.get(dtype, "")
    weak = [name for name, entry in tensors.items() if entry["gain"] < GAIN_PROBLEM]
    if overall["gain"] < GAIN_PROBLEM or weak:
        worst = min((entry["gain"] for entry in tensors.values()), default=1.0)
        return [], [
            f"rounding to {dtype} swallows part of the update: gain {overall['gain']:.2f} overall, {worst:.2f} at worst, below "
            f"{GAIN_PROBLEM} in {len(weak)} of {len(tensors)} tensors; {remedy}; stochastic rounding keeps the mean and adds noise"
        ]
    if overall["error"] > ERROR_WARNING:
        return [f"rounding to {dtype} adds an error of {overall['error']:.0%} of the update's size; {remedy}"], []
    return [], []
