"""How a merge learns something from data before it is written.

A preset that learns is a `Learned`: `learn(study, work)` writes what it has learnt (a table of coefficients, statistics, masks) into
a folder, and `stages_from(folder)` gives the stages that read it. `taught` does the first where it has not been done, as a stage with
a manifest; the merge itself is then the streamed one of every other preset.

    merge PLAN:  rows of `data.tasks` ─► Study ─► learn ─► OUT-learnt/learnt/{manifest.json, …} ─► stages_from ─► transfer
    a recipe:    validation rows (else the training rows) ─► … ─► learnt/ beside the adapter ─► …
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from guidetune import artefacts
from guidetune.data.rows import EncodedRows
from guidetune.errors import BadInput, RunFailed
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.fingerprints import fingerprint
from guidetune.models.sources import ModelSource
from guidetune.registry import source_file
from guidetune.weightspace.combine import Sum
from guidetune.weightspace.merged import Merged
from guidetune.weightspace.stages import Merger, Piece, Preset, Sparsifier, Stages

if TYPE_CHECKING:
    from guidetune.engine.batching import MicroBatch
    from guidetune.engine.forward import Forward

VERSION = 1  # of what every learner writes: raise it when the same inputs give other files
HELD_BYTES = 1 << 30  # anchor and updates stay in memory while learning up to this size, else they are read again in every step
MICRO_TOKENS = 8192  # of one forward pass

Values = Callable[["Forward", "MicroBatch"], torch.Tensor]
"""A value for each supervised position of a micro-batch, fp32 [n], such as -log p of its token."""


@dataclass(frozen=True)
class Cost:
    """What learning takes: passes over documents, bytes it keeps on disk, bytes in memory beside the model."""

    forwards: int
    backwards: int
    disk: int = 0
    memory: int = 0

    def text(self) -> str:
        passes = f"{self.forwards:,} forward and {self.backwards:,} backward passes over single rows"
        return f"{passes}; {self.disk / 1e6:,.1f} MB of results on disk; about {self.memory / 1e6:,.0f} MB in memory beside the libraries"


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task. `folder`: of the prepare stage that made them (`read_records` has their texts)."""

    name: str
    rows: EncodedRows
    folder: Path


class Learned(Preset):
    """A preset that learns from data before it merges.

    `task_of_source`: it needs the rows of each source's own task, in the order of the sources.
    """

    task_of_source: ClassVar[bool] = False

    learnt: str | None = Field(None, description="Folder of what was learnt before from these sources; null: learn it from the data.")
    limit: int | None = Field(256, ge=1, description="Rows of each task, the first ones; null: all.")
    seed: int = Field(0, description="Seed of batches and samples.")

    def usable(self, task: TaskRows) -> np.ndarray:
        """Indices of the rows that are used: the first `limit` that have a supervised token."""
        found = np.flatnonzero(task.rows.supervised > 0)
        return found if self.limit is None else found[: self.limit]

    def check_tasks(self, tasks: Sequence[TaskRows], sources: int) -> None:
        """Raises BadInput where the rows are not what is learnt from, for a merge of so many sources."""
        if not tasks:
            raise BadInput(f"{self.name} learns from data, and there are none; add data: {{tasks: [[{{path: …}}], …]}} to the plan")
        if self.task_of_source and len(tasks) != sources:
            raise BadInput(f"{self.name} needs the rows of each source's own task: {sources} sources, and rows of {len(tasks)} tasks")
        empty = [task.name for task in tasks if not len(self.usable(task))]
        if empty:
            raise BadInput([f"data of task {task!r}: no row has a supervised token to learn from" for task in empty])

    @abstractmethod
    def learn(self, study: Study, work: Path) -> dict[str, Any]:
        """Write what is learnt into `work`; the result is its summary, for the manifest."""

    @abstractmethod
    def cost(self, study: Study) -> Cost:
        """What `learn` would take; nothing is read but headers."""

    @abstractmethod
    def stages_from(self, folder: Path) -> Stages:
        """The stages of the merge, which read `folder` when they are at work and not before."""

    def stages(self) -> Stages:
        return self.stages_from(Path(self.learnt or "not learnt yet"))

    def identity(self) -> dict[str, Any]:
        spec = {name: value for name, value in super().identity().items() if name != "learnt"}
        return {**spec, "learnt": None if self.learnt is None else _manifest(Path(self.learnt))["fingerprint"]}


