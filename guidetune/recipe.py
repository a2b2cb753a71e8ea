"""The YAML a user writes, typed: every fault at once, each with its line, its value and the nearest valid name.

    models: {base: meta-llama/Llama-3.1-8B, instruct: meta-llama/Llama-3.1-8B-Instruct}
    data: {train: [{path: gsm8k/train.jsonl, map: {user: question, assistant: answer}}]}
    tune: {on: base, weights: [gift]}
    evaluate: {task: [{method: gsm8k, path: gsm8k/test.jsonl}]}

`load` gives a frozen `Recipe` in which every default is filled in, every method is built and every path is absolute, so that
`resolved_yaml` runs again from anywhere. An arm of `compare` is the same recipe with a few keys changed: the rows of `ARMS`.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from guidetune import registry
from guidetune.data.sources import WORLD, LossOn, SourceSpec, locate
from guidetune.engine.settings import TuneSettings
from guidetune.errors import BadInput

MAX_BYTES = 256 * 1024  # a recipe is a page or two; more is a data file given by mistake
MAX_VALUES = 20_000  # after aliases are written out: stops nested-alias bombs
MAX_DEPTH = 40

PAIR = ("base", "instruct")  # how the rest of a recipe calls its two models

Trail = tuple[str | int, ...]  # a place in the recipe: ("tune", "weights", 0, "power")


# ---------------------------------------------------------------------------------------------------------------------
# Typed sections


def _fault(loc: Trail, text: str, value: Any = ...) -> dict[str, Any]:
    return {"loc": loc, "text": text, "value": value}


def _raise(faults: list[dict[str, Any]]) -> None:
    """Faults inside one value, with their own places; `_problems` takes them apart again."""
    raise PydanticCustomError("faults", "invalid", {"faults": faults})


def _pydantic_faults(model: type[BaseModel], error: ValidationError, what: str) -> list[dict[str, Any]]:
    faults = []
    for item in error.errors():
        loc = tuple(item["loc"])
        if item["type"] == "extra_forbidden":
            hint = registry.nearest(str(loc[-1]), _field_names(model, loc[:-1]))
            faults.append(_fault(loc, f"unknown option of {what}{hint}", item["input"]))
        elif item["type"] == "missing":
            faults.append(_fault(loc[:-1], f"{what} needs the option {str(loc[-1])!r}"))
        else:
            faults.append(_fault(loc, _wording(item), item["input"]))
    return faults


def _wording(item: Any) -> str:
    """A pydantic fault in the words of someone who wrote YAML."""
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of keys to values"
    if item["type"] == "too_short" and item["ctx"].get("min_length") == 1:
        return "needs at least one item"
    text = re.sub(r"^(Input|List|String|Value|Tuple|Dictionary) should", "must", item["msg"]).removeprefix("Value error, ")
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        close = difflib.get_close_matches(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]), n=1)
        text += f" (did you mean {close[0]!r}?)" if close else ""
    return text


def _find(path: str, root: Path, spec: SourceSpec | None = None) -> tuple[str, list[str]]:
    """Where a data file is (a hub id stays as it is), and why it cannot be used."""
    try:
        found = locate(spec or SourceSpec(path=path), root)
        return (path if found is None or path.startswith(WORLD) else str(found.resolve())), []
    except BadInput as error:
        return path, error.problems
    except (OSError, ValueError, RuntimeError) as error:
        return path, [f"cannot be opened: {error}"]


def _place_paths(model: BaseModel, root: Path) -> tuple[BaseModel, list[dict[str, Any]]]:
    """The same model with its file options absolute, and a fault for each file that is not there."""
    updates: dict[str, Any] = {}
    faults = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        if not isinstance(value, (str, Path)) or not (name == "path" or name.endswith("_path") or isinstance(value, Path)):
            continue
        path, reasons = _find(str(value), root)
        faults += [_fault((name,), why, str(value)) for why in reasons]
        updates[name] = path if isinstance(value, str) else Path(path)
    if isinstance(folder := getattr(model, "folder", None), str):
        updates["folder"] = _beside_recipe(folder, root)
    for name in ("teacher", "model", "weak", "strong"):  # options that name a model
        if isinstance(spec := getattr(model, name, None), str) and spec not in PAIR and name in type(model).model_fields:
            updates[name] = _beside_recipe(spec, root)
    return (model.model_copy(update=updates) if updates else model), faults


def _build(kind: str, default: str | None = None) -> Callable[[Any, ValidationInfo], Any]:
    """A validator that turns `gift` or `{method: gift, power: 2}` into the method."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, registry.Method):
            return registry.build(kind, value)
        spec = {"method": value} if isinstance(value, str) else value
        if isinstance(spec, Mapping) and default is not None:
            spec = {"method": default, **spec}
        if isinstance(spec, Mapping) and "method" not in spec and _is_method_file(spec.get("path")):
            spec = {"method": spec["path"], **{key: given for key, given in spec.items() if key != "path"}}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("method"), str):
            _raise([_fault((), f"a {kind} is written as its name or as {{method: name, option: value}}", value)])
        name = spec["method"]
        root = info.context.get("root") if info.context else None
        here = ("method",) if isinstance(value, Mapping) and "method" in value else ()
        options = {k: v for k, v in spec.items() if k != "method"}
        try:
            if _is_method_file(name):
                cls, options = _method_file(kind, name, options, root or Path.cwd())
            elif name not in registry.names(kind):
                _raise([_fault(here, f"unknown {kind}{registry.nearest(name, registry.names(kind))}", name)])
            else:
                cls = registry.get(kind, name)
        except BadInput as error:
            _raise([_fault(here, text, name) for text in error.problems])
        try:
            built = cls(**options)
        except ValidationError as error:
            _raise(_pydantic_faults(cls, error, name))
        except BadInput as error:
            _raise([_fault((), text, value) for text in error.problems])
        if root is not None:
            built, faults = _place_paths(built, root)
            if faults:
                _raise(faults)
        return built

    return validate


def _is_method_file(name: Any) -> bool:
    return isinstance(name, str) and name.endswith((".yaml", ".yml", ".py"))


