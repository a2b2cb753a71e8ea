"""Merge what an arm learnt at several scales without tuning again, pick one on validation items, report it on the others.

    theta(s) = receiving model + s * learnt

The weights of a scale are made in memory, by the arithmetic that writes a model (float32 sums, one rounding), so that scale 1 is bit for
bit the model that `transfer` wrote. Scale 0, the receiving model, is always among the points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from guidetune.artefacts import derive_seed, fingerprint
from guidetune.comparison.contrasts import GROUPS, Contrast
from guidetune.errors import BadInput
from guidetune.evaluation import statistics
from guidetune.evaluation.evaluate import Planned, read_items
from guidetune.evaluation.results import summarise
from guidetune.report.findings import compare_task, smaller_is_better

if TYPE_CHECKING:
    from guidetune.evaluation.task import Item
    from guidetune.weightspace.apply import Plan

MAX_SCALES = 50
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # group -> task -> TaskResult


class Selection(BaseModel):
    """How a scale is picked, on validation items only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["retain", "mean"] = Field(
        "retain", description="retain: the best task score among scales that lose little; mean: the best mean of task and general."
    )
    max_loss: float = Field(0.02, ge=0, description="retain: how much of the general score at scale 0 may be lost (0.02: two points).")
    share: float = Field(0.3, gt=0, lt=1, description="Items of each task kept for validation where the recipe names no validation tasks.")

    def words(self, general: bool = True, points: bool = True) -> str:
        """The criterion as it stands in the results; `points`: the general score is a share of right answers."""
        if not general:
            return "the best task score on validation items; general skills were not measured"
        if self.rule == "mean":
            return "the best mean of the task and the general score on validation items"
        lost = f"{100 * self.max_loss:g} points below" if points else f"{self.max_loss:g} worse than"
        return f"the best task score on validation items among scales whose general score is at most {lost} that at scale 0"


def parse_scales(text: str) -> tuple[float, ...]:
    """`0,0.25,0.5` -> (0.0, 0.25, 0.5), in rising order; `0:1.5:0.25` is from, to, step.

    Raises:
        BadInput: not numbers, not finite, none, or more than 50.
    """
    from math import isfinite

    found: list[float] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            numbers = [float(number) for number in part.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 3 and all(map(isfinite, numbers)) and numbers[2] > 0 and (numbers[1] - numbers[0]) / numbers[2] < MAX_SCALES:
            start, stop, step = numbers
            found += [round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-9) + 1)]
        elif len(numbers) == 1 and isfinite(numbers[0]):
            found.append(numbers[0])
        else:
            raise BadInput(f"--scales {text}: {part!r} is no scale; write numbers such as 0,0.25,0.5 or from:to:step such as 0:1.5:0.25")
    if not found or len(set(found)) > MAX_SCALES:
        raise BadInput(f"--scales {text}: give between 1 and {MAX_SCALES} scales")
    return tuple(sorted(set(found)))


@dataclass(frozen=True)
class Sweep:
    """Which items validate and which test. `separate`: tasks of their own for validation, else the items in `kept` of the same tasks."""

    selection: Selection
    test: Mapping[str, Sequence[Planned]]
    separate: Mapping[str, Sequence[Planned]] | None = None
    kept: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)  # (group, task) -> ids


def plan_sweep(test: Mapping[str, Sequence[Planned]], separate: Mapping[str, Sequence[Planned]], selection: Selection, seed: int) -> Sweep:
    """Set validation items apart from test items.

    Without validation tasks, a share of each task's own items by a hash of (seed, prompt): the same items for every arm, scale and run, and
    equal prompts on one side.

    Raises:
        BadInput: no task to pick by; a validation prompt that the test asks too; a task that is too small to be divided.
    """
    if not test.get("task"):
        raise BadInput("--scales: evaluate.task is empty, so there is nothing to pick a scale by")
    problems = []
    if any(separate.values()):
        if not separate.get("task"):
            problems.append("evaluate.validation.task is empty, so there is nothing to pick a scale by")
        asked = {_prompt(item) for planned in test.values() for one in planned for item in one.items}
        for one in (one for planned in separate.values() for one in planned):
            common = [item.id for item in one.items if _prompt(item) in asked]
            if common:
                problems.append(
                    f"evaluate.validation: {len(common):,} items of {one.label} are asked by the test too, first {common[0]}; "
                    "a scale picked on test items would look better than it is"
                )
        if problems:
            raise BadInput(problems)
        return Sweep(selection, test, separate)
    kept = {}
    for group, planned in test.items():
        for one in planned:
            ids = frozenset(item.id for item in one.items if _is_validation(item, seed, selection.share))
            if not ids or len(ids) == len(one.items):
                problems.append(
                    f"--scales: task {one.label} has {len(one.items)} items, too few to keep some for validation; name others under "
                    "evaluate.validation"
                )
            kept[group, one.label] = ids
    if problems:
        raise BadInput(problems)
    return Sweep(selection, test, None, kept)


def _prompt(item: Item) -> str:
    return fingerprint([item.text, [dict(message) for message in item.messages]])


def _is_validation(item: Item, seed: int, share: float) -> bool:
    return derive_seed(seed, "validation", _prompt(item)) / 2**63 < share


# ---------------------------------------------------------------------------------------------------------------------
# Weights of a scale


def set_weights(model: Any, plan: Plan) -> None:
    """Write into a loaded model what `transfer` would write to disk for this plan; tensors without an update are left alone."""
    import torch

    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for entry in plan.entries:
            if entry.name not in plan.update_of:
                continue
            parameter = parameters[plan.target.names.parameter_of.get(entry.name, entry.name)]
            for start, stop in plan.pieces(entry):
                values = plan.compute(entry, start, stop)[3]
                (parameter[start:stop] if parameter.dim() else parameter).copy_(values)


