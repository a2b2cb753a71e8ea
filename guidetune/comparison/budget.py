"""How much each arm learns from: rows, supervised tokens and optimiser steps, known before anything is tuned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from guidetune.engine.batching import optimiser_batch
from guidetune.engine.settings import TuneSettings, total_steps

if TYPE_CHECKING:
    from guidetune.data.rows import EncodedRows

TOLERANCE = 0.01  # of the tokens: other truncation of a few rows is not another budget


@dataclass(frozen=True)
class Budget:
    """What tuning goes through in all its steps; a row seen in two epochs counts twice."""

    supervised_tokens: int
    rows: int
    steps: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def of(settings: TuneSettings, rows: EncodedRows) -> Budget:
    """The budget of tuning on these rows, from the very batches that the loop will draw."""
    steps = total_steps(settings, len(rows))
    supervised = rows.supervised
    tokens = seen = 0
    for step in range(steps):
        batch = optimiser_batch(len(rows), settings.batch, settings.seed, step)
        tokens += int(supervised[batch].sum())
        seen += len(batch)
    return Budget(tokens, seen, steps)


def together(budgets: Iterable[Budget]) -> Budget:
    """What an arm goes through that tunes several tasks."""
    each = list(budgets)
    return Budget(sum(one.supervised_tokens for one in each), sum(one.rows for one in each), sum(one.steps for one in each))


def differences(budgets: Mapping[str, Budget]) -> list[str]:
    """A sentence for each arm whose budget is not that of the first one: other rows or steps, or tokens more than 1 % apart."""
    found = []
    first = next(iter(budgets), None)
    for name, own in budgets.items():
        assert first is not None
        common = budgets[first]
        apart = [] if own.rows == common.rows else [f"{own.rows:,} rows instead of {common.rows:,}"]
        apart += [] if own.steps == common.steps else [f"{own.steps:,} steps instead of {common.steps:,}"]
        if abs(own.supervised_tokens - common.supervised_tokens) > TOLERANCE * common.supervised_tokens:
            apart.append(f"{own.supervised_tokens:,} supervised tokens instead of {common.supervised_tokens:,}")
        if apart:
            found.append(f"the budgets differ: arm {name} has {', '.join(apart)} (arm {first})")
    return found
