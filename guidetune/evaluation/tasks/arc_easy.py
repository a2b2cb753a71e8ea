"""ARC-Easy (arXiv 1803.05457)."""

from __future__ import annotations

from typing import ClassVar

from guidetune.evaluation.tasks.arc import ARC
from guidetune.registry import method


@method(kind="task", name="arc_easy", paper="1803.05457", summary="The easy part of ARC.")
class ARCEasy(ARC):
    """`arc` under the name of its easy set."""

    files: ClassVar[tuple[str, ...]] = ("ARC-Easy",)
