"""Two models compared tensor by tensor: norms, cosine, sign agreement and effective rank, summed by layer and kind of module.

What is compared is x and y: the weights of A and B or, with a base M, the updates A − M and B − M. All numbers come from sums over
pieces (fp32 values, fp64 sums), so memory is a few pieces a thread, and for the rank (`spectrum`) the square of a matrix' smaller side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch

from guidetune.errors import BadInput
from guidetune.models.checkpoint import FLOATS, Checkpoint
from guidetune.models.sources import ModelSource, resolve
from guidetune.progress import progress
from guidetune.threads import available_cores
from guidetune.weightspace.sources import LoraDelta
from guidetune.weightspace.spectrum import effective_rank
from guidetune.weightspace.stages import layers, ranges

RANK_SIDE = 4096  # `auto` leaves the rank of matrices out whose smaller side is larger
Rank = Literal["auto", "exact", "none"]


@dataclass
class Sums:
    """What is added up over the values of x and y; of several tensors the sums of their sums."""

    values: int = 0
    x2: float = 0.0  # Σ x²
    y2: float = 0.0
    xy: float = 0.0
    d2: float = 0.0  # Σ (x − y)²
    base2: float = 0.0  # Σ M², without a base Σ A²
    both: int = 0  # values that neither leaves at zero
    agree: int = 0  # of those, with equal signs
    changed: int = 0  # values that differ

    def add(self, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> None:
        def dot(a: torch.Tensor, b: torch.Tensor) -> float:
            return float((a * b).sum(dtype=torch.float64))

        d = x - y
        sign = torch.sign(x) * torch.sign(y)
        self.values += x.numel()
        self.x2 += dot(x, x)
        self.y2 += dot(y, y)
        self.xy += dot(x, y)
        self.d2 += dot(d, d)
        self.base2 += dot(base, base)
        self.both += int(torch.count_nonzero(sign))
        self.agree += int((sign > 0).sum())
        self.changed += int(torch.count_nonzero(d))

    def __iadd__(self, other: Sums) -> Sums:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def report(self) -> dict[str, Any]:
        """norm_a, norm_b: ‖x‖, ‖y‖; relative_*: divided by the base's norm (without a base: A's); None where it is 0 / 0."""
        norms, base = sqrt(self.x2) * sqrt(self.y2), sqrt(self.base2)
        return {
            "values": self.values,
            "norm_a": sqrt(self.x2),
            "norm_b": sqrt(self.y2),
            "norm_difference": sqrt(self.d2),
            "relative_a": sqrt(self.x2) / base if base else None,
            "relative_b": sqrt(self.y2) / base if base else None,
            "relative_difference": sqrt(self.d2) / base if base else None,
            "cosine": max(-1.0, min(1.0, self.xy / norms)) if norms else None,
            "sign_agreement": self.agree / self.both if self.both else None,
            "changed": self.changed / self.values if self.values else None,
        }


class Weights:
    """A model's parameters by name, in float32: a folder, `world:` name or hub id, or an adapter with the model it belongs to."""

    def __init__(self, spec: str | Path | ModelSource) -> None:
        self.source = resolve(spec)
        self.checkpoint = Checkpoint(self.source.path)
        if self.checkpoint.quantization:
            raise BadInput(f"{self.source.spec} is quantised ({self.checkpoint.quantization}): its weights cannot be compared")
        self.names = self.checkpoint.names
        self.lora: LoraDelta | None = None
        if self.source.adapter is not None:
            self.lora = LoraDelta(self.source.adapter, self.source.base_spec, saved_modules=True)
            if problems := self.lora.fit(self.names):
                raise BadInput(problems)
        self.shapes = {
            name: self.names.shapes[name] for name, file in self.names.file_of.items() if self.checkpoint.tensors[file].dtype in FLOATS
        }

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        found = self.checkpoint.parameter_rows(name, start, stop).float()
        if self.lora is not None and name in self.lora.shapes:
            found = found + self.lora.rows(name, start, stop)
        return found

    def shared(self, a: str, b: str) -> bool:
        """Whether two parameters are one."""
        return self.names.tied.get(a) == b and (self.lora is None or self.lora.same(a, b))

    def close(self) -> None:
        self.checkpoint.close()
        if self.lora is not None:
            self.lora.close()


