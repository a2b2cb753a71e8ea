"""The parts of a run's page as plain values, each ready to be shown, or None where the run does not have it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from guidetune.report import heatmap, numbers, plots, provenance, samples
from guidetune.report.findings import (
    GROUPS,
    REFERENCE,
    Comparison,
    arms_of,
    breakdown,
    compare_group,
    compare_task,
    comparisons,
    failed,
    frontier,
    group_mean,
    labels,
    mapping,
    natural,
    signal_ends,
    tasks_of,
    verdicts,
)
from guidetune.report.tables import Row, rows_of, seed_rows, total_seconds
from guidetune.report.text import clip

MAX_SKILLS = 40
MAX_TEXT = 40_000  # characters of the recipe and of other long blocks
MAX_PANELS = 6  # tasks that are drawn one by one; all are in the tables


def page(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, each part already worded, or None where the run does not have it."""
    arms = arms_of(results)
    palette = plots.Palette(list(arms), REFERENCE)
    heatmaps, not_mapped = heatmap.collect(run, results)
    return {
        "title": str(results.get("name") or run.name or "run"),
        "kind": {"compare": "comparison", "eval": "evaluation"}.get(str(results.get("kind")), "run"),
        "created": moment(results.get("created")),
        "seconds": numbers.finite(results.get("seconds")),
        "models": _models(results),
        "sentences": _sentences(results),
        "verdicts": verdicts(results),
        "about": {name: str(arm.get("description") or "") for name, arm in arms.items()},
        "tests": sum(
            compare_group(arm, group) is not None for name, arm in arms.items() for group in GROUPS if name != REFERENCE and not failed(arm)
        ),
        "arms": _arms(results, arms),
        "seeds": seed_rows(results),
        "over_seeds": any(row.comparison is not None for row in seed_rows(results)),
        "details": _details(results),
        "pairs": _pairs(results, arms),
        "notes": _notes(arms),
        "colour": palette.index,
        "forest": _forest(arms, palette),
        "evaluated": any(labels(results, group) for group in GROUPS),
        "tradeoff": _tradeoff(results, arms, palette),
        "skills": _skills(results, arms, palette),
        "difficulty": _difficulty(results, arms, palette),
        "loss": _loss(run, results, arms, palette),
        "confidence": _confidence(mapping(results.get("guidance"))),
        "signal": _signal(arms, palette),
        "scales": _scales(results, palette),
        "curves": _curves(results, arms, palette),
        "heatmaps": heatmaps,
        "heatmaps_missing": not_mapped,
        **browser(run, results),
        "ledger": _ledger(run, results),
        "transfer": _transfer(arms),
        "costs": _costs(run, results, arms),
        "budget": _budget(results),
        "phases": _phases(arms),
        "recipe": _recipe(run, results),
        "versions": list(_leaves(mapping(results.get("versions")))),
        "machine": list(_leaves(mapping(results.get("machine")))),
        "fingerprints": provenance.fingerprints(run, results),
        "stages": provenance.stages(run),
    }


def browser(run: Path, results: Mapping[str, Any], room: float = samples.SIZE_LIMIT) -> dict[str, Any]:
    """The browser of gained and lost items within `room` bytes."""
    found, missing = samples.collect(run, results, room)
    return {"browser": found, "browser_missing": missing, "per_kind": samples.PER_KIND, "text_limit": samples.TEXT_LIMIT}


