"""A number for each prepared row, such as its difficulty. Methods are the files beside this one.

A score is kept in a side table (`data.side`): the column `score` by row id, missing where a row has none. What reads it (phases,
selection) asks for it by name and id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from guidetune.artefacts import read_json, write_json
from guidetune.data.rows import EncodedRows
from guidetune.data.side import SideTable, SideWriter
from guidetune.errors import RunFailed
from guidetune.progress import progress
from guidetune.registry import Method

if TYPE_CHECKING:
    from guidetune.data.chat import Chat
    from guidetune.guidance.store import Guidance
    from guidetune.models.handle import ModelHandle

TABLE = "scores.parquet"
COLUMN = "score"
WINDOW = 512  # rows that a scorer gets at a time, and that a kill can cost
BINS = 20
_VALUES, _DONE, _SHOWN = "values.f64", "done.json", 5


class NoScore(NamedTuple):
    """A row without a score, and why."""

    why: str


Score = float | NoScore


@dataclass(frozen=True)
class Row:
    """A prepared row: its text, its tokens, and the columns of its source that were kept for the scorer.

    place: among the prepared rows; input_ids int32 [L], loss_weight float32 [L] (above 0: a target).
    """

    place: int
    id: str
    messages: list[dict[str, Any]]
    input_ids: np.ndarray
    loss_weight: np.ndarray
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> np.ndarray:
        """Positions of the supervised tokens, int64 [n]; 0 is never one."""
        at = np.flatnonzero(self.loss_weight > 0)
        return at[at > 0]


@dataclass
class ScoreContext:
    """What a scorer may use. Models are opened when first asked for and given back by `close`."""

    chat: Chat
    open_model: Callable[[str], ModelHandle]
    guidance: Callable[[str], Guidance]
    batch_tokens: int = 8192
    close: Callable[[], None] = lambda: None


class Scorer(Method):
    """Contract: `scores(rows, context)` gives one number, or a `NoScore` with the reason, for each row.

    A row's score depends on the row, the options and the models alone: not on the other rows, their order or the batches.
    """

    unit: ClassVar[str] = ""  # what the numbers are, for tables
    uses_chat: ClassVar[bool] = False  # whether a chat template decides the numbers besides the tokens

    @property
    def models(self) -> tuple[str, ...]:
        """Models that are run: `base`, `instruct`, or a model's own name."""
        return ()

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teachers whose guidance is read."""
        return ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the sources that must be kept for it."""
        return ()

    def deciding(self) -> dict[str, Any]:
        """Every option that the numbers depend on."""
        return self.spec()

    def scores(self, rows: Sequence[Row], context: ScoreContext) -> Sequence[Score]:
        raise TypeError(f"{type(self).__name__} does not define scores()")

    def notes(self) -> list[str]:
        """What is to be said after the last row, such as cost."""
        return []


def score(
    scorer: Scorer,
    rows: EncodedRows,
    records: Iterable[Mapping[str, Any]],
    context: ScoreContext,
    work: Path,
    name: str,
    columns: SideTable | None = None,
) -> dict[str, Any]:
    """Write the side table of all rows into `work`; returns how the scores are distributed, and why rows are without one.

    What was scored survives a kill: a second call on the same `work` goes on after it. Where several processes call it, each computes
    and rank 0 writes. `columns` is the side table that was prepared with the rows.

    Raises:
        RunFailed: a scorer gave other than one finite number per row.
    """
    from guidetune.engine.distributed import current

    group = current()
    done, why, examples = group.once(lambda: _begin(work, len(rows)))
    values = np.memmap(work / _VALUES, dtype=np.float64, mode="r+") if len(rows) and group.main else np.zeros(len(rows))
    stream = _rows(rows, records)
    for _ in islice(stream, done):
        pass
    try:
        with progress(f"score ({name})", len(rows), "rows", done) as bar:
            while window := _with_columns(list(islice(stream, WINDOW)), scorer.columns, columns):
                found = list(scorer.scores(window, context))
                if len(found) != len(window):
                    raise RunFailed(f"scorer {scorer.name!r} gave {len(found)} scores for {len(window)} rows")
                for row, one in zip(window, found, strict=True):
                    if isinstance(one, NoScore):
                        values[row.place] = np.nan
                        why[one.why] += 1
                        if len(examples) < _SHOWN:
                            examples.append({"id": row.id, "why": one.why})
                    elif np.isfinite(one):
                        values[row.place] = one
                    else:
                        raise RunFailed(f"scorer {scorer.name!r} gave {one} for row {row.id}")
                done += len(window)
                if isinstance(values, np.memmap):
                    values.flush()
                    write_json(work / _DONE, {"rows": done, "why": dict(why), "examples": examples})
                bar.advance(len(window))
    finally:
        context.close()
    summary = {**summarise(np.asarray(values)), "why": dict(why), "examples": examples, "notes": scorer.notes(), "unit": scorer.unit}

    def keep() -> None:
        with SideWriter(work / TABLE, {COLUMN: float}, {"scorer": scorer.deciding(), "rows": rows.digest}) as table:
            for a in range(0, len(rows), WINDOW):
                part = values[a : a + WINDOW].tolist()
                table.write(rows.ids[a : a + WINDOW], score=[None if np.isnan(v) else v for v in part])
        for scratch in (_VALUES, _DONE):
            (work / scratch).unlink(missing_ok=True)

    group.once(keep)
    return summary


