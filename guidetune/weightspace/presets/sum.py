"""The plain sum of updates."""

from __future__ import annotations

from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.stages import Preset, Stages


@method(kind="weightspace", name="sum", summary="Anchor plus the weighted updates.")
class Sum(Preset):
    """W + Σ w_i τ_i. Also the chat vector (2310.04799), GIFT's transfer, and ExPO (2404.16792): one source {model: aligned, minus: sft}."""

    def stages(self) -> Stages:
        return Stages(combine.Sum())
