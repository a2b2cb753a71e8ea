"""The training loop: one for every way of tuning."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guidetune.artefacts import derive_seed, write_text_atomic
from guidetune.data.rows import EncodedRows
from guidetune.engine.batching import MicroBatch, assemble, micro_batches, optimiser_batch, steps_per_epoch
from guidetune.engine.checkpoint import load_checkpoint, save_checkpoint
from guidetune.engine.forward import Forward, opened
from guidetune.engine.settings import TuneSettings, rate, total_steps
from guidetune.errors import BadInput, RunFailed
from guidetune.guidance.store import Guidance
from guidetune.objectives.reduce import REDUCERS, scale
from guidetune.objectives.token_weights import TokenBatch, TokenWeights
from guidetune.params import Attached
from guidetune.progress import progress

SIGNAL_EDGES = (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
CHECKPOINT_SECONDS = 120.0
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


@dataclass
class FitResult:
    """What a run measured. `signal`: share of tokens and of Σ w ℓ per teacher-confidence bin."""

    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    validation: list[dict[str, float]]
    signal: list[dict[str, float]]
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
) -> FitResult:
    """Train `attached` on `rows`; checkpoints go to `work`, and a run found there goes on. Metrics go to `metrics` (work/metrics.jsonl).

    The loss of an optimiser batch is Σ c ℓ / D over all its micro-batches (see `objectives.reduce`): gradients of Σ c ℓ are
    summed first and divided by D once.

    Raises:
        BadInput: no rows, guidance of other rows, an unknown head.
        RunFailed: the loss or the gradient is not finite; the offending rows are named.
    """
    if not len(rows) or not rows.supervised.sum():
        raise BadInput("there is no supervised token to train on")
    objective = objective or Objective()
    model = attached.model
    steps = total_steps(settings, len(rows))
    params = attached.trainable()
    trainable = list(params.values())
    optimiser = torch.optim.AdamW(attached.param_groups(settings.lr, settings.weight_decay), betas=settings.betas, fused=True)
    cursor = load_checkpoint(work, params, optimiser)
    state = _State(**cursor) if cursor else _State(signal=np.zeros((len(SIGNAL_EDGES) - 1, 2)).tolist())
    log = _Metrics(metrics or work / METRICS, state.step)
    layout = None if settings.layout == "auto" else settings.layout
    per_epoch = steps_per_epoch(len(rows), settings.batch)
    model.train()
    began, mark, saved = state.seconds, time.monotonic(), time.monotonic()

    def keep() -> None:
        state.seconds = began + time.monotonic() - mark
        log.flush()
        save_checkpoint(work, params, optimiser, state.__dict__)

    try:
        with (
            opened(model, layout, autocast, settings.gradient_checkpointing is True) as forward,
            progress(label, steps, "steps", state.step) as bar,
        ):
            if validation is not None and state.step == 0:
                _validate(forward, validation, settings, state, log)
            while state.step < steps:
                start = time.monotonic()
                lr = rate(settings, state.step, steps)
                indices = optimiser_batch(len(rows), settings.batch, settings.seed, state.step)
                loss, tokens, signal = _accumulate(forward, rows, indices, settings, objective, state.step)
                penalty = attached.penalty()
                if penalty is not None:
                    penalty.backward()
                norm = _gradient_norm(trainable)
                if not math.isfinite(norm):
                    raise RunFailed(
                        f"step {state.step + 1}: the gradient is not finite; rows: {', '.join(rows.ids[i] for i in indices[:8])}"
                    )
                if settings.clip and norm > settings.clip:
                    torch._foreach_mul_([p.grad for p in trainable if p.grad is not None], settings.clip / norm)
                for group in optimiser.param_groups:
                    group["lr"] = lr * group.get("lr_factor", 1.0)
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
                if (every and state.step % every == 0) or (not every and time.monotonic() - saved > CHECKPOINT_SECONDS):
                    keep()
                    saved = time.monotonic()
                if stop is not None and stop(state.step):
                    break
            log.flush()
    except KeyboardInterrupt:
        keep()
        raise
    for name, p in params.items():
        if not torch.isfinite(p).all():
            raise RunFailed(f"{name} is not finite after training; nothing was published")
    dtype = str(forward.head.weight.dtype if autocast is None else autocast).removeprefix("torch.")
    return FitResult(
        steps=state.step,
        tokens=state.tokens,
        seconds=round(began + time.monotonic() - mark, 3),
        loss_first=float(state.loss_first or 0.0),
        loss_last=float(state.loss_last or 0.0),
        validation=state.validation,
        signal=_shares(np.array(state.signal)) if objective.guidance else [],
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
    reduce = REDUCERS[objective.reducer]
    total, denominator, tokens = 0.0, 0.0, 0
    signal = np.zeros((len(SIGNAL_EDGES) - 1, 2))
    for k, group in enumerate(micro_batches(indices, rows.lengths, settings.micro_tokens, forward.layout)):
        batch = assemble(rows, group, forward.layout, forward.device)
        with forward.documents(batch):
            nll = forward.nll(batch, derive_seed(settings.seed, "dropout", step, k))
            seen = objective.token_batch(batch, nll)
            w = objective.token_weights(batch, seen)
            c, share = reduce(w, batch.row, len(group))
            loss = (c * nll).sum()
            if not torch.isfinite(loss):
                bad = sorted({rows.ids[int(group[r])] for r in batch.row[~torch.isfinite(c * nll)].tolist()})
                raise RunFailed(f"step {step + 1}: the loss is not finite; rows: {', '.join(bad[:8])}")
            loss.backward()
        total += float(loss.detach())
        denominator += share
        tokens += batch.tokens
        if seen.teachers:
            signal += _signal(next(iter(seen.teachers.values())), (w * nll.detach()))
    factor = scale(objective.reducer, denominator)
    grads = [p.grad for group in (forward.model.parameters(),) for p in group if p.grad is not None]
    if factor != 1.0:
        torch._foreach_mul_(grads, factor)
    return total * factor, tokens, signal


def _gradient_norm(params: Sequence[torch.Tensor]) -> float:
    grads = [p.grad for p in params if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(grads)]))) if grads else 0.0


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
    total, count = forward.total_nll(data, settings.micro_tokens)
    entry = {"step": state.step, "validation_loss": total / max(count, 1)}
    state.validation.append(entry)
    log.add(**entry)


class _Metrics:
    """metrics.jsonl: appended as the run goes; on resume what lies beyond the checkpoint is dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._pending: list[str] = []
        if path.exists():
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
        if self._pending:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self._pending))
                file.flush()
                os.fsync(file.fileno())
        self._pending = []
        self._flushed = time.monotonic()
