"""Which arm is better, and how sure that is: paired tests over items and seeds, corrected over arms, and put into words.

Nothing here runs a model: it reads the item files that the evaluations left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidetune.errors import BadInput
from guidetune.evaluation import statistics
from guidetune.evaluation.evaluate import paired_results, read_items
from guidetune.evaluation.statistics import ALPHA
from guidetune.progress import say
from guidetune.report import numbers
from guidetune.report.findings import compare_group, compare_task, smaller_is_better

REFERENCE = "instruct"  # the arm every other is compared with
GROUPS = {"task": "the task", "general": "general skills"}
MAX_PAIRS = 12  # arms up to which every two are compared with each other: their number grows with the square


@dataclass(frozen=True)
class Contrast:
    """One comparison, ready to be put into words; `gain` > 0: `a` is better."""

    a: str
    b: str
    on: str
    gain: float
    ci: tuple[float, float] | None
    p: float | None
    n: int
    seeds: int = 1
    points: bool = True  # shares of right items, told in points; else the metric's own unit
    paired: Mapping[str, Any] = field(default_factory=dict)  # the result of `statistics` that all this is from

    def detectable(self, tests: int = 1) -> float | None:
        """The smallest true difference that would be found, with p held against .05 / tests: what Holm asks of the smallest p."""
        return statistics.detectable(self.paired, self.n, ALPHA / max(tests, 1)) if self.paired else None

    def words(self, adjusted: float | None = None, tests: int = 1) -> str:
        """One sentence that claims no more than the test allows; `adjusted`: p after correction over `tests` comparisons."""
        final = self.p if adjusted is None else adjusted
        basis = f"{numbers.count(self.n)} items" + (f", {self.seeds} seeds" if self.seeds > 1 else "")
        if self.p is None or final is None:
            more = "more" if self.gain >= 0 else "less"
            return f"{self.a} scores {self._size(self.gain)} {more} than {self.b} on {self.on}; no test is possible."
        corrected = f" after Holm's correction over {tests} comparisons" if tests > 1 else ""
        span = f"95 % interval {self._span()}; " if self.ci else ""
        if final < ALPHA:
            better = "better" if self.gain > 0 else "worse"
            alone = "" if self.seeds > 1 else " One training seed: this is about these models, another seed may give another size."
            evidence = f"({span}{numbers.p_value(final)}{corrected}; {basis})"
            return f"{self.a} is {better} than {self.b} on {self.on} by {self._size(self.gain)} {evidence}.{alone}"
        if self.p < ALPHA:
            start = f"{self.a} and {self.b} on {self.on}: a difference of {self._size(self.gain)} is {numbers.p_value(self.p)} by itself, "
            return f"{start}but {numbers.p_value(final)}{corrected}: no difference was established ({basis})."
        text = f"No difference between {self.a} and {self.b} on {self.on} was detected ({numbers.p_value(final)}{corrected})"
        if (least := self.detectable(tests)) is not None:
            text += f"; with {basis} only differences above {self._size(least)} would be, four times in five"
        else:
            text += f"; {basis}"
        if self.ci and self.ci[0] < 0:
            text += f". A loss of up to {self._size(self.ci[0])} is not excluded"
        return text + "."

    def _size(self, value: float) -> str:
        return f"{abs(100 * value):.1f} points" if self.points else f"{abs(value):.3g}"

    def _span(self) -> str:
        assert self.ci is not None
        low, high = sorted(abs(end) if self.gain < 0 else end for end in self.ci) if self.ci[0] * self.ci[1] > 0 else self.ci
        return f"{100 * low:.1f} to {100 * high:.1f}" if self.points else f"{low:.3g} to {high:.3g}"


def compare_arms(out: Path, arms: dict[str, dict[str, Any]], reference: str = REFERENCE) -> dict[str, Any]:
    """Write `vs_instruct` into every task result of every arm and seed, and give `results["comparison"]`.

    Args:
        out: the run's folder; `paths.evaluation` of an arm is relative to it.
        arms: `results["arms"]`. Each `vs_instruct` is `statistics.paired` with `p_adjusted` (Holm over the arms of one task), `mde` (the
            minimum detectable difference; `mde_adjusted` after correction) and `verdict`. Arms with several seeds get the test over seeds
            and items in `over_seeds[group][task]["vs_instruct"]`; it then stands for the arm in the summary.

    Returns:
        `correction, alpha, groups: {group: {arm: {diff, ci, p, p_adjusted, mde, verdict}}}` (diff > 0: better than the reference),
        `pairs` (every two arms, task by task) and `verdict`, sentences on the whole.
    """
    finished = {name: entry for name, entry in arms.items() if entry.get("status") == "ok"}
    items = _Items(out)
    best: dict[tuple[str, str, str], Contrast] = {}  # (arm, group, task) -> the test that counts
    others = [name for name in finished if name != reference]
    if reference in finished:
        for group, label in _tasks(finished.values()):
            best |= _against_reference(out, items, finished, reference, group, label)
    groups = _summaries(finished, others, best, reference) if reference in finished else {group: {} for group in GROUPS}
    pairs = _pairs(items, finished, others) if 2 <= len(others) <= MAX_PAIRS else []
    said = _overall(groups, pairs, reference) if best else []
    said += [entry["verdict"] for group in groups.values() for entry in group.values()]
    return {"correction": "holm", "alpha": ALPHA, "reference": reference, "groups": groups, "pairs": pairs, "verdict": said}


def compare_two(out: Path, arms: Mapping[str, Mapping[str, Any]], a: str, b: str) -> list[dict[str, Any]]:
    """Any two arms of a run, task by task: what `pairs` of `compare_arms` holds, for two that it did not pair.

    Raises:
        BadInput: an arm that is not there or has no results.
    """
    problems = [f"there is no finished arm {name!r} in {out}" for name in (a, b) if arms.get(name, {}).get("status") != "ok"]
    if problems:
        raise BadInput(problems)
    return _pairs(_Items(out), {name: dict(arms[name]) for name in (a, b)}, [a, b])


def compare_group_of(
    out: Path,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    group: str,
    label: str | None = None,
    share: tuple[float, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Two arms on the mean of a group's tasks: `{diff, ci, p, test}`, diff > 0 when `a` is better; over seeds where both have several.

    label: on this task alone. share: (s, an untuned arm): `b` counts as that arm plus the share s of its gain on it.

    Raises:
        BadInput: the two have no task in common, or other items.
    """
    items = _Items(out)
    counted: dict[str, dict[str, Any]] = {}
    for label in (one for one in a[group] if one in b[group] and label in (None, one)):
        result = dict(a[group][label])
        over = _over_seeds(items, a, b, group, label, share)
        if over is None:
            ids, x, weights = items.scores([a], group, label)
            y = _shared(items, [b], group, label, ids, share)
            over = statistics.paired(x[0], y[0], weights, result.get("higher_is_better", True))
        counted[label] = {**result, "vs_instruct": over}
    part = compare_group({group: counted}, group)
    if part is None:
        raise BadInput(f"the arms have no {group} results in common")
    return {"diff": part.gain, "ci": list(part.ci) if part.ci else None, "p": part.p, "test": part.test}


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Items:
    """Item scores of evaluations, read once."""

    out: Path
    known: dict[Path, dict[str, Mapping[str, Any]]] = field(default_factory=dict)

    def of(self, entry: Mapping[str, Any], group: str, label: str) -> dict[str, Mapping[str, Any]]:
        folder = self.out / entry["paths"]["evaluation"] / group
        place = folder / label
        if place not in self.known:
            self.known[place] = {line["id"]: line for line in read_items(folder, entry[group][label])}
        return self.known[place]

    def scores(
        self, entries: Iterable[Mapping[str, Any]], group: str, label: str, ids: Iterable[str] | None = None
    ) -> tuple[list[str], list[list[float]], list[float] | None]:
        """(ids, scores [entries, items], weights of the items); BadInput where the entries have other items."""
        rows = [self.of(entry, group, label) for entry in entries]
        order = list(rows[0]) if ids is None else list(ids)
        if any(row.keys() != set(order) for row in rows):
            raise BadInput(f"{label}: the arms were not evaluated on the same items")
        first = rows[0]
        weights = [float(first[key]["tokens"]) for key in order] if order and "nll" in first[order[0]] else None
        return order, [[float(row[key]["correct"]) for key in order] for row in rows], weights


