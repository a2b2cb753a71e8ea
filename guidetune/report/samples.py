"""Sample outputs of the arms side by side: the items that flipped against the instruct model first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidetune.report import numbers
from guidetune.report.findings import GROUPS, REFERENCE, arms_of, labels, mapping, tasks_of
from guidetune.report.text import clean, clip, escaped_size

TEXT_LIMIT = 1200  # characters of one prompt or output
SIZE_LIMIT = 700_000  # bytes of all samples in the page


@dataclass(frozen=True)
class Output:
    """What one arm answered; `right` is None where no score was stored, `cut` counts characters left out."""

    arm: str
    text: str
    cut: int
    right: bool | None
    score: str


@dataclass(frozen=True)
class Sample:
    """One evaluation item with the answers of all arms."""

    group: str
    label: str
    id: str
    kind: str
    prompt: str
    prompt_cut: int
    reference: str
    outputs: list[Output] = field(default_factory=list)

    @property
    def flipped(self) -> list[str]:
        """The arms whose result differs from the instruct model's."""
        before = next((output.right for output in self.outputs if output.arm == REFERENCE), None)
        return [output.arm for output in self.outputs if before is not None and output.right is not None and output.right != before]


def items_file(run: Path, arm: str, group: str, label: str, arm_results: Mapping[str, Any], kind: Any = "compare") -> Path | None:
    """The per-item file of a task result: where the result says, else where the run folder's layout puts it."""
    stated = tasks_of(arm_results, group).get(label, {}).get("items")
    folder = mapping(arm_results.get("paths")).get("evaluation")
    candidates = []
    if isinstance(stated, str) and stated:
        candidates += [run / stated]
        if isinstance(folder, str) and folder:
            candidates += [run / folder / stated, run / folder / group / stated]
        candidates += [run / "arms" / arm / "evaluation" / group / stated, run / "evaluation" / group / stated]
    name = f"{label}.jsonl"
    if isinstance(folder, str) and folder:
        candidates += [run / folder / group / name, run / folder / name]
    candidates += [run / "arms" / arm / "evaluation" / group / name]
    if kind == "run" and arm != REFERENCE:
        candidates += [run / "evaluation" / group / name]  # `run` keeps its one arm at the top
    return next((path for path in candidates if path.is_file()), None)


