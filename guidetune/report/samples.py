"""The browser of gained and lost items: per task and arm, what was asked and what every arm answered."""

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
SIZE_LIMIT = 1_100_000.0  # bytes of all items in the page
PER_KIND = 10  # items of one task that an arm gained, and as many that it lost
UNCHANGED = 2  # items of one task that no arm changed, right and wrong
ENTRY = 260  # bytes that one line of a list takes


@dataclass(frozen=True)
class Output:
    """An answer and the arms that gave it; `right` is None where no score was stored, `cut` counts characters left out."""

    arms: list[str]
    text: str
    cut: int
    right: bool | None
    score: str


@dataclass(frozen=True)
class Sample:
    """One evaluation item with the answers of all arms; `under` is the arm below which it is shown in full."""

    group: str
    label: str
    id: str
    anchor: str
    prompt: str
    prompt_cut: int
    reference: str
    gained: list[str]
    lost: list[str]
    under: str
    outputs: list[Output] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The prompt's first words."""
        text = " ".join(self.prompt.split())
        return text if len(text) <= 90 else text[:89] + "…"


@dataclass
class ArmItems:
    """What an arm changed in one task: how many items, and those that are shown (item, whether it is shown here first)."""

    arm: str
    gained_total: int
    lost_total: int
    gained: list[tuple[Sample, bool]] = field(default_factory=list)
    lost: list[tuple[Sample, bool]] = field(default_factory=list)


@dataclass
class TaskItems:
    """One task of the browser; `flips` holds every (item, arm, "gained" or "lost"), also those that are not shown."""

    group: str
    label: str
    n: int
    arms: list[ArmItems] = field(default_factory=list)
    others: list[tuple[str, Sample]] = field(default_factory=list)
    flips: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def shown(self) -> int:
        return len({s.anchor for arm in self.arms for s, _ in [*arm.gained, *arm.lost]} | {s.anchor for _, s in self.others})


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


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, item) of every readable line of a per-item file."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            try:
                item = json.loads(line)
            except ValueError:
                continue  # a run that was killed may leave half a line
            if isinstance(item, dict) and "id" in item:
                yield number, item


def _right(item: Mapping[str, Any]) -> bool | None:
    value = item.get("correct")
    number = float(value) if isinstance(value, bool) else numbers.finite(value)
    return None if number is None else number >= 0.5


@dataclass
class _Scores:
    """Of one per-item file: which items were right, and where they stand."""

    path: Path
    right: dict[str, bool | None] = field(default_factory=dict)
    line: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> _Scores:
        scores = cls(path)
        for number, item in read_lines(path):
            scores.right[str(item["id"])] = _right(item)
            scores.line[str(item["id"])] = number
        return scores

    def items(self, wanted: set[str]) -> dict[str, dict[str, Any]]:
        lines = {self.line[id_] for id_ in wanted if id_ in self.line}
        found = {}
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file):
                if number in lines:
                    item = json.loads(text)
                    found[str(item["id"])] = item
        return found


def _flips(scores: Mapping[str, _Scores]) -> list[tuple[str, str, str]]:
    """(item, arm, kind) of every item whose result differs from the instruct model's; items in file order."""
    reference = scores.get(REFERENCE)
    if reference is None:
        return []
    return [
        (id_, name, "gained" if right else "lost")
        for id_, before in reference.right.items()
        for name in scores
        if name != REFERENCE and before is not None and (right := scores[name].right.get(id_)) is not None and right != before
    ]


def _unchanged(scores: Mapping[str, _Scores]) -> dict[str, str]:
    """Some items that no arm changed, {id: kind}; without the instruct model also some on which the arms differ."""
    wanted = {
        "arms differ": 0 if REFERENCE in scores else PER_KIND,
        "right in every arm": UNCHANGED,
        "wrong in every arm": UNCHANGED,
        "not scored": 3,
    }
    found: dict[str, str] = {}
    for id_ in next(iter(scores.values())).right:
        values = {one.right.get(id_) for one in scores.values()}
        kind = {frozenset({True}): "right in every arm", frozenset({False}): "wrong in every arm"}.get(
            frozenset(values), "not scored" if None in values else "arms differ"
        )
        if wanted[kind]:
            wanted[kind] -= 1
            found[id_] = kind
    return found


