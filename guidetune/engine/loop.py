"""The training loop: one for every way of tuning."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guidetune.artefacts import derive_seed, write_text_atomic
from guidetune.data.rows import EncodedRows
from guidetune.engine import distributed, kernels
from guidetune.engine.batching import MicroBatch, assemble, micro_batches, optimiser_batch, steps_per_epoch
from guidetune.engine.checkpoint import load_checkpoint, save_checkpoint
from guidetune.engine.forward import Forward, opened
from guidetune.engine.settings import TuneSettings, rate, total_steps
from guidetune.errors import BadInput, RunFailed
from guidetune.guidance.store import Guidance
from guidetune.objectives.reduce import REDUCERS, scale
from guidetune.objectives.token_weights import TokenBatch, TokenWeights
from guidetune.params import Attached
from guidetune.progress import progress, say

SIGNAL_EDGES = (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
CHECKPOINT_SECONDS = 120.0
# Of a thread's share of an optimiser batch: with fewer, threads that share one micro-batch were faster.
LANE_TOKENS = 256
BUSY = 0.75  # below this share of the ranks' time a launch is told how to do better
METRICS = "metrics.jsonl"


@dataclass
class Objective:
    """Token weights (multiplied), the reducer, and the guidance the weights read."""

    weights: Sequence[TokenWeights] = ()
    reducer: str = "tokens"
    guidance: Mapping[str, Guidance] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.reducer not in REDUCERS:
            raise BadInput(f"unknown reducer {self.reducer!r}; there are: {', '.join(REDUCERS)}")
        for weight in self.weights:
            for teacher in weight.teachers:
                if teacher not in self.guidance:
                    raise BadInput(f"token weights {weight.name!r} need the guidance of teacher {teacher!r}, which was not computed")

    def token_batch(self, batch: MicroBatch, nll: torch.Tensor) -> TokenBatch:
        device = batch.targets.device
        teachers = {
            name: torch.from_numpy(np.concatenate([store.row(int(i)) for i in batch.rows]).astype(np.float32)).to(device)
            for name, store in self.guidance.items()
        }
        for name, values in teachers.items():
            if len(values) != len(batch.targets):
                raise BadInput(
                    f"guidance of teacher {name!r} has {len(values)} tokens for {len(batch.targets)} targets: it belongs to other rows"
                )
        stops = torch.tensor(sorted(self.stop_ids), dtype=torch.long, device=device)
        return TokenBatch(batch.targets, batch.row, torch.isin(batch.targets, stops), -nll.detach(), teachers)

    def token_weights(self, batch: MicroBatch, tokens: TokenBatch) -> torch.Tensor:
        """Product of the rows' own weights and all token weights, fp32 [n]."""
        w = batch.loss_weight
        for weight in self.weights:
            w = w * weight.weights(tokens).detach()
        return w


@dataclass(frozen=True)
class Part:
    """This run is one of several that follow each other: its place in the common course of the learning rate, and whose moments go on.

    Its last state, optimiser moments included, stays in `work` for the part after it.
    """

    before: int  # optimiser steps of the parts before
    total: int  # optimiser steps of all parts
    state: Path | None = None  # folder of the part before; its trainable tensors and moments are taken over


