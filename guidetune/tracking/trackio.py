"""trackio: a local database and dashboard of Hugging Face's."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from guidetune.registry import method
from guidetune.tracking import TrackedRun, Tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

_printing = threading.Lock()  # the standard output belongs to the process


@method(kind="tracker", name="trackio", summary="trackio's local database, shown by `trackio show`.")
class Trackio(Tracker):
    """Each arm is a run; the arms of a job are one group.

    The database is trackio's own (`TRACKIO_DIR`), so that one dashboard shows all jobs.
    """

    packages: ClassVar[tuple[str, ...]] = ("trackio",)

    project: str = Field("guidetune", min_length=1, description="Project that the runs belong to.")
    space_id: str | None = Field(None, description="A Hugging Face Space to send the numbers to (default: they stay on this machine).")

    def open(self, run: TrackedRun) -> GeneralTracker:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at import
        from accelerate.tracking import TrackioTracker

        class Quiet(TrackioTracker):
            def finish(self) -> None:
                with _no_output():
                    super().finish()

        tracker = Quiet(
            self.project,
            name=f"{run.job}/{run.arm}-{run.id[:6]}",  # trackio knows a run by its name
            group=run.job,
            resume="allow",
            config=dict(run.config),
            space_id=self.space_id,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        with _no_output():
            tracker.start()
        return tracker


@contextmanager
def _no_output() -> Iterator[None]:
    """What trackio prints is no result of the command: it goes to standard error."""
    with _printing, redirect_stdout(sys.stderr):
        yield
