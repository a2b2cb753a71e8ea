"""Exact duplicates out: the first conversation of each kind stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, content_key
from guidetune.registry import method


@method(kind="operation", name="deduplicate", summary="Drop exact duplicates of an earlier conversation.")
class Deduplicate(Operation):
    """The first row of each distinct conversation (or prompt) stays; later ones are dropped and counted in the ledger."""

    by: Literal["conversation", "prompt"] = Field(
        "conversation", description="What must be equal: the whole conversation, or all of it before the last answer."
    )

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Keeps the first of equal records, in order. Memory: 16 bytes and a set entry per distinct record."""
        seen: set[bytes] = set()
        for record in rows:
            messages = record.messages if self.by == "conversation" else record.messages[:-1]
            key = hashlib.blake2b(content_key(messages).encode(), digest_size=16).digest()
            if key in seen:
                context.drop(record, "duplicate", f"the same {self.by} as an earlier row")
            else:
                seen.add(key)
                yield record