def moment(value: Any) -> str:
    """A stored time as date and minute."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M")
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OSError, OverflowError):
        return str(value or "")


def _models(results: Mapping[str, Any]) -> dict[str, Any]:
    models = mapping(results.get("models"))
    names = {}
    for role in ("base", "instruct"):
        value = models.get(role)
        names[role] = str(value.get("spec") or value.get("path") or "") if isinstance(value, Mapping) else str(value or "")
    return {"names": names, "pair": list(_leaves(mapping(models.get("pair"))))}


def _arms(results: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for name, arm in arms.items():
        rows: list[Row] = [] if failed(arm) else [row for row in rows_of(results, name, arm) if row.score is not None]
        shown.append(
            {
                "name": name,
                "rows": rows,
                "failed": failed(arm),
                "error": str(arm.get("error") or "no reason was recorded"),
                "seconds": total_seconds(arm),
                "reference": name == REFERENCE,
            }
        )
    return shown


def _forest(arms: Mapping[str, Mapping[str, Any]], palette: plots.Palette) -> Callable[[Comparison, str], Any]:
    """Draws a comparison on the scale that all arms share."""
    parts = [compare_task(result) for arm in arms.values() for group in GROUPS for result in tasks_of(arm, group).values()]
    reach = max((abs(end) for part in parts if part for end in (part.gain, *(part.ci or ()))), default=0.0) or 1.0
    return lambda comparison, name: _markup(plots.forest(comparison.gain, comparison.ci, reach, palette.index(name)))


def _details(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every paired test in full."""
    return [
        {"arm": name, "group": group, "measure": label or f"{group} mean", "mean": label is None, "test": part}
        for (name, group, label), part in comparisons(results).items()
        if label is not None or part.tasks > 1
    ]


def _sentences(results: Mapping[str, Any]) -> list[str]:
    """What the comparison says as a whole; what it says of each arm stands with the arm."""
    comparison = mapping(results.get("comparison"))
    of_arms = {
        str(mapping(entry).get("verdict")) for group in mapping(comparison.get("groups")).values() for entry in mapping(group).values()
    }
    return [str(text) for text in comparison.get("verdict") or [] if str(text).strip() and str(text) not in of_arms]


def _notes(arms: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(task, note) of everything that a task says about its own results, once each, with the arms where not all say it."""
    said: dict[tuple[str, str], list[str]] = {}
    for name, arm in arms.items():
        for group in GROUPS:
            for label, result in tasks_of(arm, group).items():
                notes = result.get("notes") or []
                for note in [notes] if isinstance(notes, str) else notes:
                    said.setdefault((label, str(note)), []).append(name)
    asked = {key: sum(key[0] in {**tasks_of(arm, "task"), **tasks_of(arm, "general")} for arm in arms.values()) for key in said}
    return [(label, note if len(names) == asked[label, note] else f"{note} ({', '.join(names)})") for (label, note), names in said.items()]


def _pairs(results: Mapping[str, Any], arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tests of the arms against each other, where the run made them; `gain` > 0: the first is better."""
    found = []
    for pair in map(mapping, mapping(results.get("comparison")).get("pairs") or []):
        a, b, group, label = (str(pair.get(key)) for key in ("a", "b", "group", "task"))
        result = tasks_of(arms.get(a, {}), group).get(label)
        part = compare_task({**result, "vs_instruct": pair}) if result else None
        if part is not None and b in arms:
            found.append({"a": a, "b": b, "group": group, "measure": label, "test": part})
    return found


def _tradeoff(results: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], palette: plots.Palette) -> dict[str, Any] | None:
    means = {(arm, group): part for (arm, group, label), part in comparisons(results).items() if label is None}
    reference = arms.get(REFERENCE, {})
    before = group_mean(reference, "general")
    if not before or before < 0 or group_mean(reference, "task") is None:
        return None
    points: dict[str, Any] = {REFERENCE: {"x": 1.0, "y": 0.0, "x_ci": None, "y_ci": None, "seeds": []}}
    for name, arm in arms.items():
        if name == REFERENCE or failed(arm):
            continue
        task, general = means.get((name, "task")), means.get((name, "general"))
        if task is None or general is None:
            continue
        repeats = [arm, *map(mapping, arm.get("seeds") or [])] if arm.get("seeds") else []
        again = [(compare_group(one, "general"), compare_group(one, "task")) for one in repeats]
        points[name] = {
            "x": 1 + general.gain / before,
            "y": task.gain,
            "x_ci": tuple(1 + end / before for end in general.ci) if general.ci else None,
            "y_ci": task.ci,
            "seeds": [(1 + kept.gain / before, gain.gain) for kept, gain in again if kept and gain],
        }
    if len(points) < 2:
        return None
    best = frontier({name: (point["x"], point["y"]) for name, point in points.items()})
    return {
        "svg": _markup(plots.gain_against_retention(points, palette, best)),
        "points": points,
        "frontier": best,
        "seeded": any(point["seeds"] for point in points.values()),
    }


