"""Arms in processes of their own, several at a time.

Each process gets an order (a JSON file), does one arm with `python -m guidetune.comparison.jobs ORDER`, and leaves its results beside the
order. One that dies, by whatever hand, is a failed arm; the others go on. When the process that gave the orders dies, its workers notice
that their standard input has ended, and stop too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidetune import progress
from guidetune.artefacts import read_json, write_json
from guidetune.errors import BadInput, RunFailed

FOLDER = ".jobs"
PATIENCE = 20.0  # seconds to write a checkpoint in after Ctrl-C


@dataclass(frozen=True)
class Order:
    """One arm with one seed. Orders that are `alike` are done one after the other, because the later ones reuse the first one's work."""

    label: str
    spec: Mapping[str, Any]
    alike: str


@dataclass(frozen=True)
class Done:
    entry: dict[str, Any] | None
    error: str = ""


def run(orders: Sequence[Order], at_a_time: int, threads: int, out: Path) -> dict[str, Done]:
    """Do all orders, at most so many at a time with so many threads each; {label: result}. Ctrl-C ends every process."""
    folder = out / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # what a killed command left
    waiting = list(enumerate(orders))
    working: dict[int, _Worker] = {}
    found: dict[str, Done] = {}
    try:
        while waiting or working:
            busy = {worker.order.alike for worker in working.values()}
            ready = next((place for place in waiting if place[1].alike not in busy), None)
            if ready is not None and len(working) < at_a_time:
                waiting.remove(ready)
                number, order = ready
                working[number] = _Worker(order, folder / str(number), threads)
                continue
            time.sleep(0.05)
            for number in [number for number, worker in working.items() if worker.ended]:
                worker = working.pop(number)
                found[worker.order.label] = worker.result()
    except BaseException:
        _stop(list(working.values()))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {order.label: found[order.label] for order in orders}


def _stop(workers: Sequence[_Worker]) -> None:
    """As Ctrl-C would: each may write its checkpoint; what has not ended after a while is killed."""
    for worker in workers:
        worker.interrupt()
    deadline = time.monotonic() + PATIENCE
    try:
        while any(not worker.ended for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    def __init__(self, order: Order, folder: Path, threads: int) -> None:
        self.order, self.folder = order, folder
        write_json(folder / "order.json", {**order.spec, "verbosity": progress.verbosity()})
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        # the package that runs here, also when it is not installed
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "guidetune.comparison.jobs", str(folder)],
            stdin=subprocess.PIPE,  # never written to: it ends with this process
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on once
            text=True,
            errors="replace",
        )
        self.last = ""
        self._reader = threading.Thread(target=self._relay, daemon=True)
        self._reader.start()

    def _relay(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.strip():
                self.last = line.strip()
                progress.say(f"[{self.order.label}] {line.rstrip()}", level=-1)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> Done:
        self._reader.join(timeout=5)
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.returncode
        try:
            left = read_json(self.folder / "result.json")
            return Done(left["entry"], left["error"])
        except (OSError, ValueError, KeyError):
            pass
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            often = " (often: the system ran out of memory; try fewer --jobs)" if code == -signal.SIGKILL else ""
            return Done(None, f"its process was ended by {name}{often}; the same command continues")
        return Done(None, f"its process ended with code {code} and no result" + (f": {self.last}" if self.last else ""))

    def interrupt(self) -> None:
        if not self.ended:
            # Windows has no signal that another process could catch as Ctrl-C; the last checkpoint is there in any case
            self.process.terminate() if os.name == "nt" else self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        if not self.ended:
            self.process.kill()
            self.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# In the worker


def main(folder: Path) -> int:
    """Do the order in this folder."""
    from guidetune import threads

    threads.settle()
    progress.hush()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    order = read_json(folder / "order.json")
    progress.set_verbosity(order["verbosity"])
    from guidetune import pipeline

    entry, error = None, ""
    try:
        entry = pipeline.ordered(order)
    except (BadInput, RunFailed, OSError, RuntimeError, ValueError, MemoryError) as fault:
        if os.environ.get("GUIDETUNE_DEBUG"):
            raise
        error = str(fault) or type(fault).__name__
    except KeyboardInterrupt:
        return 130
    write_json(folder / "result.json", {"entry": entry, "error": error})
    return 0


def _end_with_parent() -> None:
    """Standard input ends when the process that gave the order is gone: stop as Ctrl-C would, and soon in any case."""
    try:
        while os.read(0, 1024):
            pass
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
