"""Merge methods: the oracles of the papers' cards, on updates held in memory, and that neither pieces nor order change a byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidetune import registry
from guidetune.errors import BadInput
from guidetune.weightspace import stages
from guidetune.weightspace.select import largest
from guidetune.weightspace.stages import Merger, View, layers
from tests.weightspace.learnt import given as given_learnt

Tensors = dict[str, torch.Tensor]
SHAPES = {"embed.weight": (40, 12), "layers.0.w": (24, 12), "layers.1.w": (24, 12), "layers.2.w": (24, 12), "layers.3.b": (12,)}
ZERO = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
EVERY = registry.names("weightspace")


def model(seed: int, size: float = 1.0) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def merge(
    method: Any, taus: Sequence[Tensors], weights: Sequence[float] | None = None, anchor: Tensors | None = None, seed: int = 0
) -> Tensors:
    """Anchor + what the preset makes of the updates, in fp32."""
    preset = given_learnt(registry.build("weightspace", method), [f"s{i}" for i in range(len(taus))], SHAPES)
    anchor = anchor or model(0)
    depth = layers(SHAPES)

    def view(name: str) -> View:
        return View(
            name,
            SHAPES[name],
            tuple(f"s{i}" for i in range(len(taus))),
            tuple(weights or [1.0] * len(taus)),
            depth.get(name),
            seed,
            lambda a, b: tuple(tau[name][a:b] for tau in taus),
            lambda a, b: anchor[name][a:b],
        )

    merger = Merger(preset.stages(), {name: view(name) for name in SHAPES})
    return {name: anchor[name] + merger.update(name, 0, SHAPES[name][0]) for name in SHAPES}


def same(a: Tensors, b: Tensors, tolerance: float = 0.0) -> None:
    for name in SHAPES:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def plus(a: Tensors, *others: Tensors, scale: float = 1.0) -> Tensors:
    return {name: a[name] + scale * sum(other[name] for other in others) for name in a}


def options(name: str) -> dict[str, Any]:
    """With everything kept."""
    full = {"ties": {"density": 1.0}, "dare": {"density": 1.0}, "breadcrumbs": {"keep": 1.0, "drop_top": 0.0, "scale": 1.0}}
    full |= {"sce": {"select_topk": 1.0}, "lines": {"alpha": 1.0}, "consensus": {"votes": 0}}
    return {"method": name, **full.get(name, {})}


ONE = [name for name in EVERY if registry.get("weightspace", name).sources_needed[0] == 1 and name != "della"]


@pytest.mark.parametrize("name", ONE)
def test_one_source_with_everything_kept_is_that_model(name: str) -> None:
    tau = model(1)
    same(merge(options(name), [tau]), plus(model(0), tau), 1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_zero_updates_leave_the_anchor(name: str) -> None:
    same(merge(name, [ZERO, ZERO]), model(0), 1e-6 if "slerp" in name or "karcher" in name else 0.0)


@pytest.mark.parametrize("name", EVERY)
def test_pieces_change_no_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # few distinct values: many ties, whose breaking must not depend on where a piece ends
    taus = [{n: (3 * t).round() / 3 for n, t in model(seed).items()} for seed in (1, 2)]
    whole = merge(name, taus)
    monkeypatch.setattr(stages, "PIECE_VALUES", 50)
    monkeypatch.setattr(stages, "HELD_BYTES", 0)
    pieces = merge(name, taus)
    for key in SHAPES:
        # sums over a tensor (angles, norms) are taken piece by piece
        exact = name not in ("slerp", "karcher", "model_stock", "sce", "dare", "lines", "regmean")
        torch.testing.assert_close(whole[key], pieces[key], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_bytes_and_the_options_are_documented(name: str) -> None:
    taus = [model(1), model(2)]
    same(merge(name, taus, seed=3), merge(name, taus, seed=3))
    cls = registry.get("weightspace", name)
    assert cls.__doc__ and all(field.description for field in cls.model_fields.values())
    assert registry.build("weightspace", registry.build("weightspace", name).spec()) == registry.build("weightspace", name)


def test_task_arithmetic_of_one_nth_is_the_soup() -> None:
    taus = [model(1), model(2), model(3)]
    same(merge({"method": "task_arithmetic", "scale": 1 / 3}, taus), merge("linear", taus), 1e-6)
    same(merge("linear", taus, [1.0, 2.0, 1.0]), plus(model(0), taus[0], taus[1], taus[1], taus[2], scale=0.25), 1e-6)
    same(merge({"method": "task_arithmetic", "scale": -0.5}, taus[:1]), plus(model(0), taus[0], scale=-0.5), 1e-6)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_ties_is_trim_elect_merge(scope: str) -> None:
    taus = [model(1), model(2), model(3)]
    flat = [torch.cat([t.flatten() for t in tau.values()]) for tau in taus]

    def trim(x: torch.Tensor) -> torch.Tensor:
        keep = torch.zeros_like(x)
        top = x.abs().argsort(descending=True, stable=True)[: int(0.3 * x.numel())]
        keep[top] = x[top]
        return keep

    def split(x: torch.Tensor) -> list[torch.Tensor]:
        parts = list(x.split([int(np.prod(s)) for s in SHAPES.values()]))
        if scope == "row":
            return [row for part, shape in zip(parts, SHAPES.values(), strict=True) for row in part.view(-1, shape[-1])]
        return parts if scope == "tensor" else [x]

    trimmed = torch.stack([torch.cat([trim(part) for part in split(x)]) for x in flat])
    sign = trimmed.sum(0).sign()
    sign[sign == 0] = 1.0 if float(sign.sum()) >= 0 else -1.0
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    expected = (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)
    got = merge(
        {"method": "ties", "density": 0.3, "scope": scope, "tie": "plus"}, taus, anchor={n: torch.zeros(s) for n, s in SHAPES.items()}
    )
    torch.testing.assert_close(torch.cat([t.flatten() for t in got.values()]), expected, rtol=1e-6, atol=1e-6)


def test_opposite_updates_leave_the_positive_values() -> None:
    tau = model(1)
    got = merge({"method": "ties", "density": 1.0, "tie": "plus"}, [tau, {n: -t for n, t in tau.items()}])
    same(got, {n: model(0)[n] + t.abs() for n, t in tau.items()}, 1e-6)


def test_dare_keeps_the_mean_and_the_asked_share() -> None:
    tau = {n: torch.ones(s) for n, s in SHAPES.items()}
    means, shares = [], []
    for seed in range(40):
        d = torch.cat([t.flatten() for t in merge({"method": "dare", "density": 0.25}, [tau], anchor=ZERO, seed=seed).values()])
        means.append(float(d.mean()))
        shares.append(float((d != 0).float().mean()))
        assert set(d.unique().tolist()) == {0.0, 4.0}
    assert abs(np.mean(means) - 1) < 0.03 and abs(np.mean(shares) - 0.25) < 0.01
    a, b = (merge({"method": "dare", "density": 0.25}, [tau], anchor=ZERO, seed=s) for s in (0, 1))
    assert any(not torch.equal(a[n], b[n]) for n in SHAPES)


def test_della_without_a_window_is_dare() -> None:
    taus = [model(1), model(2)]
    same(
        merge({"method": "della", "density": 0.5, "epsilon": 0.0, "sign": "sum"}, taus),
        merge({"method": "dare", "density": 0.5}, taus),
        1e-6,
    )


def test_della_keeps_large_values_more_often() -> None:
    draw = torch.Generator().manual_seed(0)
    tau = {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}
    kept = torch.zeros(40, 12)
    total = torch.zeros(40, 12)
    for seed in range(200):
        d = merge({"method": "della", "density": 0.5, "epsilon": 0.3, "sign": "sum"}, [tau], anchor=ZERO, seed=seed)["embed.weight"]
        kept += d != 0
        total += d
    rank = tau["embed.weight"].abs().argsort(1).argsort(1)
    rates = [float(kept[rank == r].mean()) / 200 for r in (0, 11)]
    assert abs(rates[0] - 0.2) < 0.03 and abs(rates[1] - 0.8) < 0.03
    assert float((total / 200 - tau["embed.weight"]).abs().mean()) < 0.1  # each value divided by its own probability


def test_breadcrumbs_orders_and_scopes() -> None:
    row = torch.tensor([5.0, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2, 0.1])
    from guidetune.weightspace.sparsify import _top

    def band(order: str, keep: float = 0.2, drop: float = 0.1) -> list[float]:
        from guidetune.weightspace.sparsify import KeepBand

        outer, inner = KeepBand(keep, drop, "row", order).counts(10)
        return row[(_top(row[None], outer) & ~_top(row[None], inner))[0]].tolist()

    assert band("first") == [4.0, 3.0] and band("last") == [4.0]
    taus = [model(1), model(2)]
    plain = {"method": "breadcrumbs", "keep": 1.0, "drop_top": 0.0, "scale": 0.4}
    same(merge(plain, taus), merge({"method": "task_arithmetic", "scale": 0.4}, taus), 1e-6)
    # nothing dropped at the top: the trimming of TIES
    one = merge({"method": "breadcrumbs", "keep": 0.3, "drop_top": 0.0, "scale": 1.0, "scope": "tensor"}, taus[:1])
    same(one, merge({"method": "ties", "density": 0.3, "scope": "tensor"}, taus[:1]))
    with pytest.raises(BadInput, match="more than there is"):
        registry.build("weightspace", {"method": "breadcrumbs", "keep": 0.9, "drop_top": 0.2})


def test_consensus_limits() -> None:
    taus = [model(1), model(2), model(3)]
    same(merge({"method": "consensus", "votes": 0}, taus), merge("sum", taus))
    same(merge({"method": "consensus", "votes": 4}, taus), model(0))
    total = plus(taus[0], taus[1], taus[2])
    name = "layers.1.w"
    votes = sum((tau[name].abs() > 0.5 * (total[name] - tau[name]).abs()).int() for tau in taus)
    got = merge({"method": "consensus", "votes": 2, "threshold": 0.5}, taus)[name]
    torch.testing.assert_close(got, model(0)[name] + total[name] * (votes >= 2), rtol=1e-6, atol=1e-6)


def test_model_stock_by_the_angle() -> None:
    tau = model(1)
    same(merge("model_stock", [tau, {n: t.clone() for n, t in tau.items()}]), plus(model(0), tau), 1e-5)
    apart = [{n: t.clone() for n, t in tau.items()} for _ in range(2)]
    for n in SHAPES:
        apart[0][n].view(-1)[::2] = 0
        apart[1][n].view(-1)[1::2] = 0
    same(merge("model_stock", apart), model(0))  # at right angles: nothing is shared
    a, b = model(1)["layers.0.w"], model(2)["layers.0.w"]
    c = float((a * b).sum() / a.norm() / b.norm())
    got = merge({"method": "model_stock", "clamp": False}, [model(1), model(2)])["layers.0.w"]
    torch.testing.assert_close(got, model(0)["layers.0.w"] + 2 * c / (1 + c) * (a + b) / 2, rtol=1e-5, atol=1e-5)


def test_slerp_ends_and_norm() -> None:
    ends = [model(5), model(6)]
    for n in SHAPES:
        ends[1][n] *= ends[0][n].norm() / ends[1][n].norm()
    anchor = model(0)
    taus = [{n: end[n] - anchor[n] for n in SHAPES} for end in ends]
    same(merge("slerp", taus, [1.0, 0.0]), ends[0], 1e-5)
    same(merge("slerp", taus, [0.0, 1.0]), ends[1], 1e-5)
    middle = merge("slerp", taus, [0.5, 0.5])
    for n in SHAPES:
        assert float(middle[n].norm()) == pytest.approx(float(ends[0][n].norm()), rel=1e-4)
    same(merge("karcher", taus, [0.5, 0.5]), middle, 1e-4)
    same(merge("karcher", taus, [0.3, 0.7]), merge("slerp", taus, [0.3, 0.7]), 1e-4)


def test_karcher_of_three_has_no_gradient_left() -> None:
    vectors = [model(seed) for seed in (5, 6, 7)]
    mean = merge("karcher", vectors, anchor=ZERO)["layers.0.w"].double().flatten()
    mean = mean / mean.norm()
    tangent = torch.zeros_like(mean)
    for vector in vectors:
        u = vector["layers.0.w"].double().flatten()
        u = u / u.norm()
        along = float(u @ mean)
        tangent += np.arccos(along) * (u - along * mean) / np.sqrt(1 - along**2)
    assert float(tangent.norm()) < 1e-5


def test_sce_by_hand() -> None:
    taus = [model(1), model(2), model(3)]
    name = "layers.2.w"
    x = torch.stack([tau[name] for tau in taus])
    variance = x.var(0, unbiased=False).flatten()
    keep = torch.zeros_like(variance, dtype=torch.bool)
    keep[variance.argsort(descending=True, stable=True)[: int(0.25 * len(variance))]] = True
    x = x * keep.view(x.shape[1:])
    energy = (x.double() ** 2).sum((1, 2))
    eta = (energy / energy.sum()).float()[:, None, None]
    agree = x.sign() == torch.where(x.sum(0) >= 0, 1.0, -1.0)
    expected = (eta * agree * x).sum(0) / (eta * agree).sum(0).clamp_min(1e-8)
    got = merge({"method": "sce", "select_topk": 0.25}, taus, anchor=ZERO)[name]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_lines_by_depth() -> None:
    tau = model(1)
    got = merge({"method": "lines", "alpha": 0.1}, [tau])
    factors = {"embed.weight": 0.1, "layers.0.w": 0.1, "layers.1.w": 0.4, "layers.2.w": 0.7, "layers.3.b": 1.0}
    same(got, {n: model(0)[n] + factors[n] * t for n, t in tau.items()}, 1e-6)
    last = merge({"method": "lines", "alpha": 0.1, "outside": "last"}, [tau])
    torch.testing.assert_close(last["embed.weight"], model(0)["embed.weight"] + tau["embed.weight"])
    torch.testing.assert_close(got["layers.3.b"], merge("sum", [tau])["layers.3.b"], rtol=0, atol=0)
    same(merge({"method": "lines", "alpha": 0.0, "beta": 0.0}, [tau]), model(0))


def test_lines_alpha_by_the_ratio_of_norms() -> None:
    taus = [model(1), model(2)]
    # of summed updates it is 1 / N: the average of the models in the first block
    same(merge({"method": "lines", "alpha": "norm", "beta": 0.0}, taus), merge("linear", taus), 1e-6)
    ties = {"method": "ties", "density": 0.2}
    merged = merge(ties, taus, anchor=ZERO)
    ratio = sum(float((taus[0][n] + taus[1][n]).abs().sum()) for n in SHAPES) / sum(float(merged[n].abs().sum()) for n in SHAPES) / 2
    got = merge({"method": "lines", "alpha": "norm", "beta": 0.3, "on": ties}, taus, anchor=ZERO)
    torch.testing.assert_close(got["layers.3.b"], (ratio + 0.3) * merged["layers.3.b"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["embed.weight"], ratio * merged["embed.weight"], rtol=1e-5, atol=1e-6)


def test_a_model_with_two_stacks_has_no_depth() -> None:
    with pytest.raises(BadInput, match="several stacks"):
        layers(["vision.blocks.0.w", "text.layers.0.w"])
    assert layers(["model.layers.0.experts.3.w", "model.layers.7.w", "norm"]) == {
        "model.layers.0.experts.3.w": (1, 2),
        "model.layers.7.w": (2, 2),
    }


@given(st.data())
def test_selection_is_that_of_a_stable_sort(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60))
    coarse = data.draw(st.booleans())
    x = torch.tensor(values, dtype=torch.float32)
    x = x.clamp(-3, 3).round() if coarse else x
    k = data.draw(st.integers(0, len(values)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=3)))
    parts = [part for part in torch.tensor_split(x, cuts) if len(part)]

    def read() -> Iterator[torch.Tensor]:
        yield from parts

    found = largest([k], read)[0]
    before, masks = 0, []
    for part in parts:
        masks.append(found.mask(part, before))
        before += found.equal(part)
    order = x.abs().argsort(descending=True, stable=True)[:k]
    expected = torch.zeros(len(x), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(torch.cat(masks), expected & (x != 0))
