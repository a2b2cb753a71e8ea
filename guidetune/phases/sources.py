"""Phases made of whole sources."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from guidetune.errors import BadInput
from guidetune.phases import Candidates, Phases
from guidetune.registry import method, nearest


@method(kind="phases", name="sources", summary="Phases of whole sources: a warm-up set first, then the task.")
class Sources(Phases):
    """Each phase is a list of sources by name (`data.train[].name`); every source is in exactly one phase. `by` is not used."""

    scored: ClassVar[bool] = False

    phases: list[list[str]] = Field(
        min_length=1, description="The sources of each phase, in the order of training, as [[warm-up], [task]]."
    )

    @model_validator(mode="after")
    def _once(self) -> Sources:
        flat = [name for phase in self.phases for name in phase]
        if not all(self.phases):
            raise ValueError(f"phases: phase {[bool(p) for p in self.phases].index(False) + 1} names no source")
        if repeated := [name for name in dict.fromkeys(flat) if flat.count(name) > 1]:
            raise ValueError(
                f"phases: the source {repeated[0]!r} is in two phases; rows are trained on in one, with more epochs if need be"
            )
        return self

    def names(self) -> list[str]:
        return ["+".join(phase) for phase in self.phases]

    def divide(self, candidates: Candidates) -> np.ndarray:
        there = list(dict.fromkeys(candidates.sources))
        place = {name: k for k, phase in enumerate(self.phases) for name in phase}
        problems = [f"phases: there is no source {name!r} with rows{nearest(name, there)}" for name in place if name not in there]
        problems += [f"phases: the source {name!r} is in no phase; add it to one" for name in there if name not in place]
        if problems:
            raise BadInput(problems)
        return np.array([place[name] for name in candidates.sources], dtype=np.int64)