@dataclass(frozen=True)
class Difference:
    """The comparison of `a` and `b`. Every entry of `tensors` has `name, layer, kind, shape`, what `Sums.report` gives, `rank_a, rank_b`
    (with a base, of the updates) or `rank_difference` (without, of A − B)."""

    a: str
    b: str
    base: str | None
    tensors: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    kinds: list[dict[str, Any]]
    all: dict[str, Any]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: str | Path, b: str | Path, base: str | Path | None = None, rank: Rank = "auto") -> Difference:
    """Compare two models, or with a base their updates; see `Sums` and `effective_rank` for the numbers.

    Args:
        rank: exact for every matrix; auto: but for those with a smaller side above 4,096; none.

    Raises:
        BadInput: a model cannot be read, the models are of different architectures, or a tensor holds values that are not finite.
    """
    if rank not in ("auto", "exact", "none"):
        raise BadInput(f"rank {rank!r} is not one of auto, exact, none")
    with ExitStack() as exits:
        models = [Weights(spec) for spec in (a, b, *([base] if base is not None else []))]
        for model in models:
            exits.callback(model.close)
        same_architecture(models)
        chosen, left_out = _common(models)
        depth = layers(chosen)
        found: dict[str, tuple[Sums, dict[str, float | None]]] = {}
        bar = exits.enter_context(
            progress("diff", total=sum(models[0].checkpoint.parameter(name).nbytes for name in chosen) / 1e6, unit="MB")
        )
        before = torch.get_num_threads()
        exits.callback(torch.set_num_threads, before)
        pool = exits.enter_context(ThreadPoolExecutor(available_cores(), initializer=torch.set_num_threads, initargs=(1,)))
        largest_first = sorted(chosen, key=lambda name: -models[0].checkpoint.parameter(name).nbytes)
        futures = {pool.submit(_tensor, name, models, rank): name for name in largest_first}
        try:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                bar.advance(models[0].checkpoint.parameter(futures[future]).nbytes / 1e6)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    tensors = [
        {"name": name, "layer": depth[name][0] if name in depth else None, "kind": kind_of(name), "shape": list(models[0].shapes[name])}
        | found[name][0].report()
        | found[name][1]
        for name in chosen
    ]
    sums = {name: found[name][0] for name in chosen}
    return Difference(
        models[0].source.spec,
        models[1].source.spec,
        models[2].source.spec if base is not None else None,
        tensors,
        _summed(tensors, sums, "layer"),
        _summed(tensors, sums, "kind"),
        {"tensors": len(tensors), **_total(sums.values()), **_mean_ranks(tensors)},
        left_out,
    )


def kind_of(name: str) -> str:
    """The kind of module a parameter belongs to: its name without its layer and what lies before (`mlp.down_proj`, `embed_tokens`)."""
    parts = name.removesuffix(".weight").split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    own = parts[numbered[-1] + 1 :] if numbered else parts
    return ".".join(own if numbered else own[-1:] if name.endswith(".weight") else own[-2:]) or name


def same_architecture(models: Sequence[Weights]) -> None:
    """Raises BadInput for models of different kinds."""
    kinds = [model.checkpoint.config.get("model_type") for model in models]
    for model, kind in zip(models, kinds, strict=True):
        if kind != kinds[0]:
            raise BadInput(
                f"{models[0].source.spec} is a {kinds[0]} model and {model.source.spec} a {kind} model: their weights do not compare"
            )


def _common(models: Sequence[Weights]) -> tuple[list[str], dict[str, str]]:
    """Parameters that every model has in one shape, a tied pair once; and why the others are left out."""
    left_out: dict[str, str] = {}
    chosen = []
    for name in dict.fromkeys(name for model in models for name in model.shapes):
        lacking = [model.source.spec for model in models if name not in model.shapes]
        shapes = {str(list(model.shapes[name])) for model in models if name in model.shapes}
        if lacking:
            left_out[name] = f"not in {', '.join(lacking)}"
        elif len(shapes) > 1:
            left_out[name] = "shapes differ: " + ", ".join(sorted(shapes))
        elif any(all(model.shared(name, other) for model in models) for other in models[0].shapes):
            continue  # the same tensor under another name
        else:
            chosen.append(name)
    if not chosen:
        raise BadInput(
            [
                f"{models[0].source.spec} and {models[1].source.spec} have no tensor in common",
                *(f"{name}: {why}" for name, why in list(left_out.items())[:3]),
            ]
        )
    return chosen, left_out


def _tensor(name: str, models: Sequence[Weights], rank: Rank) -> tuple[Sums, dict[str, float | None]]:
    shape = models[0].shapes[name]
    sums = Sums()
    for start, stop in ranges(shape):
        parts = [model.rows(name, start, stop) for model in models]
        base = parts[2] if len(parts) > 2 else parts[0]
        x, y = (parts[0] - base, parts[1] - base) if len(parts) > 2 else parts
        sums.add(x, y, base)
        if not all(map(_finite, parts)):
            raise BadInput(
                f"{name} of {next(m.source.spec for m, part in zip(models, parts, strict=True) if not _finite(part))} "
                "holds values that are not finite"
            )
    labels = ("rank_a", "rank_b") if len(models) > 2 else ("rank_difference",)
    if len(shape) != 2 or rank == "none" or (rank == "auto" and min(shape) > RANK_SIDE):
        return sums, dict.fromkeys(labels)
    a, b, base_of = models[0], models[1], models[-1]

    def less(of: Weights, start: int, stop: int) -> torch.Tensor:
        return of.rows(name, start, stop) - base_of.rows(name, start, stop)

    each = (a, b) if len(models) > 2 else (a,)
    return sums, {
        label: effective_rank(lambda start, stop, of=of: less(of, start, stop), shape) for label, of in zip(labels, each, strict=True)
    }


def _finite(values: torch.Tensor) -> bool:
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _total(sums: Iterable[Sums]) -> dict[str, Any]:
    whole = Sums()
    for one in sums:
        whole += one
    return whole.report()


def _mean_ranks(tensors: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean effective rank over the matrices that differ at all."""
    found: dict[str, float | None] = {}
    for label in ("rank_a", "rank_b", "rank_difference"):
        if any(label in tensor for tensor in tensors):
            known = [tensor[label] for tensor in tensors if tensor.get(label)]
            found[label] = sum(known) / len(known) if known else None
    return found


def _summed(tensors: Sequence[Mapping[str, Any]], sums: Mapping[str, Sums], by: str) -> list[dict[str, Any]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        groups.setdefault(tensor[by], []).append(tensor)
    keys = sorted(groups, key=lambda key: (key is not None, key)) if by == "layer" else list(groups)
    return [
        {by: key, "tensors": len(groups[key]), **_total(sums[one["name"]] for one in groups[key]), **_mean_ranks(groups[key])}
        for key in keys
    ]
