"""Add a delta to a model and write the result: streamed tensor by tensor, float32 arithmetic, one rounding, verified, atomic.

    Y = round(W + scale * D)        W: the target's weight, D: the update

The target model is never built; what is in memory is a piece of one tensor. Tensors without an update are copied as bytes.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from guidetune import artefacts
from guidetune.artefacts import StageResult
from guidetune.errors import BadInput, RunFailed
from guidetune.models.checkpoint import FLOATS, TORCH_DTYPES, Checkpoint
from guidetune.models.fingerprints import fingerprint
from guidetune.models.pair import check_pair
from guidetune.models.sources import ModelSource, resolve
from guidetune.progress import progress, say
from guidetune.threads import available_cores, keep_memory
from guidetune.weightspace.rounding import ROUNDINGS, Rounding, judge, round_to
from guidetune.weightspace.sources import Delta, Difference, LoraDelta, StoredDelta
from guidetune.weightspace.stages import ranges
from guidetune.weightspace.store import Entry, SafetensorsWriter, parse_size, plan_shards, shard_names, write_index
from guidetune.weightspace.vocabulary import Extended, Vocabulary, differing

REPORT = "transfer.json"
VERSION = 1  # of the arithmetic and the layout: part of the stage's key
FULL_VERIFY_BYTES = 2 << 30
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
NOT_SIDE_FILES = (
    "*.index.json", "adapter_config.json", "guidetune.json", "manifest.json", "transfer.json", "results.json", "metrics.json",
    "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", ".*",
)  # fmt: skip


@dataclass
class Plan:
    """What is written: every tensor with its update, if it has one."""

    delta: Delta
    target: Checkpoint
    entries: list[Entry]
    stored_from: dict[str, str]  # tensor to write -> tensor of the target it comes from
    update_of: dict[str, str]  # tensor to write -> name in delta.shapes
    untie: bool
    scale: float
    rounding: str
    seed: int
    warnings: list[str] = field(default_factory=list)

    def pieces(self, entry: Entry) -> list[tuple[int, int]]:
        """The row ranges a tensor is worked on in."""
        return ranges(entry.shape)

    def compute(self, entry: Entry, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(W, D, T, Y) for rows [start, stop) of a tensor with an update."""
        w = self.target.float_rows(self.stored_from[entry.name], start, stop)
        d = self.delta.rows(self.update_of[entry.name], start, stop).to(w.dtype)
        if self.scale != 1.0:
            d = d * self.scale
        t = w + d
        if bool((t == 0).any()):  # where nothing is added the stored value stays: -0.0 + 0.0 would become 0.0
            t = torch.where(d == 0, w, t)
        per_row = t.numel() // max(1, stop - start)
        y = round_to(t, dtype_of(entry), self.rounding, (self.seed, entry.name), start * per_row)
        return w, d, t, y

    def converts(self, entry: Entry) -> bool:
        return self.target.tensors[self.stored_from[entry.name]].dtype != entry.dtype


def dtype_of(entry: Entry) -> torch.dtype:
    return getattr(torch, TORCH_DTYPES[entry.dtype])


