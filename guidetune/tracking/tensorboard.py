"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar

from guidetune.registry import method
from guidetune.tracking import TrackedRun, Tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@method(kind="tracker", name="tensorboard", summary="Event files in the run's folder, for `tensorboard --logdir`.")
class TensorBoard(Tracker):
    """One folder for each arm, so that their curves lie over each other: `tensorboard --logdir runs/NAME/tracking/tensorboard`."""

    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def open(self, run: TrackedRun) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker(run.arm, run.folder / "tensorboard")
        tracker.start()
        if run.fresh:
            # accelerate's way would write a run of its own into the list, named by the time
            text = json.dumps(dict(run.config), indent=1, ensure_ascii=False)
            tracker.tracker.add_text("recipe", f"```json\n{text}\n```", 0)
        return tracker