def learner(preset: Preset) -> Learned | None:
    """The part of a preset that learns: itself, one that it is put on (LiNeS), or none."""
    if isinstance(preset, Learned):
        return preset
    inner = (getattr(preset, name) for name in type(preset).model_fields)
    return next((found for one in inner if isinstance(one, Preset) and (found := learner(one))), None)


def with_learnt(preset: Preset, folder: Path) -> Preset:
    """The preset with the folder of what its learner has learnt."""
    if isinstance(preset, Learned):
        return preset.model_copy(update={"learnt": str(folder)})
    parts = {name: getattr(preset, name) for name in type(preset).model_fields}
    inner = {name: with_learnt(one, folder) for name, one in parts.items() if isinstance(one, Preset) and learner(one)}
    return preset.model_copy(update=inner)


def taught(merged: Merged, target: ModelSource, tasks: Sequence[TaskRows], folder: Path, allow_mismatch: bool = False) -> Path:
    """Let the learner of `merged`'s preset learn, unless `folder` holds that already, and give the preset what was learnt.

    Returns the folder of what was learnt.

    Raises:
        BadInput: no data, or data of another number of tasks; a source does not fit the anchor; `learnt` belongs to other sources.
        RunFailed: a statistic, loss or gradient is not finite, or the disk is full.
    """
    preset = learner(merged.preset)
    assert preset is not None
    study = Study.of(preset, merged, target, tasks, allow_mismatch)
    place = folder if preset.learnt is None else Path(preset.learnt)
    if preset.learnt is None:
        study.check_data()
        key = study.key()
        try:
            artefacts.stage(place, key, lambda work: preset.learn(study, work))
        except OSError as error:
            shutil.rmtree(place.with_name(f".{place.name}.partial"), ignore_errors=True)  # statistics are large: a full disk is given room
            need = preset.cost(study).disk
            raise RunFailed(f"cannot write what is learnt to {place}: {error.strerror or error}; it takes {need / 1e6:,.1f} MB") from None
    else:
        study.check_learnt()
    merged.preset = with_learnt(merged.preset, place)
    return place


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = artefacts.finished(folder)
    if manifest is None:
        raise BadInput(f"{folder} holds nothing that was learnt for a merge (no manifest.json); leave `learnt` out to learn it from data")
    return manifest


