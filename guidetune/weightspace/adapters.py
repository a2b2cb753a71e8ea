"""LoRA adapters written: extracted from the difference of two models, or several added up exactly.

An adapter's update is (alpha / r) B A. Here alpha = r for every module, so that it is B A; ranks may differ between modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from guidetune import artefacts
from guidetune.artefacts import StageResult
from guidetune.errors import BadInput, RunFailed
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.fingerprints import fingerprint
from guidetune.models.sources import ADAPTER_WEIGHTS, PROVENANCE, ModelSource, resolve
from guidetune.progress import progress, say
from guidetune.weightspace.apply import STORED, check_origin, check_place, published, read_folders
from guidetune.weightspace.diff import Weights, same_architecture
from guidetune.weightspace.merged import Merged
from guidetune.weightspace.scale import Weight
from guidetune.weightspace.sources import PREFIX, LoraDelta
from guidetune.weightspace.spectrum import low_rank
from guidetune.weightspace.stages import Preset, ranges
from guidetune.weightspace.store import Entry, SafetensorsWriter

EXTRACTED, ADDED = "extract.json", "added.json"
VERSION = 1


@dataclass
class _Adapter:
    """What is to be written: of each module its factors a [r, in] and b [out, r], and parameters saved whole."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    conv1d: bool = False
    saved: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, work: Path, base: ModelSource, dtype: str) -> int:
        """The files that peft reads, and the base's fingerprint; returns the number of values."""
        tensors = {}
        for path, (a, b) in self.factors.items():
            of, end = ("lora_embedding_", "") if path in self.embeddings else ("lora_", ".weight")
            tensors |= {f"{PREFIX}{path}.{of}A{end}": a, f"{PREFIX}{path}.{of}B{end}": b}
        tensors |= {f"{PREFIX}{name}": values for name, values in self.saved.items()}
        stored = {name: values.to(getattr(torch, dtype)).contiguous() for name, values in tensors.items()}
        if bad := [name for name, values in stored.items() if not bool(torch.isfinite(values).all())]:
            raise RunFailed(f"{bad[0]} is not finite in {dtype}; write float32 or bfloat16")
        entries = [Entry(name, STORED[dtype], tuple(values.shape)) for name, values in stored.items()]
        with SafetensorsWriter(work / ADAPTER_WEIGHTS, entries) as writer:
            for name, values in stored.items():
                writer.write(name, 0, memoryview(values.flatten().view(torch.uint8).numpy()))
        self._config(base).save_pretrained(str(work))
        origin = {"base": str(base.path) if Path(base.spec).exists() else base.spec, "base_fingerprint": fingerprint(base)}
        artefacts.write_json(work / PROVENANCE, {**origin, "method": "guidetune"})
        return sum(values.numel() for values in stored.values())

    def _config(self, base: ModelSource) -> Any:
        from peft import LoraConfig

        ranks = {path: a.shape[0] for path, (a, _) in self.factors.items()}
        common = Counter(ranks.values()).most_common(1)[0][0]
        other = {path: r for path, r in ranks.items() if r != common}
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(base.path) if Path(base.spec).exists() else base.spec,
            r=common,
            lora_alpha=common,
            lora_dropout=0.0,
            target_modules=sorted(ranks),
            rank_pattern=other,
            alpha_pattern=dict(other),
            fan_in_fan_out=self.conv1d,
            modules_to_save=sorted({name.rsplit(".", 1)[0] for name in self.saved}) or None,
            inference_mode=True,
        )


def extract(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    save_modules: bool = False,
) -> StageResult:
    """Write the difference of two models as an adapter: of every linear module the best approximation of low rank (`spectrum.low_rank`).

    Exact (to rounding) where the difference has no higher rank. What no linear module holds (norms, biases, embeddings) is left out and
    named, or with `save_modules` stored whole (peft's modules_to_save), but for biases of linear modules and tied embeddings.

    Args:
        rank: r of every module; with `energy` the largest one allowed.
        energy: each module has the smallest rank whose singular values hold this share of Σ σ², unchanged modules none.

    Returns:
        The stage; its `result` and `extract.json` have `tensors: {name: {rank, norm, kept, residual}}` with residual = ‖τ − B A‖ / ‖τ‖ of
        what is stored, `left_out: {name: {norm, reason}}`, and the residual of all of the difference.

    Raises:
        BadInput: the models do not fit together or are the same, or an option has no sense.
        RunFailed: the disk filled up.
    """
    problems = []
    if rank is None and energy is None:
        problems.append("give a rank, or the energy to keep")
    if rank is not None and rank < 1:
        problems.append(f"rank {rank} is not at least 1")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy {energy:g} is not above 0 and at most 1")
    if dtype not in STORED:
        problems.append(f"dtype {dtype!r} is not one of {', '.join(STORED)}")
    if problems:
        raise BadInput(problems)
    out, models = Path(out), [Weights(tuned), Weights(base)]
    try:
        if models[1].source.adapter is not None:
            raise BadInput(f"{models[1].source.spec} is an adapter: an adapter is extracted against a full model; merge it first")
        same_architecture(models)
        adapter = models[0].source.adapter
        check_place(out, [model.source.path for model in models] + ([adapter] if adapter is not None else []))
        key = {
            "extract": VERSION,
            "tuned": fingerprint(models[0].source),
            "base": fingerprint(models[1].source),
            "options": [rank, energy, dtype, save_modules],
        }
        return published(out, key, lambda work: _extract(models[0], models[1], work, rank, energy, dtype, save_modules))
    finally:
        for model in models:
            model.close()


