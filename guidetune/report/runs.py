"""Runs side by side, also of different days: what differs between their recipes, and what between their results.

Scores are set against each other only where both runs put the same items with the same settings; otherwise the reason stands there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from guidetune.artefacts import fingerprint, finished, leaves
from guidetune.errors import BadInput
from guidetune.report import numbers, plots
from guidetune.report.findings import (
    GROUPS,
    REFERENCE,
    Comparison,
    arms_of,
    compare_task,
    failed,
    mapping,
    smaller_is_better,
    tasks_of,
)
from guidetune.report.samples import items_file, read_lines
from guidetune.report.sheets import Sheet
from guidetune.report.tables import total_seconds
from guidetune.report.text import clean, clip

# Parts of an evaluation's key that make its scores another measurement; the model's own parts (its weights, its precision) do not.
SETTINGS = {
    "task": "task options",
    "chat": "chat template",
    "seed": "seed of the samples",
    "new_tokens": "longest answer",
    "samples": "samples per item",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "engine": "engine",
}
MAX_KEYS = 200  # lines of one table of differences


@dataclass(frozen=True)
class Run:
    """A run folder with its results and the name it has on the page."""

    name: str
    folder: Path
    results: Mapping[str, Any]

    @cached_property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The arms that ended well."""
        return {name: arm for name, arm in arms_of(self.results).items() if not failed(arm)}

    def items(self, arm: str, group: str, label: str) -> Path | None:
        return items_file(self.folder, arm, group, label, self.arms[arm], self.results.get("kind"))


@dataclass(frozen=True)
class Measurement:
    """How a task was put: a digest of its items and the file with their results, the settings, the metric."""

    items: str
    path: Path | None
    metric: str
    settings: Mapping[str, Any]
    code: Any
    smaller_is_better: bool


@dataclass
class Cell:
    """One arm's score in one run.

    `against` is the paired difference to the first run that has the arm (`to`), `reason` why there is none, `note` what to mind.
    """

    score: float | None = None
    ci: tuple[float, float] | None = None
    n: int | None = None
    against: Comparison | None = None
    reason: str = ""
    note: str = ""
    to: str = ""


@dataclass
class Line:
    """One arm and task over all runs."""

    arm: str
    group: str
    label: str
    cells: list[Cell] = field(default_factory=list)

    @property
    def comparable(self) -> list[Cell | None]:
        """The cells that can be set against each other, None for the others; empty when there are fewer than two."""
        cells = [None if cell.score is None or cell.reason else cell for cell in self.cells]
        return cells if len(cells) - cells.count(None) > 1 else []


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, named so that they can be told apart.

    Raises:
        BadInput: fewer than two, one given twice, or one without readable results; all reasons at once.
    """
    from guidetune.report.html import read_results

    problems, found = [], []
    for folder in map(Path, folders):
        try:
            found.append((folder, read_results(folder)))
        except BadInput as error:
            problems += error.problems
    places = [folder.resolve() for folder, _ in found]
    problems += [f"{folder} is given twice" for i, (folder, _) in enumerate(found) if places[i] in places[:i]]
    if not problems and len(found) < 2:
        problems.append("a comparison of runs needs at least two of them")
    if problems:
        raise BadInput(problems)
    return [Run(name, folder, results) for name, (folder, results) in zip(_names(found), found, strict=True)]


def _names(found: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[str]:
    for name in (
        lambda folder, results: str(results.get("name") or folder.name),
        lambda folder, results: folder.name,
        lambda folder, results: f"{folder.parent.name}/{folder.name}",
        lambda folder, results: str(folder),
    ):
        names = [clean(name(folder, results)) or "run" for folder, results in found]
        if len(set(names)) == len(names):
            return names
    return [f"run {i + 1}" for i in range(len(found))]


def measured(run: Run, group: str, label: str) -> dict[str, Measurement]:
    """How the task was put to every arm of the run that has it."""
    found = {}
    for name, arm in run.arms.items():
        result = tasks_of(arm, group).get(label)
        if result is None or numbers.finite(result.get("score")) is None:
            continue
        path = run.items(name, group, label)
        key = mapping((finished(path.parent) or {}).get("key")) if path else {}
        items = str(key.get("items") or "")
        settings = {k: key.get(k) for k in SETTINGS if k in key}
        found[name] = Measurement(items, path, str(result.get("metric")), settings, key.get("code"), smaller_is_better(result))
    return found


def _content(path: Path) -> str:
    """A digest of what a per-item file asks."""
    return fingerprint([[item["id"], item.get("prompt"), item.get("reference")] for _, item in read_lines(path)])


def _obstacle(one: Measurement, two: Measurement) -> str:
    """Why two scores of a task cannot be set against each other, or nothing."""
    if one.path is None or two.path is None:
        return "per-item results are missing"
    known = one.items and one.items == two.items
    if not known and _content(one.path) != _content(two.path):
        return "other items"
    if one.metric != two.metric:
        return f"other metric ({one.metric}, {two.metric})"
    drawn = one.settings.get("temperature") and two.settings.get("temperature")  # else no seed was used
    plain = []
    for key, words in SETTINGS.items():
        a, b = one.settings.get(key), two.settings.get(key)
        if a != b and (drawn or key != "seed"):
            plain.append(f"{words} {a} and {b}" if isinstance(a, (int, float)) and isinstance(b, (int, float)) else words)
    return f"other settings: {', '.join(plain)}" if plain else ""


def _code_note(one: Run, two: Run, group: str, label: str) -> tuple[str, str]:
    """(reason, note) where the evaluation's code is not the same: does a model that both runs have still get the same scores from it?"""
    for name, arm in one.arms.items():
        print_ = arm.get("fingerprint")
        for other, candidate in two.arms.items():
            if print_ and candidate.get("fingerprint") == print_:
                paths = one.items(name, group, label), two.items(other, group, label)
                if None not in paths:
                    old, new = ({item["id"]: item.get("correct") for _, item in read_lines(path)} for path in paths if path)
                    if old == new:
                        return "", f"other version of the evaluation's code, which scores {name} the same, item by item"
                    changed = sum(old.get(id_) != new.get(id_) for id_ in old)
                    return (
                        f"other version of the evaluation's code, which scores the same model ({name}) differently on {changed} items",
                        "",
                    )
    return "", "other version of the evaluation's code; no model is in both runs to check it by"


