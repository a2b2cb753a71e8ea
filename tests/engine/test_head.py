"""The fused head in 16 bits, and where a probability is too small for fp32."""

from __future__ import annotations

import torch

from guidetune.engine.head import chunk_rows, head_nll
from guidetune.models.architecture import Parts


def parts(weight: torch.Tensor) -> Parts:
    return Parts(torch.nn.Identity(), weight, None, 1.0, None)


def test_a_16_bit_head_is_off_by_the_rounding_of_distances_from_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(500, 64, generator=generator) * 0.6).bfloat16()
    targets = torch.randint(0, 500, (300,), generator=generator)
    # a third of the rows are confident of their target: there plain 16-bit logits lose most
    h = torch.randn(300, 64, generator=generator)
    h[:100] += weight[targets[:100]].float() * 0.7
    h = h.bfloat16()
    exact = torch.nn.functional.cross_entropy(h.double() @ weight.double().T, targets, reduction="none")
    plain = torch.nn.functional.cross_entropy((h @ weight.T).float(), targets, reduction="none").double()
    got = head_nll(h, targets, parts(weight)).double()
    z = h.double() @ weight.double().T
    bound = 2**-8 * (z.softmax(-1) * (z - z.gather(1, targets[:, None])).abs()).sum(-1)
    assert ((got - exact).abs() <= bound + 1e-6).all()
    assert float((got - exact)[:100].abs().mean()) < 0.3 * float((plain - exact)[:100].abs().mean())
    sure = exact < 0.1
    assert sure.sum() > 30 and float(torch.expm1(exact - got)[sure].abs().max()) < 0.002  # of p itself


def test_a_hopeless_target_has_its_finite_loss() -> None:
    weight = torch.zeros(40, 8)
    weight[3] = 100.0
    h = torch.ones(2, 8, requires_grad=True)
    nll = head_nll(h, torch.tensor([5, 3]), parts(weight))
    assert nll.tolist() == [800.0, 0.0]
    nll.sum().backward()
    assert torch.isfinite(h.grad).all() and float(h.grad[0, 0]) == 100.0


def test_chunks_are_of_one_size_and_cover_the_rows() -> None:
    for rows in (1, 15, 16, 17, 262, 707, 5000):
        step = chunk_rows(32_000, rows)
        assert step % 16 == 0 and step <= 288 and -(-rows // step) * step - rows < step
