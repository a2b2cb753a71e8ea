"""Token weights and reducers against the numbers of the method cards, and the contract over every registered method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guidetune import registry
from guidetune.engine.head import head_nll
from guidetune.errors import BadInput
from guidetune.models.architecture import Parts
from guidetune.objectives.reduce import REDUCERS, scale
from guidetune.objectives.token_weights import TokenBatch
from guidetune.objectives.token_weights.dft import Dft
from guidetune.objectives.token_weights.gift import Gift
from guidetune.objectives.token_weights.stm import Stm

LOGITS = torch.tensor([[2.0, 0, -1], [0.5, 0.5, 0.5], [0, 3, 0], [1, 0, 2]])
TARGETS = torch.tensor([0, 2, 1, 0])
Q = torch.tensor([0.9, 0.1, 0.5, 1.0])
NLL = F.cross_entropy(LOGITS, TARGETS, reduction="none")


def batch(q: torch.Tensor = Q, stop: tuple[bool, ...] = (False, False, False, True)) -> TokenBatch:
    row = torch.zeros(4, dtype=torch.long)
    return TokenBatch(TARGETS, row, torch.tensor(stop), -NLL, {"instruct": q.log(), "base": q.log()})


def reduced(mode: str, w: torch.Tensor, nll: torch.Tensor = NLL, row: torch.Tensor | None = None, rows: int = 1) -> float:
    c, d = REDUCERS[mode](w, torch.zeros(len(w), dtype=torch.long) if row is None else row, rows)
    return float((c * nll).sum() * scale(mode, d))


def test_card_losses() -> None:
    np.testing.assert_allclose(NLL, [0.169846, 1.098612, 0.094923, 1.407606], atol=1e-6)
    w = Gift().weights(batch())
    assert reduced("weights", w) == pytest.approx(0.687116, abs=1e-6)
    assert reduced("tokens", w) == pytest.approx(0.429448, abs=1e-6)
    assert reduced("sum", w) == pytest.approx(1.717790, abs=1e-6)
    assert reduced("paper", w) == pytest.approx(1.717790, abs=1e-6)
    assert reduced("tokens", torch.ones(4)) == pytest.approx(0.692747, abs=1e-6)
    assert reduced("weights", Gift(power=2).weights(batch())) == pytest.approx(0.763236, abs=1e-6)


def test_the_release_keeps_weight_one_on_the_stop_token() -> None:
    w = Gift(eos_weight=1.0).weights(batch(torch.full((4,), 0.3)))
    np.testing.assert_allclose(w, [0.3, 0.3, 0.3, 1.0], atol=1e-6)
    assert reduced("weights", w) == pytest.approx(0.956116, abs=1e-6)
    assert reduced("weights", Gift().weights(batch(torch.full((4,), 0.3)))) == pytest.approx(0.692747, abs=1e-6)
    assert reduced("weights", Gift(power=0, eos_weight=1.0).weights(batch())) == pytest.approx(0.692747, abs=1e-6)


def test_global_and_micro_normalisation_differ_as_published() -> None:
    w = Gift().weights(batch())
    halves = [reduced("micro", w[a:b], NLL[a:b]) for a, b in ((0, 2), (2, 4))]
    assert np.mean(halves) == pytest.approx(0.616384, abs=1e-6)
    top, bottom = 0.0, 0.0
    for a, b in ((0, 2), (2, 4)):
        c, d = REDUCERS["weights"](w[a:b], torch.zeros(2, dtype=torch.long), 1)
        top, bottom = top + float((c * NLL[a:b]).sum()), bottom + d
    assert top / bottom == pytest.approx(0.687116, abs=1e-6)


def test_floor_and_cap() -> None:
    w = Gift().weights(batch(torch.tensor([0.0, 1e-9, 0.5, 1.0])))
    np.testing.assert_allclose(w, [1e-4, 1e-4, 0.5, 1.0], rtol=1e-6)
    assert float(Gift(floor=0).weights(batch(torch.tensor([0.0, 1e-9, 0.5, 1.0])))[0]) == pytest.approx(1e-8)


def test_dft_and_stm_oracles() -> None:
    p = Dft().weights(batch())
    np.testing.assert_allclose(p, [0.843795, 0.333333, 0.909443, 0.244728], atol=1e-6)
    assert reduced("tokens", p) == pytest.approx(0.235082, abs=1e-6)
    np.testing.assert_array_equal(Stm().weights(batch()), [1, 0, 1, 1])
    assert Stm(max_perplexity=1e30).weights(batch()).min() == 1
    # gradient of DFT with respect to the logits: p (softmax - onehot), as the weight is held constant
    z = LOGITS.clone().requires_grad_()
    nll = F.cross_entropy(z, TARGETS, reduction="none")
    (
        Dft().weights(TokenBatch(TARGETS, torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool), -nll.detach())) * nll
    ).sum().backward()
    expected = p[:, None] * (LOGITS.softmax(-1) - F.one_hot(TARGETS, 3))
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("name", registry.names("token_weights"))
def test_contract_of_every_token_weight(name: str) -> None:
    weight = registry.build("token_weights", name)
    seen = batch()
    w = weight.weights(seen)
    assert w.shape == (4,) and w.dtype == torch.float32 and bool((w >= 0).all()) and not w.requires_grad
    assert bool(torch.isfinite(w).all())
    order = torch.tensor([2, 0, 3, 1])
    shuffled = TokenBatch(
        seen.targets[order],
        seen.row[order],
        seen.is_stop[order],
        seen.student_log_prob[order],
        {k: v[order] for k, v in seen.teachers.items()},
    )
    torch.testing.assert_close(weight.weights(shuffled), w[order])
    if weight.teachers:
        with pytest.raises(BadInput, match=weight.teachers[0]):
            weight.weights(TokenBatch(seen.targets, seen.row, seen.is_stop, seen.student_log_prob))
    assert weight.spec()["method"] == name and registry.build("token_weights", weight.spec()) == weight
    assert weight.summary and type(weight).__doc__
    for option in type(weight).model_fields.values():
        assert option.description
    with pytest.raises(BadInput, match="no_such_option"):
        registry.build("token_weights", {"method": name, "no_such_option": 1})


@pytest.mark.parametrize("mode", sorted(REDUCERS))
def test_laws_of_every_reducer(mode: str) -> None:
    w = torch.tensor([0.2, 0.7, 0.4, 0.9, 0.1, 0.6])
    nll = torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0, 0.2])
    row = torch.tensor([0, 0, 0, 1, 1, 2])
    base = reduced(mode, w, nll, row, 3)
    scaled = reduced(mode, 3 * w, nll, row, 3)
    if mode in ("weights", "micro", "sequence"):
        assert scaled == pytest.approx(base, rel=1e-6)
    else:
        assert scaled == pytest.approx(3 * base, rel=1e-6)
    if mode in ("tokens", "weights", "micro"):
        assert reduced(mode, torch.ones(6), nll, row, 3) == pytest.approx(float(nll.mean()), rel=1e-6)
    assert reduced(mode, torch.zeros(6), nll, row, 3) == 0.0
    expected = {
        "sequence": np.mean([(0.2 + 1.4 + 0.2) / 1.3, (1.35 + 0.3) / 1.0, 0.2]),
        "rows": np.mean([1.8 / 3, 1.65 / 2, 0.12]),
        "paper": (1.8 + 1.65 + 0.12) / 3,
        "sum": 1.8 + 1.65 + 0.12,
    }
    if mode in expected:
        assert base == pytest.approx(float(expected[mode]), rel=1e-5)


@pytest.mark.parametrize(("scale_", "softcap", "bias"), [(1.0, None, False), (0.25, None, True), (1.0, 5.0, False), (2.0, 3.0, True)])
@pytest.mark.parametrize("trained", [False, True])
def test_fused_head_equals_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, scale_: float, softcap: float | None, bias: bool, trained: bool
) -> None:
    monkeypatch.setattr("guidetune.engine.head.CHUNK_ELEMENTS", 16 * 37)  # several chunks
    g = torch.Generator().manual_seed(0)
    h = torch.randn(50, 8, generator=g).requires_grad_()
    weight = torch.randn(37, 8, generator=g).requires_grad_(trained)
    b = torch.randn(37, generator=g).requires_grad_(trained) if bias else None
    y = torch.randint(0, 37, (50,), generator=g)
    w = torch.rand(50, generator=g)
    (w * head_nll(h, y, Parts(torch.nn.Identity(), weight, b, scale_, softcap))).sum().backward()
    inputs = [x for x in (h, weight, b) if x is not None and x.requires_grad]
    got = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    z = (h @ weight.T + (b if b is not None else 0)) * scale_
    z = softcap * torch.tanh(z / softcap) if softcap else z
    (w * F.cross_entropy(z, y, reduction="none")).sum().backward()
    for a, x in zip(got, inputs, strict=True):
        torch.testing.assert_close(a, x.grad, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_gives_a_zero_that_stays_in_the_graph() -> None:
    h = torch.zeros(0, 8, requires_grad=True)
    loss = head_nll(h, torch.zeros(0, dtype=torch.long), Parts(torch.nn.Identity(), torch.zeros(5, 8), None, 1.0, None)).sum()
    loss.backward()
    assert float(loss) == 0.0 and h.grad is not None