def _scales(results: Mapping[str, Any], palette: plots.Palette) -> dict[str, Any] | None:
    """The sweep over merge scales: means per split, and every test score."""
    sweeps: dict[str, Any] = {}
    table = []
    for name, sweep in mapping(results.get("scales")).items():
        sweep = mapping(sweep)
        chosen = numbers.finite(sweep.get("chosen"))
        drawn: dict[str, Any] = {"chosen": chosen, "validation": [], "test": []}
        for point in sorted(map(mapping, sweep.get("points") or []), key=lambda one: numbers.finite(one.get("scale")) or 0.0):
            scale = numbers.finite(point.get("scale"))
            if scale is None:
                continue
            validation, test = mapping(point.get("validation")), mapping(point.get("test"))
            means = [_score_of(validation, group) for group in GROUPS], [_score_of(test, group) for group in GROUPS]
            drawn["validation"].append((scale, *means[0]))
            drawn["test"].append((scale, *means[1]))
            tests = [(group, label, result) for group in GROUPS for label, result in tasks_of(test, group).items()]
            is_chosen = chosen is not None and abs(scale - chosen) < 1e-9
            table.append({"arm": str(name), "scale": scale, "chosen": is_chosen, "validation": means[0], "test": means[1], "tests": tests})
        if drawn["validation"]:
            criterion, where = (str(sweep.get(key) or "") for key in ("criterion", "chosen_on"))
            if where and where not in criterion:
                criterion = f"{criterion}, on {where}".removeprefix(", ")
            sweeps[str(name)] = drawn | {"criterion": criterion, "said": [str(text) for text in sweep.get("verdict") or []]}
    if not sweeps:
        return None
    said = [text for sweep in sweeps.values() for text in sweep["said"]]
    criteria: dict[str, list[str]] = {}
    for name, sweep in sweeps.items():
        criteria.setdefault(sweep["criterion"], []).append(name)
    criteria.pop("", None)
    return {"svg": _markup(plots.scale_sweep(sweeps, palette)), "sweeps": sweeps, "table": table, "said": said, "criteria": criteria}


def _score_of(part: Mapping[str, Any], group: str) -> float | None:
    """A split's mean score of a group: a number, or the mean over its tasks."""
    value = part.get(group)
    return group_mean({group: value}, group) if isinstance(value, Mapping) else numbers.finite(value)


def _curves(results: Mapping[str, Any], arms: Mapping[str, Any], palette: plots.Palette) -> dict[str, Any] | None:
    """Avg@k, pass@k and maj@k over k, for tasks that were answered several times."""
    panels: dict[str, dict[str, dict[str, list[tuple[int, float]]]]] = {}
    for group in GROUPS:
        for label in labels(results, group):
            for name, arm in arms.items():
                for measure, curve in _curves_of(tasks_of(arm, group).get(label, {})).items():
                    panels.setdefault(label, {}).setdefault(measure, {})[name] = curve
    if not panels:
        return None
    drawn = dict(list(panels.items())[:MAX_PANELS])
    table = [
        (label, measure, name, curve)
        for label, by_measure in panels.items()
        for measure, curves in by_measure.items()
        for name, curve in curves.items()
    ]
    ks = sorted({k for *_, curve in table for k, _ in curve})
    return {"svg": _markup(plots.sample_curves(drawn, palette)), "ks": ks, "table": table, "left_out": len(panels) - len(drawn)}


