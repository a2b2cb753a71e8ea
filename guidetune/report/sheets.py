"""Every table of a page as plain columns and rows, for CSV and Markdown files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidetune.artefacts import write_text_atomic
from guidetune.errors import BadInput
from guidetune.report import numbers
from guidetune.report.tables import cell, markdown_text, records
from guidetune.report.text import clean


@dataclass(frozen=True)
class Sheet:
    """A table: file name, title, columns, and rows of as many plain values; None is unknown."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def csv(self) -> str:
        """Full precision; text that a spreadsheet would run as a formula gets a leading apostrophe."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([cell(column) for column in self.columns])
        writer.writerows([cell(value) for value in row] for row in self.rows)
        return buffer.getvalue()

    def markdown(self) -> str:
        """GitHub-flavoured Markdown, numbers to five digits."""
        numeric = [all(isinstance(row[i], (int, float)) or row[i] is None for row in self.rows) for i in range(len(self.columns))]
        lines = [f"# {markdown_text(self.title)}\n", f"| {' | '.join(map(markdown_text, self.columns))} |"]
        lines.append(f"|{'|'.join('---:' if right else '---' for right in numeric)}|")
        lines += [f"| {' | '.join('' if v is None else markdown_text(numbers.any_value(v)) for v in row)} |" for row in self.rows]
        return "\n".join(lines) + "\n"


def export(sheets: Iterable[Sheet], folder: Path) -> list[Path]:
    """Write `<name>.csv` and `<name>.md` of every table that has rows into `folder`; returns the files.

    Raises:
        BadInput: the folder cannot be written to.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for sheet in sheets:
            if sheet.rows:
                for suffix, text in ((".csv", sheet.csv()), (".md", sheet.markdown())):
                    written.append(folder / f"{sheet.name}{suffix}")
                    write_text_atomic(written[-1], text)
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror or error}; choose another folder for --export") from None
    return written