def _method_file(kind: str, name: str, options: Mapping[str, Any], root: Path) -> tuple[type[registry.Method], dict[str, Any]]:
    """Class and options of a user's own method: a Python file with the class, or a YAML file with `method` and its options.

    `options` come before those of the YAML file, whose relative paths start at its own folder.

    Raises:
        BadInput: no such file, or one that is no method of the kind; faults of a YAML file come with their lines.
    """
    path = Path(name).expanduser()
    path = next((place for place in (root / path, path) if place.is_file()), root / path)
    if path.suffix == ".py":
        return registry.get(kind, str(path)), dict(options)
    problems: list[str] = []
    origins = _Origins(str(path))
    tree = _read(_text(path, f"{kind} file"), str(path), origins, problems)
    inner = tree.pop("method", None)
    if not isinstance(inner, str):
        problems.append(f"{path}: needs `method`, the {kind} that it sets up{registry.nearest('', registry.names(kind))}")
    if problems:
        raise BadInput(problems)
    if _is_method_file(inner) and not inner.endswith(".py"):
        raise BadInput(f"{origins.of(('method',))}: method = {inner!r}: a {kind} or a Python file, not another YAML file")
    try:
        cls, _ = _method_file(kind, inner, {}, path.parent) if _is_method_file(inner) else (registry.get(kind, inner), None)
    except BadInput as error:
        raise BadInput([f"{origins.of(('method',))}: {problem}" for problem in error.problems]) from None
    for key, given in tree.items():
        if isinstance(given, str) and (key == "path" or key.endswith("_path")):
            beside = path.parent / Path(given).expanduser()
            tree[key] = str(beside.resolve()) if beside.exists() else given
    if "label" in cls.model_fields:
        tree.setdefault("label", path.stem)
    try:
        cls(**{**tree, **options})
    except ValidationError as error:
        if any(not fault["loc"] or fault["loc"][0] not in options for fault in error.errors()):
            raise BadInput(_problems(error, tree, origins, cls)) from None
    return cls, {**tree, **options}


def _build_source(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, SourceSpec):
        return value
    if not isinstance(value, (str, Mapping)):
        _raise([_fault((), "a source is written as {path: FILE, ...}", value)])
    faults: list[dict[str, Any]] = []
    spec = {"path": value} if isinstance(value, str) else value
    built, root = None, info.context.get("root") if info.context else None
    try:
        built = SourceSpec.model_validate(dict(spec))
    except ValidationError as error:
        faults = _pydantic_faults(SourceSpec, error, "a source")
    path = spec.get("path")
    if root is not None and isinstance(path, str) and not any(fault["loc"] == ("path",) for fault in faults):
        place, reasons = _find(path, root, built)
        faults += [_fault(("path",) if isinstance(value, Mapping) else (), why, path) for why in reasons]
        built = built and built.model_copy(update={"path": place})
    if faults:
        _raise(faults)
    return built


def _beside_recipe(value: Any, root: Path) -> Any:
    """A model that is a folder beside the recipe becomes an absolute path; hub ids and world: names stay as they are."""
    if isinstance(value, str) and value:
        try:
            if (path := (root / Path(value).expanduser()).resolve()).is_dir():
                return str(path)
        except (OSError, ValueError, RuntimeError):
            return value  # not the name of a folder; the loader says what is wrong with it
    return value


def _place_model(value: Any, info: ValidationInfo) -> Any:
    if info.field_name not in PAIR and value in PAIR:
        return value  # a member of the recipe's pair, not a folder that happens to be called so
    return _beside_recipe(value, info.context["root"]) if info.context and "root" in info.context else value


def _method_field(kind: str, default: str | None = None) -> Any:
    return Annotated[registry.Method, BeforeValidator(_build(kind, default)), PlainSerializer(lambda m: m.spec())]


