"""RegMean (arXiv 2212.09849)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn

from guidetune.engine.batching import sorted_batches
from guidetune.errors import BadInput
from guidetune.progress import progress
from guidetune.registry import method
from guidetune.weightspace.learning import MICRO_TOKENS, Composed, Cost, Learned, Study, TaskRows
from guidetune.weightspace.stages import Stages
from guidetune.weightspace.statistics import Collection, RegressionMean
from guidetune.weightspace.store import parse_size


@method(
    kind="weightspace", name="regmean", paper="2212.09849", summary="Merge linear layers so that their outputs stay those of each model."
)
class RegMean(Learned):
    """Of each linear layer the weights whose outputs are nearest to every model's own on its own task's inputs; the rest is averaged.

        W = (Σ w_i W_i G'_i) (Σ w_i G'_i)⁻¹,    G_i = X_iᵀ X_i over the tokens of the task,  G' = a G + (1 − a) diag(G) + δ m I

    Embeddings, norms and biases are averaged, and a head that shares the embedding's weights with it. Layers that share their input
    (q, k and v) share G. G is divided by the number of tokens (`per_token`), so that a task with more text does not count more.
    """

    sources_needed: ClassVar[tuple[int, int | None]] = (2, None)
    task_of_source: ClassVar[bool] = True

    off_diagonal: float = Field(0.9, ge=0, le=1, description="a: what off-diagonal products are multiplied by (the paper: 0.9, T5 0.1).")
    damping: float = Field(1e-4, ge=0, allow_inf_nan=False, description="δ, as a share of the mean diagonal: inverts G of few inputs.")
    per_token: bool = Field(True, description="Divide G by the number of tokens.")
    held: str = Field("4GB", description="Products collected in one pass over the rows; what does not fit takes another pass.")

    @field_validator("held")
    @classmethod
    def _size(cls, held: str) -> str:
        try:
            parse_size(held)
        except BadInput as error:
            raise ValueError(str(error)) from None
        return held

    def stages_from(self, folder: Path) -> Stages:
        return Stages(RegressionMean(folder, self.off_diagonal, self.damping))

    def cost(self, study: Study) -> Cost:
        kinds = study.anchor.names.kinds
        # what shares an input is known only from a pass: q, k, v and gate, up as they are in most models
        first = [name for name in study.merged.shapes if kinds.get(name) == "linear" and not name.endswith(SHARING)]
        sizes = [4 * study.merged.shapes[name][1] ** 2 for name in first]
        passes = len(_portions(sizes, parse_size(self.held)))
        rows = sum(len(study.rows_of(task)) for task in study.tasks)
        return Cost(rows * passes, 0, sum(sizes) * len(study.tasks), study.memory(sets=0) + min(sum(sizes), parse_size(self.held)))

    def learn(self, study: Study, work: Path) -> dict[str, Any]:
        found = Collection(work, study.merged.ids, study.labels)
        tokens = []
        with study.composed() as composed:
            linears = _linears(composed)
            inputs = _inputs(composed, study, linears)
            first = list(dict.fromkeys(inputs.values()))
            portions = _portions([4 * linears[name].in_features ** 2 for name in first], parse_size(self.held))
            for id, task in zip(study.merged.ids, study.tasks, strict=True):
                composed.write_source(id)
                for portion in portions:
                    found.write(id, _products(composed, study, task, {first[k]: linears[first[k]] for k in portion}, self.per_token))
                tokens.append(int(task.rows.lengths[study.rows_of(task)].sum()))
        averaged = [name for name in composed.parameters if name not in inputs]
        found.close(inputs, averaged=averaged)
        return {"linear_layers": len(inputs), "products": len(first), "averaged": len(averaged), "tokens": tokens, "passes": len(portions)}


SHARING = ("k_proj.weight", "v_proj.weight", "up_proj.weight")


def _portions(sizes: list[int], most: int) -> list[list[int]]:
    """Consecutive items of at most `most` bytes together; one that is larger goes alone."""
    portions: list[list[int]] = []
    room = 0
    for k, size in enumerate(sizes):
        if not portions or size > room:
            portions.append([])
            room = most
        portions[-1].append(k)
        room -= size
    return portions


def _linears(composed: Composed) -> dict[str, nn.Linear]:
    """The linear layers with a changed weight that is not an embedding's too, by the name of the weight."""
    modules = dict(composed.model.named_modules())
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    owners = {name: modules.get(name.removesuffix(".weight")) for name in composed.parameters if name.endswith(".weight")}
    return {name: m for name, m in owners.items() if isinstance(m, nn.Linear) and id(m.weight) not in embeddings}


def _inputs(composed: Composed, study: Study, linears: dict[str, nn.Linear]) -> dict[str, str]:
    """Linear weight -> the first one that has the same input, seen in a pass over one row."""
    seen: list[tuple[torch.Tensor, str]] = []
    same: dict[str, str] = {}

    def look(name: str, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        first = next((other for tensor, other in seen if tensor is x), None)
        if first is None:
            seen.append((x, name))  # kept: another tensor cannot take its place in memory
        same[name] = first or name

    task = study.tasks[0]
    _pass(composed, task, study.rows_of(task)[:1], linears, look)
    return same


def _products(composed: Composed, study: Study, task: TaskRows, linears: dict[str, nn.Linear], per_token: bool) -> dict[str, torch.Tensor]:
    """Xᵀ X of each layer's inputs, fp32 [in, in]; `per_token`: divided by their number."""
    sums = {name: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for name, m in linears.items()}
    counts = dict.fromkeys(linears, 0)

    def add(name: str, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        x = (x if mask is None else x[mask.bool()]).flatten(0, -2).float()
        sums[name].addmm_(x.T, x)
        counts[name] += len(x)

    _pass(composed, task, study.rows_of(task), linears, add)
    return {name: total / max(1, counts[name]) if per_token else total for name, total in sums.items()}


def _pass(
    composed: Composed,
    task: TaskRows,
    rows: np.ndarray,
    linears: dict[str, nn.Linear],
    see: Callable[[str, torch.Tensor, torch.Tensor | None], None],
) -> None:
    """Run the model over rows and show `see` the input of each layer, [.., in], and which of it is no padding (None: all of it)."""
    mask: list[torch.Tensor | None] = []  # of the batch that is running; empty while the engine tries the model out

    def hook(name: str, x: torch.Tensor) -> None:
        if mask:
            see(name, x, mask[0])

    with ExitStack() as stack, torch.no_grad():
        for name, module in linears.items():
            stack.callback(module.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0])).remove)
        forward = stack.enter_context(composed.forward())  # with hooks in place it runs the model's own modules
        bar = stack.enter_context(progress(f"regmean ({task.name})", total=len(rows), unit="row"))
        for batch in sorted_batches(task.rows, rows, MICRO_TOKENS, forward.layout, forward.device):
            mask[:] = [batch.attention_mask]
            with forward.documents(batch):
                hidden = forward.hidden(batch)
            mask.clear()
            for name, module in linears.items():
                if module.weight is forward.head.weight:  # the engine's own, and only where something is predicted
                    see(name, hidden, None)
            bar.advance(len(batch.rows))
