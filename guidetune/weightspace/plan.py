"""The plan of a merge, as written in YAML, and its execution.

anchor: world:instruct                 # what is written = anchor + combined deltas
sources:
  - {adapter: runs/x/adapter, of: world:base, weight: 1.0}
  - {model: M, minus: B, weight: 0.5}
method: sum                            # or {method: task_arithmetic, scale: 0.4}
out_dtype: float32
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainSerializer, Tag, ValidationError

from guidetune import registry, yaml12
from guidetune.artefacts import StageResult
from guidetune.errors import BadInput
from guidetune.models.checkpoint import Checkpoint
from guidetune.models.sources import resolve
from guidetune.threads import available_cores
from guidetune.weightspace.apply import check_origin, make_plan, transfer
from guidetune.weightspace.merged import Merged, added
from guidetune.weightspace.mergekit import is_mergekit, plan_of
from guidetune.weightspace.scale import Weight
from guidetune.weightspace.sources import Delta, Difference, LoraDelta, StoredDelta
from guidetune.weightspace.stages import Preset
from guidetune.weightspace.store import parse_size, plan_shards
from guidetune.weightspace.vocabulary import Extended, Vocabulary


def _weights(value: Any) -> Any:
    """A number, or the rules of a `Weight`: values spread over the layers, or {filter, value} by parts of names."""

    def numbers(given: Any) -> tuple[float, ...] | None:
        given = given if isinstance(given, list) else [given]
        fine = given and all(isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x) for x in given)
        return tuple(float(x) for x in given) if fine else None

    if isinstance(value, Weight):
        return value
    found = numbers(value)
    if found is not None:
        return Weight(((None, found),)) if isinstance(value, list) else found[0]
    if isinstance(value, list) and value and all(isinstance(one, dict) and set(one) <= {"filter", "value"} for one in value):
        rules = [(one.get("filter"), numbers(one.get("value"))) for one in value]
        if all(found is not None and (part is None or isinstance(part, str)) for part, found in rules):
            return Weight(tuple(rules))
    raise ValueError(f"{value!r} is no weight: a number, numbers spread over the layers, or a list of {{filter, value}}")


def _written(weight: float | Weight) -> Any:
    """As it stands in a plan."""
    if not isinstance(weight, Weight):
        return weight
    if len(weight.rules) == 1 and weight.rules[0][0] is None:
        return list(weight.rules[0][1])
    return [{"filter": part, "value": list(values)} for part, values in weight.rules]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    weight: Annotated[Any, BeforeValidator(_weights), PlainSerializer(_written)] = Field(
        1.0, description="What the delta is multiplied by: a number, numbers spread over the layers, or {filter, value} by parts of names."
    )


class AdapterSource(Part):
    """A LoRA adapter; its delta is (alpha / r) B A."""

    adapter: str = Field(description="Adapter folder.")
    of: str | None = Field(None, description="The model it was trained on; by default the one it records.")
    saved_modules: bool = Field(False, description="Also add what modules_to_save hold, as the difference to the base.")


class ModelSource(Part):
    """A full model minus the model it was tuned from."""

    model: str = Field(description="The tuned model; also an adapter folder with its base, or MODEL+ADAPTER.")
    minus: str | None = Field(None, description="The model it was tuned from; null: the anchor.")
    include: str | list[str] | None = Field(None, description="'projections', or glob patterns of parameter names; default all.")


class DeltaSource(Part):
    """An update that another plan has written."""

    delta: str = Field(description="A folder written with `write: delta`.")


KINDS = {"adapter": AdapterSource, "delta": DeltaSource, "model": ModelSource}


def _kind(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((kind for kind in ("adapter", "delta", "model") if kind in value), "model" if "minus" in value else None)
    return next((kind for kind, of in KINDS.items() if isinstance(value, of)), "model")


def _method(value: Any) -> Preset:
    """`ties` or `{method: ties, density: 0.3}`; faults become those of the plan, each with its own place."""
    spec = {"method": value} if isinstance(value, str) else value
    if isinstance(spec, Preset):
        return spec
    if not isinstance(spec, dict) or not isinstance(spec.get("method"), str):
        given = spec.get("method") if isinstance(spec, dict) else spec
        raise ValueError(f"method is the name of a merge method, not {type(given).__name__}")
    name, known = spec["method"], registry.names("weightspace")
    if name not in known:
        raise ValueError(f"no merge method {name!r}{registry.nearest(name, known)}")
    try:
        return registry.build("weightspace", spec)
    except BadInput as error:
        raise ValueError("; ".join(error.problems)) from None


Method = Annotated[registry.Method, BeforeValidator(_method), PlainSerializer(lambda method: method.spec())]
Source = Annotated[
    Annotated[AdapterSource, Tag("adapter")] | Annotated[DeltaSource, Tag("delta")] | Annotated[ModelSource, Tag("model")],
    Discriminator(_kind),
]


class MergePlan(BaseModel):
    """What to write: `anchor` + the combined deltas of `sources`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    anchor: str = Field(description="The model that gets the deltas; its tokenizer and configs are kept.")
    sources: list[Source] = Field(min_length=1, description="The deltas, each an adapter or a difference of two models.")
    method: Method = Field("sum", validate_default=True, description="How the deltas are combined (kind weightspace).")
    out_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as the anchor is stored; adapter: float32."
    )
    write: Literal["model", "adapter", "delta"] = Field(
        "model",
        description="adapter: one LoRA adapter for the anchor, exactly the weighted sum of the sources, which are all adapters. "
        "delta: the joined update alone, to be a source of other plans.",
    )
    tokenizer: Literal["base", "union"] | None = Field(
        None,
        description="What to do with sources of other vocabularies: base: their rows by the anchor's tokens; union: their own tokens are "
        "added. null: refuse them.",
    )
    rounding: Literal["nearest", "stochastic"] = "nearest"
    max_shard: int | str = "5GB"
    seed: int = 0
    allow_mismatch: bool = Field(False, description="Write even when models do not fit together.")


