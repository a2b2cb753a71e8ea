"""Progress of long work: a bar with rate and ETA on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from guidetune import processes

_verbosity = 0
PLAIN_EVERY_S = 10.0


def set_verbosity(level: int) -> None:
    """-1: results only; 0: progress and notices; 1: everything."""
    global _verbosity
    _verbosity = level


def verbosity() -> int:
    """What `set_verbosity` set."""
    return _verbosity


def hush() -> None:
    """Silence what libraries warn of and no user can do anything about."""
    # peft still asks transformers by an attribute's old name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def say(text: str, level: int = 0) -> None:
    """A notice on standard error (results go to standard output); of several processes rank 0 speaks."""
    if _verbosity >= level and processes.rank() == 0:
        print(text, file=sys.stderr, flush=True)


class Bar:
    """What a stage advances. `info` are numbers shown beside the rate, such as the loss."""

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.start_value = self.done = done
        self.start = self._last = time.monotonic()
        self.info: dict[str, Any] = {}
        self._render: Any = None

    def advance(self, n: float = 1, **info: Any) -> None:
        self.done += n
        self.info.update(info)
        if self._render is not None:
            self._render(self)
        elif _verbosity >= 0 and time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._last = time.monotonic()
            say(self.line())

    @property
    def rate(self) -> float:
        return (self.done - self.start_value) / max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        share = f" {100 * self.done / self.total:.0f} %" if self.total else ""
        eta = f", {_span((self.total - self.done) / self.rate)} left" if self.total and self.rate > 0 else ""
        info = "".join(f", {k} {v:.4g}" if isinstance(v, float) else f", {k} {v}" for k, v in self.info.items())
        return f"{self.label}{share}: {self.rate:,.0f} {self.unit}/s{info}{eta}"


@contextmanager
def progress(label: str, total: float | None = None, unit: str = "rows", done: float = 0.0) -> Iterator[Bar]:
    """Show progress of one piece of work; `done` is what an earlier, interrupted attempt had finished."""
    bar = Bar(label, total, unit, done)
    if _verbosity < 0 or processes.rank() or not sys.stderr.isatty():
        yield bar
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as live:
        task = live.add_task(label, total=total, completed=done, rate="", info="")

        def render(bar: Bar) -> None:
            info = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in bar.info.items())
            live.update(task, completed=bar.done, rate=f"{bar.rate:,.0f} {bar.unit}/s", info=info)

        bar._render = render
        yield bar


def _span(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 90:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