def transfer(
    adapter: str | Path | Delta,
    into: str | Path | ModelSource,
    out: str | Path,
    scale: float = 1.0,
    dtype: str = "auto",
    max_shard: int | str = "5GB",
    rounding: str = "nearest",
    seed: int = 0,
    base: str | Path | None = None,
    allow_mismatch: bool = False,
    saved_modules: bool = False,
    verify: str = "auto",
    verify_rows: Sequence[Sequence[int]] | None = None,
    vocabulary: Vocabulary | None = None,
) -> StageResult:
    """Write `into` + `scale` * update as a complete model folder, with `transfer.json` beside the weights.

    Args:
        adapter: a LoRA adapter folder, or any `Delta` (`Delta.difference(tuned, base)` for a fully tuned model).
        into: the model that gets the update, normally the instruct sibling of the model it was trained on.
        dtype: "auto" keeps every tensor's stored dtype; float32, bfloat16 or float16 convert all of them.
        rounding: "nearest" or "stochastic" (unbiased; reproducible from `seed`).
        base: the model that the adapter was trained on, instead of the one it records.
        allow_mismatch: write even when base and target do not fit together or the adapter belongs to another base.
        verify: "full" compares weights and logits, "weights" only the weights, "none" nothing; "auto" is full up to 2 GB.
        verify_rows: token ids of up to 8 probe texts; made from the target's tokenizer when not given.
        vocabulary: that of the result, where it is not just the target's.

    Returns:
        The stage; its `result` is the summary (rounding figures, verification, warnings, problems).

    Raises:
        BadInput: the update does not fit the target, with every reason; or the place cannot be written.
        RunFailed: the disk filled up, a value does not fit the dtype, or the written model failed its verification.
    """
    target_source = resolve(into)
    if target_source.adapter is not None:
        raise BadInput(f"{target_source.spec} is an adapter: an update can only be added to a full model; merge it first")
    out = Path(out)
    problems = []
    if dtype != "auto" and dtype not in STORED:
        problems.append(f"dtype {dtype!r} is not one of auto, {', '.join(STORED)}")
    if rounding not in ROUNDINGS:
        problems.append(f"rounding {rounding!r} is not one of {', '.join(ROUNDINGS)}")
    if verify not in ("auto", "full", "weights", "none"):
        problems.append(f"verify {verify!r} is not one of auto, full, weights, none")
    if not isfinite(scale):
        problems.append(f"scale {scale} is not a finite number")
    if problems:
        raise BadInput(problems)
    shard_bytes = parse_size(max_shard)
    delta = adapter if isinstance(adapter, Delta) else LoraDelta(adapter, base, saved_modules)
    try:
        check_place(out, [target_source.path, *read_folders(delta)])
        warnings = check_origin(delta, target_source, allow_mismatch)
        with Checkpoint(target_source.path) if vocabulary is None else Extended(target_source, vocabulary) as target:
            plan = make_plan(delta, target, scale, dtype, rounding, seed)
            plan.warnings[:0] = warnings
            return _write_stage(plan, target_source, out, shard_bytes, dtype, verify, verify_rows)
    finally:
        if not isinstance(adapter, Delta):
            delta.close()


def read_folders(delta: Delta) -> list[Path]:
    if isinstance(delta, LoraDelta):
        return [delta.folder, delta.source.path]
    if isinstance(delta, Difference):
        return [source.path for source in delta.sources]
    if isinstance(delta, StoredDelta):
        return [delta.folder]
    return [folder for part in delta.members() if part is not delta for folder in read_folders(part)]


def check_place(out: Path, inputs: Sequence[Path]) -> None:
    """Raises BadInput when writing `out` would replace something that is not an earlier result, or one of the inputs."""
    place = out.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(place):
            raise BadInput(f"--out {out} holds {path}, which is read from; choose another --out")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and artefacts.finished(out) is None:
        raise BadInput(f"--out {out} is not empty and is not a result of this tool; choose another --out, or empty it")


def check_origin(delta: Delta, target: ModelSource, allow_mismatch: bool) -> list[str]:
    """Does the update come from a sibling of the target? Returns warnings; raises BadInput with the reasons against."""
    if delta.members() != [delta]:
        return [warning for part in delta.members() for warning in check_origin(part, target, allow_mismatch)]
    problems, warnings = [], []
    if isinstance(delta, LoraDelta):
        source = delta.source
        origin = ModelSource(str(source.base_spec), source.path)
        recorded = _recorded_fingerprint(delta)
        own = str(delta.config.get("base_model_name_or_path") or "")
        if recorded is None and own != source.base_spec and own and Path(own).is_dir():
            recorded = fingerprint(own)  # another base was named: the adapter's own one is here to compare with
        if recorded is None:
            warnings.append(
                f"adapter {source.spec} does not record its base's fingerprint: that {source.base_spec} is its base is taken on trust"
            )
        elif recorded != fingerprint(origin):
            problems.append(
                f"adapter {source.spec} was trained on another base (fingerprint {recorded[:12]}) than {source.base_spec} "
                f"({fingerprint(origin)[:12]})"
            )
    elif isinstance(delta, Difference):
        origin = delta.sources[1]
        kinds = [source.config.get("model_type") for source in delta.sources]
        if kinds[0] != kinds[1]:  # the names of the tensors may be the same
            problems.append(f"{delta.sources[0].spec} is a {kinds[0]} model and {origin.spec} a {kinds[1]} model: they do not compare")
        if delta.vocabulary is None and (why := differing(*delta.sources)) is not None:
            problems.append(
                f"{delta.sources[0].spec} and {origin.spec} have other vocabularies ({why}): their rows do not belong together; "
                "give `tokenizer: base` or `tokenizer: union` in a plan"
            )
    elif isinstance(delta, StoredDelta):
        if delta.base_fingerprint == fingerprint(target):
            return []
        try:
            origin = resolve(delta.base)
        except BadInput:
            return [
                f"delta {delta.folder}: its base {delta.base} is not here: that it fits {target.spec} is taken on trust but for its shapes"
            ]
    else:
        return []
    if origin.path != target.path:
        report = check_pair(origin, target, distance=False)
        problems += [f"{origin.spec} and {target.spec} do not fit together: {problem}" for problem in report.problems]
    if problems and not allow_mismatch:
        raise BadInput([*problems, "nothing was written; allow the mismatch explicitly if you know that the update still applies"])
    return warnings + problems


