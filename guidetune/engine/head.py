"""The output head: -log p of given targets without ever holding a [T, V] tensor.

For supervised rows h [n, H], W [V, H], targets y [n], one chunk at a time:

    z = transform(h Wᵀ + b),   p = softmax(z) in fp32,   nll = −log p[y],   d nll / d h = ((p − onehot(y)) ⊙ z') W

A 16-bit product rounds its results to two or three digits. So the product starts from −z[y] (formed on its own in fp32): what is
rounded is the distance of each logit from the target's, and −log p is off by at most 2⁻⁸ Σ p_j |z_j − z[y]| in bf16: near nothing
for a confident p, of which plain 16-bit logits lose whole percents. Costs one fill of the chunk; memory: the chunk, once.

The gradient of every row's nll is formed in the forward pass (two matrix products in all) and scaled by the incoming gradient
in the backward pass. So token weights may depend on the nll itself (they are detached), and one routine serves weighted and
plain losses. A trainable head (full fine-tuning) costs two more products in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from guidetune.engine import scratch
from guidetune.models.architecture import Parts, has_contents, transform

CHUNK_ELEMENTS = 8_388_608  # logits held at once on a CPU: 16 MB in bf16
GPU_CHUNK_ROWS = 2048  # a GPU needs tall products


def chunk_rows(vocab: int, rows: int, device: str = "cpu") -> int:
    """Rows per chunk: chunks of one size, in steps of 16 (a product of a new shape is compiled first, which takes its time)."""
    most = GPU_CHUNK_ROWS if device == "cuda" else max(16, CHUNK_ELEMENTS // max(vocab, 1))
    chunks = -(-rows // most)
    return -(-rows // chunks // 16) * 16


def logits(h: torch.Tensor, head: Parts) -> torch.Tensor:
    """fp32 logits [n, V] of hidden rows [n, H]; small n only."""
    # autocast would round the fp32 head to bf16 behind our back
    with torch.autocast(h.device.type, enabled=False):
        z = (h.to(head.weight.dtype) @ head.weight.T).float()
        return transform(z if head.bias is None else z + head.bias.float(), head)


def _product(h: torch.Tensor, y: torch.Tensor, head: Parts) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h Wᵀ − z[y] [n, V] in the weights' dtype (in scratch), and z[y] [n, 1]; plain h Wᵀ and None for fp32 weights."""
    weight = head.weight
    z = scratch.block("logits", (len(h), weight.shape[0]), weight.dtype, h.device)
    h = h.to(weight.dtype)
    if weight.dtype == torch.float32:
        return torch.mm(h, weight.T, out=z), None
    shift = (h.float() * weight.index_select(0, y).float()).sum(-1, keepdim=True).to(weight.dtype)
    z.copy_((-shift).expand_as(z))
    return torch.addmm(z, h, weight.T, out=z), shift


def _softmax(
    h: torch.Tensor, y: torch.Tensor, z: torch.Tensor, shift: torch.Tensor | None, head: Parts
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """softmax fp32 [n, V] (in scratch), nll [n], and the soft cap's slope [n, V] where there is one, from `_product`'s result."""
    p = z
    if shift is not None:
        p = scratch.block("probabilities", tuple(z.shape), torch.float32, z.device).copy_(z)
    if head.bias is not None:
        p += head.bias.float()
    slope = None
    if head.softcap is not None:
        if shift is not None:
            p += shift.float()
        p.mul_(head.scale / head.softcap).tanh_()
        slope = 1.0 - p * p
        p *= head.softcap
    elif head.scale != 1.0:
        p *= head.scale
    torch.softmax(p, -1, out=p)
    target = p.gather(1, y[:, None]).squeeze(1)
    nll = -target.log()
    if has_contents(target) and bool((target < 1e-30).any()):  # too small for fp32: once more, by their logits
        rare = (target < 1e-30).nonzero().squeeze(1)
        again = logits(h[rare], head)
        nll[rare] = again.logsumexp(-1) - again.gather(1, y[rare, None]).squeeze(1)
    return p, nll, slope


def _grad_logits(p: torch.Tensor, y: torch.Tensor, slope: torch.Tensor | None, head: Parts) -> torch.Tensor:
    """d nll / d (h Wᵀ): softmax minus one-hot, through the soft cap and the scale. p is overwritten."""
    p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1.0))
    if slope is not None:
        p *= slope
    return p.mul_(head.scale) if head.scale != 1.0 else p


def _few(rows: int, weight: torch.Tensor) -> Iterable[tuple[int, int]]:
    """The rows of a chunk in the pieces that go through the softmax at once: few on a CPU, where they stay in the cache."""
    return [(0, rows)] if weight.is_cuda else scratch.pieces(rows, weight.shape[0])


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x with zero rows at its end, `rows` in all."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, head: Parts) -> torch.Tensor:
        n = h.shape[0]
        nll = torch.empty(n, dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        step = chunk_rows(weight.shape[0], n, h.device.type)
        with torch.autocast(h.device.type, enabled=False):  # autocast would round an fp32 head to bf16 behind our back
            for a in range(0, n, step):
                b = min(a + step, n)
                rows, targets = _filled(h[a:b], step), _filled(y[a:b], step)
                z, shift = _product(rows, targets, head)
                for c, d in _few(step, weight):
                    one = slice(c, d)
                    p, part, slope = _softmax(rows[one], targets[one], z[one], None if shift is None else shift[one], head)
                    nll[a + c : min(a + d, b)] = part[: max(b - a - c, 0)]
                    if dh is not None:
                        z[one] = _grad_logits(p, targets[one], slope, head)
                if dh is not None:
                    dh[a:b] = (z @ weight)[: b - a]
        trained = ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2])
        ctx.head, ctx.trained = head, trained
        ctx.save_for_backward(dh, h if trained else None, y if trained else None)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        dh, h, y = ctx.saved_tensors
        grad_h = dh * grad[:, None].to(dh.dtype) if dh is not None else None
        grad_w = grad_b = None
        if ctx.trained:
            head: Parts = ctx.head
            grad_w = torch.zeros_like(head.weight, dtype=torch.float32)
            grad_b = torch.zeros_like(head.bias, dtype=torch.float32) if head.bias is not None else None
            step = chunk_rows(head.weight.shape[0], len(y), h.device.type)
            for a in range(0, len(y), step):
                rows, targets = h[a : a + step], y[a : a + step]
                p, _, slope = _softmax(rows, targets, *_product(rows, targets, head), head)
                g = _grad_logits(p, targets, slope, head).mul_(grad[a : a + step, None])
                with torch.autocast(h.device.type, enabled=False):
                    grad_w.addmm_(g.T, h[a : a + step].float())
                if grad_b is not None:
                    grad_b += g.sum(0)
            grad_w = grad_w.to(head.weight.dtype)
            grad_b = grad_b.to(head.bias.dtype) if grad_b is not None else None
        return grad_h, grad_w, grad_b, None, None


def head_nll(h: torch.Tensor, targets: torch.Tensor, head: Parts) -> torch.Tensor:
    """-log p of each target: fp32 [n], differentiable in `h` (and in the head's weight when it is trained).

    h: hidden states at the positions that predict the targets, [n, H]; targets: int64 [n].
    """
    if h.shape[0] == 0:
        return h.float().sum(-1) * 0.0
    return _HeadNLL.apply(h, head.weight, head.bias, targets, head)
