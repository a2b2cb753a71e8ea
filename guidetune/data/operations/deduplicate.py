"""Exact duplicates out: the first conversation of each kind stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from pydantic import Field

from guidetune.data.keys import KeyTable, key_array
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, content_key
from guidetune.registry import method

_CHUNK = 1024  # records looked up at a time


@method(kind="operation", name="deduplicate", summary="Drop exact duplicates of an earlier conversation.")
class Deduplicate(Operation):
    """The first row of each distinct conversation (or prompt) stays; later ones are dropped and counted in the ledger."""

    by: Literal["conversation", "prompt"] = Field(
        "conversation", description="What must be equal: the whole conversation, or all of it before the last answer."
    )

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Keeps the first of equal records, in order. A 128-bit hash of each distinct record is kept in a scratch file, none in memory."""
        seen = KeyTable(context.scratch / ".seen" if context.scratch else None, words=2)
        rows = iter(rows)
        while chunk := list(islice(rows, _CHUNK)):
            _, new = seen.insert(key_array([self._key(record) for record in chunk]))
            for record, first in zip(chunk, new.tolist(), strict=True):
                if first:
                    yield record
                else:
                    context.drop(record, "duplicate", f"the same {self.by} as an earlier row")
        seen.close()

    def _key(self, record: Record) -> bytes:
        messages = record.messages if self.by == "conversation" else record.messages[:-1]
        return hashlib.blake2b(content_key(messages).encode(), digest_size=16).digest()