def _curves_of(result: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """{measure: [(k, score)]}: the stored curves, else the pass@k among the metrics."""
    stored = mapping(result.get("curves"))
    ks = [int(k) for k in map(numbers.finite, stored.get("k") or []) if k is not None]
    found = {}
    for measure in ("avg", "pass", "maj"):
        values = stored.get(measure) or []
        known = [(k, value) for k, part in zip(ks, values, strict=False) if (value := numbers.finite(part)) is not None]
        if len(known) > 1:
            found[measure.capitalize() if measure == "avg" else measure] = known
    if not found:
        metrics = mapping(result.get("metrics"))
        passes = [
            (int(key[5:]), value)
            for key, part in metrics.items()
            if key.startswith("pass@") and key[5:].isdigit() and (value := numbers.finite(part)) is not None
        ]
        if len(passes) > 1:
            found["pass"] = sorted(passes)
    return found


def _budget(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """What every arm was allowed to learn from."""
    rows = [
        (str(name), *(numbers.finite(mapping(part).get(key)) for key in ("supervised_tokens", "rows", "steps")))
        for name, part in mapping(results.get("budget")).items()
        if mapping(part)
    ]
    equal = results.get("budget_equal")
    return {"rows": rows, "equal": equal if isinstance(equal, bool) else None} if rows else None


def _phases(arms: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]] | None:
    """A line for each phase of each arm: what it was, and the means of the model after it."""
    keys = ("rows", "supervised_tokens", "steps", "score_low", "score_high", "lr", "epochs", "loss_last", "task_mean", "general_mean")
    rows = [
        (str(name), f"{place}. {mapping(phase).get('name', '')}", *(numbers.finite(mapping(phase).get(key)) for key in keys))
        for name, arm in arms.items()
        for place, phase in enumerate(arm.get("phases") or [], 1)
    ]
    return rows or None


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)


def _skills(results: Mapping[str, Any], arms: Mapping[str, Any], palette: plots.Palette) -> dict[str, Any] | None:
    scores = breakdown(results, "general", "skill")
    if not scores:
        return None

    def change(skill: str) -> float:
        cells = scores[skill]
        others = [value for name, (value, _) in cells.items() if name != REFERENCE]
        return sum(others) / len(others) - cells[REFERENCE][0] if others and REFERENCE in cells else 0.0

    order = sorted(scores, key=lambda skill: (change(skill), natural(skill)))  # most forgotten first
    kept = order if len(order) <= MAX_SKILLS else sorted(order, key=lambda skill: -abs(change(skill)))[:MAX_SKILLS]
    kept = [skill for skill in order if skill in set(kept)]
    names = [name for name in arms if any(name in scores[skill] for skill in kept)]
    figure = plots.skill_bars({skill: scores[skill] for skill in kept}, names, REFERENCE, palette)
    return {
        "svg": _markup(figure),
        "left_out": len(order) - len(kept),
        "names": names,
        "table": [(skill, [scores[skill].get(name) for name in names]) for skill in kept],
    }


def _difficulty(results: Mapping[str, Any], arms: Mapping[str, Any], palette: plots.Palette) -> dict[str, Any] | None:
    panels: dict[str, Any] = {}
    for label in labels(results, "task"):
        one = {"arms": {name: {"task": {label: tasks_of(arm, "task").get(label)}} for name, arm in arms.items()}}
        levels = breakdown(one, "task", "difficulty")
        if len(levels) > 1:
            panels[label] = {level: levels[level] for level in sorted(levels, key=natural)}
    if not panels:
        return None
    drawn = dict(list(panels.items())[:MAX_PANELS])
    names = [name for name in arms if any(name in cells for levels in panels.values() for cells in levels.values())]
    table = [(task, level, [cells.get(name) for name in names]) for task, levels in panels.items() for level, cells in levels.items()]
    return {
        "svg": _markup(plots.by_difficulty(drawn, list(arms), palette)),
        "names": names,
        "table": table,
        "left_out": len(panels) - len(drawn),
    }


def _metrics_file(run: Path, name: str, arm: Mapping[str, Any], kind: Any) -> Path | None:
    stated = mapping(arm.get("paths")).get("metrics")
    candidates = [run / stated] if isinstance(stated, str) and stated else []
    candidates.append(run / "arms" / name / "metrics.jsonl")
    if kind == "run" and name != REFERENCE:
        candidates.append(run / "metrics.jsonl")
    return next((path for path in candidates if path.is_file()), None)