def lines(runs: Sequence[Run]) -> list[Line]:
    """Every arm and task with its score in each run, and the paired difference to the first run that has it, corrected over arms."""
    from guidetune.evaluation.statistics import holm

    found = []
    for group in GROUPS:
        for label in dict.fromkeys(label for run in runs for arm in run.arms.values() for label in tasks_of(arm, group)):
            how = [measured(run, group, label) for run in runs]
            for name in dict.fromkeys(name for arms in how for name in arms):
                found.append(_line(runs, how, name, group, label))
    for order in range(1, len(runs)):
        families: dict[tuple[str, str], dict[int, float]] = {}
        for place, line in enumerate(found):
            part = line.cells[order].against
            if part is not None and part.p is not None:
                families.setdefault((line.group, line.label), {})[place] = part.p
        for family in families.values():
            for place, p in holm(family).items():
                cell = found[place].cells[order]
                assert cell.against is not None
                cell.against = replace(cell.against, p_adjusted=p)
    return found


def _line(runs: Sequence[Run], how: Sequence[Mapping[str, Measurement]], name: str, group: str, label: str) -> Line:
    from guidetune.evaluation.evaluate import paired_results

    line = Line(name, group, label)
    first = next(i for i, arms in enumerate(how) if name in arms)
    for order, run in enumerate(runs):
        if name not in how[order]:
            line.cells.append(Cell())
            continue
        result = tasks_of(run.arms[name], group)[label]
        n = numbers.finite(result.get("n"))
        cell = Cell(numbers.finite(result.get("score")), numbers.interval_ends(result.get("ci")), None if n is None else int(n))
        line.cells.append(cell)
        if order == first:
            continue
        cell.to = runs[first].name
        cell.reason = _obstacle(how[first][name], how[order][name])
        if not cell.reason and how[first][name].code != how[order][name].code:
            cell.reason, cell.note = _code_note(runs[first], run, group, label)
        if not cell.reason and not cell.note and how[first][name].items != how[order][name].items:
            cell.note = "ids, prompts and references of the items are the same; whether the whole of what was asked is, cannot be told"
        if cell.reason:
            continue
        old = tasks_of(runs[first].arms[name], group)[label]
        mine, theirs = run.items(name, group, label), runs[first].items(name, group, label)
        assert mine is not None and theirs is not None  # `_obstacle` has looked
        try:
            better = not smaller_is_better(result)
            paired = paired_results(
                mine.parent,
                {**result, "items": mine.name, "higher_is_better": better},
                theirs.parent,
                {**old, "items": theirs.name, "higher_is_better": better},
            )
        except (BadInput, KeyError, ValueError, TypeError) as error:
            cell.reason = f"the items cannot be paired: {error}"
        else:
            cell.against = compare_task({**result, "vs_instruct": paired})
    return line


