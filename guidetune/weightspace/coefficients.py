"""Coefficients of updates learnt by gradient: θ(Λ) = W + Σ_i Σ_k Λ[i, j, k] · M_k ⊙ τ_i in each block j.

A block is one named tensor (or the whole model). K > 1 splits the values of a tensor at random into K parts, M_k the k-th one's mask.
The gradient is exact and needs no copy of the model:

    ∂L / ∂Λ[i, j, k] = ⟨∂L / ∂θ_j, M_k ⊙ τ_ij⟩

so one backward pass gives the gradient of a tensor, and N·K sums over it those of the coefficients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guidetune import artefacts
from guidetune.engine.batching import optimiser_batch
from guidetune.errors import RunFailed
from guidetune.progress import progress
from guidetune.weightspace.learning import Composed, Study, TaskRows
from guidetune.weightspace.sparsify import draws
from guidetune.weightspace.stages import Combiner, Piece, View

FILE = "coefficients.json"
WHOLE = "*"  # the one block of a model that has one coefficient for each source


def part_of(piece: Piece, parts: int, seed: int) -> torch.Tensor | None:
    """Which of `parts` random parts each value of a piece belongs to: int64 like the piece; None where there is one part.

    Drawn from the seed, the tensor's name and the value's place alone, so every value is in exactly one part.
    """
    if parts == 1:
        return None
    shape = (piece.stop - piece.start, *piece.shape[1:]) if piece.shape else ()
    count = int(np.prod(shape))
    drawn = draws(seed, "parts", piece.name, piece.first, count).long() + 32768
    return (drawn * parts >> 16).view(shape)


def combined(taus: Sequence[torch.Tensor], rows: Sequence[Sequence[float]], part: torch.Tensor | None) -> torch.Tensor | None:
    """Σ_i Λ_i[part] ⊙ τ_i; rows: the coefficients of each source, [N][K]. None where all of them are zero."""
    total: torch.Tensor | None = None
    for tau, coefficients in zip(taus, rows, strict=True):
        if not any(coefficients):
            continue
        if part is None:
            total = tau * coefficients[0] if total is None else total.add_(tau, alpha=coefficients[0])
        else:
            term = torch.tensor(coefficients, dtype=tau.dtype, device=tau.device)[part.to(tau.device)].mul_(tau)
            total = term if total is None else total.add_(term)
    return total


@dataclass
class Table:
    """Λ by source id and block: `values[id][block]` holds K numbers."""

    values: dict[str, dict[str, list[float]]]
    parts: int = 1
    seed: int = 0

    def of(self, source: str, name: str) -> list[float]:
        row = self.values[source]
        return row[name] if name in row else row[WHOLE]

    def save(self, folder: Path, labels: Iterable[str], **more: Any) -> None:
        """As `coefficients.json`, readable: sources by what they are called, blocks by name."""
        sources = [
            {"source": label, "id": id, "coefficients": {name: row[0] if self.parts == 1 else row for name, row in blocks.items()}}
            for label, (id, blocks) in zip(labels, self.values.items(), strict=True)
        ]
        artefacts.write_json(folder / FILE, {"sources": sources, "parts": self.parts, "seed": self.seed, **more})


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int) -> Table:
    tree = json.loads(path.read_text(encoding="utf-8"))
    values = {
        one["id"]: {name: row if isinstance(row, list) else [row] for name, row in one["coefficients"].items()} for one in tree["sources"]
    }
    return Table(values, tree["parts"], tree["seed"])


def load(folder: Path) -> Table:
    """The table of a learnt folder."""
    path = folder / FILE
    return _loaded(path, path.stat().st_mtime_ns)


@dataclass(frozen=True)
class Coefficients(Combiner):
    """Σ_i w_i Λ_i ⊙ τ_i with the table in `folder`."""

    folder: Path

    def prepare(self, view: View, taus: Callable[[], Any]) -> Any:
        table = load(self.folder)
        return table, [[w * c for c in table.of(id, view.name)] for id, w in zip(view.sources, view.weights, strict=True)]

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        table, rows = prepared
        total = combined(taus, rows, part_of(piece, table.parts, table.seed))
        return torch.zeros_like(taus[0]) if total is None else total


class Blend:
    """A model in memory as a function of its coefficients Λ, fp64 [N sources, J blocks, K parts]."""

    def __init__(self, composed: Composed, ids: Sequence[str], by_block: bool, parts: int = 1, seed: int = 0) -> None:
        self.composed, self.ids, self.parts, self.seed = composed, list(ids), parts, seed
        self.blocks = list(composed.parameters) if by_block else [WHOLE]
        self._place = {name: j for j, name in enumerate(self.blocks)}
        self._row = {id: i for i, id in enumerate(self.ids)}
        self.values = torch.zeros(len(self.ids), len(self.blocks), parts, dtype=torch.float64)
        self._kept = torch.ones_like(self.values)

    def _block(self, name: str) -> int:
        return self._place.get(name, 0)

    def view(self, name: str) -> View:
        return self.composed.merger.views[name]

    def write(self) -> None:
        """θ(Λ) into the model; Λ = 0 gives the anchor to the last bit."""
        rows = self.values.tolist()

        def update(piece: Piece, taus: list[torch.Tensor]) -> torch.Tensor | None:
            view, j = self.view(piece.name), self._block(piece.name)
            mine = [[w * c for c in rows[self._row[id]][j]] for id, w in zip(view.sources, view.weights, strict=True)]
            return combined(taus, mine, part_of(piece, self.parts, self.seed))

        self.composed.write(update)

    def gradient(self) -> torch.Tensor:
        """∂L/∂Λ, fp64 [N, J, K], from the gradients that backward passes left at the parameters."""
        out = torch.zeros_like(self.values)
        for name in self.composed.parameters:
            view, j = self.view(name), self._block(name)
            for piece, taus, grad in self.composed.gradients(name):
                part = part_of(piece, self.parts, self.seed)
                for id, w, tau in zip(view.sources, view.weights, taus, strict=True):
                    product = (grad.double() * tau.double()).mul_(w).cpu()
                    if part is None:
                        out[self._row[id], j, 0] += product.sum()
                    else:
                        out[self._row[id], j].index_add_(0, part.flatten(), product.flatten())
        return out.mul_(self._kept)

    def keep_strongest(self, count: int) -> None:
        """Of each block only the `count` sources whose gradient is largest now are learnt from here on; the others stay where they are."""
        strength = self.gradient().norm(dim=2)  # [N, J]
        top = strength.topk(min(count, len(self.ids)), dim=0).indices
        self._kept = torch.zeros_like(strength).scatter_(0, top, 1.0)[:, :, None].expand_as(self.values).clone()

    def table(self) -> Table:
        """Λ by name: of two names that are tied, both."""
        rows = self.values.tolist()
        names = {name: self._block(self.composed.stands_for[name]) for name in self.composed.merger.views}
        blocks = names if self.blocks != [WHOLE] else {WHOLE: 0}
        return Table({id: {name: rows[i][j] for name, j in blocks.items()} for i, id in enumerate(self.ids)}, self.parts, self.seed)


@dataclass(frozen=True)
class Schedule:
    """The optimiser of coefficients: Adam (`decay`: decoupled weight decay towards zero, AdamW), lr constant or to zero along a cosine."""

    steps: int
    lr: float
    cosine: bool = False
    decay: float = 0.0
    clip: float | None = None


def descend(
    blend: Blend,
    schedule: Schedule,
    loss: Callable[[int], float],
    label: str,
    penalty: Callable[[torch.Tensor], torch.Tensor] | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Minimise L + penalty(Λ) over Λ; the loss of every step, without the penalty.

    Args:
        loss: runs forward and backward on the blended model for a step, and returns L.
        after: called after each update of Λ, which is not yet in the model.

    Raises:
        RunFailed: a gradient is not finite.
    """
    values = blend.values.requires_grad_(True)
    optimiser = torch.optim.AdamW([values], lr=schedule.lr, weight_decay=schedule.decay)
    history = []
    with progress(label, total=schedule.steps, unit="step") as bar:
        for step in range(schedule.steps):
            with torch.no_grad():
                blend.write()
            blend.composed.clear()
            history.append(loss(step))
            gradient = blend.gradient()
            if not bool(torch.isfinite(gradient).all()):
                raise RunFailed(f"{label}: step {step + 1}: the gradient of the coefficients is not finite; a smaller lr may help")
            values.grad = gradient if penalty is None else gradient + torch.autograd.grad(penalty(values), values)[0]
            if schedule.clip is not None:
                torch.nn.utils.clip_grad_norm_([values], schedule.clip)
            if schedule.cosine:
                optimiser.param_groups[0]["lr"] = schedule.lr * 0.5 * (1 + cos(pi * step / schedule.steps))
            optimiser.step()
            after(step)
            bar.advance(1)
    blend.values = values.detach()
    blend.composed.clear()
    return history


def task_batches(study: Study, batch: int, step: int, rows: Sequence[np.ndarray] | None = None) -> Iterator[tuple[TaskRows, np.ndarray]]:
    """A batch of every task's rows (or of some of them): those of optimiser batch `step`, drawn from the seed alone."""
    for number, task in enumerate(study.tasks):
        usable = study.rows_of(task) if rows is None else rows[number]
        yield task, usable[optimiser_batch(len(usable), batch, artefacts.derive_seed(study.preset.seed, "task", number), step)]


def losses(folder: Path, history: Sequence[float]) -> None:
    """The loss of every step, as `losses.jsonl`."""
    with artefacts.atomic_lines(folder / "losses.jsonl") as write:
        for step, value in enumerate(history, 1):
            write(json.dumps({"step": step, "loss": value}))