def of_page(page: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Sheet]:
    """The tables of a run's page, from the values that the page shows (`sections.page`)."""
    arms = records(results)
    yield Sheet("arms", "Arms", list(arms[0]) if arms else [], [list(record.values()) for record in arms])
    yield Sheet(
        "verdict",
        "Verdict",
        ["arm", "verdict", "text"],
        [(v.arm, v.tone, v.text) for v in page["verdicts"]] + [("", "", text) for text in page["sentences"]],
    )
    yield Sheet(
        "tests",
        "Paired tests against instruct",
        ["arm", "group", "measure", "difference", "ci_low", "ci_high", "p", "p_corrected", "smallest_detectable", "n", "test", "in_words"],
        [
            (one["arm"], one["group"], one["measure"], t.gain, *(t.ci or (None, None)), t.p, t.p_adjusted, t.mde, t.n, t.test, t.verdict)
            for one in page["details"]
            for t in (one["test"],)
        ],
    )
    yield Sheet("notes", "What tasks say about their results", ["task", "note"], page["notes"])
    yield Sheet(
        "pairs",
        "Arms against each other",
        ["a", "b", "group", "measure", "a_minus_b", "ci_low", "ci_high", "p", "p_corrected", "smallest_detectable", "test", "in_words"],
        [
            (one["a"], one["b"], one["group"], one["measure"], t.gain, *(t.ci or (None, None)), t.p, t.p_adjusted, t.mde, t.test, t.verdict)
            for one in page["pairs"]
            for t in (one["test"],)
        ],
    )
    yield Sheet(
        "seeds",
        "Scores over seeds",
        ["arm", "group", "measure", "mean", "sd", "seeds", "scores", "difference", "ci_low", "ci_high", "p", "p_corrected"],
        [
            (row.arm, row.group, row.label, row.mean, row.sd, len(row.scores), "; ".join(map(str, row.scores)))
            + ((t.gain, *(t.ci or (None, None)), t.p, t.p_adjusted) if (t := row.comparison) else (None,) * 5)
            for row in page["seeds"]
        ],
    )
    if part := page["tradeoff"]:
        yield Sheet(
            "gain-and-retention",
            "Gain against retention",
            ["arm", "general_kept", "kept_ci_low", "kept_ci_high", "task_gain", "gain_ci_low", "gain_ci_high", "on_frontier"],
            [
                (name, p["x"], *(p["x_ci"] or (None, None)), p["y"], *(p["y_ci"] or (None, None)), name in part["frontier"])
                for name, p in part["points"].items()
            ],
        )
    if part := page["scales"]:
        yield Sheet(
            "scales",
            "Scores by merge scale",
            ["arm", "scale", "chosen", "split", "group", "measure", "score", "ci_low", "ci_high", "n"],
            [line for row in part["table"] for line in _scale_lines(row)],
        )
    if part := page["skills"]:
        yield Sheet("skills", "General skills", ["skill", "arm", "score", "n"], list(_cells(part["names"], part["table"])))
    if part := page["difficulty"]:
        yield Sheet(
            "difficulty", "Task by difficulty", ["task", "difficulty", "arm", "score", "n"], list(_cells(part["names"], part["table"]))
        )
    if part := page["curves"]:
        yield Sheet(
            "samples",
            "Score by number of samples",
            ["task", "measure", "arm", "k", "score"],
            [(label, measure, name, k, value) for label, measure, name, curve in part["table"] for k, value in curve],
        )
    if (part := page["confidence"]) and part["bins"]:
        yield Sheet("confidence", "Teacher confidence", ["from", "to", "tokens"], part["bins"])
    if part := page["signal"]:
        yield Sheet(
            "signal",
            "Learning signal by teacher confidence",
            ["arm", "confidence_from", "confidence_to", "tokens", "share_of_signal"],
            [(name, b["lo"], b["hi"], b["tokens"], b["signal"]) for name, bins in part["shares"].items() for b in bins],
        )
    if rows := page["phases"]:
        heads = ["rows", "target_tokens", "steps", "score_low", "score_high", "lr", "epochs", "loss_last", "task_mean", "general_mean"]
        yield Sheet("phases", "Phases of training", ["arm", "phase", *heads], rows)
    yield Sheet(
        "token-weights",
        "Token weights on training rows",
        ["arms", "row", "source", "which", "place", "token", "weight"],
        [
            (", ".join(heat.arms), row.id, row.source, row.which, place, token.text, token.weight)
            for heat in page["heatmaps"]
            for row in heat.rows
            for place, token in enumerate(row.tokens)
        ],
    )
    yield Sheet(
        "gained-and-lost",
        "Items gained and lost against instruct",
        ["group", "task", "item", "arm", "change"],
        [(task.group, task.label, *flip) for task in page["browser"] for flip in task.flips],
    )
    if part := page["loss"]:
        yield Sheet("loss", "Loss", ["arm", "training_first", "training_last", "validation_first", "validation_last"], part["table"])
    if part := page["ledger"]:
        keys = ["name", "read", "used", "cut", "dropped"]
        yield Sheet(
            "ledger", "Data ledger", ["source", *keys[1:]], [[row[key] for key in keys] for row in [*part["sources"], part["total"]]]
        )
        yield Sheet(
            "dropped", "Rows dropped", ["reason", "rows", "examples"], [(why, n, "; ".join(some)) for why, n, some in part["reasons"]]
        )
    if part := page["transfer"]:
        yield Sheet("transfer", "Transfer", ["fact", *part["names"]], [(key, *cells) for key, cells in part["rows"]])
    if part := page["costs"]:
        keys = ["name", "total", "tokens", "steps", "rate", "answered", "memory", "disk"]
        yield Sheet(
            "costs",
            "Costs",
            [
                "arm",
                "total_s",
                "tokens",
                "steps",
                "tokens_per_s",
                "tokens_answered",
                "peak_memory_mb",
                "disk_bytes",
                "guide_s",
                "tune_s",
                "transfer_s",
                "evaluate_s",
            ],
            [(*(row[key] for key in keys), *row["stages"]) for row in part["rows"]],
        )
    if part := page["budget"]:
        yield Sheet("budget", "Training budget", ["arm", "target_tokens", "rows", "steps"], part["rows"])
    facts = [(what, *pair) for what in ("versions", "machine", "fingerprints") for pair in page[what]]
    facts += [("model pair", *pair) for pair in page["models"]["pair"]]
    yield Sheet("provenance", "Provenance", ["what", "name", "value"], facts)
    yield Sheet(
        "stages",
        "Stages on disk",
        ["folder", "stage", "fingerprint", "seconds", "bytes"],
        [(s.path, s.stage, s.fingerprint, s.seconds, s.bytes) for s in page["stages"]],
    )


def _cells(names: Sequence[str], table: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """One line per arm of rows that end in a list of (score, n) per arm."""
    for *keys, cells in table:
        for name, cell_ in zip(names, cells, strict=True):
            if cell_:
                yield (*keys, name, *cell_)


def _scale_lines(row: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    head = (row["arm"], row["scale"], row["chosen"])
    for split in ("validation", "test"):
        for group, value in zip(("task", "general"), row[split], strict=True):
            if value is not None:
                yield (*head, split, group, f"{group} mean", value, None, None, None)
    for group, label, result in row["tests"]:
        ends = numbers.interval_ends(result.get("ci")) or (None, None)
        yield (*head, "test", group, clean(label), numbers.finite(result.get("score")), *ends, numbers.finite(result.get("n")))
