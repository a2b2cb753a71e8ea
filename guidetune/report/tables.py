"""The arms table: for the terminal (rich), as Markdown and as CSV. One list of rows feeds all of them and the page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guidetune.report import numbers
from guidetune.report.findings import (
    GROUPS,
    REFERENCE,
    Comparison,
    arms_of,
    averaged,
    compare_over_seeds,
    comparisons,
    failed,
    labels,
    mapping,
    over_seeds,
    shown_mean,
    tasks_of,
)
from guidetune.report.text import clean

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measure of one arm: a task, or the mean of a group with several tasks (`group_row`); a mean over seeds has its `sd`, not `ci`."""

    arm: str
    group: str
    label: str
    score: float | None
    ci: tuple[float, float] | None
    n: int | None
    comparison: Comparison | None
    group_row: bool = False
    sd: float | None = None
    seeds: int = 1

    @property
    def spread(self) -> str:
        """What stands behind the score: its interval, or the standard deviation over seeds."""
        return f"± {numbers.score(self.sd)}" if self.sd is not None else numbers.interval(self.ci, 2) if self.ci else ""


def rows_of(results: Mapping[str, Any], name: str, arm: Mapping[str, Any]) -> list[Row]:
    """The measures of one arm: every task of both groups, then the mean of a group with several tasks. Empty when it was not evaluated."""
    rows: list[Row] = []
    if not any(tasks_of(arm, group) for group in GROUPS):
        return rows
    known = comparisons(results)
    for group in GROUPS:
        tasks = tasks_of(arm, group)
        for label in labels(results, group):
            result = tasks.get(label, {})
            n = numbers.finite(result.get("n"))
            over = over_seeds(arm, group, label)
            repeated = bool(over.get("vs_instruct"))  # what is tested is what is shown
            rows.append(
                Row(
                    name,
                    group,
                    label,
                    numbers.finite(over.get("mean") if repeated else result.get("score")),
                    None if repeated else numbers.interval_ends(result.get("ci")),
                    None if n is None else int(n),
                    known.get((name, group, label)),
                    sd=numbers.finite(over.get("sd")) if repeated else None,
                    seeds=len(over.get("scores") or []) if repeated else 1,
                )
            )
        if len(averaged(arm, group)) > 1:
            rows.append(Row(name, group, f"{group} mean", shown_mean(arm, group), None, None, known.get((name, group, None)), True))
    return rows


def total_seconds(arm: Mapping[str, Any]) -> float | None:
    """Seconds over all stages of an arm, or None when none was recorded."""
    known = [
        value
        for key, part in mapping(arm.get("cost")).items()
        # evaluate_wall_s is the same evaluation again, loading included
        if key.endswith("_s") and not key.endswith("_wall_s") and (value := numbers.finite(part)) is not None
    ]
    return sum(known) if known else None


def _bare(text: str) -> str:
    """Terminals: as short as can be (no zero before the point), and a minus that every code page has."""
    text = text.replace(numbers.MINUS, "-").replace(numbers.MISSING, "-").replace(", ", " ")
    return re.sub(r"(?<!\d)0\.", ".", text)


def _flips(comparison: Comparison | None) -> str:
    if comparison is None or None in (comparison.kept, comparison.lost, comparison.gained):
        return ""
    return f"{comparison.kept}/{comparison.lost}/{comparison.gained}"


