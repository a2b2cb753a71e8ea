"""From judged outputs to a task's result: scores with intervals, breakdowns, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from guidetune.evaluation.metrics import majority, majority_at_k, pass_at_k, same_votes
from guidetune.evaluation.statistics import bootstrap, sample_intervals, wilson
from guidetune.evaluation.task import Item, Output, Task

if TYPE_CHECKING:
    from rich.table import Table

CURVES = ("avg", "pass", "maj")
BREAKDOWNS = ("skill", "difficulty", "category")


def judge(task: Task, item: Item, outputs: Sequence[Output], judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result line of one item from the judgement of each output; of several, `correct` is the mean and `samples` holds each."""
    first, output = judged[0], outputs[0]
    line: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "output": task.kept_text(output), "reference": item.reference}
    if len(outputs) == 1:
        line.update(first)
    else:
        line["correct"] = sum(one["correct"] for one in judged) / len(judged)
        line.update({key: sum(one[key] for one in judged) / len(judged) for key in numbers(first) if key != "correct"})
        best = majority([one.get("answer") for one in judged], task.same_answer)
        line["majority"] = judged[best]["correct"] if best is not None else 0
        line["samples"] = [
            {"output": task.kept_text(one), "finished": one.finished, "tokens": one.tokens, **verdict}
            for one, verdict in zip(outputs, judged, strict=True)
        ]
    if output.loglik is not None:
        line.update({"choices": list(item.choices or ()), "choices_loglik": list(output.loglik)})
    if task.mode == "generate":
        line["finished"] = sum(one.finished for one in outputs) / len(outputs)
        line.setdefault("tokens", sum(one.tokens for one in outputs))
    if output.prior_loglik is not None:
        line["choices_prior_loglik"] = list(output.prior_loglik)
    line["meta"] = dict(item.meta)
    if any(one.cut for one in outputs):
        line["cut"] = max(one.cut for one in outputs)
    return line


def curves(task: Task, lines: Sequence[Mapping[str, Any]], samples: int, seed: int) -> dict[str, Any]:
    """Scores against the number k of samples, k = 1, 2, 4, ..., n, from all n.

    `{"k", "avg", "pass", "maj", "ci": {"avg": [[lo, hi], ...], ...}}`

    `pass`: unbiased pass@k. `maj`: mean over the subsets of k samples of whether their majority answer is right (`metrics.majority_at_k`).
    `avg`: the mean over all subsets is the same for every k; its interval is that of an evaluation with k samples, so it narrows
    with k. Intervals are 95 % bootstraps over items. A sample counts as right when its `correct` is at least 1.
    """
    ks = [k for k in range(1, samples + 1) if k & (k - 1) == 0 or k == samples]
    correct = [[float(one["correct"]) for one in line["samples"]] for line in lines]
    right = [sum(value >= 1 for value in values) for values in correct]
    votes = [same_votes([one.get("answer") for one in line["samples"]], task.same_answer) for line in lines]
    found: dict[str, Any] = {"k": ks, "avg": [], "pass": [], "maj": [], "ci": {"avg": [], "pass": [], "maj": []}}
    passed = {k: [pass_at_k(samples, c, k) for c in right] for k in ks}
    majorities = {k: majority_at_k(votes, correct, k, seed) for k in ks}
    means = [sum(values) / samples for values in correct]
    # where all samples of an item agree there is nothing to draw, and an interval of right-or-wrong scores is never a point
    agreed = set(means) <= {0.0, 1.0}
    averages = [interval(means, None, lines, seed)] * len(ks) if agreed else sample_intervals(correct, ks, seed)
    mean_correct = sum(means) / len(means)
    for k, low_high in zip(ks, averages, strict=True):
        found["avg"].append(mean_correct)
        found["ci"]["avg"].append(list(low_high))
        for name, values in (("pass", passed[k]), ("maj", majorities[k])):
            found[name].append(sum(values) / len(values))
            found["ci"][name].append(list(interval(values, None, lines, seed)))
    return found


def numbers(verdict: Mapping[str, Any]) -> list[str]:
    """Names of the numeric entries, in order."""
    return [key for key, value in verdict.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]