def _extract(
    tuned: Weights, base: Weights, work: Path, rank: int | None, energy: float | None, dtype: str, save_modules: bool
) -> dict[str, Any]:
    names = base.names
    made, tensors = _Adapter(), {}
    left_out: dict[str, dict[str, Any]] = {
        name: {"norm": None, "reason": "only one of the two models has it, or in another shape"}
        for name in {*tuned.shapes, *base.shapes}
        if tuned.shapes.get(name) != base.shapes.get(name)
    }
    chosen = [name for name in base.shapes if name not in left_out and not any(base.shared(name, other) for other in base.shapes)]
    tied = {part for pair in names.tied.items() for part in pair}
    squares = {"all": 0.0, "rest": 0.0}
    with progress("extract", total=sum(base.checkpoint.parameter(name).nbytes for name in chosen) / 1e6, unit="MB") as bar:
        for name in chosen:
            shape, kind = base.shapes[name], names.kinds.get(name, "other")

            def rows(start: int, stop: int, name: str = name) -> torch.Tensor:
                return tuned.rows(name, start, stop) - base.rows(name, start, stop)

            norm = sqrt(sum(float(rows(*piece).double().pow(2).sum()) for piece in ranges(shape)))
            if norm != norm or norm == float("inf"):
                raise BadInput(f"{name} holds values that are not finite, in {tuned.source.spec} or {base.source.spec}")
            squares["all"] += norm**2
            bar.advance(base.checkpoint.parameter(name).nbytes / 1e6)
            if not norm:
                continue
            path, part = name.rsplit(".", 1)
            if kind not in ("linear", "conv1d") or len(shape) != 2 or name in tied:
                linear = names.kinds.get(f"{path}.weight") in ("linear", "conv1d") and part != "weight"
                why = "tied embeddings" if name in tied else "bias of a linear module" if linear else "not a linear module"
                if save_modules and not linear and name not in tied:
                    made.saved[name] = tuned.rows(name, 0, shape[0] if shape else 1)
                else:
                    squares["rest"] += norm**2
                    left_out[name] = {"norm": norm, "reason": why}
                continue
            found = low_rank(rows, shape, rank, energy)
            stored = [values.to(getattr(torch, dtype)).float() for values in (found.a, found.b)]
            rest = sqrt(sum(float((rows(i, j) - stored[1][i:j] @ stored[0]).double().pow(2).sum()) for i, j in ranges(shape)))
            squares["rest"] += rest**2
            tensors[name] = {"rank": found.a.shape[0], "norm": norm, "kept": found.kept, "residual": rest / norm}
            made.conv1d |= kind == "conv1d"
            made.factors[path] = (found.b.T, found.a.T) if kind == "conv1d" else (found.a, found.b)
    if not made.factors:
        raise BadInput(f"no linear module of {tuned.source.spec} differs from {base.source.spec}: there is nothing to extract")
    if made.conv1d and any(names.kinds.get(f"{path}.weight") == "linear" for path in made.factors):
        raise BadInput("the model has changed modules of both kinds, Linear and Conv1D, which one peft adapter cannot hold")
    values = made.write(work, base.source, dtype)
    artefacts.write_json(work / EXTRACTED, {"tensors": tensors, "left_out": left_out})
    if left_out:
        say(f"extract: {len(left_out)} changed tensors are left out, such as {next(iter(left_out))}")
    return {
        "modules": len(tensors),
        "saved": sorted(made.saved),
        "left_out": left_out,
        "ranks": [min(t["rank"] for t in tensors.values()), max(t["rank"] for t in tensors.values())],
        "residual": sqrt(squares["rest"] / squares["all"]),
        "values": values,
        "tensors": tensors,
    }


