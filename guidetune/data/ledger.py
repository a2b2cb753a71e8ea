"""The account of every input row: used, cut or dropped with its reason. `read == used + sum(dropped)`."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidetune.artefacts import write_json

FILE, LINES = "ledger.json", "ledger.jsonl"
_EXAMPLES = 3
_COUNTS = (
    "read",
    "used",
    "cut",
    "tokens",
    "supervised_tokens",
    "tokens_cut",
    "ends_with_stop",
    "appended_eos",
    "trimmed_turns",
    "control_text",
)


@dataclass
class _Tally:
    read: int = 0
    used: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised_tokens: int = 0
    tokens_cut: int = 0
    ends_with_stop: int = 0
    appended_eos: int = 0
    trimmed_turns: int = 0
    control_text: int = 0
    lengths: array[int] = field(default_factory=lambda: array("I"))

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return counts | {"dropped": dict(self.dropped.most_common()), "lengths": _quantiles(self.lengths)}


class Ledger:
    """Streams one line per input row to `ledger.jsonl`; `finish` writes the totals to `ledger.json`."""

    def __init__(self, folder: Path, sources: list[str]) -> None:
        self._folder = folder
        self._sources = {name: _Tally() for name in sources}
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._file = (folder / LINES).open("w", encoding="utf-8", newline="\n", errors="backslashreplace")

    def read(self, source: str) -> None:
        self._sources[source].read += 1

    def drop(self, id: str, source: str, line: int, reason: str, why: str) -> None:
        self._sources[source].dropped[reason] += 1
        self._example(reason, id, source, line, why)
        self._line(id=id, source=source, line=line, outcome="dropped", reason=reason, why=why, tokens_cut=0)

    def use(
        self,
        id: str,
        source: str,
        line: int,
        *,
        tokens: int,
        supervised: int,
        tokens_cut: int = 0,
        ends_with_stop: bool = True,
        appended_eos: bool = False,
        trimmed_turns: int = 0,
        control_text: str | None = None,
    ) -> None:
        tally = self._sources[source]
        tally.used += 1
        tally.cut += tokens_cut > 0
        tally.tokens += tokens
        tally.supervised_tokens += supervised
        tally.tokens_cut += tokens_cut
        tally.ends_with_stop += ends_with_stop
        tally.appended_eos += appended_eos
        tally.trimmed_turns += trimmed_turns
        if control_text is not None:
            tally.control_text += 1
            self._example("control token in the text", id, source, line, f"the text holds {control_text!r}")
        tally.lengths.append(tokens)
        outcome = "cut" if tokens_cut else "used"
        reason = "longer than max_length" if tokens_cut else None
        self._line(id=id, source=source, line=line, outcome=outcome, reason=reason, tokens_cut=tokens_cut)

    def _example(self, reason: str, id: str, source: str, line: int, why: str) -> None:
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append({"id": id, "source": source, "line": line, "why": why})

    def _line(self, **values: Any) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def totals(self) -> dict[str, Any]:
        whole = _Tally()
        for tally in self._sources.values():
            for name in _COUNTS:
                setattr(whole, name, getattr(whole, name) + getattr(tally, name))
            whole.dropped.update(tally.dropped)
            whole.lengths.extend(tally.lengths)
        return whole.as_dict() | {
            "sources": {name: tally.as_dict() for name, tally in self._sources.items()},
            "examples": self._examples,
        }

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the files and return the totals, with `facts` beside them."""
        self.close()
        totals = self.totals() | facts
        text = json.loads(json.dumps(totals).encode("utf-8", "backslashreplace"))
        write_json(self._folder / FILE, text)
        return text

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _quantiles(lengths: array[int]) -> dict[str, int]:
    if not lengths:
        return {"p50": 0, "p95": 0, "max": 0}
    import numpy as np

    values = np.frombuffer(lengths, dtype=np.dtype(f"u{lengths.itemsize}"))
    p50, p95 = np.percentile(values, [50, 95], method="inverted_cdf")
    return {"p50": int(p50), "p95": int(p95), "max": int(values.max())}
