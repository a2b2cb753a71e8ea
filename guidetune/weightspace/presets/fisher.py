"""Fisher merging (arXiv 2111.09832)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from guidetune.artefacts import derive_seed
from guidetune.errors import RunFailed
from guidetune.progress import progress
from guidetune.registry import method
from guidetune.weightspace.learning import Composed, Cost, Learned, Study, TaskRows
from guidetune.weightspace.stages import Stages
from guidetune.weightspace.statistics import Collection, FisherMean

if TYPE_CHECKING:
    from guidetune.engine.batching import MicroBatch
    from guidetune.engine.forward import Forward


@method(
    kind="weightspace",
    name="fisher",
    paper="2111.09832",
    summary="Average models, each value by how much a model's predictions hang on it.",
)
class Fisher(Learned):
    """Σ w_i F_i θ_i / Σ w_i F_i with the diagonal Fisher information of each model on its own task:

        F_i = E_x E_{y ~ p_i(y|x)} (∂ log p_i(y|x) / ∂θ)²

    One example is one row, and its gradient is squared before any is added to it; of a batch's sum the square would hold products
    of different examples. y is drawn from the model's own prediction at every supervised position, after the tokens that are there
    (`labels: model`); `data` takes the tokens themselves, the empirical Fisher information.
    """

    sources_needed: ClassVar[tuple[int, int | None]] = (2, None)
    task_of_source: ClassVar[bool] = True

    labels: Literal["model", "data"] = Field("model", description="Whose tokens are scored: drawn from the model, or those of the rows.")
    samples: int = Field(1, ge=1, description="Draws for each row (labels: model).")
    normalize: bool = Field(False, description="Scale each model's F to norm 1, so that none counts more for having steeper predictions.")
    floor: float = Field(1e-6, gt=0, allow_inf_nan=False, description="Least F: where no model's predictions hang on a value, the average.")

    @property
    def _draws(self) -> int:
        return self.samples if self.labels == "model" else 1

    def stages_from(self, folder: Path) -> Stages:
        return Stages(FisherMean(folder, self.floor))

    def cost(self, study: Study) -> Cost:
        rows = sum(len(study.rows_of(task)) for task in study.tasks)
        disk = 4 * study.changed_values * len(study.merged.parts)
        return Cost(rows * self._draws, rows * self._draws, disk, study.memory(sets=2))

    def learn(self, study: Study, work: Path) -> dict[str, Any]:
        found = Collection(work, study.merged.ids, study.labels)
        norms = {}
        with study.composed() as composed:
            for id, task, label in zip(study.merged.ids, study.tasks, study.labels, strict=True):
                composed.write_source(id)
                sums = self._information(composed, study, task)
                norm = float(sum(float(f.double().square().sum()) for f in sums.values()) ** 0.5)
                norms[label] = norm
                if self.normalize and norm > 0:
                    sums = {name: f / norm for name, f in sums.items()}
                found.write(id, sums)
        found.close(composed.stands_for, norms=norms)
        return {"norms": norms, "rows": [len(study.rows_of(task)) for task in study.tasks]}

    def _information(self, composed: Composed, study: Study, task: TaskRows) -> dict[str, torch.Tensor]:
        """F of every changed parameter: the mean over rows and draws of the squared gradient of one row."""
        from guidetune.engine.batching import assemble

        sums = {name: torch.zeros_like(p) for name, p in composed.parameters.items()}
        rows = study.rows_of(task)

        def square(name: str, parameter: torch.nn.Parameter) -> None:
            sums[name].addcmul_(parameter.grad, parameter.grad)
            parameter.grad = None  # at once: never the gradients of the whole model beside the sums

        hooks = [p.register_post_accumulate_grad_hook(lambda p, name=name: square(name, p)) for name, p in composed.parameters.items()]
        try:
            with composed.forward() as forward, progress(f"{self.name} ({task.name})", total=len(rows) * self._draws, unit="row") as bar:
                for row in rows:
                    batch = assemble(task.rows, np.array([row]), forward.layout, forward.device)
                    for draw in range(self._draws):
                        seed = derive_seed(self.seed, "fisher", task.rows.ids[int(row)], draw)
                        with forward.documents(batch):
                            self._log_prob(forward, batch, seed).backward()
                        bar.advance(1)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: f.div_(len(rows) * self._draws) for name, f in sums.items()}

    def _log_prob(self, forward: Forward, batch: MicroBatch, seed: int) -> torch.Tensor:
        """log p(y | x) of one row, y drawn or as it is."""
        from guidetune.engine.head import chunk_rows, head_nll, logits

        hidden = forward.hidden(batch)
        if not bool(torch.isfinite(hidden).all()):
            raise RunFailed(f"{self.name}: the model's hidden states are not finite; row {int(batch.rows[0]) + 1} of its data")
        if self.labels == "data":
            return -head_nll(hidden, batch.targets, forward.head).sum()
        generator = torch.Generator().manual_seed(seed)
        step = chunk_rows(forward.head.weight.shape[0], len(hidden), hidden.device.type)
        with torch.no_grad():
            drawn = [
                torch.multinomial(logits(h, forward.head).softmax(-1).cpu(), 1, generator=generator).squeeze(1)
                for h in hidden.detach().split(step)
            ]
        targets = torch.cat(drawn).to(batch.targets.device)
        return -head_nll(hidden, targets, forward.head).sum()