def _recorded_fingerprint(delta: LoraDelta) -> str | None:
    from guidetune.models.sources import PROVENANCE, read_config

    path = delta.folder / PROVENANCE
    return read_config(path).get("base_fingerprint") if path.is_file() else None


def make_plan(delta: Delta, target: Checkpoint, scale: float, dtype: str, rounding: str, seed: int) -> Plan:
    """Decide for every tensor whether it is copied, converted or updated.

    Raises:
        BadInput: with every reason why the update cannot be added to this model.
    """
    problems: list[str] = []
    if target.quantization:
        problems.append(f"{target.folder} is quantised ({target.quantization}): merge into its 16-bit original and quantise the result")
    names = target.names
    if names.missing:
        problems.append(f"{target.folder} lacks weights of its own architecture, first {names.missing[0]}")
    problems += delta.fit(names)
    problems += delta.checks()
    if problems:
        raise BadInput(problems[:12])
    stored_from = {file: file for file in target.tensors}
    update_of: dict[str, str] = {}
    for name in delta.shapes if scale != 0.0 else ():
        update_of[names.file_of.get(name, name)] = name
    untie, warnings = False, []
    for a, b in names.tied.items() if scale != 0.0 else ():
        hit = [name for name in (a, b) if name in delta.shapes]
        if not hit:
            continue
        if delta.same(a, b):
            # One update for the one matrix that both share.
            for name in (a, b):
                update_of[names.file_of[name]] = name
            continue
        untie = True
        warnings.append(
            f"{a} and {b} share one tensor, and the update changes {' and '.join(hit)} separately: they are stored untied in the result"
        )
        own = {name: names.file_of[name] for name in (a, b)}
        if own[a] == own[b]:
            shared = own[a]
            single = a if names.parameter_of[shared] == b else b  # the one that has no tensor of its own yet
            if single in target.tensors:
                raise BadInput(f"{target.folder}: cannot untie {a} and {b}, a tensor named {single} is already there")
            own[single] = single
            stored_from[single] = shared
            update_of.pop(shared, None)
        for name in hit:
            update_of[own[name]] = name
    lost = set(delta.shapes) - set(update_of.values()) if scale != 0.0 else set()
    lost -= {name for a, b in names.tied.items() if delta.same(a, b) for name in (a, b)}
    if lost:
        raise BadInput([f"the update of {name} would be applied to no tensor" for name in sorted(lost)][:8])
    entries = []
    for file, source in stored_from.items():
        info = target.tensors[source]
        code = STORED[dtype] if dtype != "auto" and info.dtype in FLOATS else info.dtype
        if file in update_of and info.dtype not in FLOATS:
            raise BadInput(f"{file} is stored as {info.dtype}, to which nothing can be added")
        entries.append(Entry(file, code, info.shape))
    return Plan(delta, target, entries, stored_from, update_of, untie, scale, rounding, seed, warnings)