Operation = _method_field("operation")
Params = _method_field("params", default="lora")
Scorer = _method_field("scorer")
Phases = _method_field("phases")
TokenWeights = _method_field("token_weights")
Task = _method_field("task")
Tracker = _method_field("tracker")
MergeMethod = _method_field("weightspace")
Source = Annotated[SourceSpec, BeforeValidator(_build_source)]
ModelName = Annotated[str, BeforeValidator(_place_model), Field(min_length=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Reducer = Literal["tokens", "weights", "sequence", "rows", "sum", "micro", "paper"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Models(Section):
    """The pair. A model is a hub id, a folder, `world:base`, `world:instruct` or an adapter folder."""

    base: ModelName = Field(description="The pretrained model, which is tuned.")
    instruct: ModelName = Field(description="The instruction-tuned model of the same architecture, which is to learn the task.")


class Data(Section):
    """The rows to learn from. Every row read ends in the ledger as used, cut or dropped with a reason."""

    train: list[Source] = Field(min_length=1, description="Sources of training rows.")
    validation: list[Source] = Field([], description="Sources of held-out rows; their loss is reported during tuning.")
    operations: list[Operation] = Field(
        [], description="Methods applied to the rows in this order; those that render rows (template, …) to validation rows too."
    )
    scores: dict[str, Scorer] = Field(
        {}, description="Numbers for each prepared row, name -> method (kind scorer): what tune.phases divides by; docs/phased.md."
    )
    loss_on: LossOn = Field(
        "assistant", description="Tokens that are learnt: of every assistant turn, of the last one (target), or all up to its end."
    )
    leaks: Literal["warn", "refuse"] = Field(
        "warn", description="When training rows have a prompt that the evaluation asks: say so, or refuse to go on."
    )
    max_length: int | None = Field(None, ge=8, description="Longest row in tokens; another place to write tune.max_length.")
    over_length: Literal["cut", "drop", "refuse"] = Field(
        "cut", description="What to do with longer rows: cut the middle of the prompt, drop the row, or refuse to start."
    )
    cut_answer: bool = Field(False, description="Cut the tail of an answer that alone is too long (else such a row is dropped).")
    max_dropped: int | float | None = Field(
        None,
        ge=0,
        description="Refuse when more rows are dropped (but for those an operation was asked to leave out): a number of rows, "
        "or a share of them when it has a decimal point.",
    )


class Guide(Section):
    """The teacher pass: log p of every supervised token under the instruct model."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto", description="Teacher weights; auto: bfloat16 where the processor has it. int8 is an approximation (docs/gift.md)."
    )
    batch_tokens: int = Field(8192, ge=1, description="Tokens in one forward pass: memory and speed, not the result.")
    layout: Literal["auto", "varlen", "padded"] = Field("auto", description="As in tune.")


class Tune(Section, TuneSettings):
    """What is trained, how each target token counts, and the optimiser."""

    on: Literal["base", "instruct"] = Field("base", description="Which model of the pair is tuned.")
    params: Params = Field("lora", validate_default=True, description="What is trained (kind params).")
    weights: list[TokenWeights] = Field([], description="Token weights, multiplied (kind token_weights); empty: plain fine-tuning.")
    reducer: Reducer | None = Field(
        None,
        description="How weighted token losses become one number: tokens Σwℓ/N, weights Σwℓ/Σw, sequence, rows, sum, micro, paper. "
        "Default: that of the first weight method; tokens when there are no weights.",
    )
    phases: Phases | None = Field(
        None, description="Train on parts of the rows one after the other (kind phases); null: on all of them at once."
    )
    max_length: int = Field(2048, ge=8, description="Longest row in tokens.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), strict=False, description="AdamW betas."
    )  # not strict: YAML has lists, not tuples

    def settings(self) -> TuneSettings:
        """The optimiser's part alone."""
        return TuneSettings(**{name: getattr(self, name) for name in TuneSettings.model_fields})


class Transfer(Section):
    """Where the learnt change goes: a complete model folder is written."""

    into: ModelName = Field("instruct", description="The model that receives it: instruct, base, or any model of the same shapes.")
    scale: float = Field(1.0, description="The change is multiplied by this.")
    into_scale: float = Field(
        1.0,
        description="What separates `into` from the tuned model is multiplied by this (RE-Adapt's alpha); 1: `into` is kept as it is.",
    )
    method: MergeMethod | None = Field(
        None, description="What is made of the change before it is added (kind weightspace), such as lines; null: nothing."
    )
    dtype: Dtype = Field("auto", description="Precision of the written weights; auto: that of the receiving model.")
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="How sums are rounded to that precision.")
    max_shard: str = Field("5GB", pattern=r"^\d+(\.\d+)?\s?[KMGT]i?B$", description="Largest weight file.")

    @field_validator("method")
    @classmethod
    def _one_source(cls, method: Any) -> Any:
        if method is not None and method.sources_needed[0] > 1:
            _raise([_fault((), f"{method.name} joins several models, and here is one change", method.name)])
        return method

    @model_validator(mode="after")
    def _one_way(self) -> Transfer:
        if self.method is not None and self.into_scale != 1:
            _raise([_fault(("method",), "cannot be used together with transfer.into_scale", self.method.name)])
        return self


class Validation(Section):
    """Tasks on which `compare --scales` picks a scale; none of their prompts may be among the test's."""

    task: list[Task] = Field([], description="As evaluate.task.")
    general: list[Task] = Field([], description="As evaluate.general.")


class Evaluate(Section):
    """What is measured, on the task that is learnt and on everything that must not be forgotten."""

    task: list[Task] = Field([], description="Tasks the tuning should improve (kind task).")
    general: list[Task] = Field([], description="Tasks whose scores should not fall (kind task).")
    validation: Validation = Field(
        Validation(), description="Tasks to pick a scale on (`task`, `general`); without any, a share of the items above is kept for that."
    )
    batch_tokens: int = Field(16384, ge=1, description="Tokens of one forward pass.")
    max_new_tokens: int | None = Field(None, ge=1, description="Longest answer; null: each task's own.")
    samples: int = Field(1, ge=1, description="Answers for each item; more than one needs a temperature.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0: the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability.")
    top_k: int = Field(0, ge=0, description="Sample from this many likeliest tokens; 0: all.")
    limit: int | None = Field(None, ge=1, description="Items of each task; null: all.")
    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="What generates; auto: vLLM where it is installed and there is a GPU, else hf."
    )
    allow_code: bool = Field(False, description="Tasks may run programs that the model wrote, in a sandbox; also --allow-code.")

    @model_validator(mode="after")
    def _consistent(self) -> Evaluate:
        faults = []
        for prefix, group in itertools.product(((), ("validation",)), ("task", "general")):
            seen: set[str] = set()
            for i, method in enumerate(getattr(self.validation if prefix else self, group)):
                label = method.label or method.default_label()
                if label in seen:
                    faults.append(_fault((*prefix, group, i), "the same task twice; give one of them another label", label))
                seen.add(label)
        if self.samples > 1 and self.temperature == 0:
            faults.append(_fault(("samples",), "needs a temperature above 0: at 0 all answers are the same", self.samples))
        if faults:
            _raise(faults)
        return self


class Recipe(Section):
    """One way through the pipeline: prepare, guide, tune, transfer, evaluate, report."""

    name: str = Field(description="Name of the run and its folder; default: the file's name.")
    description: str = Field("", description="One line for the report.")
    models: Models = Field(description="The base and the instruct model.")
    data: Data = Field(description="Training and validation rows.")
    guide: Guide = Field(Guide(), description="The teacher pass.")
    tune: Tune | None = Field(default_factory=lambda: Tune(), description="Tuning; null: none (the models as they are).")
    transfer: Transfer | None = Field(Transfer(), description="The written model; null: the adapter alone.")
    evaluate: Evaluate | None = Field(None, description="Evaluation; null: none.")
    arms: dict[str, dict[str, Any]] = Field(
        {}, description="More arms for compare: name -> the keys it changes, as `tune.lr: 1e-3`; `from` and `grid`: docs/compare.md."
    )
    seed: int = Field(42, ge=0, description="Every random draw derives from it.")
    track: list[Tracker] = Field([], description="Trackers that are shown the run's numbers (kind tracker); docs/tracking.md.")
    max_memory: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?\s?[KMGT]i?B$",
        description="Memory a run may take, as 8GB: settings are chosen to fit, or the run is refused. null: what is free, and a warning.",
    )

    _root: Path = PrivateAttr(default_factory=Path.cwd)
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
            _raise([_fault((), "must be a plain folder name: letters, digits and . _ + -, at most 100, a letter or digit first", name)])
        return name

    @property
    def root(self) -> Path:
        """Folder that relative paths of the recipe were resolved against."""
        return self._root

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, tree: Any) -> Any:
        """Defaults that come from another key: data.max_length and tune.max_length are one setting, tune.seed is the recipe's."""
        if not isinstance(tree, Mapping):
            return tree
        tree = dict(tree)
        tune, data = tree.get("tune", {}), tree.get("data")
        if tune is None and isinstance(data, Mapping) and data.get("max_length") is None:
            tree["data"] = {**data, "max_length": 2048}
        if isinstance(tune, Mapping):
            tune = tree["tune"] = dict(tune)
            if tune.get("seed") is None:
                tune["seed"] = seed if type(seed := tree.get("seed", 42)) is int and seed >= 0 else 42
            if isinstance(data, Mapping):
                data = tree["data"] = dict(data)
                asked, alias = tune.get("max_length"), data.get("max_length")
                if asked is None and type(alias) is int and alias >= 8:
                    tune["max_length"] = alias
                elif alias is None:
                    data["max_length"] = asked if type(asked) is int and asked >= 8 else 2048
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.tune is not None and self.data.max_length is not None and self.data.max_length != self.tune.max_length:
            _raise([_fault(("data", "max_length"), f"tune.max_length says {self.tune.max_length}; give one of them", self.data.max_length)])
        if self.tune is not None and self.transfer is not None and self.transfer.into_scale != 1 and self.tune.on == self.transfer.into:
            text = f"nothing separates transfer.into from tune.on, which are both {self.tune.on}"
            _raise([_fault(("transfer", "into_scale"), text, self.transfer.into_scale)])
        if self.tune is not None and self.tune.phases is not None:
            self._check_phases()
        if self.tune is not None and self.tune.reducer is None:
            object.__setattr__(self.tune, "reducer", default_reducer(self.tune.weights))
        return self

    def _check_phases(self) -> None:
        """The score that phases are divided by must be one of data.scores, or a scorer that needs no options."""
        assert self.tune is not None
        phases: Any = self.tune.phases
        name = phases.by if phases.scored else None
        if name is None or name in self.data.scores or name in self._added():
            return
        if name not in registry.names("scorer"):
            hint = registry.nearest(name, [*self.data.scores, *self._added(), *registry.names("scorer")])
            _raise([_fault(("tune", "phases", "by"), f"no name in data.scores, no score of an operation and no scorer{hint}", name)])
        try:
            registry.build("scorer", name)
        except BadInput as error:
            text = f"the scorer {name} needs options; set it up in data.scores ({'; '.join(error.problems)})"
            _raise([_fault(("tune", "phases", "by"), text, name)])

    def _added(self) -> list[str]:
        """Numbers that operations give the rows."""
        return [name for step in self.data.operations for name, kind in step.adds(self._root).items() if kind is not str]  # type: ignore[attr-defined]

    def scorer(self, name: str) -> Any:
        """The scorer behind a name in data.scores, the score that an operation gives, or the scorer of that name with its defaults."""
        if name in self._added() and name not in self.data.scores:
            return registry.build("scorer", {"method": "column", "column": name})
        return self.data.scores.get(name) or registry.build("scorer", name)

    def resolved_yaml(self) -> str:
        """The recipe with every default written out and every path absolute; `load` of it gives the same recipe."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def default_reducer(weights: Sequence[registry.Method]) -> str:
    """`tokens` without weights; otherwise what the first weight method was published with (`weights` unless it says so)."""
    return getattr(weights[0], "reducer", "weights") if weights else "tokens"


# ---------------------------------------------------------------------------------------------------------------------
# Arms: the same recipe with a few keys changed


class Arm(NamedTuple):
    description: str
    changes: dict[str, Any]  # dotted key -> value; a bare method name keeps the options the recipe gives that method


ARMS: dict[str, Arm] = {
    "instruct": Arm("the instruct model as it is", {"tune": None}),
    "base-sft": Arm("plain tuning of the base model, not transferred", {"tune.on": "base", "tune.weights": [], "transfer.into": "base"}),
    "sft": Arm("plain tuning of the instruct model", {"tune.on": "instruct", "tune.weights": []}),
    "graft": Arm("plain tuning of the base model, moved to the instruct model", {"tune.on": "base", "tune.weights": []}),
    "gift": Arm("guided tuning of the base model, moved to the instruct model", {"tune.on": "base", "tune.weights": ["gift"]}),
    "gift-base-teacher": Arm(
        "as gift, with the base model itself as teacher", {"tune.on": "base", "tune.weights": [{"method": "gift", "teacher": "base"}]}
    ),
    "guided": Arm("guided tuning of the instruct model itself", {"tune.on": "instruct", "tune.weights": ["gift"]}),
    "dft": Arm("the base model tuned with its own confidence as weight, moved", {"tune.on": "base", "tune.weights": ["dft"]}),
    "stm": Arm("the instruct model tuned on the tokens it finds likely", {"tune.on": "instruct", "tune.weights": ["stm"]}),
    "re-adapt": Arm(
        "plain tuning of the base model, half of it moved to the instruct model",
        {"tune.on": "base", "tune.weights": [], "transfer.scale": 0.5},
    ),
}
ALIASES = {"gift-base": "gift-base-teacher"}
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")  # a folder, and a word between the commas of --arms
MAX_GRID = 100  # arms of one grid
DEFAULT_ARMS = ("instruct", "sft", "graft", "gift")


def arm_names(recipe: Recipe) -> list[str]:
    """Every arm `compare` knows for this recipe: the built-in ones, its own, and the members of its grids."""
    known = _Arms.of(recipe._given, [])
    return [*known.changes, *known.families]


def arms(recipe: Recipe, names: Sequence[str] = DEFAULT_ARMS, grid: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipe of each named arm. An arm changes the keys it lists and nothing else.

    The name of a grid stands for all its members. `grid` (`tune.lr=1e-4,3e-4`, several: all combinations) makes a grid of every named
    arm that tunes.

    Raises:
        BadInput: an unknown or repeated arm, or one whose changes do not make a recipe.
    """
    problems: list[str] = []
    known = _Arms.of(recipe._given, problems)
    names = list(names)
    every = [*known.changes, *known.families]
    problems += [f"--arms: unknown arm {name!r}{registry.nearest(name, every)}" for name in dict.fromkeys(names) if name not in every]
    if not names:
        problems.append(f"--arms: name at least one of {', '.join(every)}")
    chosen = [member for name in names for member in known.families.get(name, [name])]
    plain = [ALIASES.get(name, name) for name in chosen]
    problems += [f"--arms: {name!r} is named twice" for name in dict.fromkeys(plain) if plain.count(name) > 1]
    values = _grid_values(grid, problems)
    if problems:
        raise BadInput(problems)
    for name in list(chosen) if values else ():
        if known.changes[name].get("tune", ...) is not None:
            members = known.expand(name, known.changes[name], values, problems, "--grid")
            place = chosen.index(name)
            chosen[place : place + 1] = members
    found = {name: _arm(known, name, recipe._given, recipe.root, _Origins(), problems) for name in chosen}
    if problems:
        raise BadInput(problems)
    return {name: made for name, made in found.items() if made is not None}


