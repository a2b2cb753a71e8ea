"""What a set of prepared rows is like: shares, label balance, languages, diversity, near-duplicates; and limits on it."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from guidetune.artefacts import read_json
from guidetune.data import ledger as ledger_files
from guidetune.data.language import language_of
from guidetune.data.neighbours import embed
from guidetune.data.ngrams import NearDuplicates, words
from guidetune.data.prepare import COLUMNS, faults, leaks, read_records
from guidetune.data.rows import EncodedRows
from guidetune.data.side import SideTable
from guidetune.errors import BadInput
from guidetune.progress import progress

SAMPLE = 10_000  # rows whose words are counted, evenly spread
_SPREAD = 2000  # rows whose embeddings are compared
_LABEL, _LABELS = 40, 50  # characters of an answer that may be a label, and how many different ones make a set of labels
_VALUES = 50  # different values of a column that are counted
_SHOWN = 5
_CHUNK = 512


def figures(folder: Path, test_texts: Iterable[str] | None = None, near: bool = True) -> dict[str, Any]:
    """Figures of a prepare folder, as JSON values.

    Memory does not grow with the rows: words and languages are those of at most 10,000 rows, evenly spread; near-duplicates are
    looked for among all rows, with scratch files. distinct-n is the number of different n-grams of words per n-gram; spread is the
    mean cosine distance between the hashed embeddings of two different rows.
    """
    rows, totals = EncodedRows.open(folder), read_json(Path(folder) / ledger_files.FILE)
    labels: dict[str, Counter[str] | None] = {}
    languages: Counter[str] = Counter()
    grams: dict[str, list[Counter[tuple[str, ...]]]] = {"prompts": [Counter(), Counter()], "answers": [Counter(), Counter()]}
    vectors: list[np.ndarray] = []
    step, apart = max(1, math.ceil(len(rows) / SAMPLE)), max(1, math.ceil(len(rows) / _SPREAD))
    repeats: list[dict[str, str]] = []
    repeated = 0
    with (
        tempfile.TemporaryDirectory(prefix="guidetune-figures-") as scratch,
        progress("figures", total=len(rows), unit="rows") as bar,
    ):
        alike = NearDuplicates(folder=Path(scratch)) if near else None
        first = 0
        for chunk in _chunks(read_records(folder)):
            asked, answered = [_said(r["messages"], "user") for r in chunk], [_said(r["messages"], "assistant") for r in chunk]
            for k, record in enumerate(chunk):
                _count_label(labels, record["source"], answered[k])
                if (first + k) % step == 0:
                    languages[language_of(f"{asked[k]} {answered[k]}")] += 1
                    for name, text in (("prompts", asked[k]), ("answers", answered[k])):
                        found = words(text)
                        for n, counter in enumerate(grams[name], 1):
                            counter.update(zip(*(found[i:] for i in range(n)), strict=False))
            picked = [k for k in range(len(chunk)) if (first + k) % apart == 0]
            vectors.append(embed([f"{asked[k]} {answered[k]}" for k in picked]))
            if alike is not None:
                for k, other in enumerate(alike.add([f"{a}\n{b}" for a, b in zip(asked, answered, strict=True)])):
                    if other is not None:
                        repeated += 1
                        if len(repeats) < _SHOWN:
                            repeats.append({"id": rows.ids[first + k], "of": rows.ids[other], "text": asked[k][:120]})
            first += len(chunk)
            bar.advance(len(chunk))
        if alike is not None:
            alike.close()
    out: dict[str, Any] = {
        "rows": {key: totals[key] for key in ("read", "made", "used", "cut", "tokens", "supervised_tokens")},
        "dropped": {"all": sum(totals["dropped"].values()), "faults": faults(totals), "reasons": totals["dropped"]},
        "sources": {name: part["used"] for name, part in totals["sources"].items()},
        "operations": totals.get("operations", []),
        "lengths": totals["lengths"],
        "without_stop_token": totals["used"] - totals["ends_with_stop"],
        "duplicates": rows.duplicates,
        "near_duplicates": {"rows": repeated, "examples": repeats} if near else None,
        "columns": _columns(Path(folder)),
        "labels": {source: _balance(counts) for source, counts in labels.items() if counts and len(counts) > 1},
        "languages": _shares(languages),
        "diversity": {
            **{f"{name} distinct-{n}": _distinct(counter) for name, both in grams.items() for n, counter in enumerate(both, 1)},
            "spread": _spread(np.concatenate(vectors)) if vectors else None,
            "of_rows": math.ceil(len(rows) / step),
        },
    }
    if test_texts is not None:
        found_leaks = leaks(folder, test_texts)
        out["leaks"] = {"rows": found_leaks.rows, "examples": [leak._asdict() for leak in found_leaks.examples]}
    return out


def check(found: Mapping[str, Any], limits: Mapping[str, int | float | None]) -> None:
    """Compare figures with limits: `dropped`, `leaks`, `duplicates`, each a number of rows, or a share of them with a decimal point.

    Raises:
        BadInput: one or more limits are passed; every one is named.
    """
    used = found["rows"]["used"]
    measured = {
        "dropped": (found["dropped"]["faults"], found["rows"]["read"] + found["rows"]["made"], "rows are dropped for a fault of theirs"),
        "leaks": (found.get("leaks", {}).get("rows"), used, "rows have a prompt of the test set"),
        "duplicates": ((found["near_duplicates"] or {}).get("rows"), used, "rows are exact or near-duplicates of an earlier one"),
    }
    problems = []
    for name, limit in limits.items():
        if limit is None:
            continue
        count, of, what = measured[name]
        if count is None:
            problems.append(f"--max-{name}: there is nothing to measure it with; the recipe has no evaluation")
        elif count > (limit * of if isinstance(limit, float) else limit):
            problems.append(f"{count:,} of {of:,} {what}, more than --max-{name} {limit}")
    if problems:
        raise BadInput(problems)


def _chunks(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


def _said(messages: Sequence[Mapping[str, Any]], role: str) -> str:
    """The last turn of a role."""
    return next((m["content"] for m in reversed(messages) if m["role"] == role), "")


def _count_label(labels: dict[str, Counter[str] | None], source: str, answer: str) -> None:
    """Count an answer while those of its source may be labels; None: they are free text."""
    counts = labels.setdefault(source, Counter())
    if counts is None:
        return
    label = " ".join(answer.split())
    if len(label) > _LABEL or (label not in counts and len(counts) >= _LABELS):
        labels[source] = None
    else:
        counts[label] += 1


def _balance(counts: Counter[str]) -> dict[str, Any]:
    """Labels by count, the share of the most frequent, and their entropy as a share of the largest possible."""
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return {
        "labels": len(counts),
        "rows": total,
        "largest_share": round(max(counts.values()) / total, 4),
        "balance": round(entropy / math.log(len(counts)), 4),
        "counts": dict(counts.most_common(10)),
    }


def _columns(folder: Path) -> dict[str, dict[str, float]]:
    """Shares of the values of every column of text or whole numbers beside the rows that has few of them."""
    if not (folder / COLUMNS).is_file():
        return {}
    table = SideTable.open(folder / COLUMNS)
    out = {}
    for name, kind in table.columns.items():
        counts: Counter[str] = Counter()
        for value in table.column(name) if kind in (str, int) else ():
            counts["(missing)" if value is None else str(value)] += 1
            if len(counts) > _VALUES:
                break
        if 0 < len(counts) <= _VALUES:
            out[name] = _shares(counts)
    return out


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: round(n / total, 4) for name, n in counts.most_common()}


def _distinct(counts: Counter[tuple[str, ...]]) -> float | None:
    total = sum(counts.values())
    return round(len(counts) / total, 4) if total else None


def _spread(vectors: np.ndarray) -> float | None:
    """Mean of 1 − cos over pairs of different rows, of vectors of length 1 (or 0)."""
    n = len(vectors)
    if n < 2:
        return None
    total = vectors.sum(0, dtype=np.float64)
    return round(float(1 - (total @ total - float((vectors.astype(np.float64) ** 2).sum())) / (n * (n - 1))), 4)
