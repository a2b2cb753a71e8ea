"""Attention of documents: forward and backward by hand against masked softmax in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guidetune.engine.attention import KEPT_LENGTH, TILE, Documents, _Attention, attend_documents, attend_documents_backward, rotated


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scaling: float, window: int | None) -> torch.Tensor:
    """[N, Hq, D] in float64: every document by itself, scores masked one by one."""
    outputs, start = [], 0
    for n in lengths:
        qd, kd, vd = (x[start : start + n].double().transpose(0, 1) for x in (q, k, v))
        kd, vd = (x.repeat_interleave(qd.shape[0] // x.shape[0], 0) for x in (kd, vd))
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        hidden = (j > i) | ((j <= i - window) if window else False)
        outputs.append((torch.softmax((qd @ kd.transpose(1, 2) * scaling).masked_fill(hidden, -torch.inf), -1) @ vd).transpose(0, 1))
        start += n
    return torch.cat(outputs)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    kv=st.sampled_from([1, 2]),
    per=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 7, 40]),
    tile=st.sampled_from([8, 160]),
    kept=st.sampled_from([0, 512]),
    seed=st.integers(0, 99),
)
def test_equals_masked_softmax(lengths: list[int], kv: int, per: int, window: int | None, tile: int, kept: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guidetune.engine.attention.TILE", tile)
        patch.setattr("guidetune.engine.attention.KEPT_LENGTH", kept)
        check(lengths, kv, per, window, seed)


@pytest.mark.parametrize("lengths", [[KEPT_LENGTH + 90, 2 * TILE, 30], [TILE + TILE // 2 + 1], [TILE + TILE // 2, TILE]])
@pytest.mark.parametrize("window", [None, 100])
def test_long_documents_go_tile_by_tile(lengths: list[int], window: int | None) -> None:
    check(lengths, 2, 2, window, 0)


def check(lengths: list[int], kv: int, per: int, window: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, dim = sum(lengths), 8
    q, k, v, do = (torch.randn(n, heads, dim, generator=generator) for heads in (kv * per, kv, kv, kv * per))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = _Attention.apply(*leaves, Documents(lengths), 0.3, window).view_as(q)
    out.backward(do)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = reference(*exact, lengths, 0.3, window)
    expected.backward(do.double())
    assert float((out.detach() - expected.detach()).abs().max()) < 2e-6 * max(1.0, float(expected.detach().abs().max()))
    for got, want in zip(leaves, exact, strict=True):
        assert float((got.grad - want.grad).abs().max()) < 1e-5 * max(1.0, float(want.grad.abs().max()))


def test_rows_behind_the_last_document_give_and_get_nothing() -> None:
    lengths, n = [5, 20], 32
    q, k, v, do = (torch.randn(n, heads, 8) for heads in (4, 2, 2, 4))
    angle = torch.randn(n, 1, 8)
    documents = Documents(lengths)
    out, saved = attend_documents(q, k, v, angle.cos(), angle.sin(), documents, 0.3)
    grads = attend_documents_backward(do.view(n, -1), saved, angle.cos(), angle.sin(), documents, torch.float32)
    assert not out[25:].any() and all(not g.reshape(n, -1)[25:].any() for g in grads)
    short = [x[:25] for x in (q, k, v)]
    again, _ = attend_documents(*short, angle[:25].cos(), angle[:25].sin(), documents, 0.3)
    assert torch.equal(out[:25], again)


def test_rotation_backwards_is_its_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    from guidetune.engine import scratch

    monkeypatch.setattr(scratch, "ELEMENTS", 1)  # pieces of 16 rows
    n, heads, kv, dim = 50, 3, 2, 8
    x, y = ([torch.randn(n, heads, dim), torch.randn(n, kv, dim)] for _ in range(2))
    angle = torch.randn(n, 1, dim // 2).repeat(1, 1, 2)

    def turned(parts: list[torch.Tensor], transposed: bool = False) -> list[torch.Tensor]:
        out = [torch.empty_like(part) for part in parts]
        rotated(*parts, angle.cos(), angle.sin(), 0.3, out, transposed)
        return out

    left = sum(float((a * b).sum()) for a, b in zip(turned(x), y, strict=True))
    right = sum(float((a * b).sum()) for a, b in zip(x, turned(y, transposed=True), strict=True))
    assert left == pytest.approx(right, rel=1e-4)
    half = torch.cat([-x[0][..., dim // 2 :], x[0][..., : dim // 2]], -1)
    torch.testing.assert_close(turned(x)[0], 0.3 * (x[0] * angle.cos() + half * angle.sin()), rtol=1e-5, atol=1e-6)
