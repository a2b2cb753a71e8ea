"""Grafting, or skill localisation (arXiv 2302.06600): the few values of an update that carry what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import progress, say
from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.learning import Composed, Cost, Learned, Study, TaskRows, batch_loss, nll
from guidetune.weightspace.masks import MaskFile, MaskWriter, StoredMasks, graft_slope, open_masks, relaxed_graft, write_manifest
from guidetune.weightspace.sparsify import KeepBand
from guidetune.weightspace.stages import Combiner, Piece, Stages, View, layers, ranges

if TYPE_CHECKING:
    from guidetune.engine.forward import Forward

Bits = dict[tuple[str, int], torch.Tensor]
"""(parameter, first row of a piece) -> which of its values."""


@dataclass(frozen=True)
class MeanOfKept(Combiner):
    """Σ w_i τ̂_i, divided by the number of sources whose graft holds the value."""

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        total = combine.weighted_sum(taus, weights)
        return total.div_(sum((tau != 0).to(total.dtype) for tau in taus).clamp_min_(1))  # type: ignore[union-attr]


@method(kind="weightspace", name="grafting", paper="2302.06600", summary="Learn the few values of an update that carry the skill.")
class Grafting(Learned):
    """W + γ ⊙ τ with γ of 0s and 1s, learnt from rows of the task. It starts as γ_b, the ⌊keep · d⌋ largest |τ| of d candidates, and

        γ(S) = γ_b + (1 − 2 γ_b) σ(S − b),    S ← S − lr · g ⊙ τ ⊙ (1 − 2 γ_b) σ (1 − σ),    g = ∂L/∂θ at W + γ(S) ⊙ τ

    so that a value changes sides where S > b. After each step γ is rounded and its loss on held-out rows looked at; the best is kept.
    Nothing holds the number of values at k unless `most` does: the share that was kept is in masks.json. What an adaptive optimiser has
    learnt is spread over many values: keep more, or tune with SGD.

    Several sources: a graft for each, from its own task's rows. One source and several tasks: a graft of the one update for each task, and
    their union is merged. Grafts of earlier merges can be left alone (`outside`).
    """

    limit: int | None = Field(None, ge=1, description="Rows of each task, the first ones; null: all.")
    keep: float = Field(1e-4, ge=0, le=1, description="Share of the candidate values in the starting mask, the largest.")
    among: Literal["layers", "all"] = Field("layers", description="Candidates: the layers' parameters, or embeddings and head as well.")
    steps: int = Field(100, ge=0, description="Steps of SGD on S; 0: the starting mask.")
    lr: float = Field(1e7, gt=0, description="Of SGD; large because σ′ is about 1e-4 and τ is small.")
    batch: int = Field(1024, ge=1, description="Rows in a step.")
    bias: float = Field(10.0, allow_inf_nan=False, description="b.")
    l1: float = Field(0.0, ge=0, description="Times the sum of γ(S), added to the loss: drops values that do little.")
    most: float | None = Field(None, gt=0, le=1, description="Stop before more than this share of the candidates is kept.")
    held_out: float = Field(0.1, gt=0, lt=1, description="Share of the rows, the last ones, on which the best step is picked.")
    overlap: Literal["exclusive", "mean", "sum"] = Field(
        "exclusive", description="Values that several grafts want: the first source's, or all of them get it and it is averaged or summed."
    )
    outside: list[str] = Field([], description="Folders of what earlier grafts have learnt; the values they hold stay as they are.")

    def stages_from(self, folder: Path) -> Stages:
        joined = MeanOfKept() if self.overlap == "mean" else combine.Sum()
        return Stages(joined, mask=StoredMasks(folder))

    def check_tasks(self, tasks: Sequence[TaskRows], sources: int) -> None:
        super().check_tasks(tasks, sources)
        if sources > 1 and len(tasks) != sources:
            raise BadInput(f"grafting needs the rows of each source's own task: {sources} sources, and rows of {len(tasks)} tasks")
        for task in tasks:
            if (count := len(self.usable(task))) < 2:
                raise BadInput(f"grafting: task {task.name!r} has {count} rows; learning and picking a step take two at least")

    def cost(self, study: Study) -> Cost:
        rows = [len(study.rows_of(task)) for task in study.tasks]
        held = sum(max(1, round(self.held_out * n)) for n in rows)
        learnt = self.steps * sum(min(self.batch, n) for n in rows)
        values = study.changed_values
        return Cost(learnt + held * (self.steps + 3), learnt, len(rows) * values // 8, study.memory(1) + 5 * values)

    def learn(self, study: Study, work: Path) -> dict[str, Any]:
        ids, tasks = study.merged.ids, study.tasks
        earlier = [mask for folder in self.outside for mask in open_masks(Path(folder)).values()]
        writers: dict[str, MaskWriter] = {}
        found: list[dict[str, Any]] = []
        with study.composed() as composed, composed.forward() as forward:
            names = self._candidates(study, composed)
            taken = _held_by(earlier, composed, names)
            union: Bits = {}
            for k, task in enumerate(tasks):
                source = ids[k] if len(ids) > 1 else ids[0]
                graft = _Graft(self, composed, source, names, taken, derive_seed(study.preset.seed, "grafting", k))
                kept, report = graft.learn(forward, study, task)
                file = f"graft-{k + 1}.safetensors"
                writers[file] = _written(work / file, composed, graft.names, kept)
                gone = "" if report["recovered"] is None else f", {100 * report['recovered']:.1f} % of the loss recovered"
                say(f"grafting: {task.name}: {report['kept']:,} values, {100 * report['share']:.3g} % of the candidates{gone}")
                found.append({"task": task.name, "source": study.labels[ids.index(source)], "file": file, **report})
                if self.overlap == "exclusive" and len(ids) > 1:
                    taken = _either(taken, kept)
                union = _either(union, kept)
            merged = {source: f"graft-{k + 1}.safetensors" for k, source in enumerate(ids)}
            if len(ids) == 1 and len(tasks) > 1:
                merged = {ids[0]: "union.safetensors"}
                writers["union.safetensors"] = _written(work / "union.safetensors", composed, names, union)
        written = write_manifest(work, writers, merged, method=self.name, grafts=found)
        shares = {file: entry["share"] for file, entry in written["files"].items()}
        return {"grafts": found, "shares": shares, "overlap": written.get("overlap")}

    def _candidates(self, study: Study, composed: Composed) -> list[str]:
        inside = layers(study.anchor.names.shapes)
        names = [name for name in composed.parameters if self.among == "all" or name in inside]
        if not names:
            raise BadInput("grafting: the sources change no parameter of the layers; embeddings and head are candidates with among: all")
        return names


class _Graft:
    """One source's graft for one task while it is learnt."""

    def __init__(
        self,
        options: Grafting,
        composed: Composed,
        source: str,
        names: Sequence[str],
        taken: Mapping[tuple[str, int], torch.Tensor],
        seed: int,
    ) -> None:
        self.options, self.composed, self.source, self.taken, self.seed = options, composed, source, taken, seed
        views = composed.merger.views
        self.names = [name for name in names if source in views[name].sources]
        self.place = {name: views[name].sources.index(source) for name in self.names}
        self.values = sum(views[name].numel for name in self.names)
        self.base = self._largest()
        self.scores = {key: self._uniform(key, mask.shape) for key, mask in self.base.items()}

    def learn(self, forward: Forward, study: Study, task: TaskRows) -> tuple[Bits, dict[str, Any]]:
        """(which values are kept, losses and counts)."""
        from guidetune.engine.batching import optimiser_batch

        rows = study.rows_of(task)
        held = min(max(1, round(self.options.held_out * len(rows))), len(rows) - 1)
        train, judge = rows[:-held], rows[-held:]

        def loss_of(update: Callable[[Piece, torch.Tensor], torch.Tensor | None]) -> float:
            self._write(update)
            with forward.steady():
                return batch_loss(forward, task.rows, judge, nll, backward=False)

        losses = {"anchor": loss_of(lambda piece, tau: None), "all": loss_of(lambda piece, tau: tau)}
        best = losses["start"] = loss_of(lambda piece, tau: tau * self.base[_key(piece)])
        kept, at, course = self.base, 0, []
        with progress("grafting", total=self.options.steps, unit="steps") as bar:
            for step in range(1, self.options.steps + 1):
                indices = train[optimiser_batch(len(train), min(self.options.batch, len(train)), self.seed, step - 1)]
                self._step(forward, task, indices)
                flipped = self._rounded()
                if self.options.most is not None and _count(flipped) > self.options.most * self.values:
                    break
                loss = loss_of(lambda piece, tau, flipped=flipped: tau * flipped[_key(piece)])  # type: ignore[misc]
                course.append(round(loss, 5))
                if loss < best:
                    kept, at, best = flipped, step, loss
                bar.advance(1)
        losses["graft"] = best
        recovered = (losses["anchor"] - best) / gap if (gap := losses["anchor"] - losses["all"]) > 0 else None
        report = {
            "candidates": self.values,
            "start": _count(self.base),
            "kept": _count(kept),
            "share": _count(kept) / max(1, self.values),
            "step": at,
            "held_out_rows": held,
            "loss": {name: round(value, 5) for name, value in losses.items()},
            "recovered": None if recovered is None else round(recovered, 4),
            "course": course,
        }
        return kept, report

    def _step(self, forward: Forward, task: TaskRows, indices: np.ndarray) -> None:
        bias, l1 = self.options.bias, self.options.l1
        self._write(lambda piece, tau: relaxed_graft(self.scores[_key(piece)], self.base[_key(piece)].float(), bias) * tau)
        batch_loss(forward, task.rows, indices, nll)
        for name in self.names:
            for piece, taus, grad in self.composed.gradients(name):
                scores, base = self.scores[_key(piece)], self.base[_key(piece)].float()
                slope = (grad * taus[self.place[name]] + l1) * graft_slope(scores, base, bias)
                if not bool(torch.isfinite(slope.sum())):
                    raise RunFailed(f"grafting: the gradient of {name} is not finite; lower lr, or look at the source's update")
                scores.sub_(slope, alpha=self.options.lr)
        self.composed.clear()

    def _rounded(self) -> Bits:
        """γ(S) rounded: γ_b, but where S > b; never what is another graft's."""
        flipped = {key: mask ^ (self.scores[key] > self.options.bias) for key, mask in self.base.items()}
        return {key: mask & ~self.taken[key] if key in self.taken else mask for key, mask in flipped.items()}

    def _write(self, update: Callable[[Piece, torch.Tensor], torch.Tensor | None]) -> None:
        """θ = W + update(piece, τ) in the candidates, W elsewhere."""

        def of(piece: Piece, taus: list[torch.Tensor]) -> torch.Tensor | None:
            return update(piece, taus[self.place[piece.name]]) if piece.name in self.place else None

        self.composed.write(of)

    def _largest(self) -> Bits:
        """γ_b: the largest values of the source's update among the candidates that are free."""
        views = {name: self._alone(name) for name in self.names}
        band = KeepBand(self.options.keep, scope="global")
        survey = band.survey(views.values())
        base = {}
        for name, view in views.items():
            prepared = band.prepare(view, survey)
            for piece in view.pieces():
                base[name, piece.start] = prepared[0].mask(piece.taus[0], _key(piece)).to(self.composed.parameters[name].device)
            view.release()
        return base

    def _alone(self, name: str) -> View:
        """This source's update of a tensor, 0 where a value is taken."""

        def read(start: int, stop: int) -> tuple[torch.Tensor, ...]:
            tau = next(taus[self.place[name]] for piece, _, taus in self.composed.pieces(name) if piece.start == start)
            key = name, start
            return ((torch.where(self.taken[key], 0.0, tau) if key in self.taken else tau).cpu(),)

        return replace(self.composed.merger.views[name], sources=(self.source,), weights=(1.0,), read=read, _held={})

    def _uniform(self, key: tuple[str, int], shape: torch.Size) -> torch.Tensor:
        draw = torch.Generator().manual_seed(derive_seed(self.seed, *key))
        return torch.rand(shape, generator=draw).to(self.base[key].device)