def load_plan(path: str | Path) -> MergePlan:
    """Read a plan file. Raises BadInput with every fault, its line and its value."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the plan {path}: {getattr(error, 'strerror', None) or error}") from None
    plan = parse_plan(text, path.name)
    sources = [_beside(part, path.parent) for part in plan.sources]
    return plan.model_copy(update={"sources": sources, "anchor": _place(plan.anchor, path.parent)})


def parse_plan(text: str, name: str = "plan") -> MergePlan:
    """A plan from YAML text; `name` is what errors call it."""
    try:
        data = yaml12.load(text)
        root = yaml.compose(text, Loader=yaml12.Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise BadInput(f"{name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise BadInput(f"{name}: a plan is a mapping with anchor and sources, not {type(data).__name__}")
    if is_mergekit(data):
        data = plan_of(data, name)
    try:
        return MergePlan.model_validate(data)
    except ValidationError as error:
        raise BadInput(list(_faults(error, root, name))) from None


def merge(
    plan: MergePlan | str | Path, out: str | Path, verify: str = "auto", verify_rows: Sequence[Sequence[int]] | None = None
) -> StageResult:
    """Write `anchor` + the combined deltas to `out`; see `transfer` for the result and what is raised."""
    plan = plan if isinstance(plan, MergePlan) else load_plan(plan)
    if plan.write == "adapter":
        from guidetune.weightspace import adapters

        assert isinstance(plan.method, Preset)
        dtype = "float32" if plan.out_dtype == "auto" else plan.out_dtype
        return adapters.add(plan.method, _adapters(plan), plan.anchor, out, dtype, plan.allow_mismatch)
    vocabulary = _vocabulary(plan)
    delta, scale = _joined(plan, vocabulary)
    try:
        if plan.write == "delta":
            from guidetune.weightspace.deltas import write_delta

            dtype = "float32" if plan.out_dtype == "auto" else plan.out_dtype
            return write_delta(delta, plan.anchor, out, scale, dtype, plan.max_shard, plan.allow_mismatch)
        return transfer(
            delta,
            plan.anchor,
            out,
            scale=scale,
            dtype=plan.out_dtype,
            max_shard=plan.max_shard,
            rounding=plan.rounding,
            seed=plan.seed,
            allow_mismatch=plan.allow_mismatch,
            verify=verify,
            verify_rows=verify_rows,
            vocabulary=vocabulary,
        )
    finally:
        delta.close()
        if vocabulary is not None:
            vocabulary.close()


def _vocabulary(plan: MergePlan) -> Vocabulary | None:
    """The vocabulary of the result, where the plan asks for one."""
    if plan.tokenizer is None:
        return None
    if plan.write != "model":
        raise BadInput(f"tokenizer: {plan.tokenizer} is of a model's rows; with write: {plan.write} leave it out")
    problems = [
        f"sources.{i}: with `tokenizer` a model is merged minus the anchor; leave `minus` out"
        for i, part in enumerate(plan.sources)
        if isinstance(part, ModelSource) and part.minus not in (None, plan.anchor)
    ]
    if problems:
        raise BadInput(problems)
    models = [resolve(part.model) for part in plan.sources if isinstance(part, ModelSource)]
    return Vocabulary(resolve(plan.anchor), models, plan.tokenizer)


def _adapters(plan: MergePlan) -> list[tuple[float | Weight, LoraDelta]]:
    """The sources of a plan that writes an adapter."""
    parts: list[tuple[float | Weight, LoraDelta]] = []
    problems: list[str] = []
    for i, part in enumerate(plan.sources):
        try:
            if not isinstance(part, AdapterSource):
                raise BadInput(f"sources.{i} is no adapter: `write: adapter` adds up adapters; make one of a model with merge extract")
            parts.append((part.weight, LoraDelta(part.adapter, part.of, part.saved_modules)))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return parts


def _source(part: AdapterSource | DeltaSource | ModelSource, anchor: str, vocabulary: Vocabulary | None) -> Delta:
    """The update of one source."""
    if isinstance(part, AdapterSource):
        return LoraDelta(part.adapter, part.of, part.saved_modules)
    if isinstance(part, DeltaSource):
        return StoredDelta(part.delta)
    minus = part.minus or anchor
    model, plus, adapter = part.model.rpartition("+")
    if not plus or Path(part.model).exists():  # a folder may have a plus in its name
        if resolve(part.model).adapter is None:
            return Difference(part.model, minus, part.include, vocabulary)
        model, adapter = "", part.model
    if part.include is not None or vocabulary is not None:
        raise BadInput(f"{part.model} is a model with an adapter: `include` and `tokenizer` need the merged model")
    learnt = LoraDelta(adapter, model or None)
    if learnt.source.path == resolve(minus).path:
        return learnt
    return added([(1.0, learnt), (1.0, Difference(learnt.source.base_spec or "", minus))], anchor)


def _joined(plan: MergePlan, vocabulary: Vocabulary | None = None) -> tuple[Delta, float]:
    """The plan's update, and what it is still to be multiplied by."""
    deltas: list[tuple[float | Weight, Delta]] = []
    problems: list[str] = []
    for part in plan.sources:
        try:
            deltas.append((part.weight, _source(part, plan.anchor, vocabulary)))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    preset = plan.method
    assert isinstance(preset, Preset)
    stages = preset.stages()
    weight, delta = deltas[0]
    if len(deltas) == 1 and stages.plain and isinstance(weight, float):  # as itself: its check on probe texts then goes through peft
        return delta, weight * stages.factor
    return Merged(preset, deltas, Checkpoint(resolve(plan.anchor).path), plan.seed), 1.0