def read(folder: Path, ids: Sequence[str]) -> np.ndarray:
    """Scores of rows by id, float64 [n]; NaN where a row has none."""
    found = SideTable.open(Path(folder) / TABLE).values(COLUMN, list(ids))
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)


def summarise(values: np.ndarray) -> dict[str, Any]:
    """Number of rows and of rows without a score (NaN), and how the scores are distributed."""
    known = values[~np.isnan(values)]
    out: dict[str, Any] = {"n": len(values), "missing": int(len(values) - len(known)), "distinct": len(np.unique(known))}
    if not len(known):
        return out
    counts, edges = np.histogram(known, bins=BINS)
    quantiles = np.quantile(known, [0.05, 0.25, 0.5, 0.75, 0.95])
    return out | {
        "mean": float(known.mean()),
        "sd": float(known.std()),
        "low": float(known.min()),
        "high": float(known.max()),
        "quantiles": dict(zip(("5", "25", "50", "75", "95"), quantiles.tolist(), strict=True)),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def histogram(name: str, summary: Mapping[str, Any]) -> list[str]:
    """A score as text: how many rows have it, its spread, and a bar for each interval."""
    missing = ", ".join(f"{n:,} {why}" for why, n in summary["why"].items())
    head = f"{name}: {summary['n'] - summary['missing']:,} of {summary['n']:,} rows" + (f" ({missing})" if missing else "")
    if "histogram" not in summary:
        return [head]
    counts, edges = summary["histogram"]["counts"], summary["histogram"]["edges"]
    unit = f" {summary['unit']}" if summary["unit"] else ""
    lines = [f"{head}; mean {summary['mean']:.4g}, sd {summary['sd']:.4g}, median {summary['quantiles']['50']:.4g}{unit}"]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        lines.append(f"  {low:9.4g} – {high:<9.4g} {'█' * round(40 * count / max(counts)):<40} {count:>10,}")
    return lines


def _begin(work: Path, n: int) -> tuple[int, Counter[str], list[dict[str, str]]]:
    """Rows that an earlier call has finished, and what it noted; the file of values is there afterwards."""
    path = work / _VALUES
    try:
        known = read_json(work / _DONE)
        if path.stat().st_size == 8 * n:
            return int(known["rows"]), Counter(known["why"]), list(known["examples"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with open(path, "wb") as file:
        file.truncate(8 * n)
    return 0, Counter(), []


def _rows(rows: EncodedRows, records: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for place, (row, record) in enumerate(zip(rows, records, strict=True)):
        yield Row(place, row.id, record["messages"], row.input_ids, row.loss_weight)


def _with_columns(rows: list[Row], names: Sequence[str], table: SideTable | None) -> list[Row]:
    """The rows with the columns that the scorer asked for."""
    if not rows or not names or table is None:
        return rows
    ids = [row.id for row in rows]
    found = {name: table.values(name, ids) for name in names}
    return [replace(row, columns={name: values[k] for name, values in found.items()}) for k, row in enumerate(rows)]


def texts(row: Row) -> tuple[str, str]:
    """(what is asked, the last answer): the turns before the last answer, one below the other."""
    answer = max((k for k, m in enumerate(row.messages) if m["role"] == "assistant"), default=len(row.messages))
    return "\n\n".join(m["content"] for m in row.messages[:answer]), row.messages[answer]["content"] if answer < len(row.messages) else ""
