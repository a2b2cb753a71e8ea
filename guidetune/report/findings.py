"""What the numbers of a run allow to be said: comparisons with the instruct model, and one careful sentence per arm."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from guidetune.report import numbers

REFERENCE = "instruct"
GROUPS = ("task", "general")
LEVEL = 0.05
# Metrics that are better when smaller, for task results that do not say `higher_is_better` themselves.
_SMALLER_IS_BETTER = {
    "nll",
    "nll_per_token",
    "loss",
    "perplexity",
    "ppl",
    "bits_per_byte",
    "bits_per_token",
    "word_perplexity",
    "wer",
    "cer",
    "error_rate",
}


def mapping(value: Any) -> dict[str, Any]:
    """`value` when it is a mapping, else an empty one: every part of results.json may be missing."""
    return dict(value) if isinstance(value, Mapping) else {}


def arms_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All arms by name, the instruct model first."""
    arms = {str(name): mapping(arm) for name, arm in mapping(results.get("arms")).items()}
    return dict(sorted(arms.items(), key=lambda pair: pair[0] != REFERENCE))


def failed(arm: Mapping[str, Any]) -> bool:
    """Whether an arm ended with an error."""
    return arm.get("status") not in (None, "ok")


def tasks_of(arm: Mapping[str, Any], group: str) -> dict[str, dict[str, Any]]:
    """The task results of one group ("task" or "general") by label."""
    return {str(label): mapping(result) for label, result in mapping(arm.get(group)).items() if isinstance(result, Mapping)}


def labels(results: Mapping[str, Any], group: str) -> list[str]:
    """Every task label of a group that any arm has, in order of appearance."""
    return list(dict.fromkeys(label for arm in arms_of(results).values() for label in tasks_of(arm, group)))


def smaller_is_better(result: Mapping[str, Any]) -> bool:
    """Whether a smaller score of this task result is the better one."""
    stated = result.get("higher_is_better")
    return not stated if isinstance(stated, bool) else str(result.get("metric", "")).lower() in _SMALLER_IS_BETTER


def group_mean(arm: Mapping[str, Any], group: str) -> float | None:
    """The mean score of a group: as stored, or computed from its tasks."""
    stored = numbers.finite(arm.get(f"{group}_mean"))
    if stored is not None:
        return stored
    scores = [numbers.finite(result.get("score")) for result in averaged(arm, group)]
    known = [value for value in scores if value is not None]
    return sum(known) / len(known) if known else None


