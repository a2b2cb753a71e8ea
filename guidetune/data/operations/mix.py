"""Sources mixed in chosen proportions, to a budget of rows or tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from guidetune.data.draws import Numbers, Smallest
from guidetune.data.operations import Operation, OperationContext, Rows
from guidetune.data.records import Record, column_of
from guidetune.errors import BadInput
from guidetune.registry import method, nearest


@method(
    kind="operation",
    name="mix",
    paper="2212.12017",
    summary="Mix sources: proportional with a cap, equal or weighted; row or token budget.",
)
class Mix(Operation):
    """Member m of group G is drawn with p(m) = w_G · min(e_m, K) / Σ_{k∈G} min(e_k, K): e rows, cap K, group weights w that sum to 1.

    Members are sources, or the values of another column (`by: task`). `equal` puts 1 in place of min(e, K), and a mapping its own
    numbers; `temperature` T takes the T-th root. Without `outer` there is one group.

    Of N rows member m gives N·p(m), rounded so that they add up; of N tokens it gives rows until N·p(m) tokens are reached. Each row
    of a member comes floor(draws / e) times, and once more if its own number, drawn from (seed, row id), is among the smallest: so
    the choice inside a member depends on no other member's rows. Repeats have the ids `<id>~2`, `<id>~3`, … and stand beside the
    first; rows that are not drawn are dropped. Without a budget the mix ends with the first member to run out (`stop: first`) or with
    the last (`all`), counting min(e, K) rows of each. The ledger has draws and effective epochs (draws / e) of every member.
    """

    weights: Literal["proportional", "equal"] | dict[str, float] = Field(
        "proportional", description="proportional, equal, or {member: weight} for every member."
    )
    cap: int | None = Field(None, gt=0, description="K: rows of a member beyond it do not raise its share (proportional only).")
    temperature: float = Field(1.0, gt=0, description="T: shares are proportional to min(e, K)^(1/T).")
    outer: dict[str, float] | None = Field(None, description="{group: weight}, for every group; the group is a tag or column of the rows.")
    by: str = Field("source", description="What a member is: source, or a column such as task or language.")
    group: str = Field("group", description="Column that names a row's group, with outer.")
    rows: int | None = Field(None, gt=0, description="Budget in rows.")
    tokens: int | None = Field(None, gt=0, description="Budget in tokens, as the rows will be encoded.")
    stop: Literal["first", "all"] = Field("first", description="Without a budget: stop when the first member, or the last, is used up.")

    chooses = True

    @model_validator(mode="after")
    def _makes_sense(self) -> Mix:
        if self.rows is not None and self.tokens is not None:
            raise ValueError("give a budget in rows or in tokens, not both")
        if self.weights != "proportional" and (self.cap is not None or self.temperature != 1.0):
            raise ValueError("cap and temperature are for weights: proportional")
        for what, given in (("weights", self.weights), ("outer", self.outer)):
            if isinstance(given, dict) and (not given or any(not 0 <= w < float("inf") for w in given.values()) or not sum(given.values())):
                raise ValueError(f"{what} must be numbers of at least 0, not all 0: {given}")
        return self

    def columns(self) -> set[str]:
        return {column_of(self.by)} | ({column_of(self.group)} if self.outer is not None else set())

    def apply(self, rows: Rows, context: OperationContext) -> Iterator[Record]:
        """Three passes: counts, the rows drawn of each member, the rows. Memory: 16 bytes per row, 8 more with a token budget."""
        names: dict[str, int] = {}
        groups: dict[int, str] = {}
        members, lengths = array("i"), array("q")
        for record in rows:
            member = names.setdefault(_said(record, self.by), len(names))
            members.append(member)
            if self.outer is not None:
                group = _said(record, self.group)
                if groups.setdefault(member, group) != group:
                    raise BadInput(f"mix: {self.by} {_said(record, self.by)!r} is in two groups, {groups[member]!r} and {group!r}")
        counts = np.bincount(np.frombuffer(members, np.int32), minlength=len(names))
        sizes = {name: int(counts[k]) for name, k in names.items()}
        share = shares(sizes, self, {name: groups[k] for name, k in names.items()} if self.outer is not None else None)
        if self.tokens is not None:
            lengths = _token_lengths(rows, context)
        draws = self._draws(rows, sizes, share, members, lengths, context.seed, names)
        numbers = Numbers(context.seed, "mix")
        whole = {m: draws[name] // sizes[name] for name, m in names.items()}
        rest = {m: Smallest(draws[name] % sizes[name]) for name, m in names.items()}
        for k, record in enumerate(rows):
            rest[members[k]].add(numbers.of(record.id))
        limits = {m: smallest.limit for m, smallest in rest.items()}
        taken: dict[str, int] = dict.fromkeys(names, 0)
        used_tokens: dict[str, int] = dict.fromkeys(names, 0)
        by_number = list(names)
        for k, record in enumerate(rows):
            member = members[k]
            times = whole[member] + (numbers.of(record.id) < limits[member])
            name = by_number[member]
            taken[name] += times
            if self.tokens is not None:
                used_tokens[name] += times * lengths[k]
            if not times:
                context.drop(record, "not drawn", f"mix takes {draws[name]} of {sizes[name]} rows of {name}")
                continue
            yield record
            for repeat in range(2, times + 1):
                yield context.copy(record, str(repeat))
        total = sum(taken.values())
        context.note(
            members={
                name: {
                    "rows": sizes[name],
                    "draws": taken[name],
                    "share": round(taken[name] / total, 6) if total else 0.0,
                    "wanted": round(share[name], 6),
                    "epochs": round(taken[name] / sizes[name], 4),
                    **({"group": groups[m]} if self.outer is not None else {}),
                    **({"tokens": used_tokens[name]} if self.tokens is not None else {}),
                }
                for name, m in names.items()
            }
        )

    def _draws(
        self,
        rows: Rows,
        sizes: Mapping[str, int],
        share: Mapping[str, float],
        members: array[int],
        lengths: array[int],
        seed: int,
        names: Mapping[str, int],
    ) -> dict[str, int]:
        """Rows to take of each member."""
        if self.tokens is not None:
            order = Numbers(seed, "mix")
            drawn = np.fromiter((order.of(record.id) for record in rows), np.int64, count=len(members))
            of_row, token = np.frombuffer(members, np.int32), np.frombuffer(lengths, np.int64)
            return {name: _rows_for(share[name] * self.tokens, drawn[of_row == m], token[of_row == m]) for name, m in names.items()}
        if self.rows is not None:
            return apportion(share, self.rows)
        fits = [self._capped(size) / share[name] for name, size in sizes.items() if share[name] > 0]
        return apportion(share, int((min if self.stop == "first" else max)(fits) + 1e-6))

    def _capped(self, size: int) -> int:
        return min(size, self.cap) if self.cap is not None else size


def shares(sizes: Mapping[str, int], mix: Mix, groups: Mapping[str, str] | None = None) -> dict[str, float]:
    """p(m) of every member; they sum to 1.

    Args:
        sizes: rows of each member.
        groups: the group of each member; None: all in one.

    Raises:
        BadInput: weights name other members or groups than there are, or nothing is left to draw from.
    """
    if isinstance(mix.weights, dict):
        _same_names("weights", mix.weights, sizes, mix.by)
        raw = {name: float(mix.weights[name]) for name in sizes}
    elif mix.weights == "equal":
        raw = dict.fromkeys(sizes, 1.0)
    else:
        raw = {name: float(mix._capped(size)) ** (1 / mix.temperature) for name, size in sizes.items()}
    raw = {name: value if sizes[name] else 0.0 for name, value in raw.items()}
    of = groups or dict.fromkeys(sizes, "")
    outer = mix.outer if groups is not None and mix.outer is not None else {"": 1.0}
    if groups is not None:
        _same_names("outer", outer, dict.fromkeys(of.values(), 0), mix.group)
    sums = {group: sum(raw[name] for name in sizes if of[name] == group) for group in outer}
    empty = [group for group, weight in outer.items() if weight > 0 and not sums[group]]
    if empty:
        raise BadInput(f"mix: nothing to draw from{f' in group {empty[0]!r}' if empty[0] else ''}: all its weights are 0")
    whole = sum(outer.values())
    return {name: outer[of[name]] / whole * raw[name] / sums[of[name]] if sums[of[name]] else 0.0 for name in sizes}


def apportion(share: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` divided by `share`, in whole numbers that add up to it: largest remainders first, ties in the order of names.

    A member with share 0 gets none.
    """
    exact = {name: p * total for name, p in share.items()}
    out = {name: int(value + 1e-9) for name, value in exact.items()}
    left = total - sum(out.values())
    for name in sorted(exact, key=lambda n: (-(exact[n] - out[n]), n))[:left]:
        if share[name] > 0:
            out[name] += 1
    return out


