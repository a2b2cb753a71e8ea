"""SOMF (arXiv 2405.09055): a safety-aligned model keeps of task updates what agrees with its refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from guidetune import registry
from guidetune.artefacts import derive_seed
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import progress, say
from guidetune.registry import method
from guidetune.weightspace import combine
from guidetune.weightspace.learning import MICRO_TOKENS, Composed, Cost, Learned, Study, TaskRows
from guidetune.weightspace.masks import EMPTY, MaskWriter, StoredMasks, concrete, write_manifest
from guidetune.weightspace.stages import Mask, Merger, On, Piece, Preset, Stages, View

if TYPE_CHECKING:
    from guidetune.data.rows import EncodedRows
    from guidetune.engine.forward import Forward

FILE = "mask.safetensors"


@dataclass(frozen=True)
class FusedTasks(combine.Sum):
    """The paper's fusion: one task as it is, several times a coefficient."""

    several: float = 0.3

    @property
    def plain(self) -> bool:  # type: ignore[override]
        return False

    def combine(self, taus: list[torch.Tensor], weights: Sequence[float], piece: Piece, view: View, prepared: Any) -> torch.Tensor:
        total = super().combine(taus, weights, piece, view, prepared)
        return total if len(taus) == 1 else total * self.several


@method(kind="weightspace", name="somf", paper="2405.09055", summary="Learn which values of task updates keep a safe model safe.")
class Somf(Learned):
    """W + F(m ⊙ τ_1 / mean(m), …), W the safe (aligned) model and τ_i the updates of tasks tuned from it; one mask m for all tasks.

    Per value a logit Λ; while learning a relaxed draw m = σ((log u − log(1 − u) + Λ) / t), new in every step, the mean per tensor. Only Λ
    is trained, with DPO (2305.18290) on safe and unsafe replies to the same prompts, the safe model as reference:

        L = −log σ(β [log π(y_safe | x) − log π_ref(y_safe | x) − log π(y_unsafe | x) + log π_ref(y_unsafe | x)])

    `data.tasks`: the safe replies, then the unsafe ones; a pair are two rows with the same prompt. The paper's fusions of several tasks:
    `fusion: linear`, the default, `{method: ties, scale: 0.4}`, `{method: dare, density: 0.8, scale: 0.3}`. A mask that keeps little is
    divided by little: look at the shares in masks.json.
    """

    every_source: ClassVar[bool] = True  # the number of tasks decides the coefficient, in every tensor

    limit: int | None = Field(None, ge=1, description="Rows of each kind, the first ones; null: all.")
    objective: Literal["dpo", "sft"] = Field("dpo", description="Safe against unsafe replies, or the likelihood of the safe ones alone.")
    beta: float = Field(0.1, gt=0, description="β of DPO.")
    temperature: float = Field(0.5, gt=0, description="t of the relaxed draw.")
    init: float = Field(0.0, allow_inf_nan=False, description="Λ at the start; 0: every value is kept with probability one half.")
    lr: float | None = Field(None, gt=0, description="Of AdamW on Λ; null: 1e-3 for one task, 1e-2 for several.")
    steps: int = Field(500, ge=0, description="Optimiser steps, the rate falling as a cosine.")
    warmup: int = Field(0, ge=0, description="Steps in which the rate rises.")
    batch: int = Field(16, ge=1, description="Pairs in a step.")
    export: Literal["threshold", "sample"] = Field("threshold", description="The mask that is written: Λ > 0, or one draw with σ(Λ).")
    scale: float = Field(0.3, allow_inf_nan=False, description="Coefficient of the summed updates of several tasks; one task has 1.")
    fusion: On | None = Field(None, description="Another method that joins the masked updates; null: the sum.")

    @field_validator("fusion")
    @classmethod
    def _learns_nothing(cls, fusion: registry.Method | None) -> registry.Method | None:
        if isinstance(fusion, Learned):
            raise ValueError(f"{fusion.name} learns from data itself")
        return fusion

    def fused(self) -> Stages:
        """F, without the mask."""
        return self.fusion.stages() if isinstance(self.fusion, Preset) else Stages(FusedTasks(several=self.scale))

    def stages_from(self, folder: Path) -> Stages:
        return replace(self.fused(), mask=StoredMasks(folder, rescale=True))

    def check_tasks(self, tasks: Sequence[TaskRows], sources: int) -> None:
        super().check_tasks(tasks, sources)
        self._replies(tasks)

    def cost(self, study: Study) -> Cost:
        kinds = 2 if self.objective == "dpo" else 1
        rows = self.steps * self.batch * kinds
        once = 2 * sum(len(study.rows_of(task)) for task in study.tasks[:kinds])
        values = study.changed_values
        return Cost(rows * kinds + once, rows, values // 8, study.model_bytes + 4 * values * (4 + len(study.merged.parts)))

    def learn(self, study: Study, work: Path) -> dict[str, Any]:
        replies = self._replies(study.tasks)
        with study.composed() as composed, composed.forward() as forward:
            home = forward.device if self.fusion is None else torch.device("cpu")  # where every method's stages can work
            views = _held(composed, home)
            logits = {name: torch.full(view.shape, self.init, device=home) for name, view in views.items()}
            composed.write(lambda piece, taus: None)
            reference = [_log_prob(forward, rows, at) for rows, at in replies]
            course = self._train(forward, composed, views, logits, replies, reference)

            kept = {name: self._exported(name, logit) for name, logit in logits.items()}
            hard = _InMemory({name: (keep.float(), float(keep.float().mean())) for name, keep in kept.items()})
            mergers = [Merger(replace(self.fused(), mask=mask), views) for mask in (None, hard)]
            before, after = (self._measured(forward, composed, merger, replies, reference) for merger in mergers)
            owner = composed.stands_for
        shapes = study.merged.shapes
        with MaskWriter(work / FILE, shapes) as writer:
            for name in shapes:
                writer.write(name, kept[owner[name]].cpu())
        report = {"pairs": len(replies[0][1]), "steps": self.steps, "course": course, "unmasked": before, "masked": after}
        written = write_manifest(work, {FILE: writer}, dict.fromkeys(study.merged.ids, FILE), method=self.name, **report)
        share = written["files"][FILE]["share"]
        say(f"somf: {100 * share:.2f} % of the values are kept; loss on {report['pairs']} pairs {before['loss']:.4g} → {after['loss']:.4g}")
        return {**report, "share": share}

    # -- parts of learning --------------------------------------------------------------------------------------------

    def _replies(self, tasks: Sequence[TaskRows]) -> list[tuple[EncodedRows, np.ndarray]]:
        """[(rows of safe replies, their indices)], for DPO also those of unsafe ones to the same prompts, in the same order."""
        wanted = 2 if self.objective == "dpo" else 1
        if len(tasks) != wanted:
            kinds = "two lists of rows, safe replies and unsafe ones to the same prompts" if wanted == 2 else "one list of safe replies"
            where = "data.tasks of a plan, transfer.data of a recipe"
            raise BadInput(f"somf with objective {self.objective} learns from {kinds} ({where}), and was given {len(tasks)}")
        found = [(task.rows, self.usable(task)) for task in tasks]
        if wanted == 1:
            return found
        (safe, chosen), (unsafe, rejected) = found
        waiting: dict[bytes, list[int]] = {}
        for j in rejected[::-1]:
            waiting.setdefault(_prompt(unsafe, int(j)), []).append(int(j))
        pairs = [(int(i), same.pop()) for i in chosen if (same := waiting.get(_prompt(safe, int(i))))]
        if not pairs:
            raise BadInput(
                "somf: no safe reply has an unsafe one to the same prompt; give the same file twice, with its two columns of replies: "
                "tasks: [{path: F, map: {user: prompt, assistant: chosen}}, {path: F, map: {user: prompt, assistant: rejected}}]"
            )
        return [(safe, np.array([i for i, _ in pairs])), (unsafe, np.array([j for _, j in pairs]))]

    def _train(
        self,
        forward: Forward,
        composed: Composed,
        views: Mapping[str, View],
        logits: Mapping[str, torch.Tensor],
        replies: Sequence[tuple[EncodedRows, np.ndarray]],
        reference: Sequence[torch.Tensor],
    ) -> list[float]:
        """Move the logits; the loss of every step."""
        from guidetune.engine.batching import optimiser_batch

        for logit in logits.values():
            logit.requires_grad_(True)
        peak = self.lr or (1e-3 if len(next(iter(views.values())).sources) == 1 else 1e-2)
        optimiser = torch.optim.AdamW(list(logits.values()), lr=peak, weight_decay=0.0)
        course = []
        with progress("somf", total=self.steps, unit="steps") as bar:
            for step in range(self.steps):
                draws = _Draws(logits, self.temperature, derive_seed(self.seed, "somf", step))
                seeded = {name: replace(view, seed=derive_seed(self.seed, step), _held={}) for name, view in views.items()}
                with torch.no_grad():
                    merger = Merger(replace(self.fused(), mask=draws), seeded)
                    _write(composed, merger, draws)
                picked = optimiser_batch(len(replies[0][1]), self.batch, self.seed, step)
                course.append(self._descend(forward, replies, reference, picked))
                for name, parameter in composed.parameters.items():
                    if parameter.grad is not None:
                        d = merger.update(name, 0, max(1, parameter.shape[0] if parameter.dim() else 1))
                        if d.requires_grad:
                            (logits[name].grad,) = torch.autograd.grad(d, logits[name], parameter.grad.to(d.device))
                        merger.close(name)
                        draws.forget(name)
                composed.clear()
                rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
                fall = 0.5 * (1 + cos(pi * max(0, step - self.warmup) / max(1, self.steps - self.warmup)))
                optimiser.param_groups[0]["lr"] = peak * rise * fall
                optimiser.step()
                optimiser.zero_grad()
                bar.advance(1)
        for logit in logits.values():
            logit.requires_grad_(False)
        return [round(loss, 5) for loss in course]

    def _descend(
        self,
        forward: Forward,
        replies: Sequence[tuple[EncodedRows, np.ndarray]],
        reference: Sequence[torch.Tensor],
        picked: np.ndarray,
    ) -> float:
        """The loss of some pairs; its gradient is added to the parameters'. Margins are found first: then any rows can go together."""
        with forward.steady():
            log_probs = [_log_prob(forward, rows, at[picked]).requires_grad_(True) for (rows, at) in replies]
        tokens = [torch.tensor([float(rows.supervised[int(i)]) for i in at[picked]]) for rows, at in replies]
        loss = self._loss(log_probs, [ref[torch.from_numpy(picked)] for ref in reference], tokens[0])
        if not bool(torch.isfinite(loss)):
            raise RunFailed("somf: the loss is not finite; lower lr, or look at the updates of the sources")
        loss.backward()
        for (rows, at), log_prob in zip(replies, log_probs, strict=True):
            assert log_prob.grad is not None
            _log_prob(forward, rows, at[picked], log_prob.grad)
        return float(loss.detach())

    def _loss(self, log_probs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        if self.objective == "sft":
            return -log_probs[0].sum() / tokens.sum()
        return -torch.nn.functional.logsigmoid(self.beta * _margin(log_probs, reference)).mean()

    def _measured(
        self,
        forward: Forward,
        composed: Composed,
        merger: Merger,
        replies: Sequence[tuple[EncodedRows, np.ndarray]],
        reference: Sequence[torch.Tensor],
    ) -> dict[str, float]:
        """The loss over all pairs of a merge in memory, and in which share of the pairs the safe reply gained on the unsafe one."""
        with torch.no_grad():
            _write(composed, merger)
        with forward.steady():
            log_probs = [_log_prob(forward, rows, at) for rows, at in replies]
        tokens = torch.tensor([float(replies[0][0].supervised[int(i)]) for i in replies[0][1]])
        found = {"loss": round(float(self._loss(log_probs, reference, tokens)), 5)}
        return found if len(replies) == 1 else found | {"safer": round(float((log_probs[0] > log_probs[1]).float().mean()), 5)}

    def _exported(self, name: str, logit: torch.Tensor) -> torch.Tensor:
        if self.export == "threshold":
            return logit > 0
        return concrete(logit, _uniform(logit, derive_seed(self.seed, "somf export", name)), self.temperature) > 0.5


@dataclass
class _InMemory(Mask):
    """(mask, mean) of each tensor, shared by all sources."""

    masks: dict[str, tuple[torch.Tensor, float]]

    def apply(self, source: str, name: str, first: int, tau: torch.Tensor) -> torch.Tensor:
        mask, mean = self.masks[name]
        if mean < EMPTY:
            return torch.zeros_like(tau)
        return mask.flatten()[first : first + tau.numel()].view(tau.shape) * tau / mean


class _Draws(Mask):
    """The relaxed masks of one step: the same however often they are asked for, with the gradient mode of whoever asks."""

    def __init__(self, logits: Mapping[str, torch.Tensor], temperature: float, seed: int) -> None:
        self.logits, self.temperature, self.seed = logits, temperature, seed
        self._drawn: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def apply(self, source: str, name: str, first: int, tau: torch.Tensor) -> torch.Tensor:
        if name not in self._drawn:
            mask = concrete(self.logits[name], _uniform(self.logits[name], derive_seed(self.seed, name)), self.temperature)
            self._drawn[name] = mask, mask.mean()
        mask, mean = self._drawn[name]
        return mask.flatten()[first : first + tau.numel()].view(tau.shape) * tau / mean.clamp_min(EMPTY)

    def forget(self, name: str) -> None:
        self._drawn.pop(name, None)


def _uniform(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform draws in the open interval (0, 1)."""
    draw = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
    return draw.clamp_(1e-6, 1 - 1e-6).to(like.device)


def _held(composed: Composed, home: torch.device) -> dict[str, View]:
    """The views of the changed parameters, their updates whole and in the memory of a device."""
    views = {}
    for name in composed.parameters:
        parts = [taus for _, _, taus in composed.pieces(name)]
        whole = tuple((torch.cat(part) if part[0].dim() else part[0]).to(home) for part in zip(*parts, strict=True))

        def read(start: int, stop: int, whole: tuple[torch.Tensor, ...] = whole) -> tuple[torch.Tensor, ...]:
            return tuple(tau[start:stop] if tau.dim() else tau for tau in whole)

        views[name] = replace(composed.merger.views[name], read=read, _held={})
    return views


def _write(composed: Composed, merger: Merger, draws: _Draws | None = None) -> None:
    """θ = W + D."""
    composed.write(lambda piece, taus: merger.update(piece.name, piece.start, piece.stop).to(composed.parameters[piece.name].device))
    for name in composed.parameters:
        merger.close(name)
        if draws is not None:
            draws.forget(name)


def _margin(log_probs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> torch.Tensor:
    """By how much more than in the reference the first replies are likelier than the second ones, [pairs]."""
    return (log_probs[0] - reference[0]) - (log_probs[1] - reference[1])


def _prompt(rows: EncodedRows, i: int) -> bytes:
    row = rows[i]
    return row.input_ids[: int(np.flatnonzero(row.loss_weight > 0)[0])].tobytes()


def _log_prob(forward: Forward, rows: EncodedRows, at: np.ndarray, slope: torch.Tensor | None = None) -> torch.Tensor:
    """Σ log p of the supervised tokens of each row, [rows]; with `slope` = dL/d(log p) the gradient of L is added to the parameters'."""
    from guidetune.engine.batching import assemble, micro_batches

    found = torch.zeros(len(at))
    lengths = rows.lengths[at]
    for group in micro_batches(np.arange(len(at)), lengths, MICRO_TOKENS, forward.layout):
        batch = assemble(rows, at[group], forward.layout, forward.device)
        with torch.set_grad_enabled(slope is not None), forward.documents(batch):
            log_prob = torch.zeros(len(group), device=forward.device).index_add(0, batch.row, -forward.nll(batch))
            if slope is not None:
                log_prob.backward(slope[torch.from_numpy(group)].to(log_prob.device))
        found[torch.from_numpy(group)] = log_prob.detach().cpu()
    return found