def add(
    preset: Preset,
    parts: Sequence[tuple[float | Weight, LoraDelta]],
    anchor: str | Path,
    out: str | Path,
    dtype: str = "float32",
    allow_mismatch: bool = False,
) -> StageResult:
    """Write Σ c_i (alpha_i / r_i) B_i A_i as one adapter for `anchor`, exactly: A = [A_1; A_2; …], B = [c_1 s_1 B_1, c_2 s_2 B_2, …].

    Ranks add up; there are no products of one adapter's A with another's B. Ranks, targets and scalings may differ between the sources.
    The preset gives the c_i, so it must be linear in the updates: a sum, also normalised or with a factor by depth.

    Raises:
        BadInput: the preset is not linear, a source holds fully trained modules, or the adapters do not fit the anchor.
        RunFailed: the disk filled up, or the written adapter's update is not the sum.
    """
    out, target = Path(out), resolve(anchor)
    merged, terms, warnings = _sum(preset, parts, target, allow_mismatch)
    check_place(out, [target.path, *read_folders(merged)])
    key = {"added": VERSION, "anchor": fingerprint(target), "delta": merged.describe(), "dtype": dtype}

    def build(work: Path) -> dict[str, Any]:
        made = _Adapter()
        for name, found in terms.items():
            pairs = [(c, *delta.factors(name)) for c, delta in found if c != 0]
            if pairs:
                path = name.removesuffix(".weight")
                made.factors[path] = torch.cat([a for _, a, _ in pairs]), torch.cat([c * b for c, _, b in pairs], dim=1)
                made.embeddings |= {path} if merged.anchor.names.kinds[name] == "embedding" else set()
                made.conv1d |= merged.anchor.names.kinds[name] == "conv1d"
        if not made.factors:
            raise BadInput("every weight is 0: the sum of the adapters is nothing")
        values = made.write(work, target, dtype)
        checked = _same_update(work, target, merged, exact=dtype == "float32")
        ranks = [a.shape[0] for a, _ in made.factors.values()]
        result = {"modules": len(ranks), "ranks": [min(ranks), max(ranks)], "values": values, "error": checked, "warnings": warnings}
        artefacts.write_json(work / ADDED, {**result, "method": preset.spec(), "sources": merged.describe()["parts"]})
        return result

    try:
        return published(out, key, build)
    finally:
        merged.close()


def preview(preset: Preset, parts: Sequence[tuple[float | Weight, LoraDelta]], anchor: str | Path, allow_mismatch: bool = False) -> str:
    """What `add` would write, in lines of text. Raises BadInput as `add`."""
    target = resolve(anchor)
    merged, terms, warnings = _sum(preset, parts, target, allow_mismatch)
    try:
        ranks = [sum(delta.rank(delta.lora_of[name]) for c, delta in found if c != 0) for name, found in terms.items()]
        values = sum(rank * sum(merged.shapes[name]) for rank, name in zip(ranks, terms, strict=True))
    finally:
        merged.close()
    lines = [
        f"method: {preset.name} of {len(parts)} adapters, written as one adapter for {target.spec}",
        f"modules: {len(ranks)}, of ranks {min(ranks)} to {max(ranks)}",
        f"writes: {4 * values / 1e6:.1f} MB in float32",
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings)])


def _sum(
    preset: Preset, parts: Sequence[tuple[float | Weight, LoraDelta]], target: ModelSource, allow_mismatch: bool
) -> tuple[Merged, dict[str, list[tuple[float, LoraDelta]]], list[str]]:
    """The sum, its terms by parameter, and warnings; BadInput where it is no sum of adapters that fit the target."""
    merged = Merged(preset, parts, Checkpoint(target.path))
    warnings = check_origin(merged, target, allow_mismatch)
    problems = [*merged.fit(merged.anchor.names), *merged.checks()]
    problems += [
        f"adapter {delta.folder} holds fully trained modules, which no sum of factors can express" for _, delta in parts if delta.saved
    ]
    if problems:
        raise BadInput(problems[:12])
    terms: dict[str, list[tuple[float, LoraDelta]]] = {}
    for name in merged.shapes:
        found = merged.terms(name)
        if found is None:
            raise BadInput(f"{preset.name} is not a weighted sum of the updates, so its result is no adapter: write a model instead")
        terms[name] = [(c, delta) for c, delta in found if isinstance(delta, LoraDelta)]
    return merged, terms, warnings


def _same_update(work: Path, target: ModelSource, merged: Merged, exact: bool) -> float:
    """The largest difference between the update of the written adapter and the sum, as a share of the largest value of the sum."""
    written = LoraDelta(work, target.path)
    try:
        if problems := written.fit(merged.anchor.names):
            raise RunFailed(f"the written adapter does not fit: {problems[0]}")
        worst = largest = 0.0
        for name, shape in merged.shapes.items():
            for start, stop in ranges(shape):
                wanted = merged.rows(name, start, stop)
                found = written.rows(name, start, stop) if name in written.shapes else torch.zeros_like(wanted)
                worst, largest = max(worst, float((found - wanted).abs().max())), max(largest, float(wanted.abs().max()))
            merged.done(name)
    finally:
        written.close()
    error = worst / largest if largest else 0.0
    if exact and error > 1e-5:
        raise RunFailed(f"the written adapter's update differs from the sum by {error:.2g} of its largest value; nothing was published")
    return error