@dataclass
class _Arms:
    """The changes of every arm, and which arms a grid stands for. The recipe's own arms come before the built-in ones."""

    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    families: dict[str, list[str]] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)  # member -> the grid that the recipe spells out

    @classmethod
    def of(cls, given: Mapping[str, Any], problems: list[str]) -> _Arms:
        built_in = {name: {"description": arm.description, **arm.changes} for name, arm in ARMS.items()}
        found = cls({**built_in, **{alias: built_in[name] for alias, name in ALIASES.items()}})
        own = given.get("arms")
        own = {n: c for n, c in own.items() if isinstance(c, Mapping)} if isinstance(own, Mapping) else {}
        for name in own:
            if not ARM_NAME.fullmatch(str(name)):
                problems.append(
                    f"arms.{name}: an arm has a plain name: letters, digits and . _ + = -, at most 100, a letter or digit first"
                )
        for name, changes in own.items():
            whole = found._started(name, own, problems, ())
            if (grid := changes.get("grid")) is None:
                found.changes[name] = whole
                continue
            if not isinstance(grid, Mapping) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
                problems.append(f"arms.{name}.grid: write the values of each key as a list, as grid: {{tune.lr: [1e-4, 3e-4]}}")
                continue
            found.changes.pop(name, None)
            found.families[name] = found.expand(name, whole, grid, problems, f"arms.{name}.grid")
        return found

    def _started(self, name: str, own: Mapping[str, Any], problems: list[str], trail: tuple[str, ...]) -> dict[str, Any]:
        """The arm's changes on top of those of the arm it starts `from`."""
        changes = {key: value for key, value in own[name].items() if key not in ("from", "grid")}
        start = own[name].get("from")
        if start is None:
            return changes
        if start in own and start != name:
            if start in trail:
                problems.append(f"arms.{name}.from: {' -> '.join((*trail, name, start))} goes in a circle")
                return changes
            return _overlaid(self._started(start, own, problems, (*trail, name)), changes)
        if start in ARMS or start in ALIASES:
            arm = ARMS[ALIASES.get(start, start)]
            return _overlaid({"description": arm.description, **arm.changes}, changes)
        problems.append(f"arms.{name}.from: unknown arm {start!r}{registry.nearest(str(start), [*ARMS, *own])}")
        return changes

    def expand(
        self, name: str, changes: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], problems: list[str], where: str
    ) -> list[str]:
        """One arm for every combination of the grid's values, `name-lr=0.0001-rank=8`; their names."""
        count = math.prod(len(values) for values in grid.values())
        if count > MAX_GRID:
            problems.append(f"{where}: {count:,} arms are more than the {MAX_GRID} that one grid may have")
            return []
        last = [key.rsplit(".", 1)[-1] for key in grid]
        short = [word if last.count(word) == 1 else key for key, word in zip(grid, last, strict=True)]
        members = []
        for values in itertools.product(*grid.values()):
            member = "-".join([name, *(f"{word}={_word(value)}" for word, value in zip(short, values, strict=True))])
            if member in self.changes or not ARM_NAME.fullmatch(member):
                reason = "there are two arms of this name" if member in self.changes else "this is no plain name"
                problems.append(f"{where}: {member}: {reason}; write these arms out one by one")
                continue
            told = ", ".join(f"{key} = {_short(value)}" for key, value in zip(grid, values, strict=True))
            text = ": ".join(part for part in (str(changes.get("description") or ""), told) if part)
            self.changes[member] = _overlaid(changes, {"description": text, **dict(zip(grid, values, strict=True))})
            self.owner[member] = name
            members.append(member)
        return members