def summarise(task: Task, lines: Sequence[Mapping[str, Any]], samples: int, seed: int) -> dict[str, Any]:
    """The TaskResult of all lines; see `evaluate`."""
    values = [float(line["correct"]) for line in lines]
    weights = _weights(lines)
    metrics: dict[str, Any] = {}
    skip = {"reference", "tokens", "cut", *(("nll", "correct") if weights is not None else ())}
    for key in numbers(lines[0]):
        if key not in skip:
            metrics[task.metric if key == "correct" else key] = sum(line[key] for line in lines) / len(lines)
    name = task.metric
    if samples > 1 and task.mode == "generate":
        name = f"avg@{samples}"
        metrics[name] = metrics.pop(task.metric)
        metrics[f"maj@{samples}"] = metrics.pop("majority")
        right = [sum(1 for one in line["samples"] if one["correct"] >= 1) for line in lines]
        metrics.update({f"pass@{k}": sum(pass_at_k(samples, c, k) for c in right) / len(right) for k in range(1, samples + 1)})
    metrics.update(task.overall(lines))
    extra: dict[str, Any] = {"notes": notes} if (notes := task.notes(lines)) else {}
    if samples > 1 and task.mode == "generate":
        extra["curves"] = curves(task, lines, samples, seed)
    score = task.scale(mean(values, weights))
    metrics.setdefault(name, score)
    return {
        "score": finite(score),
        "ci": [finite(task.scale(bound)) for bound in interval(values, weights, lines, seed)],
        "n": len(lines),
        "metric": name,
        "higher_is_better": task.higher_is_better,
        "metrics": {key: finite(value) for key, value in metrics.items()},
        "by": {key: groups for key in BREAKDOWNS if (groups := _by(task, lines, key))},
        **extra,
    }


def _weights(lines: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Tokens, for results per token (lines with an `nll`); else every item counts the same."""
    return [float(line["tokens"]) for line in lines] if "nll" in lines[0] else None


def mean(values: Sequence[float], weights: Sequence[float] | None) -> float:
    if weights is None:
        return sum(values) / len(values)
    return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)


def interval(
    values: Sequence[float], weights: Sequence[float] | None, lines: Sequence[Mapping[str, Any]], seed: int
) -> tuple[float, float]:
    """95 %: Wilson for right-or-wrong items, else a bootstrap over items (over its windows, when a text is the only item)."""
    if weights is None and set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values))
    if len(lines) == 1 and len(lines[0].get("windows", ())) > 1:
        parts = lines[0]["windows"]
        return bootstrap([nll / tokens for nll, tokens in parts], [tokens for _, tokens in parts], seed)
    return bootstrap(values, weights, seed)


def _by(task: Task, lines: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["meta"].get(key) is not None:
            groups.setdefault(str(line["meta"][key]), []).append(line)
    found = {}
    for name in sorted(groups, key=lambda text: (len(text), text) if text.isdigit() else (99, text)):
        values = [float(line["correct"]) for line in groups[name]]
        found[name] = {"score": finite(task.scale(mean(values, _weights(groups[name])))), "n": len(values)}
    return found


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if isfinite(value) else None


def table(results: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """The results of one model for the terminal: score, 95 % interval, number of items, further metrics."""
    from rich.table import Table

    shown = Table(title=title)
    for heading in ("task", "metric", "score", "95 % interval", "items", "also"):
        shown.add_column(heading, justify="right" if heading in ("score", "items") else "left")
    for label, result in results.items():
        also = ", ".join(f"{key} {_short(value)}" for key, value in result["metrics"].items() if key != result["metric"])
        low, high = result["ci"]
        shown.add_row(label, result["metric"], _short(result["score"]), f"{_short(low)} to {_short(high)}", str(result["n"]), also)
    return shown


def curve_table(results: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Avg@k, pass@k and maj@k against k, with intervals, of the tasks that were sampled; None when there is none."""
    from rich.table import Table

    shown = Table("task", "k", "avg@k", "pass@k", "maj@k", box=None, pad_edge=False, header_style="bold")
    for label, result in results.items():
        found = result.get("curves") or {"k": []}
        for i, k in enumerate(found["k"]):
            cells = [f"{found[name][i]:.3f} ({found['ci'][name][i][0]:.3f} to {found['ci'][name][i][1]:.3f})" for name in CURVES]
            shown.add_row(label if i == 0 else "", str(k), *cells)
    return shown if shown.row_count else None


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