def _rows_for(tokens: float, drawn: np.ndarray, lengths: np.ndarray) -> int:
    """How many rows, in the order of their numbers and around again, come nearest to a number of tokens."""
    if not len(lengths) or tokens <= 0:
        return 0
    along = np.cumsum(lengths[np.argsort(drawn, kind="stable")])
    whole = int(tokens // along[-1])
    left = tokens - whole * along[-1]
    at = int(np.searchsorted(along, left))
    before = along[at - 1] if at else 0
    more = at + 1 if at < len(along) and along[at] - left < left - before else at
    return whole * len(lengths) + more


def _token_lengths(rows: Rows, context: OperationContext) -> array[int]:
    """Tokens of every row, as it would be encoded; rows that cannot be are counted as 0."""
    from itertools import islice

    from guidetune.data.chat import Encoded

    if context.chat is None:
        raise BadInput("mix: a budget in tokens needs the chat format; give it in rows")
    lengths = array("q")
    stream = iter(rows)
    while chunk := list(islice(stream, 256)):
        for encoded in context.chat.encode_many([record.messages for record in chunk]):
            lengths.append(min(len(encoded.input_ids), context.max_length) if isinstance(encoded, Encoded) else 0)
    return lengths


def _said(record: Record, column: str) -> str:
    value = record.value(column)
    if value is None:
        raise BadInput(
            f"mix: row {record.id!r} ({record.source} line {record.line}) has no {column!r}; "
            f"give its source tags: {{{column}: …}}, or columns: {{{column}: …}}"
        )
    return str(value)


def _same_names(what: str, given: Mapping[str, float], there: Mapping[str, int], column: str) -> None:
    problems = [f"mix: {what}: there is no {column} {name!r}{nearest(name, list(there))}" for name in given if name not in there]
    problems += [f"mix: {what}: {column} {name!r} has no weight; give it one (0 leaves it out)" for name in there if name not in given]
    if problems:
        raise BadInput(problems)