def preview(plan: MergePlan | str | Path) -> str:
    """What `merge` would do, in lines of text; nothing is written, and no weight but what the checks need is read.

    Raises:
        BadInput: what `merge` would refuse, as far as it can be known now.
    """
    plan = plan if isinstance(plan, MergePlan) else load_plan(plan)
    if plan.write == "adapter":
        from guidetune.weightspace import adapters

        assert isinstance(plan.method, Preset)
        return adapters.preview(plan.method, _adapters(plan), plan.anchor, plan.allow_mismatch)
    target = resolve(plan.anchor)
    vocabulary = _vocabulary(plan)
    delta, scale = _joined(plan, vocabulary)
    try:
        warnings = check_origin(delta, target, plan.allow_mismatch)
        with Checkpoint(target.path) if vocabulary is None else Extended(target, vocabulary) as anchor:
            made = make_plan(delta, anchor, scale, plan.out_dtype, plan.rounding, plan.seed)
            warnings += made.warnings
            written = sum(entry.nbytes for entry in made.entries)
            updated = [entry for entry in made.entries if entry.name in made.update_of]
            read = anchor.nbytes
    finally:
        delta.close()
    stages = plan.method.stages()  # type: ignore[attr-defined]
    shards = len(plan_shards(made.entries, parse_size(plan.max_shard)))
    cores = available_cores()
    lines = [
        f"method: {plan.method.name} of {len(plan.sources)} sources, added to {plan.anchor}",
        f"tensors: {len(updated)} changed, {len(made.entries) - len(updated)} copied as they are or converted",
        f"writes: {written / 1e9:.2f} GB in {shards} {'file' if shards == 1 else 'files'}",
        f"reads: {read / 1e9:.2f} GB of the anchor; of each source every tensor up to {stages.reads} times (small ones once)",
        f"memory: at most about {stages.memory(len(plan.sources), cores) / 1e6:.0f} MB at work on {cores} threads, beside the libraries",
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings)])