def differences(values: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """(key, value of every run as text) of all keys that are not the same everywhere."""
    flat = [dict(leaves(value)) for value in values]
    keys = dict.fromkeys(key for one in flat for key in one)
    absent = object()
    found = []
    for key in keys:
        parts = [one.get(key, absent) for one in flat]
        if any(part != parts[0] for part in parts[1:]):
            found.append((key, ["not set" if part is absent else _text(part) for part in parts]))
    return found


def _text(value: Any) -> str:
    if isinstance(value, (list, Mapping)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return clip(clean(numbers.any_value(value)), 200)[0]


def _recipe_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The recipes' differences, then those of arms that all runs have, where these are not the same once more."""
    shared = differences([_recipe(run.results.get("recipe")) for run in runs])
    known = set(map(repr, shared))
    for name in [name for name in runs[0].arms if all(name in run.arms for run in runs)]:
        own = differences([_recipe(run.arms[name].get("recipe")) for run in runs])
        shared += [(f"arm {name}: {key}", values) for key, values in own if repr((key, values)) not in known]
    return shared


def _recipe(recipe: Any) -> dict[str, Any]:
    """A recipe without what does not change a result."""
    return {key: value for key, value in mapping(recipe).items() if key not in ("name", "description", "max_memory")}


def _surroundings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What else differs: versions, machine, rows, guidance."""
    parts = [
        {
            "versions": mapping(run.results.get("versions")),
            "machine": mapping(run.results.get("machine")),
            "ledger": {key: mapping(run.results.get("ledger")).get(key) for key in ("read", "used", "cut", "tokens", "supervised_tokens")},
            "guidance": {key: mapping(run.results.get("guidance")).get(key) for key in ("teacher", "mean_confidence", "below_0.05")},
            "models": {key: _spec(mapping(run.results.get("models")).get(key)) for key in ("base", "instruct")},
        }
        for run in runs
    ]
    return differences(parts)


def _spec(value: Any) -> Any:
    return value.get("spec") or value.get("path") if isinstance(value, Mapping) else value


def sentences(runs: Sequence[Run], found: Sequence[Line], recipe: Sequence[tuple[str, list[str]]]) -> list[str]:
    """What may be said about every run against the first, and what may not."""
    said = []
    if not found or not any(sum(cell.score is not None for cell in line.cells) > 1 for line in found):
        said.append("The runs have no task in common that the same arm was evaluated on: their scores cannot be set against each other.")
    for order, run in enumerate(runs[1:], start=1):
        first = runs[0].name
        tested = [(line, cell.against) for line in found if (cell := line.cells[order]).against is not None and cell.to == first]
        moved = [(line, part) for line, part in tested if part is not None and part.holds]
        reasons = {cell.reason for line in found if (cell := line.cells[order]).reason}
        if tested:
            told = "; ".join(
                f"{line.arm} on {line.label} {numbers.signed(part.gain)}" + (f" {numbers.interval(part.ci)}" if part.ci else "")
                for line, part in moved[:6]
            )
            more = f"; {len(moved) - 6} more" if len(moved) > 6 else ""
            rest = len(tested) - len(moved)
            text = f"{run.name} against {runs[0].name}, {len(tested)} paired tests on the same items: "
            text += f"changed (after Holm correction over arms): {told}{more}" if moved else "no change that the tests can tell from chance"
            text += f"; the other {rest} not distinguishable." if moved and rest else "."
            said.append(text)
        if notes := {cell.note for line in found if (cell := line.cells[order]).note}:
            said.append(f"{run.name} against {runs[0].name}: {'; '.join(sorted(notes))}.")
        if reasons:
            where = "partly not comparable" if tested else "not comparable"
            said.append(f"{run.name} against {runs[0].name}: {where} ({'; '.join(sorted(reasons))}); no difference is given there.")
    keys = [key for key, _ in recipe]
    if keys:
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        said.append(f"The recipes differ in {len(keys)} {'key' if len(keys) == 1 else 'keys'}: {shown}.")
    else:
        said.append("The recipes are the same in everything that changes a result.")
    if len(keys) > 1:
        said.append("As several keys differ, a change of a score cannot be put down to one of them.")
    return said


def page(folders: Sequence[Path]) -> dict[str, Any]:
    """Everything the page of several runs shows.

    Raises:
        BadInput: see `read`.
    """
    from markupsafe import Markup

    from guidetune.report.sections import moment

    runs = read(folders)
    found = lines(runs)
    recipe, around = _recipe_differences(runs), _surroundings(runs)
    names = [run.name for run in runs]
    arms = list(dict.fromkeys(name for run in runs for name in run.arms))
    run_palette, arm_palette = plots.Palette(names, names[0]), plots.Palette(arms, REFERENCE)
    drawn = [
        (f"{line.arm} · {line.label}", [(cell.score, cell.ci) if cell else None for cell in line.comparable])
        for line in found
        if line.comparable
    ][:60]
    return {
        "title": " and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "created": moment(run.results.get("created")),
                "seconds": numbers.finite(run.results.get("seconds")),
                "arms": list(run.arms),
                "failed": [name for name, arm in arms_of(run.results).items() if failed(arm)],
                "base": str(_spec(mapping(run.results.get("models")).get("base")) or ""),
                "instruct": str(_spec(mapping(run.results.get("models")).get("instruct")) or run.results.get("model") or ""),
            }
            for run in runs
        ],
        "names": names,
        "colour": arm_palette.index,
        "run_colour": run_palette.index,
        "sentences": sentences(runs, found, recipe),
        "svg": Markup(plots.run_dots(drawn, names, run_palette)) if drawn else None,
        "lines": found,
        "recipe": recipe[:MAX_KEYS],
        "surroundings": around[:MAX_KEYS],
        "left_out": max(0, len(recipe) - MAX_KEYS) + max(0, len(around) - MAX_KEYS),
        "costs": [(name, [_cost(run.arms.get(name)) for run in runs]) for name in arms],
    }


def _cost(arm: Mapping[str, Any] | None) -> tuple[float | None, float | None, str]:
    """Seconds, peak memory in MB, and the fingerprint of the evaluated model."""
    if arm is None:
        return None, None, ""
    return total_seconds(arm), numbers.finite(mapping(arm.get("cost")).get("peak_rss_mb")), str(arm.get("fingerprint") or "")


def sheets(values: Mapping[str, Any]) -> Iterator[Sheet]:
    """The tables of the page of several runs."""
    names = values["names"]
    yield Sheet(
        "runs",
        "Runs",
        ["run", "folder", "created", "seconds", "base", "instruct", "arms", "failed"],
        [
            (r["name"], r["folder"], r["created"], r["seconds"], r["base"], r["instruct"], ", ".join(r["arms"]), ", ".join(r["failed"]))
            for r in values["runs"]
        ],
    )
    rows = []
    for line in values["lines"]:
        for name, cell in zip(names, line.cells, strict=True):
            part = cell.against
            tested = (part.gain, *(part.ci or (None, None)), part.p, part.p_adjusted, part.lost, part.gained) if part else (None,) * 7
            if cell.score is not None:
                rows.append(
                    (
                        line.group,
                        line.label,
                        line.arm,
                        name,
                        cell.score,
                        *(cell.ci or (None, None)),
                        cell.n,
                        cell.to or None,
                        *tested,
                        cell.reason or cell.note or None,
                    )
                )
    yield Sheet(
        "scores",
        "Scores of every run",
        [
            "group",
            "task",
            "arm",
            "run",
            "score",
            "ci_low",
            "ci_high",
            "n",
            "against",
            "difference",
            "diff_ci_low",
            "diff_ci_high",
            "p",
            "p_corrected",
            "lost",
            "gained",
            "caution",
        ],
        rows,
    )
    yield Sheet("recipe-differences", "Recipe keys that differ", ["key", *names], [(key, *parts) for key, parts in values["recipe"]])
    yield Sheet("surroundings", "What else differs", ["key", *names], [(key, *parts) for key, parts in values["surroundings"]])
    yield Sheet(
        "costs",
        "Costs",
        ["arm", "run", "seconds", "peak_memory_mb", "model_fingerprint"],
        [(arm, name, *cost) for arm, costs in values["costs"] for name, cost in zip(names, costs, strict=True) if cost != (None, None, "")],
    )