def arms_table(results: Mapping[str, Any]) -> Table:
    """The arms side by side, for a terminal of 80 columns or more.

    Scores with 95 % intervals; the difference to the instruct model on the same items with its interval, p and stars
    (* p < .05, ** p < .01, *** p < .001); items kept, lost and gained; the arm's time over all stages.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
        caption_justify="left",
        caption_style="dim",
        show_edge=False,
    )
    # 80 columns have no room for a column of times: an arm's time stands under its name.
    table.add_column("arm", style="bold", overflow="fold", min_width=6, max_width=16)
    table.add_column("measure", overflow="fold", min_width=7, max_width=26)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("vs instruct", justify="right", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("kept/lost\n/gained", justify="right", no_wrap=True)
    notes = ["95 % intervals; paired tests; p after Holm correction over arms: * p<.05 ** p<.01 *** p<.001"]
    for name, arm in arms_of(results).items():
        shown = clean(name)
        seconds = total_seconds(arm)
        time = Text("" if seconds is None else f"{seconds:,.0f} s", style="not bold dim")
        if failed(arm):
            table.add_row(Text(shown), Text("failed", style="red"), end_section=True)
            notes.append(f"{shown} failed: {clean(str(arm.get('error') or 'no reason recorded'))}")
            continue
        rows = rows_of(results, name, arm)
        if not rows:
            table.add_row(Text(shown), Text("not evaluated", style="dim"))
            table.add_row(time, end_section=True)
        for i, row in enumerate(rows):
            style = "bold" if row.group_row else ""
            part = row.comparison
            score = f"{numbers.score(row.score)} {row.spread}".rstrip()
            if name == REFERENCE:
                difference = Text("reference" if i == 0 else "", style="dim")
            elif part is None:
                difference = Text("no paired test" if row.score is not None else "", style="dim")
            else:
                change = numbers.signed(part.gain) + (f" {numbers.interval(part.ci, 2)}" if part.ci else "")
                difference = Text(_bare(change), style=("green" if part.gain > 0 else "red") if part.holds else "")
            p = "" if part is None or part.p is None else _p(part)
            table.add_row(
                (Text(shown), time)[i] if i < 2 else "",
                Text(clean(row.label), style=style),
                Text(_bare(score), style=style),
                difference,
                Text(p),
                _flips(part),
                end_section=i == len(rows) - 1 > 0,
            )
        if len(rows) == 1:
            table.add_row(time, end_section=True)
    table.caption = Text("\n".join(notes))  # not a str: an error may hold what rich takes for markup
    return table


def _p(part: Comparison) -> str:
    """p after correction, as the report shows it, with its stars."""
    return f"{numbers.p_value(part.corrected).removeprefix('p').removeprefix(' = ').replace(' ', '')}{numbers.stars(part.corrected)}"


_COLUMNS = [
    "arm",
    "status",
    "group",
    "measure",
    "score",
    "ci_low",
    "ci_high",
    "sd",
    "seeds",
    "n",
    "gain_vs_instruct",
    "gain_ci_low",
    "gain_ci_high",
    "p",
    "p_adjusted",
    "mde",
    "test",
    "kept",
    "lost",
    "gained",
    "seconds",
]


def records(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arms table as plain records with the columns of the CSV; unknown values are None."""
    found = []
    for name, arm in arms_of(results).items():
        base = dict.fromkeys(_COLUMNS) | {"arm": name, "status": arm.get("status") or "ok", "seconds": total_seconds(arm)}
        rows = [] if failed(arm) else rows_of(results, name, arm)
        if not rows:
            found.append(base)
        for row in rows:
            part = row.comparison
            record = base | {"group": row.group, "measure": row.label, "score": row.score, "sd": row.sd, "seeds": row.seeds, "n": row.n}
            record |= {"ci_low": row.ci[0] if row.ci else None, "ci_high": row.ci[1] if row.ci else None}
            if part is not None:
                record |= {
                    "gain_vs_instruct": part.gain,
                    "p": part.p,
                    "p_adjusted": part.p_adjusted,
                    "mde": part.mde,
                    "test": part.test or None,
                }
                record |= {"gain_ci_low": part.ci[0] if part.ci else None, "gain_ci_high": part.ci[1] if part.ci else None}
                record |= {"kept": part.kept, "lost": part.lost, "gained": part.gained}
            found.append(record)
    return found


