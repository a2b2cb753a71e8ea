"""ARC-Challenge: the questions that retrieval and co-occurrence got wrong (arXiv 1803.05457)."""

from __future__ import annotations

from typing import ClassVar

from guidetune.evaluation.tasks.arc import ARC
from guidetune.registry import method


@method(kind="task", name="arc_challenge", paper="1803.05457", summary="The hard part of ARC.")
class ARCChallenge(ARC):
    """`arc` under the name of its challenge set."""

    files: ClassVar[tuple[str, ...]] = ("ARC-Challenge",)