def averaged(arm: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    """The results that a group's mean is over: scores of which more is better; a likelihood in nats has another unit.

    A group of likelihoods alone is averaged as it is.
    """
    results = list(tasks_of(arm, group).values())
    return [result for result in results if not smaller_is_better(result)] or results


@dataclass(frozen=True)
class Comparison:
    """An arm against the instruct model on the same items; `gain` > 0 is better, whichever way the metric points."""

    gain: float
    ci: tuple[float, float] | None
    p: float | None
    n: int
    tasks: int = 1
    kept: int | None = None
    lost: int | None = None
    gained: int | None = None
    test: str = ""
    p_adjusted: float | None = None
    mde: float | None = None
    verdict: str = ""

    @property
    def significant(self) -> bool:
        """By its own p alone."""
        return self.p is not None and self.p < LEVEL

    @property
    def corrected(self) -> float | None:
        """p after correction over the arms where that is known, else p."""
        return self.p if self.p_adjusted is None else self.p_adjusted

    @property
    def holds(self) -> bool:
        """Significant after correction over the arms."""
        return self.corrected is not None and self.corrected < LEVEL


def compare_task(result: Mapping[str, Any]) -> Comparison | None:
    """The paired comparison stored with one task result, or None."""
    paired = mapping(result.get("vs_instruct"))
    diff = numbers.finite(paired.get("diff"))
    if diff is None:
        return None
    ci = numbers.interval_ends(paired.get("ci"))
    if smaller_is_better(result):
        diff, ci = -diff, (-ci[1], -ci[0]) if ci else None
    counts = [int(value) if (value := numbers.finite(paired.get(key))) is not None else None for key in ("kept", "lost", "gained")]
    n = numbers.finite(paired.get("n")) or numbers.finite(result.get("n")) or 0
    return Comparison(
        diff,
        ci,
        numbers.finite(paired.get("p")),
        int(n),
        1,
        *counts,
        test=str(paired.get("test") or ""),
        p_adjusted=numbers.finite(paired.get("p_adjusted")),
        mde=numbers.finite(paired.get("mde")),
        verdict=str(paired.get("verdict") or ""),
    )


def compare_group(arm: Mapping[str, Any], group: str) -> Comparison | None:
    """An arm's mean gain over the tasks of a group (see `averaged`).

    One task: its paired test. Several: mean of the gains; the tasks have different items, so their interval half-widths h_k add in squares,
    h = sqrt(sum h_k^2) / K, and p comes from the normal distribution with standard error h / 1.96.
    """
    parts = [part for part in map(compare_task, averaged(arm, group)) if part is not None]
    if len(parts) <= 1:
        return parts[0] if parts else None
    mean = sum(part.gain for part in parts) / len(parts)
    n = sum(part.n for part in parts)

    def total(values: list[int | None]) -> int | None:
        return None if None in values else sum(value for value in values if value is not None)

    counts = [total([getattr(part, key) for part in parts]) for key in ("kept", "lost", "gained")]
    if any(part.ci is None for part in parts):
        return Comparison(mean, None, None, n, len(parts), *counts)
    half = math.sqrt(sum(((part.ci[1] - part.ci[0]) / 2) ** 2 for part in parts if part.ci)) / len(parts)
    if half > 0:
        p = math.erfc(abs(mean) / (half / 1.959964) / math.sqrt(2))
    else:
        p = 1.0 if mean == 0 else None  # no spread at all: a test has nothing to work with
    return Comparison(mean, (mean - half, mean + half), p, n, len(parts), *counts, test="normal approximation over tasks")


def comparisons(results: Mapping[str, Any]) -> dict[tuple[str, str, str | None], Comparison]:
    """Every comparison with the instruct model by (arm, group, task label), the mean of a group under None.

    An arm with several seeds is compared over seeds and items, where that test was made. Each has its p after Holm's correction over the
    arms of the same task: the stored one, else computed here.
    """
    from guidetune.evaluation.statistics import holm

    found: dict[tuple[str, str, str | None], Comparison] = {}
    stored = mapping(mapping(results.get("comparison")).get("groups"))
    for name, arm in arms_of(results).items():
        if name == REFERENCE or failed(arm):
            continue
        for group in GROUPS:
            for label, result in tasks_of(arm, group).items():
                first = compare_task(result)
                if (part := compare_over_seeds(arm, group, label) or first) is not None:
                    # a test over seeds has no single item that was kept or lost
                    counts = {} if first is None else {key: getattr(first, key) for key in ("kept", "lost", "gained")}
                    found[name, group, label] = replace(part, **counts)
            counted = {
                label: {**result, "vs_instruct": over_seeds(arm, group, label).get("vs_instruct") or result.get("vs_instruct")}
                for label, result in tasks_of(arm, group).items()
            }
            if (part := compare_group({group: counted}, group)) is not None:
                found[name, group, None] = _stored(part, mapping(mapping(stored.get(group)).get(name)))
    for family in {key[1:] for key in found}:
        members = {key: part for key, part in found.items() if key[1:] == family and part.p is not None}
        for key, p in holm({key: part.p for key, part in members.items()}).items():
            if members[key].p_adjusted is None:
                found[key] = replace(members[key], p_adjusted=p)
    return found


def over_seeds(arm: Mapping[str, Any], group: str, label: str) -> dict[str, Any]:
    """Mean, spread and test of one task over an arm's seeds; empty when it was not repeated."""
    return mapping(mapping(mapping(arm.get("over_seeds")).get(group)).get(label))


def compare_over_seeds(arm: Mapping[str, Any], group: str, label: str) -> Comparison | None:
    """The test of one task over seeds and items, where the run made one."""
    test = over_seeds(arm, group, label).get("vs_instruct")
    return compare_task({**tasks_of(arm, group).get(label, {}), "vs_instruct": test}) if test else None


def _stored(part: Comparison, entry: Mapping[str, Any]) -> Comparison:
    """The comparison of a group as the run itself made it (over seeds, where there were several), else `part`."""
    diff = numbers.finite(entry.get("diff"))
    if diff is None:
        return replace(part, p_adjusted=numbers.finite(entry.get("p_adjusted")) if entry else part.p_adjusted)
    return replace(
        part,
        gain=diff,
        ci=numbers.interval_ends(entry.get("ci")),
        p=numbers.finite(entry.get("p")),
        p_adjusted=numbers.finite(entry.get("p_adjusted")),
        mde=numbers.finite(entry.get("mde")),
        verdict=str(entry.get("verdict") or ""),
    )


def shown_mean(arm: Mapping[str, Any], group: str) -> float | None:
    """A group's mean score, over the seeds where there are several."""
    over = numbers.finite(mapping(mapping(arm.get("over_seeds")).get(f"{group}_mean")).get("mean"))
    return group_mean(arm, group) if over is None else over


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names whose point no other beats on one axis without losing on the other (more is better on both), by x ascending."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a >= x and b >= y and (a > x or b > y) for other, (a, b) in points.items() if other != name)

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


@dataclass(frozen=True)
class Verdict:
    """One arm in words: `parts` on the task and on general skills. `tone`: reference, better, worse, mixed, even, unknown or failed."""

    arm: str
    parts: tuple[str, ...]
    tone: str

    @property
    def text(self) -> str:
        """All parts on one line."""
        return " ".join(self.parts)


def _n(comparison: Comparison) -> str:
    return f"n = {numbers.count(comparison.n)}" if comparison.n else "this sample size"


def _significance(comparison: Comparison, adjusted: float | None, tests: int) -> str:
    text = f"{numbers.p_value(comparison.p)}, significant"
    if adjusted is not None and adjusted >= LEVEL:
        return f"{text} alone, but not after Holm correction over the {tests} arms"
    return text


def _clause(
    name: str, arm: Mapping[str, Any], reference: Mapping[str, Any], group: str, comparison: Comparison | None, tests: int
) -> str | None:
    results = tasks_of(arm, group)
    score, before = shown_mean(arm, group), shown_mean(reference, group)
    if not results or score is None:
        return None
    if comparison is None:
        return f"{name} {numbers.score(score)}, without a paired test against instruct"
    over = f" (mean of {comparison.tasks} tasks)" if comparison.tasks > 1 else ""
    if comparison.tasks < len(results):
        over = f" (tested on {comparison.tasks} of {len(results)} tasks)"
    if len(results) == 1 and smaller_is_better(next(iter(results.values()))):
        over += " (a smaller score is better; + means improved)"
    change = f"{numbers.signed(comparison.gain)} {numbers.interval(comparison.ci)}" if comparison.ci else numbers.signed(comparison.gain)
    path = f"{numbers.score(before)} → {numbers.score(score)}, " if before is not None else ""
    if comparison.verdict:
        return f"{name}{over} {path.removesuffix(', ')}: {comparison.verdict.removesuffix('.')}"
    if comparison.significant:
        evidence = _significance(comparison, comparison.p_adjusted, tests)
    elif comparison.p is None:
        evidence = "no test available"
    else:
        evidence = f"{numbers.p_value(comparison.p)}, not distinguishable at {_n(comparison)}"
        if comparison.ci and comparison.ci[0] < 0:
            evidence += f"; a loss of up to {numbers.score(-comparison.ci[0])} is not excluded"
    return f"{name}{over} {path}{change} against instruct ({evidence})"


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """One sentence per arm that claims no more than the paired tests allow."""

    arms = arms_of(results)
    reference = arms.get(REFERENCE, {})
    means = {(arm, group): part for (arm, group, label), part in comparisons(results).items() if label is None}
    adjusted = {key: part.p_adjusted for key, part in means.items() if part.p_adjusted is not None}
    said = []
    for name, arm in arms.items():
        if failed(arm):
            said.append(Verdict(name, (f"failed: {arm.get('error') or 'no reason was recorded'}",), "failed"))
            continue
        if name == REFERENCE:
            said.append(Verdict(name, (_reference_text(arm),), "reference"))
            continue
        clauses = [
            _clause(word, arm, reference, group, means.get((name, group)), sum(key[1] == group for key in adjusted))
            for word, group in (("task", "task"), ("general skills", "general"))
        ]
        stated = [clause for clause in clauses if clause]
        if not stated:
            said.append(Verdict(name, ("not evaluated: nothing can be said about its gain or its forgetting.",), "unknown"))
            continue
        parts = [f"{clause}." for clause in stated]
        if len(parts) > 1 and not any(part.verdict for (arm_, _), part in means.items() if arm_ == name):
            parts = ["; ".join(stated) + "."]
        if clauses[0] and not clauses[1]:
            parts.append("General skills were not measured, so forgetting is unknown.")
        elif clauses[1] and not clauses[0]:
            parts.append("The task was not measured, so the gain is unknown.")
        said.append(Verdict(name, tuple(parts), _tone({group: means.get((name, group)) for group in GROUPS}, name, adjusted)))
    return said


def _reference_text(arm: Mapping[str, Any]) -> str:
    parts = [
        f"{word} {numbers.score(mean)}"
        for word, group in (("task", "task"), ("general skills", "general"))
        if (mean := group_mean(arm, group)) is not None
    ]
    return f"the reference, untouched: {', '.join(parts)}." if parts else "the reference, untouched; not evaluated."


def _tone(parts: Mapping[str, Comparison | None], name: str, adjusted: Mapping[tuple[str, str], float]) -> str:
    known = {group: part for group, part in parts.items() if part is not None and (name, group) in adjusted}
    if not known:
        return "unknown"
    signs = {part.gain > 0 for group, part in known.items() if adjusted[name, group] < LEVEL}
    return {frozenset(): "even", frozenset({True}): "better", frozenset({False}): "worse"}.get(frozenset(signs), "mixed")


def breakdown(results: Mapping[str, Any], group: str, by: str) -> dict[str, dict[str, tuple[float, int]]]:
    """{key: {arm: (score, n)}} over all tasks of a group, e.g. by skill. Keys met in several tasks are averaged over their items.

    A task without such a split counts as one key under its own label when `by` is "skill".
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for name, arm in arms_of(results).items():
        for label, result in tasks_of(arm, group).items():
            split = mapping(mapping(result.get("by")).get(by))
            if not split and by == "skill":
                split = {label: result}
            for key, part in split.items():
                value, n = numbers.finite(mapping(part).get("score")), numbers.finite(mapping(part).get("n")) or 0
                if value is None:
                    continue
                cell = sums.setdefault(str(key), {}).setdefault(name, [0.0, 0.0])
                cell[0] += value * max(n, 1)
                cell[1] += max(n, 1)
    return {key: {name: (total / n, int(n)) for name, (total, n) in cells.items()} for key, cells in sums.items()}


def natural(key: str) -> list[Any]:
    """Sort key that puts "10" after "9" and "step 10" after "step 9"."""
    return [
        (0, float(part), "") if part.replace(".", "", 1).isdigit() else (1, 0.0, part) for part in re.split(r"(\d+(?:\.\d+)?)", key) if part
    ]


def signal_ends(bins: Any, low: float = 0.3, high: float = 0.9) -> tuple[float | None, float | None]:
    """Shares of the learning signal from tokens with teacher confidence < `low` and >= `high`; None where no bin edge falls there."""
    parts = [
        (a, b, s)
        for part in (bins or [])
        if None
        not in ((a := numbers.finite(part.get("lo"))), (b := numbers.finite(part.get("hi"))), (s := numbers.finite(part.get("signal"))))
    ]
    below = [s for a, b, s in parts if b <= low + 1e-9]
    above = [s for a, b, s in parts if a >= high - 1e-9]
    edges = [edge for a, b, _ in parts for edge in (a, b)]
    low_is_edge = any(abs(edge - low) < 1e-9 for edge in edges)
    high_is_edge = any(abs(edge - high) < 1e-9 for edge in edges)
    return (sum(below) if low_is_edge else None, sum(above) if high_is_edge else None)