def _word(value: Any) -> str:
    """A value of a grid in the name of its arm."""
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value).lower()
    if isinstance(value, Mapping):
        return "-".join(_word(part) for part in value.values())
    if isinstance(value, list):
        return "+".join(_word(part) for part in value) or "none"
    return re.sub(r"[^A-Za-z0-9._+]+", "-", Path(value).stem if "/" in str(value) else str(value)).strip("-") or "none"


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two sets of changes, the second one's in force; `{tune: {lr: 1}}` and `{tune.lr: 1}` alike."""
    flat = {trail: value for changes in (below, above) for trail, value in _flatten(changes)}
    return {".".join(map(str, trail)): value for trail, value in flat.items()}


def _grid_values(grid: Sequence[str], problems: list[str]) -> dict[str, list[Any]]:
    """`tune.lr=1e-4,3e-4` -> {"tune.lr": [1e-4, 3e-4]}."""
    found: dict[str, list[Any]] = {}
    for text in grid:
        key, equals, listed = text.partition("=")
        key, listed = key.strip(), listed.strip()
        values, faults = _value(listed if listed.startswith("[") else f"[{listed}]")
        if not equals or not key or faults or not isinstance(values, list) or not values:
            problems.append(f"--grid {_short(text)}: write it as key=value,value, for example --grid tune.lr=1e-4,3e-4")
        elif key in found:
            problems.append(f"--grid: {key} is given twice")
        else:
            found[key] = [_from_here(_trail(key)[-1], value) for value in values]
    return found


def shape(recipe: Recipe) -> str:
    """The built-in arm that the recipe as it stands amounts to, else `tuned`."""

    def traits(one: Recipe, exact: bool) -> Any:
        if one.tune is None:
            return None
        weights = [(w.name, getattr(w, "teacher", None) if exact else None) for w in one.tune.weights]
        moved = (one.transfer.into, one.transfer.scale if exact else None) if one.transfer else None
        return one.tune.on, weights, moved

    plain = {**recipe._given, "tune": None}  # so that the arms come with their own options
    if isinstance(moved := plain.get("transfer"), Mapping):
        plain["transfer"] = {key: value for key, value in moved.items() if key != "scale"}
    made = {name: _changed(arm.changes, plain, recipe.root, _Origins(), []) for name, arm in ARMS.items()}
    for exact in (True, False):  # gift with another teacher or scale is gift, unless that is an arm of its own
        for name, one in made.items():
            if one is not None and traits(one, exact) == traits(recipe, exact):
                return name
    return "tuned"


