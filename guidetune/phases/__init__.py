"""Which rows are trained on when: the phases of a tuning, one after the other. Methods are the files beside this one.

A `Phases` only makes a plan: rows, learning rate and epochs of each phase. Each phase is then one run of the one training loop, which
starts from the weights that the phase before has left (Phased Instruction Fine-Tuning, arXiv 2406.04371).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from guidetune.artefacts import derive_seed, write_text_atomic
from guidetune.data.rows import EncodedRows
from guidetune.engine.settings import TuneSettings, total_steps
from guidetune.errors import BadInput
from guidetune.registry import Method

_SHOWN = 3


@dataclass(frozen=True)
class Candidates:
    """Rows that are to be divided: scores float64 [n] (never NaN), tokens int64 [n], the source and a random number in [0, 1) of each."""

    scores: np.ndarray
    tokens: np.ndarray
    sources: Sequence[str]
    draw: np.ndarray


@dataclass(frozen=True)
class Phase:
    """One phase: `rows` are places among the prepared rows, int64 [n], ascending; `number` counts from 1 in the method's own order."""

    name: str
    number: int
    rows: np.ndarray
    low: float | None
    high: float | None
    mean: float | None
    settings: TuneSettings

    @property
    def steps(self) -> int:
        return total_steps(self.settings, len(self.rows))


class Phases(Method):
    """Contract: `divide(candidates)` gives each row the number of its phase, from 0; every phase of `names()` gets a row.

    `plan` does the rest for all methods: order, controls, rows without a score, settings of each phase.
    """

    scored: ClassVar[bool] = True  # whether rows are divided by a score

    by: str | None = Field(None, description="Score that the rows are divided by: a name in data.scores, or a scorer with its defaults.")
    order: Literal["ascending", "descending"] | list[int] = Field(
        "ascending",
        description="Order of training; a list of phase numbers (1 is the first) may leave phases out, as [3] for the last alone.",
    )
    shuffled: bool = Field(False, description="A control: rows are put at random into phases of the same sizes, whatever their scores.")
    missing: Literal["refuse", "first", "last", "leave_out"] = Field(
        "refuse", description="Rows without a score: refuse to start, put them into the first or last phase, or leave them out."
    )
    lr: float | list[float] | None = Field(
        None, description="Peak learning rate of all phases, or of each in the order of training; null: tune.lr."
    )
    epochs: float | list[float] | None = Field(
        None, description="Epochs of all phases, or of each in the order of training; null: tune.epochs."
    )
    optimiser: Literal["fresh", "carried"] = Field(
        "fresh",
        description="fresh: each phase has its own optimiser and course of the learning rate; carried: both go on from phase to phase.",
    )
    evaluate: bool = Field(True, description="Evaluate the model after each phase, not only after the last one.")

    @model_validator(mode="after")
    def _sound(self) -> Phases:
        if isinstance(self.order, list):
            if not self.order:
                raise ValueError("order: names no phase")
            if repeated := [n for n in dict.fromkeys(self.order) if self.order.count(n) > 1]:
                raise ValueError(f"order: {self.order} goes in a circle: phase {repeated[0]} comes twice; give it more epochs instead")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if any(not np.isfinite(v) or v <= 0 for v in (value if isinstance(value, list) else [value] if value is not None else [])):
                raise ValueError(f"{name}: {value} must be above 0")
        if self.scored and self.by is None:
            raise ValueError("by: name the score that the rows are divided by, such as a name in data.scores, or length")
        return self

    # -- what a method defines ----------------------------------------------------------------------------------------

    def names(self) -> list[str] | None:
        """Names of the phases where they are known before the rows are; None: they are numbered."""
        return None

    def divide(self, candidates: Candidates) -> np.ndarray:
        """The phase of each row, int [n], from 0 to the number of phases - 1.

        Raises:
            BadInput: the rows cannot be divided in this way.
        """
        raise TypeError(f"{type(self).__name__} does not define divide()")

    # -- the plan -----------------------------------------------------------------------------------------------------

    def plan(self, rows: EncodedRows, scores: np.ndarray | None, settings: TuneSettings) -> list[Phase]:
        """The phases in the order of training. scores: float64 [rows], NaN where a row has none.

        The first phase has the seed of `settings`, each later one a seed of its own that follows from it; what is random in the
        division (`shuffled`, ties) follows from the seed and the rows' ids alone.

        Raises:
            BadInput: rows without a score, an empty phase, a phase number that there is not, or more rates than phases.
        """
        found = np.zeros(len(rows)) if scores is None else np.asarray(scores, dtype=np.float64)
        if len(found) != len(rows):
            raise BadInput(f"phases: {len(found):,} scores for {len(rows):,} rows")
        known = self._known(rows, found)
        seed = settings.seed
        draw = np.array([derive_seed(seed, "phases", id) for id in rows.ids], dtype=np.float64) / 2**63
        sources = rows.sources
        candidates = Candidates(found[known], rows.lengths[known].astype(np.int64), [sources[int(k)] for k in known], draw[known])
        of_row = np.full(len(rows), -1, dtype=np.int64)
        of_row[known] = self.divide(candidates)
        count = len(self.names() or []) or int(of_row.max()) + 1
        if self.missing in ("first", "last"):
            of_row[of_row < 0] = 0 if self.missing == "first" else count - 1
        if self.shuffled:
            used = np.flatnonzero(of_row >= 0)
            of_row[used[np.argsort(draw[used], kind="stable")]] = np.sort(of_row[used])
        sizes = np.bincount(of_row[of_row >= 0], minlength=count)
        if not sizes.all():
            empty = ", ".join(str(k + 1) for k in np.flatnonzero(sizes == 0))
            shown = ", ".join(f"{n:,}" for n in sizes)
            raise BadInput(f"phases: phase {empty} has no row (rows of each phase: {shown}); {self._advice(found[known])}")
        order = self._order(count)
        lr, epochs = self._each("lr", settings.lr, len(order)), self._each("epochs", settings.epochs, len(order))
        names = self.names() or [str(k + 1) for k in range(count)]
        phases = []
        for place, k in enumerate(order):
            members = np.flatnonzero(of_row == k)
            own = found[members] if scores is not None else np.zeros(0)
            own = own[~np.isnan(own)]
            figures = (float(own.min()), float(own.max()), float(own.mean())) if len(own) else (None, None, None)
            changed = {"lr": lr[place], "epochs": epochs[place], "seed": derive_seed(seed, "phase", place) if place else seed}
            phases.append(Phase(names[k], k + 1, members, *figures, settings.model_copy(update=changed)))
        return phases

    def _known(self, rows: EncodedRows, scores: np.ndarray) -> np.ndarray:
        """Places of the rows that have a score."""
        without = np.flatnonzero(np.isnan(scores))
        if len(without) == len(scores):
            raise BadInput(f"phases: no row has the score {self.by!r}")
        if len(without) and self.missing == "refuse":
            ids = rows.ids
            some = ", ".join(ids[int(k)] for k in without[:_SHOWN]) + (", …" if len(without) > _SHOWN else "")
            raise BadInput(
                f"phases: {len(without):,} of {len(scores):,} rows have no score {self.by!r} ({some}); "
                "put them into a phase with missing: first or last, or leave them out with missing: leave_out"
            )
        return np.flatnonzero(~np.isnan(scores))

    def _order(self, count: int) -> list[int]:
        if self.order == "ascending":
            return list(range(count))
        if self.order == "descending":
            return list(range(count))[::-1]
        if wrong := [n for n in self.order if not 1 <= n <= count]:  # type: ignore[operator]
            raise BadInput(f"phases: order names phase {wrong[0]}, and there are {count}, numbered from 1")
        return [n - 1 for n in self.order]  # type: ignore[operator]

    def _each(self, name: str, default: float, count: int) -> list[float]:
        value = getattr(self, name)
        if isinstance(value, list):
            if len(value) != count:
                raise BadInput(f"phases: {name} has {len(value)} values for {count} phases")
            return [float(v) for v in value]
        return [float(default if value is None else value)] * count

    def _advice(self, scores: np.ndarray) -> str:
        if not self.scored:
            return "change the division"
        return f"the scores lie between {scores.min():g} and {scores.max():g}; change the cuts"


