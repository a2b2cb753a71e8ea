"""Which of several processes this one is, as the launcher (torchrun, accelerate) tells it in the environment. Imports nothing heavy."""

from __future__ import annotations

import os


def count() -> int:
    """Processes of this run; 1 when no launcher started several."""
    return _integer("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number, 0 … count() - 1. Rank 0 writes and speaks."""
    return _integer("RANK", 0) if count() > 1 else 0


def local_rank() -> int:
    """This process's number on its own machine."""
    return _integer("LOCAL_RANK", 0) if count() > 1 else 0


def stay_alone() -> None:
    """From here on this process is the only one: for work that has nothing to share."""
    os.environ["WORLD_SIZE"] = "1"


def _integer(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