def scaled(plan: Plan, scale: float) -> Plan:
    """The same plan at another scale; 0 gives the receiving model's own weights back."""
    return replace(plan, scale=scale)


# ---------------------------------------------------------------------------------------------------------------------
# From item files to points and a choice


@dataclass
class Point:
    """One scale: where its results lie. `results[side][group][task]` with the folder that `items` is relative to."""

    scale: float
    test: Results
    test_folder: Path
    validation: Results | None = None


def report(sweep: Sweep, measured: Iterable[Point], arm: str, samples: int, seed: int) -> dict[str, Any]:
    """`results["scales"][arm]`: the points, the choice, and the test result of the choice against scale 0."""
    shown: list[dict[str, Any]] = []
    lines: dict[float, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    ordered = sorted(measured, key=lambda point: point.scale)
    for point in ordered:
        sides: dict[str, dict[str, dict[str, Any]]] = {"validation": {}, "test": {}}
        lines[point.scale] = {}
        for group in GROUPS:
            for one in sweep.test.get(group, ()):
                every = read_items(point.test_folder / group, dict(point.test[group][one.label]))
                kept = sweep.kept.get((group, one.label), frozenset())
                tested = [line for line in every if line["id"] not in kept]
                lines[point.scale][group, one.label] = tested
                sides["test"].setdefault(group, {})[one.label] = _summary(one, tested, samples, seed)
                if sweep.separate is None:
                    held = [line for line in every if line["id"] in kept]
                    sides["validation"].setdefault(group, {})[one.label] = _summary(one, held, samples, seed)
            for one in (sweep.separate or {}).get(group, ()):
                assert point.validation is not None
                sides["validation"].setdefault(group, {})[one.label] = dict(point.validation[group][one.label])
        shown.append(
            {
                "scale": point.scale,
                "validation": {group: level(sides["validation"].get(group, {})) for group in GROUPS},
                "test": {group: {label: _brief(result) for label, result in sides["test"].get(group, {}).items()} for group in GROUPS},
                "items": {side: sum(r["n"] for group in found.values() for r in group.values()) for side, found in sides.items()},
            }
        )
    chosen = pick(shown, sweep.selection)
    zero, best = lines[0.0], lines[chosen]
    against: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    said = []
    for (group, label), tested in best.items():
        paired, sentence = _against_zero(tested, zero[group, label], shown, chosen, arm, group, label)
        against[group][label] = paired
        said.append(sentence)
    general = any(point["validation"]["general"] is not None for point in shown)
    points = (shown[0]["validation"]["general"] or 0) >= 0  # a group of losses has a level below 0
    if chosen == 0:
        said = ["No scale of what was learnt was better on the validation items within the limit: scale 0 is the receiving model as it is."]
    return {
        "chosen": chosen,
        "chosen_on": "validation",
        "criterion": sweep.selection.words(general, points),
        "points": shown,
        "chosen_vs_0": against,
        "verdict": said,
    }


def _summary(planned: Planned, lines: Sequence[Mapping[str, Any]], samples: int, seed: int) -> dict[str, Any]:
    return summarise(planned.task, lines, samples if planned.task.mode == "generate" else 1, seed)


def _brief(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("score", "ci", "n", "metric", "higher_is_better")}


def level(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """One number for a group, larger is better: the mean score; of a group of losses alone, minus their mean."""
    scores = [result["score"] for result in results.values() if not smaller_is_better(result) and result["score"] is not None]
    if scores:
        return sum(scores) / len(scores)
    losses = [result["score"] for result in results.values() if result["score"] is not None]
    return -sum(losses) / len(losses) if losses else None


def pick(points: Sequence[Mapping[str, Any]], selection: Selection) -> float:
    """The scale chosen by the points' validation levels alone; of equal ones the smaller scale, which changes the model less.

    Raises:
        BadInput: there is no point at scale 0 to measure loss by.
    """
    start = next((point for point in points if point["scale"] == 0), None)
    if start is None:
        raise BadInput("a scale is picked by its loss against scale 0, which was not measured")
    floor = start["validation"]["general"]
    allowed = []
    for point in points:
        task, general = point["validation"]["task"], point["validation"]["general"]
        if task is None:
            continue
        if selection.rule == "mean" and general is not None:
            allowed.append(((task + general) / 2, point["scale"]))
        elif general is None or floor is None or general >= floor - selection.max_loss - 1e-12:
            allowed.append((task, point["scale"]))
    best = max(value for value, _ in allowed)
    return min((scale for value, scale in allowed if value >= best - 1e-12), key=lambda scale: (abs(scale), scale))


def _against_zero(
    lines: Sequence[Mapping[str, Any]],
    zero: Sequence[Mapping[str, Any]],
    shown: Sequence[Mapping[str, Any]],
    chosen: float,
    arm: str,
    group: str,
    label: str,
) -> tuple[dict[str, Any], str]:
    result = next(point for point in shown if point["scale"] == chosen)["test"][group][label]
    order = {line["id"]: line for line in zero}
    weights = [float(line["tokens"]) for line in lines] if lines and "nll" in lines[0] else None
    paired = statistics.paired(
        [line["correct"] for line in lines], [order[line["id"]]["correct"] for line in lines], weights, result["higher_is_better"]
    )
    part = compare_task({**result, "vs_instruct": paired})
    if part is None:
        return paired, f"Nothing was measured on {label}."
    points = not smaller_is_better(result) and abs(result["score"] or 0) <= 1
    name = f"{arm} at scale {chosen:g}"
    words = Contrast(name, "scale 0", f"{label} (test items)", part.gain, part.ci, part.p, part.n, 1, points, paired)
    return {**paired, "mde": words.detectable(), "verdict": words.words()}, words.words()