def side_files(folder: Path) -> list[Path]:
    """Everything of a model folder but its weights, its readme and other tools' records, as paths relative to it."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name == "additional_chat_templates":
            found += sorted(file.relative_to(folder) for file in path.glob("*.jinja"))
        elif (
            path.is_file()
            and any(fnmatch.fnmatch(path.name, p) for p in SIDE_FILES)
            and not any(fnmatch.fnmatch(path.name, p) for p in NOT_SIDE_FILES)
        ):
            found.append(path.relative_to(folder))
    return found


def _write_stage(
    plan: Plan, source: ModelSource, out: Path, shard_bytes: int, dtype: str, verify: str, rows: Sequence[Sequence[int]] | None
) -> StageResult:
    shards = plan_shards(plan.entries, shard_bytes)
    total = sum(entry.nbytes for entry in plan.entries)
    if verify == "auto":
        verify = "full" if total <= FULL_VERIFY_BYTES else "weights"
    sides = {str(path): artefacts.digest_file(plan.target.folder / path) for path in side_files(plan.target.folder)}
    key = {
        "transfer": VERSION,
        "into": fingerprint(source),
        "files": sides,
        "delta": plan.delta.describe(),
        "scale": plan.scale,
        "dtype": dtype,
        "rounding": [plan.rounding, plan.seed if plan.rounding == "stochastic" else None],
        "shards": [len(shards), shard_bytes],
        "verify": verify,
    }
    if isinstance(plan.target, Extended):
        key["vocabulary"] = plan.target.vocabulary.describe()
    if artefacts.finished(out, key) is None:
        _check_space(out, total)
    result = published(out, key, lambda work: _build(plan, source, work, shards, dtype, verify, rows), total)
    summary = result.result
    for text in summary.get("warnings", []):
        say(f"transfer: warning: {text}")
    for text in summary.get("problems", []):
        say(f"transfer: problem: {text}", level=-1)
    return result


def published(out: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]], total: int | None = None) -> StageResult:
    """`artefacts.stage` for files of weights (`total` bytes of them): a failure leaves none behind, and a full disk is said so."""
    try:
        return artefacts.stage(out, key, build)
    except (BadInput, RunFailed):
        free_partial(out)
        raise
    except OSError as error:
        free_partial(out)
        raise RunFailed(disk_message(out, total, error)) from None


def _check_space(out: Path, total: int) -> None:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    work = out.with_name(f".{out.name}.partial")
    held = sum(file.stat().st_size for file in work.glob("*.safetensors")) if work.is_dir() else 0
    free = shutil.disk_usage(parent).free + held
    if total + (16 << 20) > free:
        raise BadInput(f"{out} needs {total / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; make room or choose another --out")


def free_partial(out: Path) -> None:
    """A failed attempt must not keep the disk full."""
    for file in out.with_name(f".{out.name}.partial").glob("*.safetensors"):
        file.unlink(missing_ok=True)


def disk_message(out: Path, total: int | None, error: OSError) -> str:
    """What to say when writing `out` (of `total` bytes, where that is known) failed."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = "" if total is None else f"it needs {total / 1e9:.2f} GB; "
        return f"the disk filled up while {out} was written ({reason}); {need}nothing is lost: make room and run again"
    if error.errno == errno.EFBIG:
        return (
            f"{out}: a file grew past the largest size allowed here ({reason}); use a smaller max_shard or raise the limit, and run again"
        )
    return f"writing {out} failed ({reason}); nothing was published: run the same command again"