@dataclass
class Study:
    """What a learner may use: the anchor, the sources' updates, and the rows of tasks."""

    preset: Learned
    merged: Merged
    target: ModelSource
    tasks: list[TaskRows]

    @classmethod
    def of(cls, preset: Learned, merged: Merged, target: ModelSource, tasks: Sequence[TaskRows], allow_mismatch: bool = False) -> Study:
        """Raises BadInput where the sources do not fit the anchor."""
        from guidetune.weightspace.apply import check_origin, make_plan

        problems = []
        try:
            check_origin(merged, target, allow_mismatch)
        except BadInput as error:
            problems += error.problems
        try:
            # the same refusals as when it is written, before anything is learnt
            plan = make_plan(merged, merged.anchor, 1.0, "auto", "nearest", 0)
            if plan.untie:
                problems.append(f"{target.spec} ties its embedding to its head, and the sources change the two apart: not learnt here")
            strange = [name for name in merged.shapes if name not in merged.anchor.names.file_of]
            problems += [f"{name} is no parameter of the model that is built: no gradient belongs to it" for name in strange[:3]]
        except BadInput as error:
            problems += error.problems
        if problems:
            raise BadInput(problems)
        return cls(preset, merged, target, list(tasks))

    def check_data(self) -> None:
        """Raises BadInput where the rows are not what the preset needs."""
        self.preset.check_tasks(self.tasks, len(self.merged.parts))

    def check_learnt(self) -> None:
        """Raises BadInput where what is given as learnt before belongs to another merge."""
        place = Path(str(self.preset.learnt))
        of = _manifest(place)["key"]
        if (of.get("anchor"), sorted(of.get("sources", []))) != (fingerprint(self.target), sorted(self.merged.ids)):
            raise BadInput(f"{place} was learnt for another anchor or for other sources; leave `learnt` out to learn it for these")

    def key(self) -> dict[str, Any]:
        return {
            "stage": "learn",
            "version": VERSION,
            "anchor": fingerprint(self.target),
            "sources": self.merged.ids,
            "weights": self.merged.describe_weights(),
            "rows": [task.rows.digest for task in self.tasks],
            "method": {name: value for name, value in self.preset.spec().items() if name != "learnt"},
            "code": artefacts.digest_file(source_file(type(self.preset))),
            "seed": self.merged.seed,
        }

    def rows_of(self, task: TaskRows) -> np.ndarray:
        """Indices of the rows that are used."""
        return self.preset.usable(task)

    @cached_property
    def labels(self) -> list[str]:
        """What the sources are called in tables, in the order of the list."""
        return self.merged.labels()

    @property
    def anchor(self) -> Checkpoint:
        return self.merged.anchor

    @property
    def model_bytes(self) -> int:
        """Of the model in fp32, as it is held while learning."""
        return 4 * sum(info.numel for info in self.anchor.tensors.values())

    @property
    def changed_values(self) -> int:
        """Values that some source changes."""
        return sum(view.numel for view in self.merged.views().values())

    def memory(self, sets: int = 1) -> int:
        """Bytes of a composed model at work: its weights, `sets` of the changed ones (gradients, sums), and what is held of the updates."""
        changed = 4 * self.changed_values
        held = changed * (1 + len(self.merged.parts))
        return self.model_bytes + sets * changed + (held if held <= HELD_BYTES else 0)

    @contextmanager
    def composed(self, sparsify: Sparsifier | None = None) -> Iterator[Composed]:
        """The anchor in memory, in fp32, to which updates can be added again and again. `sparsify`: what they go through first."""
        from guidetune.models.loading import load_model, pick_device

        model = load_model(self.target, dtype="float32", device=pick_device())
        merger = Merger(Stages(Sum(), sparsify or Sparsifier()), self.merged.views())
        composed = Composed(model, merger)
        try:
            yield composed
        finally:
            composed.close()


