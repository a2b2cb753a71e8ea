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
    """What tuning goes through in all its steps; a row seen in two epochs counts twice.

    `short`: steps that were cut short by the end of an epoch or a phase; so many steps more or fewer are no other budget.
    """

    supervised_tokens: int
    rows: int
    steps: int
    short: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def of(settings: TuneSettings, rows: EncodedRows) -> Budget:
    """The budget of tuning on these rows, from the very batches that the loop will draw."""
    steps = total_steps(settings, len(rows))
    supervised = rows.supervised
    tokens = seen = short = 0
    for step in range(steps):
        batch = optimiser_batch(len(rows), settings.batch, settings.seed, step)
        tokens += int(supervised[batch].sum())
        seen += len(batch)
        short += len(batch) < settings.batch
    return Budget(tokens, seen, steps, short)


def total(parts: Iterable[Budget]) -> Budget:
    """The budget of several parts one after the other, such as phases."""
    found = Budget(0, 0, 0)
    for part in parts:
        found = Budget(*(a + b for a, b in zip(found.as_dict().values(), part.as_dict().values(), strict=True)))
    return found


def differences(budgets: Mapping[str, Budget]) -> list[str]:
    """A sentence for each arm whose budget is not that of the first one: other rows, tokens more than 1 % apart, or other steps.

    Equal rows in phases make a few steps more than at once, for each phase ends with a batch of its own: these do not count.
    """
    found = []
    first = next(iter(budgets), None)
    for name, own in budgets.items():
        assert first is not None
        common = budgets[first]
        apart = [] if own.rows == common.rows else [f"{own.rows:,} rows instead of {common.rows:,}"]
        apart += (
            [] if abs(own.steps - common.steps) <= abs(own.short - common.short) else [f"{own.steps:,} steps instead of {common.steps:,}"]
        )
        if abs(own.supervised_tokens - common.supervised_tokens) > TOLERANCE * common.supervised_tokens:
            apart.append(f"{own.supervised_tokens:,} supervised tokens instead of {common.supervised_tokens:,}")
        if apart:
            found.append(f"the budgets differ: arm {name} has {', '.join(apart)} (arm {first})")
    return found
