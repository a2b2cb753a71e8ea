"""Proportions of `mix`: the cards' numbers, and what holds for any sizes and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidetune import registry
from guidetune.data.operations.mix import apportion, shares
from guidetune.errors import BadInput
from tests.data.operating import conversation, operate


def p(sizes: list[int], groups: list[str] | None = None, **options: Any) -> list[float]:
    mix = registry.build("operation", {"method": "mix", **options})
    named = {str(k): size for k, size in enumerate(sizes)}
    of = {str(k): group for k, group in enumerate(groups)} if groups is not None else None
    return list(shares(named, mix, of).values())


def test_the_cap_of_opt_iml() -> None:
    assert p([10, 100, 10_000], cap=100) == pytest.approx([10 / 210, 100 / 210, 100 / 210])
    assert p([10, 100, 10_000]) == pytest.approx([10 / 10_110, 100 / 10_110, 10_000 / 10_110])  # no cap: by size
    assert p([10, 100, 10_000], cap=1) == pytest.approx([1 / 3] * 3)  # K = 1: equal
    assert p([4, 16], temperature=2.0) == pytest.approx([2 / 6, 4 / 6])
    assert p([10, 30, 5], ["a", "a", "b"], outer={"a": 3, "b": 1}, cap=20) == pytest.approx([0.25, 0.5, 0.25])
    assert p([10, 30, 5], ["a", "a", "b"], outer={"a": 1, "b": 0}) == pytest.approx([0.25, 0.75, 0])
    assert p([10, 30], weights={"0": 2, "1": 6}) == pytest.approx([0.25, 0.75])


_sizes = st.lists(st.integers(1, 10**6), min_size=1, max_size=12)


@given(sizes=_sizes, cap=st.none() | st.integers(1, 10**6), rows=st.integers(1, 10**6))
def test_shares_and_draws_of_any_sizes(sizes: list[int], cap: int | None, rows: int) -> None:
    share = p(sizes, cap=cap)
    assert sum(share) == pytest.approx(1)
    for a, b in zip(range(len(sizes)), range(1, len(sizes)), strict=False):
        if sizes[a] <= sizes[b]:
            assert share[a] <= share[b] + 1e-12  # rises with the size
        if cap is not None and min(sizes[a], sizes[b]) >= cap:
            assert share[a] == pytest.approx(share[b])  # and is constant from the cap on
    draws = apportion({str(k): v for k, v in enumerate(share)}, rows)
    assert sum(draws.values()) == rows
    assert all(abs(n - rows * share[int(k)]) < 1 for k, n in draws.items())
    # Removing a member only rescales the others.
    if len(sizes) > 1:
        rest = p(sizes[:-1], cap=cap)
        assert [x / share[0] for x in share[:-1]] == pytest.approx([x / rest[0] for x in rest])


@given(sizes=_sizes, data=st.data())
def test_groups_have_their_weights(sizes: list[int], data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.sampled_from("abc"), min_size=len(sizes), max_size=len(sizes)))
    outer = {g: data.draw(st.floats(0.125, 8)) for g in set(groups)}
    zero = data.draw(st.sampled_from(sorted(outer)))
    if len(outer) > 1:
        outer[zero] = 0.0
    share = p(sizes, groups, outer=outer, cap=1000)
    for group, weight in outer.items():
        assert sum(x for x, g in zip(share, groups, strict=True) if g == group) == pytest.approx(weight / sum(outer.values()))


def rows_of(**sizes: int) -> list[Any]:
    return [conversation(f"{name}{k}", source=name) for name, size in sizes.items() for k in range(size)]


def test_draws_repeats_and_effective_epochs(tmp_path: Path) -> None:
    done = operate({"method": "mix", "weights": "equal", "rows": 100}, rows_of(small=7, large=500), tmp_path)
    of = [r.origin for r in done.records]
    assert len(of) == 100 == len({r.id for r in done.records})
    counts = [of.count(f"small{k}") for k in range(7)]
    assert sum(counts) == 50 and set(counts) == {7, 8}  # no row twice before every row once
    assert {r.origin for r in done.records if r.source == "large"} <= {f"large{k}" for k in range(500)}
    facts = done.facts["members"]
    assert facts["small"]["epochs"] == pytest.approx(50 / 7, abs=1e-3) and facts["large"]["draws"] == 50
    assert done.dropped == {"not drawn": 450} and done.made == 43
    assert {r.id for r in done.records if r.origin == "small0"} >= {"small0", "small0~2", "small0~7"}


def test_a_source_is_drawn_from_as_if_the_others_said_something_else(tmp_path: Path) -> None:
    one = rows_of(a=30, b=40)
    other = [conversation(r.id.replace("b", "c") if r.source == "b" else r.id, source=r.source, text=r.id * 3) for r in one]
    for options in ({"rows": 50}, {"cap": 10}, {"weights": {"a": 1, "b": 3}, "rows": 200}):
        first, second = (operate({"method": "mix", **options}, rows, tmp_path).records for rows in (one, other))
        assert [r.id for r in first if r.source == "a"] == [r.id for r in second if r.source == "a"]


def test_without_a_budget(tmp_path: Path) -> None:
    rows = rows_of(a=10, b=100)
    assert len(operate("mix", rows, tmp_path).records) == 110  # everything once
    capped = operate({"method": "mix", "cap": 20}, rows, tmp_path)
    assert [sum(r.source == s for r in capped.records) for s in "ab"] == [10, 20]
    first = operate({"method": "mix", "weights": "equal"}, rows, tmp_path)
    assert [sum(r.source == s for r in first.records) for s in "ab"] == [10, 10]
    every = operate({"method": "mix", "weights": "equal", "stop": "all"}, rows, tmp_path)
    assert [sum(r.source == s for r in every.records) for s in "ab"] == [100, 100]


def test_a_budget_in_tokens(tmp_path: Path) -> None:
    rows = [conversation(f"{s}{k}", source=s, text="word " * (2 if s == "a" else 9)) for s in "ab" for k in range(60)]
    done = operate({"method": "mix", "weights": "equal", "tokens": 3000}, rows, tmp_path)
    tokens = {name: part["tokens"] for name, part in done.facts["members"].items()}
    length = {name: tokens[name] / done.facts["members"][name]["draws"] for name in "ab"}
    assert all(abs(tokens[name] - 1500) <= length[name] for name in "ab"), tokens
    assert done.facts["members"]["a"]["draws"] > done.facts["members"]["b"]["draws"]


def test_members_and_groups_by_columns(tmp_path: Path) -> None:
    rows = [conversation(f"r{k}", fields={"task": "xyz"[k % 3], "group": "g" if k % 3 else "h"}) for k in range(90)]
    done = operate({"method": "mix", "by": "task", "outer": {"g": 1, "h": 1}, "rows": 40}, rows, tmp_path)
    tasks = [r.fields["task"] for r in done.records]
    assert [tasks.count(t) for t in "xyz"] == [20, 10, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1, "c": 2}}, r"there is no source 'c'.*\n.*source 'b' has no weight"),
        ({"outer": {"g": 1}}, "has no 'group'; give its source tags"),
        ({"weights": {"a": 0, "b": 0}}, "not all 0"),
        ({"weights": {"a": -1, "b": 2}}, "at least 0"),
        ({"weights": "equal", "cap": 5}, "cap and temperature are for weights: proportional"),
        ({"rows": 5, "tokens": 5}, "not both"),
    ],
)
def test_errors_of_a_mix(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        operate({"method": "mix", **options}, rows_of(a=3, b=4), tmp_path)
