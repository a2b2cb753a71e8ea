"""aTLAS: task vector composition with learnt anisotropic scaling (arXiv 2407.02880)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from guidetune.errors import BadInput
from guidetune.registry import method
from guidetune.weightspace.coefficients import Blend, Coefficients, Schedule, descend, losses, task_batches
from guidetune.weightspace.learning import Cost, Learned, Study, TaskRows, batch_loss, entropy, nll
from guidetune.weightspace.stages import Stages


@method(
    kind="weightspace",
    name="atlas",
    paper="2407.02880",
    summary="Learn a factor for each update and block, from few rows or none labelled.",
)
class Atlas(Learned):
    """W^j + Σ_i Σ_k Λ[i, j, k] M_k^j ⊙ τ_i^j in every block j, a named tensor; Λ starts at 0, which is the anchor, and is trained.

    `objective: supervised`: the mean loss of the tasks' rows (few-shot learning with a pool of updates, or one model for all tasks);
    `entropy`: the mean entropy of the predictions, no labels needed. Sources may be LoRA adapters: Σ Λ[i, j] B_i A_i.
    `parts: K` splits each tensor, vectors too, at random into K parts with coefficients of their own (aTLAS × K).
    Of the coefficients after every `check_every` steps those with the best loss on held-out rows are kept, the zeros of the start among
    them. Leave out the update that was tuned on the rows you test on: it would give the answers away.
    """

    objective: Literal["supervised", "entropy"] = Field("supervised", description="Loss of the rows' answers, or entropy without labels.")
    by: Literal["tensor", "source"] = Field("tensor", description="One coefficient for each tensor, or one for a source (isotropic).")
    parts: int = Field(1, ge=1, le=65536, description="K: random parts of each tensor, each with its own coefficient.")
    pool: int | None = Field(None, ge=1, description="Sources kept for each block, those of the largest gradient at 0; null: all.")
    steps: int = Field(200, ge=1, description="Optimiser steps, each over one batch of every task.")
    batch: int = Field(16, ge=1, description="Rows of each task in a step.")
    lr: float = Field(0.1, gt=0, allow_inf_nan=False, description="Learning rate of AdamW, to zero along a cosine.")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False, description="Pulls coefficients towards 0, the anchor.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    penalty: float = Field(0.0, ge=0, allow_inf_nan=False, description="γ of γ · mean_j ‖Λ[:, j]‖ in the loss (the paper: 0.5 where used).")
    norm: Literal[1, 2] = Field(2, description="Which norm the penalty takes.")
    held_out: float = Field(
        0.2, ge=0, lt=1, description="Share of each task's rows that picks the coefficients; 0: the last ones are kept."
    )
    check_every: int = Field(20, ge=1, description="Steps between two looks at the held-out rows.")

    def stages_from(self, folder: Path) -> Stages:
        return Stages(Coefficients(folder))

    def _split(self, study: Study, task: TaskRows) -> tuple[np.ndarray, np.ndarray]:
        """Rows to learn from, and those held out: every so many-th one."""
        rows = study.rows_of(task)
        if not self.held_out:
            return rows, rows[:0]
        at = np.floor(np.arange(1, len(rows) + 1) * self.held_out) > np.floor(np.arange(len(rows)) * self.held_out)
        if not at.any() or at.all():
            raise BadInput(
                f"data of task {task.name!r}: {len(rows)} rows are too few to hold {self.held_out:g} of them out; add rows, or 0"
            )
        return rows[~at], rows[at]

    def _checks(self) -> int:
        return 1 + -(-self.steps // self.check_every) if self.held_out else 0

    def cost(self, study: Study) -> Cost:
        splits = [self._split(study, task) for task in study.tasks]
        passes = self.steps * sum(min(self.batch, len(learn)) for learn, _ in splits)
        checks = self._checks() * sum(len(held) for _, held in splits)
        return Cost(passes + checks, passes, 0, study.memory())

    def learn(self, study: Study, work: Path) -> dict[str, Any]:
        values = nll if self.objective == "supervised" else entropy
        splits = [self._split(study, task) for task in study.tasks]
        learnt_from = [learn for learn, _ in splits]
        with study.composed() as composed, composed.forward() as forward:
            blend = Blend(composed, study.merged.ids, self.by == "tensor", self.parts, study.preset.seed)
            best = (float("inf"), 0, blend.values.clone())
            checked = []

            def look(step: int) -> None:
                nonlocal best
                with torch.no_grad():
                    blend.write()
                held = zip(study.tasks, splits, strict=True)
                score = sum(batch_loss(forward, task.rows, rows, values, backward=False) for task, (_, rows) in held)
                checked.append({"step": step, "loss": score})
                if score < best[0]:
                    best = (score, step, blend.values.detach().clone())

            def loss(step: int) -> float:
                batches = task_batches(study, self.batch, step, learnt_from)
                return sum(batch_loss(forward, task.rows, rows, values) for task, rows in batches)

            def after(step: int) -> None:
                if self.held_out and ((step + 1) % self.check_every == 0 or step + 1 == self.steps):
                    look(step + 1)

            def penalty(coefficients: torch.Tensor) -> torch.Tensor:
                return self.penalty * coefficients.norm(p=self.norm, dim=(0, 2)).mean()

            if self.held_out:
                look(0)
            if self.pool is not None:
                blend.write()
                loss(0)
                blend.keep_strongest(self.pool)
            schedule = Schedule(self.steps, self.lr, cosine=True, decay=self.weight_decay, clip=self.clip)
            history = descend(blend, schedule, loss, self.name, penalty if self.penalty else None, after)
            if self.held_out:
                blend.values = best[2]
        blend.table().save(work, study.labels, held_out=checked)
        losses(work, history)
        kept = best[1] if self.held_out else self.steps
        return {
            "loss_first": history[0],
            "loss_last": history[-1],
            "step_kept": kept,
            "held_out": checked,
            "coefficients": blend.values.numel(),
        }