def csv_text(results: Mapping[str, Any]) -> str:
    """The arms table as CSV, one line per arm and measure, full precision.

    Text cells that a spreadsheet would run as a formula get a leading apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records(results):
        writer.writerow({key: cell(value) for key, value in record.items()})
    return buffer.getvalue()


def cell(value: Any) -> Any:
    """A CSV cell: text that a spreadsheet would run as a formula gets a leading apostrophe."""
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") or text[:1] == "\t" else text


def markdown_text(text: str) -> str:
    """Text for a Markdown table cell: one line, nothing that Markdown or HTML would act on."""
    text = " ".join(clean(text).split())
    for mark in "\\`*_[]|~":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown(results: Mapping[str, Any], only: Collection[str] | None = None) -> str:
    """The arms table as GitHub-flavoured Markdown, of all arms or `only` of some (corrected over all)."""
    lines = [
        "| arm | measure | score [95 % CI] | n | vs instruct [95 % CI] | p | kept / lost / gained | time |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in arms_of(results).items():
        if only is not None and name not in only:
            continue
        time = numbers.duration(total_seconds(arm))
        if failed(arm):
            lines.append(
                f"| {markdown_text(name)} | failed: {markdown_text(str(arm.get('error') or 'no reason recorded'))} | | | | | | {time} |"
            )
            continue
        rows = rows_of(results, name, arm)
        if not rows:
            lines.append(f"| {markdown_text(name)} | not evaluated | | | | | | {time} |")
        for i, row in enumerate(rows):
            part = row.comparison
            score = numbers.score(row.score) + (f" {numbers.interval(row.ci)}" if row.ci else f" {row.spread}" if row.spread else "")
            change = "reference" if name == REFERENCE else ""
            if part is not None:
                change = numbers.signed(part.gain) + (f" {numbers.interval(part.ci)}" if part.ci else "")
            p = "" if part is None or part.p is None else markdown_text(_p(part))
            label = f"**{markdown_text(row.label)}**" if row.group_row else markdown_text(row.label)
            n = numbers.count(row.n) if row.n is not None else ""
            cells = ["" if i else markdown_text(name), label, score, n, change, p, _flips(part).replace("/", " / "), "" if i else time]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class SeedRow:
    """One measure of one arm over its seeds: mean, standard deviation (n − 1), the scores, and the test over seeds and items."""

    arm: str
    label: str
    group: str
    mean: float | None
    sd: float | None
    scores: list[float]
    comparison: Comparison | None = None


def seed_rows(results: Mapping[str, Any]) -> list[SeedRow]:
    """Every arm's scores over seeds; empty when no arm was repeated. The untrained reference has its one score."""
    arms = arms_of(results)
    if not any(mapping(arm.get("over_seeds")) for arm in arms.values()):
        return []
    rows = []
    for name, arm in arms.items():
        over = mapping(arm.get("over_seeds"))
        for group in ("task", "general"):
            for label in tasks_of(arm, group):
                one = numbers.finite(tasks_of(arm, group)[label].get("score"))
                spread = mapping(mapping(over.get(group)).get(label)) or {"mean": one, "sd": None, "scores": [one]}
                scores = [v for v in map(numbers.finite, spread.get("scores") or []) if v is not None]
                mean, sd = numbers.finite(spread.get("mean")), numbers.finite(spread.get("sd"))
                rows.append(SeedRow(name, label, group, mean, sd, scores, compare_over_seeds(arm, group, label)))
    return rows


def seeds_markdown(results: Mapping[str, Any]) -> str:
    """The scores over seeds as a Markdown table: mean ± standard deviation, and every seed's score."""
    lines = ["| arm | measure | mean ± sd | seeds |", "|---|---|---:|---|"]
    for row in seed_rows(results):
        spread = f" ± {numbers.score(row.sd)}" if row.sd is not None else ""
        scores = ", ".join(numbers.score(v) for v in row.scores) if len(row.scores) > 1 else "not trained"
        lines.append(f"| {markdown_text(row.arm)} | {markdown_text(row.label)} | {numbers.score(row.mean)}{spread} | {scores} |")
    return "\n".join(lines) + "\n"
