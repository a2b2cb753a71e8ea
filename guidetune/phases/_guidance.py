"""The guidance of a phase's rows."""

from __future__ import annotations

import numpy as np

from guidetune.guidance.store import Guidance


class PhaseGuidance(Guidance):
    """The guidance of some of the rows that a store was made for: a view."""

    def __init__(self, store: Guidance, places: np.ndarray) -> None:
        super().__init__(store.log_prob, store.offsets, store.summary)
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def row(self, i: int) -> np.ndarray:
        return super().row(int(self._places[i]))
