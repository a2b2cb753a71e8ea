"""The processor: use the cores that are ours, and sleep instead of spinning when waiting. And the size of memory pages.

Two busy OpenMP pools on the same cores, each spinning while it waits for the other, were measured to slow a training step
several times over; with sleeping threads the loss is what the sharing costs.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def available_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no container, or an older one
    return max(1, cores)


def processor_flags() -> frozenset[str]:
    """The instruction sets that Linux lists for the processor; empty where it cannot be asked."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in text.splitlines() if line.startswith("flags")), "").split())


def settle() -> None:
    """Call before the first `import torch` of a command; what the user set in the environment stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    # Large tensors on large pages: a training step was measured to hold a third less memory, in the same CPU time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Products of a thousand shapes stay prepared in every thread otherwise: 200 MB on two threads, and no time saved.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")


def keep_memory() -> None:
    """Let freed blocks of up to 32 MB stay with the process: work in pieces then finds its memory again without page faults.

    A merge was measured to take a third less time. Of glibc only; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 256 << 20)