def _arm(known: _Arms, name: str, given: dict[str, Any], root: Path, origins: _Origins, problems: list[str]) -> Recipe | None:
    """The recipe of one arm; faults go to `problems`."""
    changes = known.changes[name]
    found: list[str] = []
    for trail, _ in _flatten(changes):
        origins.cover(trail, origins.of(("arms", known.owner.get(name, name))) or f"arm {name}")
    made = _changed(changes, given, root, origins, found)
    problems += [f"{problem} (arm {name})" for problem in found]
    return made


def _changed(changes: Mapping[str, Any], given: dict[str, Any], root: Path, origins: _Origins, problems: list[str]) -> Recipe | None:
    """The given recipe with some keys changed."""
    tree = copy.deepcopy(given)
    tune = tree.get("tune")
    if isinstance(tune, dict) and tune.get("reducer") is not None and _is_default_reducer(tune):
        del tune["reducer"]  # no choice of the user's, only the default for the weights that the arm may change
    for trail, value in _flatten(changes):
        if (why := _put(tree, trail, _with_options(value, _at(given, trail)))) is not None:
            problems.append(f"{origins.of(trail)}: {why}")
    return _validate(tree, root, origins, problems)


def _is_default_reducer(tune: Mapping[str, Any]) -> bool:
    try:
        return tune["reducer"] == default_reducer([registry.build("token_weights", spec) for spec in tune.get("weights") or []])
    except (BadInput, TypeError):
        return False  # weights that cannot be built are reported where they stand


def _with_options(value: Any, before: Any) -> Any:
    """A bare method name keeps the options that the recipe gives that method."""
    if not isinstance(value, list) or not isinstance(before, list):
        return value
    options = {spec["method"]: spec for spec in before if isinstance(spec, dict) and isinstance(spec.get("method"), str)}
    return [copy.deepcopy(options.get(item, item)) if isinstance(item, str) else item for item in value]


def _flatten(changes: Mapping[str, Any], prefix: Trail = ()) -> Iterator[tuple[Trail, Any]]:
    """`{tune: {lr: 1}}` and `{tune.lr: 1}` alike -> (("tune", "lr"), 1); lists and methods are replaced whole."""
    for key, value in changes.items():
        trail = (*prefix, *_trail(str(key)))
        if isinstance(value, Mapping) and value and "method" not in value:
            yield from _flatten(value, trail)
        else:
            yield trail, copy.deepcopy(value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides such as `tune.lr=1e-4` or `evaluate.task.0.limit=10`.

    Relative paths in the file start at the file's folder; in an override, at the working folder when something is there.

    Raises:
        BadInput: with every fault found, each as `file:line: key = value: what is wrong (did you mean ...?)`.
    """
    path = Path(path)
    text = _text(path, "recipe")
    folder = path.resolve().parent
    return parse(text, str(path), folder, overrides)


def _text(path: Path, what: str) -> str:
    """The text of a YAML file that a user wrote."""
    try:
        if path.is_dir():
            inside = path / "recipe.yaml"
            raise BadInput(f"{path} is a folder, not a {what}" + (f"; it holds {inside}" if inside.is_file() else ""))
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"there is no {what} {path}{_beside(path)}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{path} has more than {MAX_BYTES // 1024} KB: not a {what}, which is a short YAML file that names data files")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text") from None


def parse(text: str, file: str = "recipe", root: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """`load` for text that is already in memory; `file` is what messages and the default name call it."""
    root = Path.cwd() if root is None else Path(root)
    problems: list[str] = []
    origins = _Origins()
    tree = _read(text, file, origins, problems)
    for override in overrides:
        _override(tree, override, origins, problems)
    if "name" not in tree:
        stem = re.sub(r"[^\w.+-]+", "-", Path(file).stem, flags=re.ASCII).lstrip("._+-")[:100]
        tree["name"] = stem or "run"
    recipe = _validate(tree, root, origins, problems)
    own = tree.get("arms")
    faults: list[str] = []
    known = _Arms.of(tree, faults)
    for fault in faults:
        places = [place for place in origins.places if place[:1] == ("arms",) and fault.startswith(f"{'.'.join(map(str, place))}")]
        problems.append(f"{origins.of(max(places, key=len, default=('arms',)))}: {fault}")
    for name in own if isinstance(own, dict) else ():
        for member in known.families.get(name, [name] if isinstance(own[name], dict) and name in known.changes else []):
            seen: list[str] = []
            _arm(known, member, tree, root, copy.deepcopy(origins), seen)
            # What is wrong with the recipe itself has been said once.
            problems += [problem for problem in seen if problem.removesuffix(f" (arm {member})") not in problems]
    if problems or recipe is None:
        raise BadInput(sorted(dict.fromkeys(problems), key=_by_line))
    return recipe


def from_mapping(tree: Mapping[str, Any], root: Path | None = None) -> Recipe:
    """A recipe from plain dicts and lists, as a program would write one."""
    problems: list[str] = []
    given = {"name": "run", **copy.deepcopy(dict(tree))}
    recipe = _validate(given, Path.cwd() if root is None else Path(root), _Origins("recipe"), problems)
    if recipe is None or problems:
        raise BadInput(problems)
    return recipe


def evaluation(tasks: Iterable[str], data: Path | None = None, overrides: Iterable[str] = ()) -> Evaluate:
    """The evaluate section from a command line: `gsm8k`, `gsm8k:path=F,limit=5`, `{method: gsm8k, path: F}` or the YAML or Python file of
    a user's own task, several by commas.

    `data` is the file of every task that names none, or a folder with one for each (`gsm8k.jsonl`, or a folder `gsm8k`), also one level
    further down.

    Raises:
        BadInput: with every fault found.
    """
    problems: list[str] = []
    specs = [_task_spec(text, problems) for text in _split_tasks(",".join(tasks))]
    if not specs and not problems:
        problems.append(f"--tasks: name at least one of {', '.join(registry.names('task'))}")
    for spec in specs:
        try:
            cls: Any = registry.get("task", str(spec.get("method")))
        except BadInput:
            continue  # told with the rest, or a YAML file, which names its data
        if data is not None and "path" in cls.model_fields and "path" not in spec:
            spec["path"] = str(_file_for((cls.name, *cls.files), data))
        if data is not None and "folder" in cls.model_fields:
            spec.setdefault("folder", str(data))
    tree: dict[str, Any] = {"task": specs}
    origins = _Origins("--tasks")
    for override in overrides:
        _override(tree, override, origins, problems)
    try:
        section = Evaluate.model_validate(tree, context={"root": Path.cwd()})
    except ValidationError as error:
        problems += _problems(error, tree, origins, Evaluate)
    if problems:
        raise BadInput(problems)
    return section


def _split_tasks(text: str) -> list[str]:
    """At commas outside braces and brackets; a part that is only `option=value` goes on with the task before it."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    found: list[str] = []
    for part in (part.strip() for part in parts):
        if found and re.match(r"\w+=", part) and ":" in found[-1]:
            found[-1] += f",{part}"
        elif part:
            found.append(part)
    return found


def _task_spec(text: str, problems: list[str]) -> dict[str, Any]:
    if text.startswith("{"):
        value, faults = _value(text)
        problems += [f"--tasks {text}: {fault}" for fault in faults]
        return value if isinstance(value, dict) else {}
    name, _, rest = text.partition(":")
    spec: dict[str, Any] = {"method": name.strip()}
    for option in rest.split(",") if rest else []:
        key, equals, given = option.partition("=")
        word = getattr(registry.get("task", name), "shorthand", None) if name in registry.names("task") else None
        if not equals and word is not None and word not in spec:
            spec[word] = option.strip()
            continue
        value, faults = _value(given)
        if not equals or faults:
            problems.append(f"--tasks {text}: write an option as name:key=value,key=value or the task as {{method: {name}, key: value}}")
        spec[key.strip()] = value
    return spec


def _file_for(names: Sequence[str], data: Path) -> Path:
    """The file of a task below a folder of data files; the folder's own path when there is none, so that the message names it.

    Looked for in this order, under each of the task's names: the only file of a folder NAME, or the one there with `test` or NAME in its
    own name; a file NAME.* in the folder; a file NAME.* one level further down.
    """
    if not data.is_dir():
        return data
    for name in names:
        inside = _files(data / name)
        own = [p for p in inside if "test" in re.split(r"[._-]", p.name) or p.name.split(".")[0] == name]
        below = [p for folder in sorted(data.iterdir()) if folder.is_dir() for p in _files(folder)]
        named = [p for p in (*_files(data), *below) if p.name.split(".")[0] == name]
        if found := (own or (inside if len(inside) == 1 else []) or named):
            return found[0]
    return data / f"{names[0]}.jsonl"


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.is_file() and not p.name.startswith(".")) if folder.is_dir() else []


