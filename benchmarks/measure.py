"""Clocks, memory, the machine's own limit, and one process per measurement."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("guidetune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy", "flash-attn")
# rows x inner x columns of x Wᵀ, as a training step has them; the best of them is the limit
PRODUCTS = ((1024, 1024, 1024), (2048, 1024, 1024), (2048, 2048, 2048), (1024, 2048, 4096))
GPU_PRODUCTS = ((8192, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336))


class Clock:
    """Wall and CPU seconds (user and system, all threads) between `start` and `stop`; several spells add up."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self.wall = self.cpu = 0.0
        self._synchronise = synchronise or (lambda: None)

    def start(self) -> None:
        self._synchronise()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self._synchronise()
        self.wall += time.perf_counter() - self._wall
        self.cpu += time.process_time() - self._cpu

    def seconds(self, tokens: int) -> dict[str, float]:
        """For the results: what these tokens took."""
        return {"tokens": tokens, "wall_s": round(self.wall, 3), "cpu_s": round(self.cpu, 3)}


class Window:
    """The measured steps of a run: the clock starts when `warm` steps are done and stops after `steps` more."""

    def __init__(self, warm: int, steps: int, clock: Clock) -> None:
        self.first, self.last, self.clock = warm, warm + steps, clock

    def after_step(self, done: int) -> bool:
        """To be called after every optimiser step with the number done; True when the last one is over."""
        if done == self.first:
            self.clock.start()
        elif done == self.last:
            self.clock.stop()
        return done >= self.last

    def holds(self, done: int) -> bool:
        """Whether the step that follows `done` finished ones is a measured one."""
        return self.first <= done < self.last


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far."""
    try:
        # not ru_maxrss, which a child inherits from the process that started it
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return round(int(line.split()[1]) / 1024)
    except OSError:
        pass
    scale = 1024**2 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)


def matmul_limit(threads: int, seconds: float = 0.25, device: str = "cpu") -> dict[str, float]:
    """Best rate of plain torch matrix products, GFLOP/s: per wall second, and per `threads` CPU-seconds.

    Each product of `PRODUCTS` runs for about `seconds` in bf16 and in fp32 (on a GPU in bf16, and the wall rate only).
    """
    import torch

    cuda = device.startswith("cuda")
    clock_end = torch.cuda.synchronize if cuda else None
    out: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))[: 1 if cuda else 2]:
        wall, cpu = [], []
        for m, k, n in GPU_PRODUCTS if cuda else PRODUCTS:
            x = torch.randn(m, k, device=device).to(dtype)
            w = torch.randn(n, k, device=device).to(dtype)
            torch.nn.functional.linear(x, w)
            clock, done, begin = Clock(clock_end), 0, time.perf_counter()
            clock.start()
            while time.perf_counter() - begin < seconds:
                for _ in range(20 if cuda else 1):
                    torch.nn.functional.linear(x, w)
                    done += 1
                if cuda:
                    torch.cuda.synchronize()
            clock.stop()
            work = 2.0 * m * k * n * done / 1e9
            wall.append(work / clock.wall)
            cpu.append(threads * work / clock.cpu)
        out[f"{name}_wall"] = round(max(wall), 1)
        if not cuda:
            out[f"{name}_cpu"] = round(max(cpu), 1)
    return out


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from guidetune.threads import available_cores

    out: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": available_cores(),
    }
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = set(info.get("flags", "").split())
        out["cpu"] = info.get("model name", platform.processor())
        out |= {"cpu_family": info.get("cpu family"), "cpu_model": info.get("model")}  # virtual machines hide the name
        out["flags"] = {name: name in flags for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")}
        memory = Path("/proc/meminfo").read_text(encoding="ascii").split("MemTotal:")[1].split()[0]
        out["memory_gb"] = round(int(memory) / 1024**2, 1)
    except (OSError, IndexError, ValueError):
        out["cpu"] = platform.processor()
    return out


def versions() -> dict[str, str]:
    """Installed versions; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(threads: int) -> dict[str, str]:
    """The same for every engine: sleeping instead of spinning threads, no network, no telemetry."""
    # the checkout beside this folder, installed or not
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def run(script: Path, arguments: Sequence[str], threads: int, timeout: float, lock: Path | None = None) -> dict[str, Any]:
    """The JSON object that a measuring process prints as its last line, or `{"error": why}`.

    `lock`: a file that is locked while the process runs, so that several people can measure on one machine in turn.
    """
    with _held(lock):
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, str(script), *arguments], env=environment(threads), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {timeout:.0f} s", "process_s": round(time.monotonic() - began, 1)}
    lines = done.stdout.strip().splitlines()
    try:
        out = json.loads(lines[-1])
    except (IndexError, ValueError):
        out = {}
    if done.returncode != 0 and "error" not in out:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        out = {"error": f"exit status {done.returncode}: {last[:300]}"}
    return {**(out or {"error": "printed no result"}), "process_s": round(time.monotonic() - began, 1)}


@contextmanager
def _held(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with open(lock, "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, largest, number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