def _build(
    plan: Plan, source: ModelSource, work: Path, shards: list[list[Entry]], dtype: str, verify: str, rows: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    from guidetune.weightspace.verify import verify_result

    for old in work.iterdir():  # what an interrupted attempt left
        if old.name != ".key" and old.name != ".spent":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    tensors = _write_weights(plan, work, shards)
    _write_side_files(plan, work, dtype)
    overall = Rounding()
    for entry in tensors.values():
        overall += entry
    report = {name: entry.report() for name, entry in tensors.items()}
    total = overall.report()
    stored = dtype if dtype != "auto" else plan.target.dtype
    warnings, problems = judge(total, report, stored)
    warnings = [*plan.warnings, *warnings]
    moved = sum(entry.d2 > 0 for entry in tensors.values())
    if plan.scale != 0.0 and not moved:
        warnings.append("the update is zero everywhere (B = 0): the result is the target model itself")
    checked = verify_result(plan, source, work, verify, rows, moved > 0)
    warnings += checked.pop("warnings", [])
    summary = {
        "tensors_updated": len(report),
        "tensors_copied": len(plan.entries) - len(report),
        "tensors_moved": moved,
        "dtype": stored,
        "rounding": plan.rounding,
        "scale": plan.scale,
        "ratio": total["ratio"],
        "error": total["error"],
        "gain": total["gain"],
        "unchanged": total["unchanged"],
        "bytes": sum(entry.nbytes for entry in plan.entries),
        "shards": len(shards),
        "untied": plan.untie,
        "verification": checked,
        "warnings": warnings,
        "problems": problems,
    }
    origin = {"into": source.spec, "into_fingerprint": fingerprint(source), "delta": plan.delta.describe(), "seed": plan.seed}
    artefacts.write_json(work / REPORT, {"summary": summary, "origin": origin, "tensors": report})
    return summary


def _write_weights(plan: Plan, work: Path, shards: list[list[Entry]]) -> dict[str, Rounding]:
    """Every tensor to its place, several at a time: a tensor is one thread's, so neither their number nor their order shows."""
    rounding: dict[str, Rounding] = {}
    total = sum(entry.nbytes for entry in plan.entries)
    names = shard_names(len(shards))
    keep_memory()
    plan.delta.begin()
    before = torch.get_num_threads()
    stop = threading.Event()
    with ExitStack() as exits:
        bar = exits.enter_context(progress("transfer", total=total / 1e6, unit="MB"))
        writers = [exits.enter_context(SafetensorsWriter(work / name, shard)) for name, shard in zip(names, shards, strict=True)]
        jobs = [(entry, writer) for writer, shard in zip(writers, shards, strict=True) for entry in shard]
        jobs.sort(key=lambda job: -job[0].nbytes)  # the largest first: nobody is left alone with it at the end
        exits.callback(torch.set_num_threads, before)
        # two threads inside every small operation cost more than they bring
        pool = exits.enter_context(ThreadPoolExecutor(available_cores(), initializer=torch.set_num_threads, initargs=(1,)))
        futures = {pool.submit(_write_tensor, plan, entry, writer, stop): entry for entry, writer in jobs}
        try:
            for future in as_completed(futures):
                entry = futures[future]
                if (sums := future.result()) is not None:
                    rounding[entry.name] = sums
                bar.advance(entry.nbytes / 1e6)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    write_index(work, shards)
    return {entry.name: rounding[entry.name] for shard in shards for entry in shard if entry.name in rounding}


def _write_tensor(plan: Plan, entry: Entry, writer: SafetensorsWriter, stop: threading.Event) -> Rounding | None:
    if entry.name in plan.update_of:
        try:
            return _write_update(plan, entry, writer, stop)
        finally:
            plan.delta.done(plan.update_of[entry.name])
    if plan.converts(entry):
        _write_converted(plan, entry, writer, stop)
        return None
    offset = 0
    for piece in plan.target.raw(plan.stored_from[entry.name]):
        _go_on(stop)
        writer.write(entry.name, offset, piece)
        offset += len(piece)
    return None


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise RunFailed("stopped")  # another thread has the reason


def _write_update(plan: Plan, entry: Entry, writer: SafetensorsWriter, stop: threading.Event) -> Rounding:
    sums, offset = Rounding(), 0
    for first, end in plan.pieces(entry):
        _go_on(stop)
        w, d, t, y = plan.compute(entry, first, end)
        sums.add(w, d, t, y)
        if not sums.finite:
            _check_range(entry, t, y)
        data = _bytes(y)
        writer.write(entry.name, offset, data)
        offset += len(data)
    return sums


def _write_converted(plan: Plan, entry: Entry, writer: SafetensorsWriter, stop: threading.Event) -> None:
    offset = 0
    for first, end in plan.pieces(entry):
        _go_on(stop)
        w = plan.target.rows(plan.stored_from[entry.name], first, end)
        y = w.to(dtype_of(entry))
        _check_range(entry, w, y)
        data = _bytes(y)
        writer.write(entry.name, offset, data)
        offset += len(data)


def _check_range(entry: Entry, exact: torch.Tensor, rounded: torch.Tensor) -> None:
    if not bool(torch.isfinite(rounded).all()):
        if bool(torch.isfinite(exact).all()):
            raise RunFailed(
                f"{entry.name} reaches {float(exact.abs().max()):.3g}, too large for {dtype_of(entry)}; write bfloat16 or float32"
            )
        raise RunFailed(f"{entry.name} holds values that are not finite, in the target model or in the update; nothing was published")


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _write_side_files(plan: Plan, work: Path, dtype: str) -> None:
    for path in side_files(plan.target.folder):
        place = work / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.name != "config.json" or (dtype == "auto" and not plan.untie):
            shutil.copyfile(plan.target.folder / path, place)
    if dtype != "auto" or plan.untie:
        config = json.loads(json.dumps(plan.target.config))
        _update_config(config, dtype, plan.untie, top=True)
        artefacts.write_json(work / "config.json", config)
    if isinstance(plan.target, Extended):
        plan.target.vocabulary.write(work)


def _update_config(config: dict[str, Any], dtype: str, untie: bool, top: bool = False) -> None:
    """Set the dtype and the tie flag here and in every nested config that has them."""
    if dtype != "auto":
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
        if top and "torch_dtype" not in config:
            config["dtype"] = dtype
    if untie and (top or "tie_word_embeddings" in config):
        config["tie_word_embeddings"] = False
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            _update_config(value, dtype, untie)
