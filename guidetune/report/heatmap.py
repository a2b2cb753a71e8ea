"""Token weights on real training rows: which target tokens an arm learns from, read from the run's own rows and guidance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidetune.artefacts import fingerprint, finished
from guidetune.errors import BadInput
from guidetune.report import numbers
from guidetune.report.findings import arms_of, failed, mapping
from guidetune.report.text import clean

if TYPE_CHECKING:
    from guidetune.data.rows import EncodedRow, EncodedRows
    from guidetune.guidance import Guidance
    from guidetune.objectives.token_weights import TokenWeights

TOKENS = 140  # target tokens of one row that are shown
CONTEXT = 400  # characters of the text before the first target
LEVELS = 9  # colours; weights are shown on [0, 1]
QUANTILES = {"little trusted": 0.1, "typical": 0.5, "well trusted": 0.9}


@dataclass(frozen=True)
class Token:
    """A target token, its weight (None: prompt text between two answers) and the colour level 0 .. LEVELS - 1."""

    text: str
    weight: float | None
    level: int


@dataclass(frozen=True)
class Row:
    """One training row with the weights of one objective; `left_out` counts target tokens that are not shown."""

    id: str
    source: str
    which: str
    mean_confidence: float
    before: str
    tokens: list[Token]
    left_out: int


@dataclass(frozen=True)
class Heatmap:
    """The rows under one combination of token weights, and the arms that used it."""

    arms: list[str]
    weights: str
    rows: list[Row]


class _NotStored(Exception):
    """A weight asked for the model in training, which no file holds."""


def _read_student(batch: Any) -> Any:
    raise _NotStored


def collect(run: Path, results: Mapping[str, Any]) -> tuple[list[Heatmap], list[str]]:
    """The weights of every arm that can be had from its files, and what cannot be shown and why.

    The rows are those at the 10th, 50th and 90th percentile of the teacher's mean confidence in a row: they are not picked by hand.
    """
    uses: dict[str, list[str]] = {}
    missing: list[str] = []
    for name, arm in arms_of(results).items():
        tune = mapping(mapping(arm.get("recipe")).get("tune"))
        if tune and not failed(arm):
            specs = [spec if isinstance(spec, Mapping) else {"method": spec} for spec in tune.get("weights") or []]
            if specs:
                uses.setdefault(json.dumps(specs, sort_keys=True, default=str), []).append(name)
    shown = []
    for text, arms in uses.items():
        try:
            adapter = mapping(mapping(arms_of(results)[arms[0]]).get("paths")).get("adapter")
            shown.append(_heatmap(run, json.loads(text), arms, run / str(adapter or "adapter")))
        except _NotStored:
            missing.append(f"{', '.join(arms)}: its weights follow the model in training and are not stored")
        except (BadInput, OSError, ValueError, KeyError, ImportError) as error:
            missing.append(f"{', '.join(arms)}: {str(error) or type(error).__name__}")
    return shown, missing


def _heatmap(run: Path, specs: Sequence[Mapping[str, Any]], arms: list[str], adapter: Path) -> Heatmap:
    from guidetune.data.view import TokenTexts
    from guidetune.guidance import Guidance
    from guidetune.registry import build

    methods: list[TokenWeights] = [build("token_weights", dict(spec)) for spec in specs]
    folders = {teacher: _teacher_folder(run, teacher) for teacher in dict.fromkeys(t for m in methods for t in m.teachers)}
    if not folders:
        raise _NotStored
    stores = {teacher: Guidance.open(folder) for teacher, folder in folders.items()}
    digests = {_key(folder).get("rows") for folder in folders.values()}
    data, rows = _rows(run, digests | {_key(adapter).get("rows")} - {None})
    if any(len(store) != len(rows) for store in stores.values()):
        raise BadInput("the stored guidance belongs to other rows")
    stops, texts = _stop_ids(run), TokenTexts(data)
    shown = [
        _row(rows[i], which, confidence, _weights(rows[i], i, methods, stores, stops), texts)
        for which, i, confidence in _typical(next(iter(stores.values())), len(rows))
    ]
    words = " × ".join(f"{m.name}" + "".join(f", {k} {v}" for k, v in m.spec().items() if k != "method") for m in methods)
    return Heatmap(arms, clean(words), shown)


def _key(folder: Path) -> dict[str, Any]:
    return mapping((finished(folder) or {}).get("key"))


def _teacher_folder(run: Path, teacher: str) -> Path:
    """Where a teacher's guidance lies in the run folder: under its role, or under a name that ends in the teacher's fingerprint."""
    for folder in sorted((run / "guidance").glob("*")):
        if folder.name == teacher or folder.name.endswith(f"-{fingerprint(teacher)[:8]}"):
            return folder
    raise BadInput(f"the run folder holds no guidance of {teacher}")


def _rows(run: Path, digests: set[Any]) -> tuple[Path, EncodedRows]:
    """The prepared rows that guidance and training were made from."""
    from guidetune.data.rows import EncodedRows

    for folder in sorted(run.glob("data*")):
        if finished(folder) is not None and {(rows := EncodedRows.open(folder)).digest} == digests:
            return folder, rows
    raise BadInput("the rows that its guidance was made for are not in the run folder")


def _typical(store: Guidance, n: int) -> Iterator[tuple[str, int, float]]:
    """(word, row, mean confidence) at fixed percentiles of the rows' mean confidence; at most 2,000 evenly spaced rows are looked at."""
    import numpy as np

    looked = range(0, n, max(1, n // 2000))
    means = sorted((float(np.exp(store.row(i).astype(np.float32)).mean()), i) for i in looked if len(store.row(i)))
    seen: set[int] = set()
    for which, share in QUANTILES.items():
        if means:
            mean, i = means[min(len(means) - 1, int(share * len(means)))]
            if i not in seen:
                seen.add(i)
                yield which, i, mean


def _weights(
    row: EncodedRow, i: int, methods: Sequence[TokenWeights], stores: Mapping[str, Guidance], stops: frozenset[int]
) -> list[float]:
    import numpy as np
    import torch

    from guidetune.objectives.token_weights import TokenBatch

    class Stored(TokenBatch):
        """A batch of which only the stored parts are known."""

        student_log_prob = property(_read_student, lambda self, value: None)  # type: ignore[assignment]

    at = row.loss_weight > 0
    targets = torch.from_numpy(row.input_ids[at].astype(np.int64))
    teachers = {name: torch.from_numpy(store.row(i).astype(np.float32)) for name, store in stores.items()}
    stop = torch.tensor([int(t) in stops for t in targets.tolist()], dtype=torch.bool)
    batch = Stored(targets, torch.zeros(len(targets), dtype=torch.long), stop, targets, teachers)
    weight = torch.from_numpy(row.loss_weight[at].astype(np.float32))
    for method in methods:
        weight = weight * method.weights(batch)
    return [float(w) for w in weight]


def _stop_ids(run: Path) -> frozenset[int]:
    """The stop tokens of the run's chat format: from a written model's generation config, none where no arm wrote one."""
    for path in sorted(run.glob("**/model/generation_config.json")):
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        return frozenset([stops] if isinstance(stops, int) else stops or [])
    return frozenset()


def _row(row: EncodedRow, which: str, confidence: float, weights: Sequence[float], texts: Any) -> Row:
    import numpy as np

    targets = np.flatnonzero(row.loss_weight > 0)
    first, last = int(targets[0]), int(targets[min(len(targets), TOKENS) - 1])
    before = clean(texts.text(row.input_ids[:first]))
    words = texts.tokens(row.input_ids[first : last + 1])
    by_place = dict(zip(targets.tolist(), weights, strict=True))
    tokens: list[Token] = []
    for place, word in enumerate(words, start=first):
        weight = by_place.get(place)
        level = 0 if weight is None else min(LEVELS - 1, max(0, int(min(1.0, weight) * LEVELS)))
        tokens.append(Token(_visible(word), numbers.finite(weight), level))
    cut = f"… {before[-CONTEXT:]}" if len(before) > CONTEXT else before
    return Row(clean(row.id)[:120], clean(row.source)[:80], which, confidence, cut, tokens, max(0, len(targets) - TOKENS))


def _visible(word: str) -> str:
    """A token's text in one piece: white space that carries the token is drawn."""
    word = clean(word).replace("\n", "⏎").replace("\t", "→")
    return (word.strip(" ") and word) or "␣" * len(word) or "·"