def _place(spec: str, root: Path) -> str:
    """A relative folder is looked for here first, then beside the plan."""
    beside = root / spec
    return str(beside) if not spec.startswith("world:") and not Path(spec).exists() and beside.exists() else spec


def _beside(part: Any, root: Path) -> Any:
    folders = {name: getattr(part, name, None) for name in ("adapter", "of", "model", "minus", "delta")}
    return part.model_copy(update={name: _place(value, root) for name, value in folders.items() if value})


def _faults(error: ValidationError, root: yaml.Node | None, name: str) -> Iterator[str]:
    for fault in error.errors():
        loc = tuple(fault["loc"])
        if len(loc) > 2 and loc[0] == "sources":
            loc = loc[:2] + loc[3:]  # without the tag of the union
        line, path = _line(root, loc), ".".join(str(step) for step in loc)
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "union_tag_not_found":
            text = "a source has either adapter, or model and minus, or delta"
        if fault["type"] == "extra_forbidden":
            model = MergePlan if len(loc) == 1 else next((KINDS[kind] for kind in KINDS if kind in fault["loc"]), ModelSource)
            near = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1, cutoff=0.5)
            text = f"unknown key; did you mean {near[0]}?" if near else f"unknown key; there is {', '.join(model.model_fields)}"
        given = fault.get("input")
        shown = isinstance(given, (str, int, float)) and fault["type"] not in ("missing", "value_error")
        value = f" (given {given!r})" if shown else ""
        yield f"{name}:{line}: {path}: {text}{value}"


def _line(node: yaml.Node | None, loc: Sequence[str | int]) -> int:
    """The 1-based line of a place in the document, or of its nearest enclosing one."""
    line = node.start_mark.line + 1 if node is not None else 1
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
            if str(step) not in pairs:
                break
            key, node = pairs[str(step)]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line