def _by_line(problem: str) -> tuple[int, int]:
    found = re.match(r"[^\n]*?:(\d+): ", problem)
    return (0, int(found.group(1))) if found else (1, 0)


def _beside(path: Path) -> str:
    try:
        near = sorted(p.name for p in path.parent.glob("*.y*ml"))
    except (OSError, ValueError):
        return ""
    return registry.nearest(path.name, near[:20]) if near else ""


@dataclass
class _Origins:
    """Where each value came from: `file:line`, or `--set`. A value without an entry has its parent's."""

    default: str = ""
    places: dict[Trail, str] = field(default_factory=dict)

    def of(self, trail: Trail) -> str:
        for end in range(len(trail), -1, -1):
            if (found := self.places.get(trail[:end])) is not None:
                return found
        return self.default

    def cover(self, trail: Trail, label: str) -> None:
        """Everything at and below `trail` now comes from `label`."""
        for old in [place for place in self.places if place[: len(trail)] == trail]:
            del self.places[old]
        self.places[trail] = label


def _validate(tree: dict[str, Any], root: Path, origins: _Origins, problems: list[str]) -> Recipe | None:
    try:
        recipe = Recipe.model_validate(tree, context={"root": root})
    except ValidationError as error:
        problems += _problems(error, tree, origins)
        return None
    recipe._root = root
    recipe._given = tree
    return recipe


def _problems(error: ValidationError, tree: Any, origins: _Origins, model: type[BaseModel] = Recipe) -> list[str]:
    """One line for each fault, with its origin, dotted key, value and the nearest valid name."""
    lines = []
    for item in error.errors():
        loc = tuple(item["loc"])
        if item["type"] == "faults":
            lines += [_line(loc + fault["loc"], fault["value"], fault["text"], tree, origins) for fault in item["ctx"]["faults"]]
        elif item["type"] == "extra_forbidden":
            hint = registry.nearest(str(loc[-1]), _field_names(model, loc[:-1]))
            lines.append(_line(loc, item["input"], f"unknown key{hint}", tree, origins))
        elif item["type"] == "missing":
            lines.append(_line(loc, ..., "is missing", tree, origins))
        else:
            lines.append(_line(loc, item["input"], _wording(item), tree, origins))
    return lines


def _line(loc: Trail, value: Any, text: str, tree: Any, origins: _Origins) -> str:
    loc = _real(loc, tree)
    key = ".".join(str(part) for part in loc) or "recipe"
    shown = "" if value is ... else f" = {_short(value)}"
    origin = origins.of(loc)
    return f"{origin}: {key}{shown}: {text}" if origin else f"{key}{shown}: {text}"


