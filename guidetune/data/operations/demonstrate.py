"""Solved examples put before the question: fixed, random or nearest ones."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from guidetune.artefacts import digest_file
from guidetune.data.draws import TOP, Numbers, number
from guidetune.data.neighbours import DIMENSION, embed, nearest
from guidetune.data.ngrams import normal_text
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Dropped, Record, column_of, load
from guidetune.data.shelf import Shelf
from guidetune.data.side import VECTORS, Embeddings
from guidetune.data.sources import SourceSpec
from guidetune.errors import BadInput
from guidetune.registry import method

_CHUNK = 256  # rows that look for demonstrations at a time
_TRIES = 32  # random draws before all of a group is gone through
_TURN = 16  # tokens that a template may write around a turn


class _Pool(NamedTuple):
    """What is known of the rows that demonstrations come from; [p] each."""

    records: Shelf
    ids: list[str]
    texts: np.ndarray  # uint64 hash of the normalised text
    origins: np.ndarray  # uint64 hash of the id of the row that was read
    groups: np.ndarray  # int32
    members: dict[str, np.ndarray]  # group -> places in the pool
    fixed: dict[str, np.ndarray]  # group -> places in the order that is the same for all rows
    vectors: np.ndarray | None


@method(kind="operation", name="demonstrate", paper="2312.12740", summary="Put solved examples before the question.")
class Demonstrate(Operation):
    """Each row gets k demonstrations of the pool, nearest last; k is a number or drawn from {k: weight} by (seed, row id).

    `nearest` compares the text `on` by its embedding: the vectors of `embeddings`, or else hashed character n-grams; every pair is
    compared. `random` draws from (seed, row id), `fixed` takes the same ones for all rows. A row is never its own demonstration, nor
    is one with the same text (up to case and white space), nor one nearer than `min_distance`. Without a pool the rows themselves are
    the pool, each row's own source for it. A pool's `map` says how its demonstrations read.

    As `turns` demonstrations are turns of their own that are not learnt; as `text` they stand in the first user turn:
    question + `between` + answer + `separator`. Demonstrations that do not fit into `max_length` are left out, the farthest first.
    With `keep_zero_shot` a row stays as it is and one more with its demonstrations follows (`<id>~shots`). The column `demos` lists
    the ids; the score `demo_distance` is that of the nearest.
    """

    k: int | dict[int, float] = Field(1, description="Demonstrations of each row, or weights of several numbers: {0: 0.6, 1: 0.3, 2: 0.1}.")
    retrieve: Literal["random", "nearest", "fixed"] = Field("random", description="Which ones.")
    pool: SourceSpec | None = Field(None, description="Source of the demonstrations (default: the rows themselves).")
    within: str | None = Field(None, description="Demonstrations are equal to the row in this column (default without a pool: source).")
    on: str = Field("user", description="Text that is compared: user, or a column.")
    embeddings: str | None = Field(None, description="Folder with embeddings of the rows' ids (and the pool's, unless given apart).")
    pool_embeddings: str | None = Field(None, description="Folder with embeddings of the pool's ids.")
    metric: Literal["l2", "cosine"] = Field("l2", description="Squared Euclidean distance, or 1 - cos.")
    min_distance: float | None = Field(None, ge=0, description="Nearer ones are left out (nearest only).")
    keep_zero_shot: bool = Field(False, description="Keep each row without demonstrations too.")
    form: Literal["turns", "text"] = Field("turns", description="Demonstrations as turns of their own, or as text of the question.")
    between: str = Field("\n", description="Between question and answer of a demonstration, as text.")
    separator: str = Field("\n\n", description="After each demonstration, as text.")

    @model_validator(mode="after")
    def _makes_sense(self) -> Demonstrate:
        counts = self.k if isinstance(self.k, dict) else {self.k: 1.0}
        if not counts or min(counts) < 0 or any(not 0 <= w < float("inf") for w in counts.values()) or not sum(counts.values()):
            raise ValueError(f"k is a number from 0 on, or {{number: weight}} with weights that are not all 0: {self.k}")
        if self.retrieve != "nearest" and (self.embeddings or self.pool_embeddings or self.min_distance is not None):
            raise ValueError("embeddings and min_distance are for retrieve: nearest")
        if self.pool_embeddings and not self.embeddings:
            raise ValueError("pool_embeddings needs embeddings of the rows beside it")
        return self

    renders = True

    @property
    def _most(self) -> int:
        return max(self.k) if isinstance(self.k, dict) else self.k

    @property
    def _within(self) -> str | None:
        return self.within if self.within is not None or self.pool is not None else "source"

    def columns(self) -> set[str]:
        return {column_of(name) for name in (self.on, self._within) if name is not None}

    def adds(self, root: Path) -> dict[str, type]:
        return {"demos": str} | ({"demo_distance": float} if self.retrieve == "nearest" else {})

    def sources(self) -> list[SourceSpec]:
        return [self.pool] if self.pool is not None else []

    def digests(self, root: Path) -> list[str]:
        folders = [_folder(root, name) / VECTORS for name in (self.embeddings, self.pool_embeddings) if name]
        return [*super().digests(root), *(digest_file(file) if file.is_file() else "none" for file in folders)]

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Memory: 40 bytes per row of the pool and its id; vectors and texts of the pool are in scratch files."""
        if self._most == 0:
            yield from rows
            return
        counts: Counter[str] = Counter()
        with Shelf(context.scratch / ".pool" if context.scratch else None) as shelf:
            pool = self._pool(rows, shelf, context)
            of_rows = Embeddings.open(_folder(context.root, self.embeddings)) if self.embeddings else None
            stream = iter(rows)
            while chunk := list(islice(stream, _CHUNK)):
                for record, (places, distances) in zip(chunk, self._found(chunk, pool, of_rows, context.seed), strict=True):
                    if len(places) < self._count(record, context.seed):
                        counts["too few in the pool"] += 1
                    shown, left_out = self._shown(record, [pool.records[p] for p in places], context)
                    counts["left out for length"] += left_out
                    counts[f"k={len(places) - left_out}"] += 1
                    if not shown:
                        yield record
                        continue
                    ids = [pool.ids[p] for p in places[: len(places) - left_out]]
                    scores = {**record.scores, "demo_distance": float(distances[0])} if self.retrieve == "nearest" else record.scores
                    changes = {"messages": shown, "fields": {**record.fields, "demos": ids[::-1]}, "scores": scores}
                    if self.keep_zero_shot:
                        yield record
                        yield context.copy(record, "shots", **changes)
                    else:
                        yield replace(record, **changes)
            if isinstance(pool.vectors, np.memmap):
                del pool
                (context.scratch / ".vectors").unlink(missing_ok=True) if context.scratch else None
        context.note(demonstrations={name: counts[name] for name in sorted(counts) if counts[name]})

    # The pool

    def _pool(self, rows: Rows, shelf: Shelf, context: OperationContext) -> _Pool:
        ids: list[str] = []
        texts, origins, groups = array("Q"), array("Q"), array("i")
        names: dict[str, int] = {}
        bad: Counter[str] = Counter()
        for record in self._candidates(rows, context.root, bad):
            shelf.add(record)
            ids.append(record.id)
            texts.append(_key(record.value(self.on)))
            origins.append(_hash(record.origin))
            groups.append(names.setdefault(_group(record, self._within), len(names)))
        if bad:
            context.note(pool_rows_left_out=dict(bad))
        if not ids:
            where = f"the pool {self.pool.path} has" if self.pool else "the rows have"
            why = "; ".join(f"{n} {reason}" for reason, n in bad.items())
            hint = "; give it a map: {user: …, assistant: …}" if self.pool and not self.pool.map else ""
            raise BadInput(f"demonstrate: {where} no conversation with {self.on!r} text to show or compare ({why or 'empty'}){hint}")
        group_of = np.frombuffer(groups, np.int32).copy()
        members = {name: np.flatnonzero(group_of == k) for name, k in names.items()}
        fixed = {}
        if self.retrieve == "fixed":
            order = Numbers(context.seed, "demonstrate fixed")
            fixed = {name: places[np.argsort([order.of(ids[p]) for p in places.tolist()])] for name, places in members.items()}
        vectors = self._vectors(shelf, ids, context) if self.retrieve == "nearest" else None
        return _Pool(shelf, ids, np.frombuffer(texts, np.uint64), np.frombuffer(origins, np.uint64), group_of, members, fixed, vectors)

    def _candidates(self, rows: Rows, root: Path, bad: Counter[str]) -> Iterator[Record]:
        stream: Iterable[Record | Dropped]
        stream = rows if self.pool is None else (found for _, found in load(self.pool, root, sorted(self.columns())))
        for found in stream:
            if isinstance(found, Dropped):
                bad[found.reason] += 1
            elif not all(isinstance(found.value(name), str) for name in ("user", "assistant", self.on)):
                bad["no text to show or compare"] += 1
            else:
                yield found

    def _vectors(self, shelf: Shelf, ids: list[str], context: OperationContext) -> np.ndarray:
        if self.embeddings:
            stored = Embeddings.open(_folder(context.root, self.pool_embeddings or self.embeddings))
            return stored.take(ids)
        shape = (len(ids), DIMENSION)
        place = context.scratch / ".vectors" if context.scratch else None
        out = np.memmap(place, np.float16, "w+", shape=shape) if place is not None else np.zeros(shape, np.float16)
        for a in range(0, len(ids), 1024):
            out[a : a + 1024] = embed([shelf[k].value(self.on) for k in range(a, min(a + 1024, len(ids)))])
        return out

    # What a row gets

    def _count(self, record: Record, seed: int) -> int:
        if not isinstance(self.k, dict):
            return self.k
        left = number(seed, "demonstrations", record.id) / TOP * sum(self.k.values())
        for count, weight in sorted(self.k.items()):
            left -= weight
            if left < 0:
                return count
        return max(count for count, weight in self.k.items() if weight)

    def _found(
        self, chunk: Sequence[Record], pool: _Pool, of_rows: Embeddings | None, seed: int
    ) -> list[tuple[list[int], Sequence[float]]]:
        """Places in the pool of each row's demonstrations, nearest first, and their distances."""
        wanted = [self._count(record, seed) for record in chunk]
        own = [_key(record.value(self.on)) for record in chunk]
        origins = [_hash(record.origin) for record in chunk]
        if self.retrieve == "nearest":
            return self._nearest(chunk, wanted, own, origins, pool, of_rows)
        out: list[tuple[list[int], Sequence[float]]] = []
        for record, count, text, origin in zip(chunk, wanted, own, origins, strict=True):
            name = _group(record, self._within)
            if self.retrieve == "fixed":
                stream = iter(pool.fixed.get(name, np.zeros(0, np.int64)).tolist())
            else:
                stream = _random(pool.members.get(name, np.zeros(0, np.int64)), number(seed, "demonstrate", record.id))
            taken: list[int] = []
            while len(taken) < count and (place := next(stream, None)) is not None:
                if place not in taken and pool.texts[place] != text and pool.origins[place] != origin:
                    taken.append(place)
            out.append((taken, []))
        return out

    def _nearest(
        self,
        chunk: Sequence[Record],
        wanted: list[int],
        own: list[int],
        origins: list[int],
        pool: _Pool,
        of_rows: Embeddings | None,
    ) -> list[tuple[list[int], Sequence[float]]]:
        assert pool.vectors is not None
        texts = [record.value(self.on) for record in chunk]
        if of_rows is not None:
            known = of_rows.places([record.id for record in chunk]).tolist()
            vectors = of_rows.take([r.id if at >= 0 else r.origin for r, at in zip(chunk, known, strict=True)])
        else:  # in the precision of the pool's, so that a text is at no distance from itself
            vectors = embed([text if isinstance(text, str) else "" for text in texts]).astype(np.float16)
        keys, from_row = np.array(own, dtype=np.uint64), np.array(origins, dtype=np.uint64)
        groups = np.array([self._group_number(record, pool) for record in chunk], dtype=np.int32)

        def allowed(a: int, b: int) -> np.ndarray:
            other = (pool.texts[None] != keys[a:b, None]) & (pool.origins[None] != from_row[a:b, None])
            return other & (pool.groups[None] == groups[a:b, None])

        places, distances = nearest(vectors, pool.vectors, max(wanted), self.metric, allowed, self.min_distance)
        out: list[tuple[list[int], Sequence[float]]] = []
        for row, count in enumerate(wanted):
            pairs = [(p, d) for p, d in zip(places[row].tolist(), distances[row].tolist(), strict=True) if p >= 0][:count]
            pairs = pairs if isinstance(texts[row], str) else []
            out.append(([p for p, _ in pairs], [d for _, d in pairs]))
        return out

    def _group_number(self, record: Record, pool: _Pool) -> int:
        members = pool.members.get(_group(record, self._within))
        return int(pool.groups[members[0]]) if members is not None and len(members) else -1

    def _shown(self, record: Record, demos: list[Record], context: OperationContext) -> tuple[list[dict[str, Any]], int]:
        """The row's messages with its demonstrations (nearest last), and how many were left out for length; none: no messages."""
        left_out = 0
        while demos:
            messages = self._with(record.messages, demos)
            size = sum(len(m["content"].encode("utf-8", "surrogatepass")) + _TURN for m in messages)
            if size <= context.max_length or self._fits(messages, context):
                return messages, left_out
            demos = demos[:-1]
            left_out += 1
        return [], left_out

    def _fits(self, messages: list[dict[str, Any]], context: OperationContext) -> bool:
        from guidetune.data.chat import Encoded

        if context.chat is None:
            return True
        encoded = context.chat.encode_many([messages])[0]
        return not isinstance(encoded, Encoded) or len(encoded.input_ids) <= context.max_length

    def _with(self, messages: list[dict[str, Any]], demos: list[Record]) -> list[dict[str, Any]]:
        pairs = [(demo.value("user"), demo.value("assistant")) for demo in reversed(demos)]
        at = next((k for k, m in enumerate(messages) if m["role"] == "user"), 0)
        if self.form == "text":
            before = "".join(f"{asked}{self.between}{answer}{self.separator}" for asked, answer in pairs)
            return [*messages[:at], {**messages[at], "content": before + messages[at]["content"]}, *messages[at + 1 :]]
        turns = []
        for asked, answer in pairs:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "train": False}]
        return [*messages[:at], *turns, *messages[at:]]


def _group(record: Record, column: str | None) -> str:
    value = record.value(column) if column is not None else ""
    return "" if value is None else str(value)


def _key(text: Any) -> int:
    return _hash(normal_text(text) if isinstance(text, str) else "")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _random(places: np.ndarray, seed: int) -> Iterator[int]:
    """Places in a random order: some draws first (with repeats), then all of them."""
    if not len(places):
        return
    rng = np.random.default_rng(seed)
    yield from places[rng.integers(0, len(places), _TRIES)].tolist()
    yield from places[rng.permutation(len(places))].tolist()


def _folder(root: Path, name: str | None) -> Path:
    place = Path(name or "").expanduser()
    return next((p for p in (Path(root) / place, place) if p.exists()), Path(root) / place)