def _in_turn(flips: Sequence[tuple[str, str, str]]) -> list[str]:
    """Items to show, best first: from every (arm, kind) in turn, so that none fills the page; at most PER_KIND of each."""
    queues: dict[tuple[str, str], list[str]] = {}
    for id_, name, kind in flips:
        queues.setdefault((name, kind), []).append(id_)
    order = dict(sorted(queues.items(), key=lambda pair: pair[0][1]))
    chosen: dict[str, None] = {}
    for rank in range(PER_KIND):
        for queue in order.values():
            if sum(id_ in chosen for id_ in queue) <= rank:
                chosen.update(dict.fromkeys(next(([id_] for id_ in queue if id_ not in chosen), [])))
    return list(chosen)


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


def collect(run: Path, results: Mapping[str, Any], room: float = SIZE_LIMIT) -> tuple[list[TaskItems], list[str]]:
    """The items to show by task, in at most `room` bytes of the page, and what could not be shown and why."""
    arms = arms_of(results)
    found: list[TaskItems] = []
    missing: list[str] = []
    budget = room
    names = [(group, label) for group in GROUPS for label in labels(results, group)]
    for position, (group, label) in enumerate(names):
        scores: dict[str, _Scores] = {}
        for name, arm in arms.items():
            if label not in tasks_of(arm, group):
                continue
            path = items_file(run, name, group, label, arm, results.get("kind"))
            if path is None:
                missing.append(f"{name}: no per-item file for {label}")
            elif (one := _Scores.read(path)).right:
                scores[name] = one
        if not scores:
            continue
        task = TaskItems(group, label, max(len(one.right) for one in scores.values()), flips=_flips(scores))
        budget -= _fill(task, scores, budget / (len(names) - position), f"item-{position}")
        found.append(task)
    return found, missing


def _fill(task: TaskItems, scores: Mapping[str, _Scores], budget: float, anchor: str) -> float:
    """Put items into a task until `budget` bytes are used; returns the bytes."""
    unchanged = _unchanged(scores)
    wanted = [*_in_turn(task.flips), *unchanged]
    rows = {name: one.items(set(wanted)) for name, one in scores.items()}
    changed: dict[str, dict[str, str]] = {}
    for id_, name, kind in task.flips:
        changed.setdefault(id_, {})[name] = kind
    per_arm = {name: ArmItems(name, 0, 0) for name in scores if name != REFERENCE}
    for _, name, kind in task.flips:
        setattr(per_arm[name], f"{kind}_total", getattr(per_arm[name], f"{kind}_total") + 1)
    used = 0.0
    for number, id_ in enumerate(wanted):
        sample = _sample(
            task, id_, f"{anchor}-{number}", {name: rows[name][id_] for name in rows if id_ in rows[name]}, changed.get(id_, {})
        )
        size = 2 * ENTRY + ENTRY * len(changed.get(id_, {})) + sum(escaped_size(output.text) + ENTRY for output in sample.outputs)
        size += escaped_size(sample.prompt) + escaped_size(sample.reference) + 3 * escaped_size(sample.title)
        if used + size > budget:
            continue
        used += size
        if id_ in unchanged:
            task.others.append((unchanged[id_], sample))
        for place, (name, kind) in enumerate(changed.get(id_, {}).items()):
            getattr(per_arm[name], kind).append((sample, place == 0))
    place = next(iter(scores.values())).line
    for one in per_arm.values():
        one.gained.sort(key=lambda entry: place.get(entry[0].id, 0))
        one.lost.sort(key=lambda entry: place.get(entry[0].id, 0))
    task.arms = [one for one in per_arm.values() if one.gained_total or one.lost_total]
    return used


def _sample(task: TaskItems, id_: str, anchor: str, items: Mapping[str, Mapping[str, Any]], changed: Mapping[str, str]) -> Sample:
    first = next(iter(items.values()))
    prompt, prompt_cut = clip(clean(_text(first.get("prompt", first.get("messages")))), TEXT_LIMIT)
    reference, _ = clip(clean(_text(first.get("reference"))), TEXT_LIMIT)
    outputs: dict[tuple[str, bool | None, str], Output] = {}
    for name, item in items.items():
        whole = clean(_text(item.get("output")))
        text, cut = clip(whole, TEXT_LIMIT)
        value = numbers.finite(item.get("correct"))
        partial = numbers.score(value) if value is not None and value not in (0, 1) else ""
        outputs.setdefault((whole, _right(item), partial), Output([], text, cut, _right(item), partial)).arms.append(name)
    gained, lost = ([name for name, kind in changed.items() if kind == wanted] for wanted in ("gained", "lost"))
    return Sample(
        task.group,
        task.label,
        clean(id_)[:120],
        anchor,
        prompt,
        prompt_cut,
        reference,
        gained,
        lost,
        next(iter(changed), ""),
        list(outputs.values()),
    )
