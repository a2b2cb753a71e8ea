"""One operation on records, accounted for as the prepare stage does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidetune import registry
from guidetune.data.ledger import Ledger
from guidetune.data.prepare import _operate
from guidetune.data.records import Record
from tests.data.chats import chat_of


@dataclass
class Done:
    records: list[Record]
    dropped: dict[str, int]
    made: int
    facts: dict[str, Any] = field(default_factory=dict)
    whys: dict[str, str] = field(default_factory=dict)  # id of a dropped row: why


def conversation(id: str, source: str = "s", text: str | None = None, answer: str = "yes", **more: Any) -> Record:
    messages = [{"role": "user", "content": text or f"question of {id}"}, {"role": "assistant", "content": answer}]
    return Record(id, source, messages, **more)


def operate(step: Any, rows: Sequence[Record], folder: Path, seed: int = 42, root: Path | None = None, max_length: int = 2048) -> Done:
    """What an operation makes of records; it fails when the operation does not account for all of them."""
    built = registry.build("operation", step)
    sources = sorted({record.source for record in rows})
    account: list[dict[str, Any]] = []
    place = {"root": root or folder, "chat": chat_of("chatml"), "max_length": max_length, "outputs": folder}
    with Ledger(folder, sources) as ledger:
        for name, count in Counter(record.source for record in rows).items():
            ledger.read(name, count)
        records = list(_operate(built, list(rows), folder / ".step0", seed, ledger, account, place))
        totals = ledger.totals()
    import json

    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    part = account[0]
    assert totals["read"] + totals["made"] == len(records) + sum(totals["dropped"].values())
    assert part["in"] + part["made"] == part["out"] + sum(part["dropped"].values())
    assert not list(folder.glob(".step*"))
    return Done(records, part["dropped"], part["made"], part["facts"], {line["id"]: line["why"] for line in lines})
