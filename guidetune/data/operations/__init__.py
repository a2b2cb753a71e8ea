"""Operations on records, between reading and encoding: one file each, found by file name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from guidetune.data.records import Record
from guidetune.data.sources import SourceSpec, digest
from guidetune.registry import Method

if TYPE_CHECKING:
    from guidetune.data.chat import Chat

Rows = Iterable[Record]
"""Records that can be gone through more than once, in the same order each time, without being held in memory."""


def _no_note(**facts: Any) -> None:
    """Facts that nobody asked for."""


def _no_copy(record: Record) -> None:
    """A copy that nobody counts."""


@dataclass(frozen=True)
class OperationContext:
    """What an operation may use.

    `seed` of the run; `drop(record, reason, why)` for the ledger; `scratch`, a folder for temporary files; `root`, where relative
    paths start; `chat`, the chat format that rows will be encoded with, and `max_length` tokens; `note(name=value)` for figures in
    the ledger; `outputs`, the folder of the finished rows, for files that stay beside them; `models`, what `base` and `instruct` stand for.
    """

    seed: int
    drop: Callable[[Record, str, str], None]
    scratch: Path | None = None
    root: Path = Path()
    chat: Chat | None = None
    max_length: int = 2048
    note: Callable[..., None] = _no_note
    copied: Callable[[Record], None] = _no_copy
    outputs: Path | None = None
    models: Mapping[str, str] = field(default_factory=dict)

    def copy(self, record: Record, name: str, **changes: Any) -> Record:
        """One more row made from `record`, with the id `<id>~<name>`; the ledger counts it as made, and knows the row it is of."""
        made = replace(record, id=f"{record.id}~{name}", of=record.origin, **changes)
        self.copied(made)
        return made


class Operation(Method):
    """Base of operations.

    `apply` yields the records to go on with: each row that it got once (perhaps changed), or calls `context.drop` for it; more rows
    of one come from `context.copy`. The same rows, options and seed give the same records; what happens to one row must not depend
    on rows of another source unless that is the point. Random draws come from (seed, purpose, row id).
    """

    chooses: ClassVar[bool] = False
    """Leaving rows out is what it is for: rows that it drops are no fault of theirs."""
    streams: ClassVar[bool] = False
    """One pass over the rows is enough: they are not kept on disk for it."""
    renders: ClassVar[bool] = False
    """It writes what a row says: it is applied to validation rows too, and rows may come with columns in place of a conversation."""

    def columns(self) -> set[str]:
        """Columns of the rows that it reads; others are not kept."""
        return set()

    def adds(self, root: Path) -> dict[str, type]:
        """Scores and columns that it gives to rows, name → float, int or str; kept beside the encoded rows."""
        return {}

    def sources(self) -> list[SourceSpec]:
        """Files that it reads besides the rows. The rows are made again when one of them changes."""
        return []

    def digests(self, root: Path) -> list[str]:
        """Fingerprints of what it reads besides the rows."""
        return [digest(spec, root) for spec in self.sources()]

    def models(self) -> tuple[str, ...]:
        """Models that it runs: `base`, `instruct`, or a model's own name. The rows are made again when one of them changes."""
        return ()

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """The records to go on with."""
        raise TypeError(f"operation {self.name!r} does not define apply")