def _key(piece: Piece) -> tuple[str, int]:
    return piece.name, piece.start


def _count(bits: Bits) -> int:
    return sum(int(mask.sum()) for mask in bits.values())


def _either(a: Mapping[tuple[str, int], torch.Tensor], b: Bits) -> Bits:
    return {**a, **{key: mask | a[key] if key in a else mask for key, mask in b.items()}}


def _held_by(masks: Sequence[MaskFile], composed: Composed, names: Sequence[str]) -> Bits:
    """Values that some of these masks keep, of the parameters `names`."""
    taken: Bits = {}
    for mask in masks:
        for name in (name for name in names if name in mask.shapes):
            shape = composed.merger.views[name].shape
            if mask.shapes[name] != shape:
                problem = f"the mask of {name} is {list(mask.shapes[name])}, the parameter {list(shape)}; it belongs to another model"
                raise BadInput(f"{mask.path}: {problem}")
            for (start, stop), bits in zip(ranges(shape), mask.pieces(name), strict=True):
                kept = bits.view((stop - start, *shape[1:]) if shape else ()).to(composed.parameters[name].device)
                taken = _either(taken, {(name, start): kept})
    return taken


def _written(path: Path, composed: Composed, names: Sequence[str], kept: Bits) -> MaskWriter:
    """A file of masks; a tied parameter has that of the one it is."""
    owners = {name: owner for name, owner in composed.stands_for.items() if owner in set(names)}
    shapes = {name: composed.merger.views[name].shape for name in owners}
    with MaskWriter(path, shapes) as writer:
        for name, owner in owners.items():
            for start, _ in ranges(shapes[name]):
                writer.write(name, kept[owner, start].cpu())
    return writer