def _real(loc: Trail, tree: Any) -> Trail:
    """The part of a pydantic location that exists in the tree (union branches add parts that do not), plus a missing last key."""
    for i, part in enumerate(loc):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return loc[: i + 1] if isinstance(tree, Mapping) else loc[:i]
    return loc


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _field_names(model: Any, loc: Trail) -> list[str]:
    """Valid keys of the mapping at `loc`, from the types."""
    here = model
    for part in loc:
        if isinstance(part, int):
            continue  # the item type was taken when the list was entered
        here = _model_in(here.model_fields[part].annotation) if here is not None and part in here.model_fields else None
    return list(here.model_fields) if here is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside `X | None`, `list[X]`, `Annotated[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part)) is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# --set


def _trail(dotted: str) -> Trail:
    return tuple(int(part) if part.isdecimal() and part.isascii() else part for part in dotted.split("."))


def _override(tree: dict[str, Any], override: str, origins: _Origins, problems: list[str]) -> None:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted or "" in dotted.split("."):
        problems.append(f"--set {_short(override)}: write it as key=value, for example --set tune.lr=1e-4")
        return
    value, faults = _value(text)
    if faults:
        problems.extend(f"--set {dotted}: {fault}" for fault in faults)
        return
    trail = _trail(dotted)
    value = _from_here(trail[-1], value)
    if (why := _put(tree, trail, value)) is not None:
        problems.append(f"--set {dotted}: {why}")
    else:
        origins.cover(trail, "--set")


def _from_here(key: str | int, value: Any) -> Any:
    """A path typed on the command line starts at the working folder, when there is something there."""
    if isinstance(value, dict):
        return {k: _from_here(k, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_from_here(key, v) for v in value]
    if (
        isinstance(value, str)
        and value
        and (key in ("path", "folder", "base", "instruct", "into", "teacher") or str(key).endswith("_path"))
    ):
        try:
            here = Path(value).expanduser().resolve()
            return str(here) if here.exists() else value
        except (OSError, ValueError, RuntimeError):
            return value
    return value


def _at(tree: Any, trail: Trail) -> Any:
    for part in trail:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _put(tree: dict[str, Any], trail: Trail, value: Any) -> str | None:
    """Set one place in the tree, making the mappings and lists on the way; a reason when that cannot be done."""
    here: Any = tree
    for i, part in enumerate(trail):
        last = i == len(trail) - 1
        done = ".".join(str(p) for p in trail[:i])
        if isinstance(here, list):
            if not isinstance(part, int):
                return f"{done} is a list of {len(here)}: write {done}.0 for its first item, {done}.{len(here)} to add one"
            if part > len(here):
                return f"{done} has {len(here)} items; the next one is {done}.{len(here)}, not {part}"
            if part == len(here):
                here.append(None)
        elif isinstance(here, dict):
            part = str(part) if not isinstance(part, str) else part
            here.setdefault(part, None)
        else:
            return f"{done} is {_short(here)}, which has no {part!r} in it"
        if last:
            here[part] = value
            return None
        inner = here[part]
        if inner is None:
            inner = [] if trail[i + 1] == 0 else {}
        elif isinstance(inner, str) and (isinstance(here, list) or part == "params"):
            # `gift` and `{method: gift}` are the same thing; so are a data file and `{path: file}`.
            inner = {"path" if trail[:2] in (("data", "train"), ("data", "validation")) else "method": inner}
        elif not isinstance(inner, (dict, list)):
            return f"{'.'.join(str(p) for p in trail[: i + 1])} is {_short(inner)}, which has no {trail[i + 1]!r} in it"
        here[part] = inner
        here = inner
    return None


# ---------------------------------------------------------------------------------------------------------------------
# YAML 1.2 with positions. The 1.1 rules of PyYAML would read `on` as true, `no` as false and `2e-4` as text.

_SCALARS: list[tuple[str, str, list[str]]] = [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
]
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would misread."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
    if _name in ("int", "float"):
        _Dumper.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


def _read(text: str, file: str, origins: _Origins, problems: list[str]) -> dict[str, Any]:
    """The root mapping of a YAML text; the origin of every value is noted as `file:line`."""
    node = _compose(text, file)
    if node is None:
        raise BadInput(f"{file} is empty; a recipe needs at least models and data")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else f"the text {_short(node.value)}"
        raise BadInput(f"{file}:{node.start_mark.line + 1}: a recipe is a mapping of keys to values, and this file holds {kind}")
    reader = _Reader(file, origins, problems)
    return reader.value(node, ())


def _value(text: str) -> tuple[Any, list[str]]:
    """The value of one `--set`."""
    try:
        node = _compose(text, "value")
        problems: list[str] = []
        return (None if node is None else _Reader("value", _Origins(), problems).value(node, ())), problems
    except BadInput as error:
        return None, error.problems


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        raise BadInput(f"{file}{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInput(f"{file}:{line}: the character {chr(error.character)!r} is not allowed in YAML") from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"{file}: not valid YAML: {error}") from None
    except RecursionError:
        raise BadInput(f"{file}: not valid YAML: nested far too deeply") from None


class _Reader:
    """Node graph -> plain values, noting positions; aliases are written out, within limits."""

    def __init__(self, file: str, origins: _Origins, problems: list[str]) -> None:
        self.file, self.origins, self.problems = file, origins, problems
        self.count = 0

    def at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def value(self, node: yaml.Node, trail: Trail) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or len(trail) > MAX_DEPTH:
            raise BadInput(f"{self.at(node)}: not a recipe: more than {MAX_VALUES} values or {MAX_DEPTH} levels (aliases written out)")
        self.origins.places.setdefault(trail, self.at(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, trail)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*trail, i)) for i, item in enumerate(node.value)]
        return self.scalar(node, trail)

    def mapping(self, node: yaml.MappingNode, trail: Trail) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.at(key_node)}: a key must be a word, not a list or mapping")
                continue
            key = key_node.value  # as written: `on` and `no` are words here
            if key in lines:
                dotted = ".".join(str(part) for part in (*trail, key))
                self.problems.append(f"{self.at(key_node)}: {dotted}: the same key twice, first at {lines[key]}; keep one")
                continue
            lines[key] = self.at(key_node)
            self.origins.places[(*trail, key)] = self.at(key_node)
            found[key] = self.value(value_node, (*trail, key))
        return found

    def scalar(self, node: yaml.Node, trail: Trail) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        try:
            if tag == "str":
                return text
            if tag == "null":
                return None
            if tag == "bool":
                return text.lower() == "true"
            if tag == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if tag == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            self.problems.append(f"{self.at(node)}: {'.'.join(map(str, trail))} = {_short(text)}: {error}")
            return None
        key = ".".join(map(str, trail))
        self.problems.append(f"{self.at(node)}: {key} = {_short(text)}: the tag {node.tag!r} is not allowed in a recipe")
        return None