@dataclass
class FitResult:
    """What a run measured. `signal`: share of tokens and of Σ w ℓ per teacher-confidence bin; `weighted_loss`: Σ w ℓ of all bins."""

    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    validation: list[dict[str, float]]
    signal: list[dict[str, float]]
    weighted_loss: float
    trainable: int
    layout: str
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def fit(
    attached: Attached,
    rows: EncodedRows,
    settings: TuneSettings,
    objective: Objective | None = None,
    *,
    work: Path,
    metrics: Path | None = None,
    validation: EncodedRows | None = None,
    autocast: torch.dtype | None = None,
    label: str = "tune",
    stop: Callable[[int], bool] | None = None,
    part: Part | None = None,
) -> FitResult:
    """Train `attached` on `rows`; checkpoints go to `work`, and a run found there goes on. Metrics go to `metrics` (work/metrics.jsonl).

    The loss of an optimiser batch is Σ c ℓ / D over all its micro-batches (see `objectives.reduce`): gradients of Σ c ℓ are
    summed first and divided by D once.

    Launched as several processes, every rank calls this with the same arguments: each takes a part of every optimiser batch, and
    all return the same weights (see `engine.distributed`).

    Raises:
        BadInput: no rows, guidance of other rows, an unknown head.
        RunFailed: the loss or the gradient is not finite; the offending rows are named. The state of the part before is damaged.
    """
    if not len(rows) or not rows.supervised.sum():
        raise BadInput("there is no supervised token to train on")
    objective = objective or Objective()
    group = distributed.current()
    model = attached.model
    group.place(model)
    steps = total_steps(settings, len(rows))
    params = attached.trainable()
    trainable = list(params.values())
    groups = group.optimiser_groups(attached.param_groups(settings.lr, settings.weight_decay))
    optimiser = torch.optim.AdamW(groups, betas=settings.betas, fused=True)
    cursor = group.agreed(lambda: load_checkpoint(work, params, optimiser))
    course = part or Part(0, steps)
    if cursor is None and course.state is not None:
        missing = group.agreed(lambda: load_checkpoint(course.state, params, optimiser)) is None  # type: ignore[arg-type]
        group.agree(RunFailed(f"{course.state} does not hold the state that this part goes on from; delete it") if missing else None)
    state = _State(**cursor) if cursor else _State(signal=np.zeros((len(SIGNAL_EDGES) - 1, 2)).tolist())
    _check_same_place(group, state.step, work)
    log = _Metrics(metrics or work / METRICS, state.step, writes=group.main)
    layout = None if settings.layout == "auto" else settings.layout
    per_epoch = steps_per_epoch(len(rows), settings.batch)
    model.train()
    began, mark, saved = state.seconds, time.monotonic(), time.monotonic()

    sharded = any(distributed.is_sharded(p) for p in trainable)

    def keep() -> None:
        if not (group.main or sharded):
            return  # rank 0 has the same weights
        state.seconds = began + time.monotonic() - mark
        log.flush()
        save_checkpoint(work, params, optimiser, state.__dict__)

    try:
        with (
            group.interruptible(),
            kernels.chosen(model, settings.kernels),
            opened(model, layout, autocast, settings.gradient_checkpointing is True) as forward,
            progress(label, steps, "steps", state.step) as bar,
        ):
            if group.size > 1:
                _tell_idle(group, forward, rows, settings, objective, state.step)
            if validation is not None and state.step == 0:
                _validate(forward, validation, settings, state, log)
            while state.step < steps:
                start = time.monotonic()
                lr = rate(settings, course.before + state.step, course.total)
                indices = optimiser_batch(len(rows), settings.batch, settings.seed, state.step)
                loss, tokens, signal = _accumulate(forward, rows, indices, settings, objective, state.step)
                penalty = attached.penalty()
                if penalty is not None:
                    penalty.backward()
                norm = group.gradient_norm(trainable)
                if not math.isfinite(norm):
                    bad = f"step {state.step + 1}: the gradient is not finite; rows: {', '.join(rows.ids[i] for i in indices[:8])}"
                    group.agree(RunFailed(bad))
                if settings.clip and norm > settings.clip:
                    torch._foreach_mul_([distributed.local(p.grad) for p in trainable if p.grad is not None], settings.clip / norm)
                for options in optimiser.param_groups:
                    options["lr"] = lr * options.get("lr_factor", 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                attached.after_step()
                state.step += 1
                state.tokens += tokens
                state.signal = (np.array(state.signal) + signal).tolist()
                state.loss_first = loss if state.loss_first is None else state.loss_first
                state.loss_last = loss
                spent = time.monotonic() - start
                log.add(
                    step=state.step,
                    epoch=round(state.step / per_epoch, 4),
                    loss=loss,
                    lr=lr,
                    grad_norm=norm,
                    tokens=state.tokens,
                    tokens_per_s=round(tokens / max(spent, 1e-9), 1),
                    seconds=round(began + time.monotonic() - mark, 3),
                )
                bar.advance(1, loss=loss, **{"tok/s": int(tokens / max(spent, 1e-9))})
                if validation is not None and (
                    state.step == steps or (settings.validate_every and state.step % settings.validate_every == 0)
                ):
                    _validate(forward, validation, settings, state, log)
                every = settings.checkpoint_every
                due = (every and state.step % every == 0) or (not every and time.monotonic() - saved > CHECKPOINT_SECONDS)
                if group.broadcast(due) if sharded and not every else due:
                    keep()
                    saved = time.monotonic()
                if stop is not None and group.broadcast(stop(state.step)):
                    break
            log.flush()
            if part is not None:
                keep()
    except KeyboardInterrupt:
        keep()
        raise
    bad = next((name for name, p in params.items() if not torch.isfinite(distributed.local(p)).all()), None)
    group.agree(RunFailed(f"{bad} is not finite after training; nothing was published") if bad else None)
    dtype = str(forward.head.weight.dtype if autocast is None else autocast).removeprefix("torch.")
    return FitResult(
        steps=state.step,
        tokens=state.tokens,
        seconds=round(began + time.monotonic() - mark, 3),
        loss_first=float(state.loss_first or 0.0),
        loss_last=float(state.loss_last or 0.0),
        validation=state.validation,
        signal=_shares(np.array(state.signal)) if objective.guidance else [],
        weighted_loss=float(np.array(state.signal)[:, 1].sum()),
        trainable=sum(p.numel() for p in trainable),
        layout=forward.layout,
        dtype=dtype,
    )


@dataclass
class _State:
    """The cursor of a run: everything that is not a tensor."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    validation: list[dict[str, float]] = field(default_factory=list)
    signal: list[list[float]] = field(default_factory=list)


def _accumulate(
    forward: Forward, rows: EncodedRows, indices: np.ndarray, settings: TuneSettings, objective: Objective, step: int
) -> tuple[float, int, np.ndarray]:
    """Gradients of one optimiser batch, divided by its denominator. Returns loss, tokens, signal per confidence bin."""
    group = distributed.current()
    pieces, owners, lanes = _pieces(group, forward, rows, indices, settings, objective)
    seed = derive_seed(settings.seed, "dropout", step)
    bins = len(SIGNAL_EDGES) - 1
    table = np.zeros((len(pieces), 3 + 2 * bins))  # per micro-batch: Σ c ℓ, share of D, tokens, signal
    failure: BaseException | None = None

    def run(turns: Sequence[tuple[int, bool]], leaves: dict[int, torch.Tensor] | None = None) -> None:
        for k, real in turns:
            if group.interrupted and not group.lockstep:
                raise KeyboardInterrupt
            found = _micro_batch(group, forward, rows, pieces[k], objective, step, seed, real, leaves)
            if real:
                table[k] = found

    try:
        turns = group.turns(owners)
        with forward.steady():
            if lanes == 1:
                run(turns)
            else:
                _side_by_side(forward, run, turns, lanes)
    except (Exception, KeyboardInterrupt) as error:
        if group.size == 1 or group.lockstep:
            raise  # in lockstep all have met and agreed already, or cannot meet any more
        failure = error
    table = group.total(table, failure)
    # Summed in the order of the micro-batches, whoever ran them: the same loss and denominator for any number of processes.
    total, denominator = 0.0, 0.0
    signal = np.zeros((bins, 2))
    for row in table:
        total += row[0]
        denominator += row[1]
        signal += row[3:].reshape(bins, 2)
    params = list(forward.model.parameters())
    group.sum_gradients(params)
    factor = scale(objective.reducer, denominator)
    grads = [distributed.local(p.grad) for p in params if p.grad is not None]
    if factor != 1.0:
        torch._foreach_mul_(grads, factor)
    return total * factor, int(table[:, 2].sum()), signal


def _side_by_side(
    forward: Forward,
    run: Callable[[Sequence[tuple[int, bool]], dict[int, torch.Tensor]], None],
    turns: Sequence[tuple[int, bool]],
    lanes: int,
) -> None:
    """Micro-batches on several threads: each collects its own gradients; they are summed in the order of the threads.

    Which micro-batch goes to which thread does not depend on who is ready first, so a run repeats to the last bit.
    """
    params = [p for p in forward.model.parameters() if p.requires_grad]
    shares = [turns[lane::lanes] for lane in range(lanes)]
    stand_ins = [[p.detach().requires_grad_() for p in params] for share in shares if share]

    def job(share: Sequence[tuple[int, bool]], own: list[torch.Tensor]) -> Callable[[], None]:
        return lambda: run(share, {id(p): q for p, q in zip(params, own, strict=True)})

    forward.at_once([job(share, own) for share, own in zip((s for s in shares if s), stand_ins, strict=True)])
    for own in stand_ins:
        there = [(p, q.grad) for p, q in zip(params, own, strict=True) if q.grad is not None]
        for p, g in there:
            if p.grad is None:
                p.grad = g
            else:
                p.grad += g


def _micro_batch(
    group: distributed.Group,
    forward: Forward,
    rows: EncodedRows,
    piece: np.ndarray,
    objective: Objective,
    step: int,
    seed: int,
    real: bool,
    leaves: dict[int, torch.Tensor] | None = None,
) -> np.ndarray:
    """Forward and backward of one micro-batch: its Σ c ℓ, share of the denominator, tokens and signal, in one vector.

    `real` False: a repetition that keeps this rank in step with the others and adds nothing to the gradient.
    """
    batch = assemble(rows, piece, forward.layout, forward.device)
    with forward.documents(batch):
        nll = forward.nll(batch, seed, leaves)
        seen = objective.token_batch(batch, nll)
        w = objective.token_weights(batch, seen)
        c, share = REDUCERS[objective.reducer](w, batch.row, len(piece))
        loss = (c * nll).sum() if real else (c * nll).sum() * 0.0
        failure: BaseException | None = None
        if not torch.isfinite(loss):
            bad = sorted({rows.ids[int(piece[r])] for r in batch.row[~torch.isfinite(c * nll)].tolist()})
            failure = RunFailed(f"step {step + 1}: the loss is not finite; rows: {', '.join(bad[:8])}")
        if group.lockstep:  # nobody starts a backward pass that another will not join
            group.agree(KeyboardInterrupt() if group.interrupted else failure)
        elif failure is not None:
            raise failure
        loss.backward()
    signal = np.zeros((len(SIGNAL_EDGES) - 1, 2))
    if seen.teachers:
        signal = _signal(next(iter(seen.teachers.values())), (w * nll.detach()))
    return np.concatenate([[float(loss.detach()), share, batch.tokens], signal.reshape(-1)])


def _pieces(
    group: distributed.Group, forward: Forward, rows: EncodedRows, indices: np.ndarray, settings: TuneSettings, objective: Objective
) -> tuple[list[np.ndarray], list[int], int]:
    """The micro-batches of an optimiser batch, the rank of each, and how many a rank runs at once (consecutive ones).

    Where the micro-batches are part of the result (the reducer `micro`, and noise that is drawn per micro-batch) they are those
    of a single thread and process, dealt out by cost. Else the rows are dealt out first, which leaves nobody idle.
    """
    if objective.reducer == "micro" or forward.draws_per_batch:
        pieces = micro_batches(indices, rows.lengths, settings.micro_tokens, forward.layout)
        return pieces, distributed.balanced([float(rows.lengths[p].sum()) for p in pieces], group.size), 1
    lengths = rows.lengths[indices].astype(float)
    enough = int(lengths.sum() / group.size) // LANE_TOKENS
    lanes = 1 if group.lockstep else min(forward.lanes, enough, len(indices) // group.size)
    # the budget is that of all lanes together; a row must fit into its share
    if lanes < 2 or lengths.max() > settings.micro_tokens // lanes:
        lanes = 1
    of_row = np.array(distributed.balanced(lengths, group.size * lanes))
    pieces, owners = [], []
    for rank in range(group.size):
        columns = [
            micro_batches(indices[of_row == rank * lanes + lane], rows.lengths, settings.micro_tokens // lanes, forward.layout)
            for lane in range(lanes)
        ]
        # by turns: lane i runs every `lanes`-th
        own = [piece for turn in zip_longest(*columns) for piece in turn if piece is not None]
        pieces += own
        owners += [rank] * len(own)
    return pieces, owners, lanes


def _tell_idle(
    group: distributed.Group, forward: Forward, rows: EncodedRows, settings: TuneSettings, objective: Objective, step: int
) -> None:
    """Say so when the micro-batches of the next optimiser batch cannot keep all ranks busy."""
    pieces, owners, _ = _pieces(group, forward, rows, optimiser_batch(len(rows), settings.batch, settings.seed, step), settings, objective)
    load = np.bincount(owners, weights=[float(rows.lengths[p].sum()) for p in pieces], minlength=group.size)
    if load.mean() < BUSY * load.max():
        say(
            f"note: {len(pieces)} micro-batches for {group.size} processes keep them {100 * load.mean() / load.max():.0f} % busy;"
            f" with the reducer micro, or dropout outside plain LoRA, they are not cut for more processes:"
            f" lower tune.micro_tokens ({settings.micro_tokens})"
        )


def _check_same_place(group: distributed.Group, step: int, work: Path) -> None:
    """Every rank must have found the same checkpoint."""
    steps = group.exchange(step)
    if len(set(steps)) > 1:
        raise RunFailed(f"the processes found different checkpoints in {work} (steps {steps}); put --out on a disk that all machines share")


def _signal(log_confidence: torch.Tensor, weighted: torch.Tensor) -> np.ndarray:
    """Tokens and Σ w ℓ per bin of teacher confidence: [bins, 2]."""
    edges = torch.tensor(SIGNAL_EDGES[1:-1], device=log_confidence.device)
    bins = torch.bucketize(log_confidence.exp(), edges, right=True)
    count = torch.bincount(bins, minlength=len(SIGNAL_EDGES) - 1)
    mass = torch.bincount(bins, weights=weighted.double(), minlength=len(SIGNAL_EDGES) - 1)
    return torch.stack([count.double(), mass], 1).cpu().numpy()


def _shares(signal: np.ndarray) -> list[dict[str, float]]:
    total = np.maximum(signal.sum(0), 1e-300)
    return [
        {"lo": lo, "hi": hi, "tokens": float(signal[i, 0] / total[0]), "signal": float(signal[i, 1] / total[1])}
        for i, (lo, hi) in enumerate(zip(SIGNAL_EDGES[:-1], SIGNAL_EDGES[1:], strict=True))
    ]


def _validate(forward: Forward, data: EncodedRows, settings: TuneSettings, state: _State, log: _Metrics) -> None:
    total, count = _total_nll(forward, data, settings.micro_tokens)
    entry = {"step": state.step, "validation_loss": total / max(count, 1)}
    state.validation.append(entry)
    log.add(**entry)


def _total_nll(forward: Forward, data: EncodedRows, max_tokens: int) -> tuple[float, int]:
    """`forward.total_nll`, its micro-batches dealt out over the ranks and summed in their order: the same number to the last bit."""
    group = distributed.current()
    if group.size == 1:
        return forward.total_nll(data, max_tokens)
    pieces = micro_batches(np.arange(len(data)), data.lengths, max_tokens, forward.layout)
    table = np.zeros((len(pieces), 2))
    turns = group.turns(distributed.balanced([float(data.lengths[p].sum()) for p in pieces], group.size))

    def own() -> None:
        for k, real in turns:
            found = forward.total_nll(data, max_tokens, pieces[k])
            if real:
                table[k] = found

    own() if group.lockstep else group.agreed(own)
    table = group.total(table)
    total = 0.0
    for row in table:
        total += row[0]
    return total, int(table[:, 1].sum())


class _Metrics:
    """metrics.jsonl: appended as the run goes; on resume what lies beyond the checkpoint is dropped."""

    def __init__(self, path: Path, step: int, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._pending: list[str] = []
        if writes and path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step and step > 0:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue  # a line cut by a crash
            write_text_atomic(path, "".join(f"{line}\n" for line in kept))
        self._flushed = time.monotonic()

    def add(self, **values: Any) -> None:
        self._pending.append(json.dumps(values))
        if time.monotonic() - self._flushed > 2.0:
            self.flush()

    def flush(self) -> None:
        if self._pending and self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self._pending))
                file.flush()
                os.fsync(file.fileno())
        self._pending = []
        self._flushed = time.monotonic()
