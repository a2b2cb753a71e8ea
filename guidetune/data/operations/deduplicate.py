"""Duplicates out, exact and near: the first conversation of each kind stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from guidetune.data.keys import KeyTable, key_array
from guidetune.data.ngrams import NearDuplicates
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, content_key
from guidetune.registry import method

_CHUNK = 1024  # records looked up at a time


class Near(BaseModel):
    """When two texts are near-duplicates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(5, gt=0)
    threshold: float = Field(0.7, gt=0, le=1)


@method(kind="operation", name="deduplicate", summary="Drop exact, and if asked near, duplicates of an earlier conversation.")
class Deduplicate(Operation):
    """The first row of each distinct conversation (or prompt) stays; later ones are dropped and counted in the ledger.

    With `near` rows go as well whose sets of word n-grams are nearly those of an earlier row: estimated by MinHash of 128
    permutations, compared where a band of them agrees. A row is compared with earlier rows that were themselves dropped too, so
    chains of small changes go with their first.
    """

    by: Literal["conversation", "prompt"] = Field(
        "conversation", description="What must be equal: the whole conversation, or all of it before the last answer."
    )

    chooses = True  # not streams: the table of ids is given back before this one grows

    near: Near | None = Field(
        None, description="Near-duplicates too: {n: words in an n-gram, threshold: least share of n-grams in common}."
    )

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Keeps the first of equal records, in order. Hashes and signatures are kept in scratch files, none in memory: 43 bytes per
        distinct record, and with `near` 512 and 43 per band."""
        seen = KeyTable(context.scratch / ".seen" if context.scratch else None, words=2)
        alike = NearDuplicates(self.near.n, self.near.threshold, context.scratch) if self.near else None
        rows = iter(rows)
        while chunk := list(islice(rows, _CHUNK)):
            _, new = seen.insert(key_array([self._key(record) for record in chunk]))
            left = []
            for record, first in zip(chunk, new.tolist(), strict=True):
                if first:
                    left.append(record)
                else:
                    context.drop(record, "duplicate", f"the same {self.by} as an earlier row")
            for record, other in zip(left, alike.add([self._text(r) for r in left]) if alike else [None] * len(left), strict=True):
                if other is None:
                    yield record
                else:
                    context.drop(record, "near-duplicate", f"nearly the {self.by} of an earlier row")
        seen.close()
        if alike is not None:
            alike.close()

    def _messages(self, record: Record) -> list[dict[str, Any]]:
        return record.messages if self.by == "conversation" else record.messages[:-1]

    def _key(self, record: Record) -> bytes:
        # a row that no operation has rendered yet is what its columns say
        content = content_key(self._messages(record)) if record.messages else json.dumps(record.fields, sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).digest()

    def _text(self, record: Record) -> str:
        if not record.messages:
            return json.dumps(record.fields, ensure_ascii=False)
        return "\n".join(message["content"] for message in self._messages(record))