def by_edges(scores: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """The interval of each score: edges are half-open, so that a score equal to an edge belongs to the phase above it. int64 [n]

    >>> by_edges(np.array([1.0, 1.5, 3.5, 5.0]), [1.5, 3.5]).tolist()
    [0, 1, 2, 2]
    """
    return np.searchsorted(np.asarray(edges, dtype=np.float64), scores, side="right").astype(np.int64)


def ascending(values: Sequence[float], what: str) -> None:
    """Raises ValueError unless the values are finite and each is above the one before."""
    if any(not np.isfinite(v) for v in values) or any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"{what}: {list(values)} must be numbers in rising order, each once")


def joined(parts: Sequence[Path], whole: Path) -> None:
    """The metrics of the phases as those of one run: steps, tokens and seconds go on, and `phase` says whose line it is."""
    lines: list[str] = []
    before = {"step": 0, "tokens": 0, "seconds": 0.0}
    for number, path in enumerate(parts, 1):
        last = dict(before)
        for text in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            if number > 1 and row["step"] == 0:
                continue  # the model that the phase before has ended with
            row |= {name: round(row[name] + start, 3) for name, start in before.items() if name in row}
            lines.append(json.dumps(row | {"phase": number}))
            last |= {name: row[name] for name in before if name in row}
        before = last
    write_text_atomic(whole, "".join(f"{line}\n" for line in lines))


def table(phases: Sequence[Phase], rows: EncodedRows) -> list[dict[str, float | int | str | None]]:
    """What each phase is, for results and reports."""
    return [
        {
            "name": phase.name,
            "number": phase.number,
            "rows": len(phase.rows),
            "supervised_tokens": int(rows.supervised[phase.rows].sum()),
            "steps": phase.steps,
            "lr": phase.settings.lr,
            "epochs": phase.settings.epochs,
            "score_low": phase.low,
            "score_high": phase.high,
            "score_mean": phase.mean,
        }
        for phase in phases
    ]