@dataclass
class Composed:
    """A model in memory whose changed weights are θ = W + d, W the anchor's and d anything made of the sources' updates.

    Only the changed parameters ask for gradients. `pieces` and `write` go through them in pieces, always the same ones.
    """

    model: Any
    merger: Merger
    parameters: dict[str, torch.nn.Parameter] = field(init=False)
    stands_for: dict[str, str] = field(init=False)  # changed parameter -> the one of `parameters` that it is
    _held: dict[tuple[str, int], tuple[torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()
        known = dict(self.model.named_parameters(remove_duplicate=False))
        # tied parameters are one tensor: the first name stands for both
        first: dict[int, str] = {}
        for name in self.merger.views:
            first.setdefault(id(known[name]), name)
        self.parameters = {name: known[name] for name in first.values()}
        self.stands_for = {name: first[id(known[name])] for name in self.merger.views}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        views = [self.merger.views[name] for name in self.parameters]
        self._hold = 4 * sum(view.numel * (1 + len(view.sources)) for view in views) <= HELD_BYTES

    def pieces(self, name: str) -> Iterator[tuple[Piece, torch.Tensor, list[torch.Tensor]]]:
        """(piece, W, [τ̂_i]) of one changed parameter, on the model's device; τ̂ in the order of `merger.views[name].sources`."""
        device = self.parameters[name].device
        for piece in self.merger.updates(name):
            at = name, piece[0].start
            if at not in self._held:
                found = piece[0].anchor().to(device), [tau.to(device) for tau in piece[1]()]
                if not self._hold:
                    yield piece[0], *found
                    continue
                self._held[at] = found
            yield piece[0], *self._held[at]

    @torch.no_grad()
    def write(self, update: Callable[[Piece, list[torch.Tensor]], torch.Tensor | None]) -> None:
        """θ = W + update(piece, [τ̂_i]) for every changed parameter; None: θ = W to the last bit."""
        for name, parameter in self.parameters.items():
            for piece, w, taus in self.pieces(name):
                d = update(piece, taus)
                rows = parameter[piece.start : piece.stop] if piece.shape else parameter
                rows.copy_(w if d is None else w + d)

    def write_source(self, id: str) -> None:
        """θ = W + τ of one source: its own model, where its update belongs to the anchor."""

        def only(piece: Piece, taus: list[torch.Tensor]) -> torch.Tensor | None:
            sources = self.merger.views[piece.name].sources
            return taus[sources.index(id)] if id in sources else None

        self.write(only)

    def gradients(self, name: str) -> Iterator[tuple[Piece, list[torch.Tensor], torch.Tensor]]:
        """(piece, [τ̂_i], ∂L/∂θ) of one changed parameter after a backward pass."""
        grad = self.parameters[name].grad
        if grad is not None:
            for piece, _, taus in self.pieces(name):
                yield piece, taus, grad[piece.start : piece.stop] if piece.shape else grad

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @contextmanager
    def forward(self) -> Iterator[Forward]:
        """The engine's passes over this model.

        Raises:
            RunFailed: what it predicts is not finite.
        """
        from guidetune.engine.forward import opened

        with torch.no_grad():
            probe = torch.arange(1, 9, device=self.model.device).remainder(self.model.config.get_text_config().vocab_size)
            if not bool(torch.isfinite(self.model(input_ids=probe[None], use_cache=False).logits).all()):
                raise RunFailed("a model with these updates makes predictions that are not finite, so nothing can be learnt from it")
        with opened(self.model) as forward:
            yield forward

    def close(self) -> None:
        self._held.clear()
        del self.model


def batch_loss(forward: Forward, rows: EncodedRows, indices: np.ndarray, values: Values, backward: bool = True) -> float:
    """Σ w v / Σ w over the supervised positions of some rows, w their loss weights; its gradient is added to the parameters'.

    Raises:
        RunFailed: the loss is not finite; the rows are named.
    """
    from guidetune.engine.batching import sorted_batches

    weight = sum(float(rows[int(i)].loss_weight[1:].sum(dtype=np.float64)) for i in indices)
    total = 0.0
    for batch in sorted_batches(rows, indices, MICRO_TOKENS, forward.layout, forward.device):
        with torch.set_grad_enabled(backward), forward.documents(batch):
            loss = (values(forward, batch) * batch.loss_weight).sum() / weight
            if not bool(torch.isfinite(loss)):
                raise RunFailed(f"the loss is not finite; rows: {', '.join(rows.ids[int(i)] for i in batch.rows[:4])}")
            if backward:
                loss.backward()
        total += float(loss.detach())
    return total


def nll(forward: Forward, batch: MicroBatch) -> torch.Tensor:
    """-log p of the tokens that are there."""
    return forward.nll(batch)


def entropy(forward: Forward, batch: MicroBatch) -> torch.Tensor:
    """H = −Σ p log p of the prediction at each supervised position; the token that is there plays no part.

    The logits are formed in chunks, and once more in the backward pass: never all of them at once.
    """
    from torch.utils.checkpoint import checkpoint

    from guidetune.engine.head import chunk_rows, logits

    hidden = forward.hidden(batch)
    head = forward.head

    def part(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        log_prob = torch.log_softmax(logits(h, replace(head, weight=weight)), -1)
        return -(log_prob.exp() * log_prob).sum(-1)

    step = chunk_rows(head.weight.shape[0], max(1, len(hidden)), hidden.device.type)
    parts = [checkpoint(part, h, head.weight, use_reentrant=False) for h in hidden.split(step)]
    return torch.cat(parts) if parts else hidden.sum(-1)