def _loss(run: Path, results: Mapping[str, Any], arms: Mapping[str, Any], palette: plots.Palette) -> dict[str, Any] | None:
    curves: dict[str, Any] = {}
    for name, arm in arms.items():
        path = _metrics_file(run, name, arm, results.get("kind"))
        if path is None:
            continue
        curve: dict[str, list[tuple[float, float]]] = {"train": [], "validation": []}
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = mapping(json.loads(line))
                except ValueError:
                    continue  # a killed run may leave half a line
                step = numbers.finite(row.get("step"))
                for key, kind in (("loss", "train"), ("validation_loss", "validation")):
                    value = numbers.finite(row.get(key))
                    if step is not None and value is not None:
                        curve[kind].append((step, value))
        if curve["train"] or curve["validation"]:
            curves[name] = curve
    if not curves:
        return None
    table = [
        (
            name,
            *(
                ends
                for kind in ("train", "validation")
                for ends in ((curve[kind][0][1], curve[kind][-1][1]) if curve[kind] else (None, None))
            ),
        )
        for name, curve in curves.items()
    ]
    return {
        "svg": _markup(plots.loss_curves(curves, palette)),
        "table": table,
        "validated": any(curve["validation"] for curve in curves.values()),
    }


def _confidence(guidance: Mapping[str, Any]) -> dict[str, Any] | None:
    histogram = mapping(guidance.get("histogram"))
    edges = [value for part in histogram.get("edges") or [] if (value := numbers.finite(part)) is not None]
    counts = [numbers.finite(part) or 0.0 for part in histogram.get("counts") or []]
    mean, below = numbers.finite(guidance.get("mean_confidence")), numbers.finite(guidance.get("below_0.05"))
    if mean is None and not counts:
        return None
    drawable = len(edges) == len(counts) + 1 and sum(counts) > 0
    return {
        "svg": _markup(plots.confidence_histogram(edges, counts, mean, below)) if drawable else None,
        "bins": list(zip(edges, edges[1:], counts, strict=False)) if drawable else [],
        "mean": mean,
        "below": below,
        "tokens": guidance.get("supervised_tokens"),
        "teacher": str(guidance.get("teacher") or REFERENCE),
    }


def _signal(arms: Mapping[str, Mapping[str, Any]], palette: plots.Palette) -> dict[str, Any] | None:
    shares = {}
    for name, arm in arms.items():
        parts = [
            {key: numbers.finite(mapping(part).get(key)) for key in ("lo", "hi", "tokens", "signal")} for part in arm.get("signal") or []
        ]
        parts = [part for part in parts if None not in (part["lo"], part["hi"], part["signal"])]
        if parts:
            shares[name] = parts
    if not shares:
        return None
    table = [(name, *signal_ends(parts)) for name, parts in shares.items()]
    widest = max(shares.values(), key=len)
    tokens = sum(part["tokens"] or 0 for part in widest)
    bins = [part | {"share": (part["tokens"] or 0) / tokens if tokens else None} for part in widest]
    return {"svg": _markup(plots.signal_shares(shares, palette)), "table": table, "shares": shares, "bins": bins}


