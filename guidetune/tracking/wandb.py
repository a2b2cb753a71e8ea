"""Weights & Biases; offline unless a recipe says otherwise."""

from __future__ import annotations

import netrc
import os
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from guidetune.registry import method
from guidetune.tracking import TrackedRun, Tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@method(kind="tracker", name="wandb", summary="Weights & Biases, offline by default; `wandb sync` uploads later.")
class WandB(Tracker):
    """Each arm is a run; the arms of a job are one group.

    Nothing leaves the machine unless `mode: online` asks for it. The program's output, its code, git state and error reports are never
    sent. Offline runs lie in `tracking/wandb/` of the run's folder; a run that is continued offline is a second folder there with the same
    run id, which `wandb sync` joins.
    """

    packages: ClassVar[tuple[str, ...]] = ("wandb",)

    mode: Literal["offline", "online", "disabled"] = Field("offline", description="online sends to the server as the run goes.")
    project: str = Field("guidetune", min_length=1, description="Project that the runs belong to.")
    entity: str | None = Field(None, description="Team or user that owns the project (default: your own).")
    tags: list[str] = Field(default_factory=list, description="Tags of the runs.")

    def obstacle(self) -> str | None:
        if (missing := super().obstacle()) is not None:
            return missing
        if self.mode == "online" and not _key_known():
            return "mode online needs an API key; run `wandb login` or set WANDB_API_KEY, or use mode: offline"
        return None

    def open(self, run: TrackedRun) -> GeneralTracker:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import
        import wandb
        from accelerate.tracking import WandBTracker

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        tracker = WandBTracker(
            self.project,
            entity=self.entity,
            mode=self.mode,
            group=run.job,
            name=f"{run.job}/{run.arm}",
            id=run.id,
            resume="allow",
            config=dict(run.config),
            tags=self.tags or None,
            dir=run.folder,
            reinit="create_new",  # another run of this process, the user's own say, is left alone
            settings=settings,
        )
        tracker.start()
        return tracker


def _key_known() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(host) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