def _items(path: Path) -> Iterator[dict[str, Any]]:
    """The readable lines of a per-item file."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                item = json.loads(line)
            except ValueError:
                continue  # a run that was killed may leave half a line
            if isinstance(item, dict) and "id" in item:
                yield item


def _right(item: Mapping[str, Any]) -> bool | None:
    value = item.get("correct")
    number = float(value) if isinstance(value, bool) else numbers.finite(value)
    return None if number is None else number >= 0.5


def _choose(right: Mapping[str, Mapping[str, bool | None]], want: Mapping[str, int]) -> list[tuple[str, str]]:
    """(id, kind) of the items to show: `want[kind]` of each kind, taken from the arms in turn so that none fills the page.

    Kinds: "gained" (instruct wrong, arm right), "lost" (the reverse), "all right", "all wrong", "differs" (no instruct to compare with).
    """
    arms = [name for name in right if name != REFERENCE]
    reference = right.get(REFERENCE)
    ids = list(reference if reference else next(iter(right.values()), {}))
    pools: dict[str, dict[str, list[str]]] = {}
    for item in ids:
        values = {name: right[name].get(item) for name in right}
        if reference is not None:
            for name in arms:
                if values[name] is not None and values[REFERENCE] is not None and values[name] != values[REFERENCE]:
                    pools.setdefault("gained" if values[name] else "lost", {}).setdefault(name, []).append(item)
        elif len(set(values.values())) > 1:
            pools.setdefault("differs", {}).setdefault("", []).append(item)
        if set(values.values()) == {True}:
            pools.setdefault("all right", {}).setdefault("", []).append(item)
        elif set(values.values()) == {False}:
            pools.setdefault("all wrong", {}).setdefault("", []).append(item)
        elif None in values.values():
            pools.setdefault("unscored", {}).setdefault("", []).append(item)
    chosen: dict[str, str] = {}
    for kind, number in want.items():
        queues = [iter(queue) for queue in pools.get(kind, {}).values()]
        taken = 0
        while queues and taken < number:
            for queue in list(queues):
                item = next((candidate for candidate in queue if candidate not in chosen), None)
                if item is None:
                    queues.remove(queue)
                elif taken < number:
                    chosen[item] = kind
                    taken += 1
    return list(chosen.items())


_WANT = {
    "task": {"gained": 5, "lost": 4, "differs": 6, "all right": 1, "all wrong": 1, "unscored": 3},
    "general": {"lost": 5, "gained": 2, "differs": 4, "all right": 1, "unscored": 2},
}


def _text(value: Any) -> str:
    """Prompt, output or reference as readable text; chat messages become `role: content` lines."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(part, Mapping) and "content" in part for part in value):
        if len(value) == 1:
            return str(value[0]["content"])
        return "\n".join(f"{part.get('role', '')}: {part['content']}" for part in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def collect(run: Path, results: Mapping[str, Any]) -> tuple[list[Sample], list[str]]:
    """The samples to show, and what could not be shown and why."""
    arms = arms_of(results)
    samples: list[Sample] = []
    missing: list[str] = []
    budget = SIZE_LIMIT
    for group in GROUPS:
        names = labels(results, group)
        # Several tasks share the group's number of samples, each with at least its flips.
        for label in names[:6]:
            files: dict[str, Path] = {}
            for name, arm in arms.items():
                if label not in tasks_of(arm, group):
                    continue
                path = items_file(run, name, group, label, arm, results.get("kind"))
                if path is None:
                    missing.append(f"{name}: no per-item file for {label}")
                else:
                    files[name] = path
            right = {name: {str(item["id"]): _right(item) for item in _items(path)} for name, path in files.items()}
            right = {name: values for name, values in right.items() if values}
            if not right:
                continue
            share = min(len(names), 6)
            want = {kind: max(1, round(number / share)) for kind, number in _WANT[group].items()}
            for sample in _read(files, right, _choose(right, want), group, label):
                budget -= sum(escaped_size(text) for text in (sample.prompt, sample.reference, *(output.text for output in sample.outputs)))
                if budget < 0:
                    missing.append("further samples: the page would become too large")
                    return samples, missing
                samples.append(sample)
        if len(names) > 6:
            missing.append(f"samples of {len(names) - 6} further {group} tasks")
    return samples, missing


def _read(
    files: Mapping[str, Path], right: Mapping[str, Any], chosen: Sequence[tuple[str, str]], group: str, label: str
) -> Iterator[Sample]:
    wanted = {item for item, _ in chosen}
    found = {
        name: {str(item["id"]): item for item in _items(path) if str(item["id"]) in wanted} for name, path in files.items() if name in right
    }
    for id_, kind in chosen:
        rows = {name: items[id_] for name, items in found.items() if id_ in items}
        if not rows:
            continue
        first = next(iter(rows.values()))
        prompt, prompt_cut = clip(clean(_text(first.get("prompt", first.get("messages")))), TEXT_LIMIT)
        outputs = []
        for name, item in rows.items():
            text, cut = clip(clean(_text(item.get("output"))), TEXT_LIMIT)
            value = numbers.finite(item.get("correct"))
            partial = numbers.score(value) if value is not None and value not in (0, 1) else ""
            outputs.append(Output(name, text, cut, _right(item), partial))
        reference, _ = clip(clean(_text(first.get("reference"))), TEXT_LIMIT)
        yield Sample(group, label, clean(id_)[:120], kind, prompt, prompt_cut, reference, outputs)