def _ledger(run: Path, results: Mapping[str, Any]) -> dict[str, Any] | None:
    ledger = mapping(results.get("ledger"))
    if not ledger and (run / "data" / "ledger.json").is_file():
        try:
            ledger = mapping(json.loads((run / "data" / "ledger.json").read_text(encoding="utf-8", errors="replace")))
        except ValueError:
            ledger = {}
    if not ledger:
        return None

    def row(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
        dropped = mapping(part.get("dropped"))
        return {
            "name": name,
            **{key: part.get(key) for key in ("read", "made", "used", "cut")},
            "dropped": sum(numbers.finite(n) or 0 for n in dropped.values()),
        }

    examples = mapping(ledger.get("examples"))
    reasons = [
        (
            str(reason),
            n,
            [_example(mapping(example)) for example in list(examples.get(reason) or [])[:3]],
        )
        for reason, n in sorted(mapping(ledger.get("dropped")).items(), key=lambda pair: -(numbers.finite(pair[1]) or 0))
    ]
    changes = [
        (_words(key), value) for key in ("tokens_cut", "appended_eos", "trimmed_turns") if (value := numbers.finite(ledger.get(key)))
    ]
    read, used = numbers.finite(ledger.get("read")), numbers.finite(ledger.get("used"))
    made = numbers.finite(ledger.get("made")) or 0
    total = row("all", ledger)
    steps = [mapping(step) for step in ledger.get("operations") or []]
    return {
        "sources": [row(str(name), mapping(part)) for name, part in mapping(ledger.get("sources")).items()],
        "total": total,
        "reasons": reasons,
        "lengths": [(str(key), value) for key, value in mapping(ledger.get("lengths")).items()],
        "changes": changes,
        "tokens": ledger.get("tokens"),
        "supervised": ledger.get("supervised_tokens"),
        "stops": ledger.get("ends_with_stop"),
        "used": used,
        "unaccounted": None if read is None or used is None else int(read + made - used - total["dropped"]),
        "made": made,
        "operations": [
            {
                "name": str(step.get("method")),
                **{key: step.get(key) for key in ("in", "made", "out")},
                "dropped": sum(numbers.finite(n) or 0 for n in mapping(step.get("dropped")).values()),
            }
            for step in steps
        ],
    }


def _example(example: Mapping[str, Any]) -> str:
    """One dropped row: where it stands and why it was dropped."""
    place = ", ".join(
        f"{word}{example[key]}" for key, word in (("id", ""), ("source", ""), ("line", "line ")) if example.get(key) not in (None, "")
    )
    return clip(f"{place}: {example['why']}" if example.get("why") else place, 300)[0]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every leaf of nested settings; long lists are cut with a note."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{prefix} › {_words(key)}" if prefix else _words(key))
    elif isinstance(value, (list, tuple)):
        shown = ", ".join(
            numbers.any_value(part) if not isinstance(part, (Mapping, list)) else json.dumps(part, default=str) for part in value[:8]
        )
        more = f", … {len(value) - 8} more" if len(value) > 8 else ""
        yield prefix, clip(shown or "none", 600)[0] + more
    else:
        yield prefix, clip(numbers.any_value(value), 600)[0]


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _transfer(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Facts of the transfers as one table, a row per fact and a column per arm."""
    facts = {name: dict(list(_leaves(mapping(arm.get("transfer"))))[:40]) for name, arm in arms.items() if mapping(arm.get("transfer"))}
    if not facts:
        return None
    keys = list(dict.fromkeys(key for leaves in facts.values() for key in leaves))
    return {"names": list(facts), "rows": [(key, [leaves.get(key, "") for leaves in facts.values()]) for key in keys]}


def _costs(run: Path, results: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    shown = []
    for name, arm in arms.items():
        cost, tune = mapping(arm.get("cost")), mapping(arm.get("tune"))
        if not cost and not tune:
            continue
        seconds, tokens = numbers.finite(cost.get("tune_s")), numbers.finite(cost.get("tokens"))
        answered = [
            numbers.finite(mapping(result.get("cost")).get("tokens")) for group in GROUPS for result in tasks_of(arm, group).values()
        ]
        shown.append(
            {
                "name": name,
                "stages": [numbers.finite(cost.get(f"{stage}_s")) for stage in ("guide", "tune", "transfer", "evaluate")],
                "total": total_seconds(arm),
                "tokens": tokens,
                "steps": numbers.finite(cost.get("steps", tune.get("steps"))),
                "rate": tokens / seconds if tokens and seconds else None,
                "answered": sum(value for value in answered if value is not None) or None,
                "memory": numbers.finite(cost.get("peak_rss_mb")),
                "disk": provenance.disk_of(run, name, arm, results.get("kind")),
            }
        )
    if not shown:
        return None
    shared = [
        (what, folder, provenance.size(run / folder))
        for what, folder in (("rows", "data"), ("guidance", "guidance"))
        if (run / folder).is_dir()
    ]
    return {"rows": shown, "shared": shared, "disk": provenance.size(run), "seconds": numbers.finite(results.get("seconds"))}


def _recipe(run: Path, results: Mapping[str, Any]) -> str:
    recipe = mapping(results.get("recipe"))
    if recipe:
        import yaml

        # A round trip through JSON turns tuples and paths into what YAML can write plainly.
        text = yaml.safe_dump(json.loads(json.dumps(recipe, default=str)), sort_keys=False, allow_unicode=True, width=100)
    else:
        path = run / "recipe.yaml"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text, cut = clip(text, MAX_TEXT)
    return text + (f"\n# … {cut:,} more characters in recipe.yaml" if cut else "")