def _tasks(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    entries = list(entries)
    return [(group, label) for group in GROUPS for label in dict.fromkeys(label for entry in entries for label in entry[group])]


def _seeds(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arm and its repetitions that finished, by seed."""
    return [entry, *(again for again in entry.get("seeds", []) if again.get("status") == "ok")]


def shared_seeds(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The repetitions of two arms with the same seeds, in order; an arm that is not trained has one for all."""

    def by_seed(entry: Mapping[str, Any]) -> dict[Any, Mapping[str, Any]]:
        tune = (entry.get("recipe") or {}).get("tune")
        first = tune.get("seed") if tune else None
        return {one.get("seed", first): one for one in _seeds(entry)}

    left, right = by_seed(a), by_seed(b)
    if list(left) == [None] or list(right) == [None]:
        return list(left.values()), list(right.values())
    both = [seed for seed in left if seed in right]
    return [left[seed] for seed in both], [right[seed] for seed in both]


def _has(entries: Iterable[Mapping[str, Any]], group: str, label: str) -> bool:
    return all(label in entry[group] for entry in entries)


def _shared(
    items: _Items,
    entries: list[Mapping[str, Any]],
    group: str,
    label: str,
    ids: list[str],
    share: tuple[float, Mapping[str, Any]] | None,
) -> list[list[float]]:
    """Scores [entries, items]; with a share, those of the untuned arm plus the share of what each gains on it, item by item."""
    _, y, _ = items.scores(entries, group, label, ids)
    if share is None:
        return y
    part, untuned = share
    _, start, _ = items.scores([untuned], group, label, ids)
    return [[s + part * (v - s) for v, s in zip(row, start[0], strict=True)] for row in y]


def _over_seeds(
    items: _Items,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    group: str,
    label: str,
    share: tuple[float, Mapping[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """The test over seeds and items of two arms, where both have their seeds (or need none)."""
    left, right = shared_seeds(a, b)
    if max(len(left), len(right)) < 2 or not _has([*left, *right], group, label):
        return None
    ids, x, weights = items.scores(left, group, label)
    y = _shared(items, right, group, label, ids, share)
    return statistics.over_seeds(x, y, weights) if len(ids) > 1 else None


def _test(paired: Mapping[str, Any], result: Mapping[str, Any], a: str, b: str, on: str) -> Contrast | None:
    """A result of `paired` or `over_seeds`, turned so that more is better."""
    part = compare_task({**result, "vs_instruct": dict(paired)})
    if part is None:
        return None
    points = not smaller_is_better(result) and max(abs(part.gain), abs(numbers.finite(result.get("score")) or 0)) <= 1
    return Contrast(a, b, on, part.gain, part.ci, part.p, part.n, int(paired.get("seeds", 1)), points, paired)


def _judge(tests: Mapping[Any, Contrast], paired: Mapping[Any, dict[str, Any]]) -> None:
    """Add p_adjusted, mde and verdict to each comparison, corrected over all of them."""
    adjusted = statistics.holm({key: test.p for key, test in tests.items() if test.p is not None})
    for key, test in tests.items():
        paired[key] |= {
            "p_adjusted": adjusted.get(key),
            "mde": test.detectable(),
            "mde_adjusted": test.detectable(len(adjusted)),
            "verdict": test.words(adjusted.get(key), len(adjusted)),
        }


def _against_reference(
    out: Path, items: _Items, arms: Mapping[str, dict[str, Any]], reference: str, group: str, label: str
) -> dict[tuple[str, str, str], Contrast]:
    """One task: every arm, and every seed of it, against the reference; {(arm, group, task): the test that counts}."""
    against = arms[reference]
    other = against[group].get(label)
    if other is None:
        return {}
    best: dict[tuple[str, str, str], Contrast] = {}
    trained = {name: entry for name, entry in arms.items() if name != reference and label in entry[group]}
    repeats = max((len(entry.get("seeds", [])) for entry in trained.values()), default=0)
    for k in range(-1, repeats):  # -1: the arm itself
        tests: dict[str, Contrast] = {}
        found: dict[str, dict[str, Any]] = {}
        for name, entry in trained.items():
            one = entry if k < 0 else next(iter(entry.get("seeds", [])[k : k + 1]), None)
            if one is None or one.get("status") != "ok" or label not in one[group]:
                continue
            places = [out / e["paths"]["evaluation"] / group for e in (one, against)]
            try:
                paired = one[group][label]["vs_instruct"] = paired_results(places[0], one[group][label], places[1], other)
            except BadInput as error:
                say(f"note: {label}: {error}")
                continue
            if (test := _test(paired, one[group][label], name, reference, label)) is not None:
                tests[name], found[name] = test, paired
        _judge(tests, found)
        if k < 0:
            best = {(name, group, label): test for name, test in tests.items()}
    tests, found = {}, {}
    for name, entry in trained.items():
        if "over_seeds" not in entry or (name, group, label) not in best:
            continue
        over = _over_seeds(items, entry, against, group, label)
        if over is not None and (test := _test(over, entry[group][label], name, reference, label)) is not None:
            tests[name], found[name] = test, over
            entry["over_seeds"][group][label]["vs_instruct"] = over
    _judge(tests, found)
    return best | {(name, group, label): test for name, test in tests.items()}


def _summaries(
    arms: Mapping[str, dict[str, Any]], names: list[str], best: Mapping[tuple[str, str, str], Contrast], reference: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """Each arm against the reference on the mean of a group's tasks, corrected over arms within the group."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, words in GROUPS.items():
        tests: dict[str, Contrast] = {}
        for name in names:
            labels = [label for arm, kind, label in best if (arm, kind) == (name, group)]
            if not labels:
                continue
            entry = arms[name]
            over = entry.get("over_seeds", {}).get(group, {})
            counted = {label: {**entry[group][label], "vs_instruct": _counting(entry, over, group, label)} for label in labels}
            part = compare_group({group: counted}, group)
            if part is None:
                continue
            used = [best[name, group, label] for label in labels]
            tests[name] = Contrast(
                name,
                reference,
                words if len(used) > 1 else f"{words} ({labels[0]})",
                part.gain,
                part.ci,
                part.p,
                part.n,
                min(test.seeds for test in used),
                all(test.points for test in used) or (part.tasks < len(used) and abs(part.gain) <= 1),
                used[0].paired if len(used) == 1 else {"ci": part.ci},
            )
        rows = {name: {"diff": test.gain, "ci": list(test.ci) if test.ci else None, "p": test.p} for name, test in tests.items()}
        _judge(tests, rows)
        found[group] = rows
    return found


def _counting(entry: Mapping[str, Any], over: Mapping[str, Any], group: str, label: str) -> dict[str, Any]:
    return over.get(label, {}).get("vs_instruct") or entry[group][label]["vs_instruct"]


def _pairs(items: _Items, arms: Mapping[str, Mapping[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Every two arms on every task, corrected over the pairs of one task."""
    rows: list[dict[str, Any]] = []
    for group, label in _tasks(arms[name] for name in names):
        tests: dict[tuple[str, str], Contrast] = {}
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for a, b in itertools.combinations(names, 2):
            if not _has([arms[a], arms[b]], group, label):
                continue
            result = arms[a][group][label]
            try:
                ids, x, weights = items.scores([arms[a]], group, label)
                _, y, _ = items.scores([arms[b]], group, label, ids)
                over = _over_seeds(items, arms[a], arms[b], group, label)
            except BadInput as error:
                say(f"note: {a} and {b}: {error}")
                continue
            paired = statistics.paired(x[0], y[0], weights, result.get("higher_is_better", True))
            counts = {key: paired[key] for key in ("kept", "lost", "gained")}
            paired = {**counts, **over} if over else paired
            if (test := _test(paired, result, a, b, label)) is not None:
                tests[a, b], found[a, b] = test, {"a": a, "b": b, "group": group, "task": label, **paired}
        _judge(tests, found)
        rows += found.values()
    return rows


def _overall(groups: Mapping[str, Mapping[str, Mapping[str, Any]]], pairs: list[dict[str, Any]], reference: str) -> list[str]:
    """The user's question: which arm gains, which of those loses nothing that could be seen."""

    def shown(group: str, sign: int) -> list[str]:
        rows = {n: r for n, r in groups.get(group, {}).items() if r["p_adjusted"] is not None and r["p_adjusted"] < ALPHA}
        return sorted((n for n, r in rows.items() if r["diff"] * sign > 0), key=lambda n: -abs(rows[n]["diff"]))

    said = []
    gaining, losing = shown("task", 1), shown("general", -1)
    if groups.get("task"):
        said.append(f"Shown to be better than {reference} on the task: {', '.join(gaining) or 'no arm'}.")
    if groups.get("general"):
        said.append(f"Shown to be worse than {reference} on general skills: {', '.join(losing) or 'no arm'}.")
    elif groups.get("task"):
        said.append("General skills were not measured, so nothing is known about forgetting.")
    if len(gaining) > 1:
        first, second = gaining[:2]
        between = [row for row in pairs if row["group"] == "task" and {row["a"], row["b"]} == {first, second}]
        if between and all(row["p_adjusted"] is not None and row["p_adjusted"] < ALPHA for row in between):
            said.append(f"On the task {first} and {second}, the two that gain most, differ from each other.")
        elif between:
            said.append(f"On the task {first} and {second}, the two that gain most, were not told apart from each other.")
    return said
