"""The output head: -log p of given targets without ever holding a [T, V] tensor.

For supervised rows h [n, H], W [V, H], targets y [n], one chunk at a time:

    z = transform(h Wᵀ + b) in fp32,   l = logsumexp(z),   nll = l − z[y],   d nll / d h = ((softmax(z) − onehot(y)) ⊙ z') W

The gradient of every row's nll is formed in the forward pass (two matrix products in all) and scaled by the incoming gradient
in the backward pass. So token weights may depend on the nll itself (they are detached), and one routine serves weighted and
plain losses. A trainable head (full fine-tuning) costs two more products in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from guidetune.models.architecture import Parts, transform

CHUNK_ELEMENTS = 8_388_608  # logits held at once: 32 MB in fp32


def chunk_rows(vocab: int, rows: int) -> int:
    return max(16, min(rows, CHUNK_ELEMENTS // max(vocab, 1)))


def logits(h: torch.Tensor, head: Parts) -> torch.Tensor:
    """fp32 logits [n, V] of hidden rows [n, H]; small n only."""
    # autocast would round the fp32 head to bf16 behind our back
    with torch.autocast(h.device.type, enabled=False):
        z = (h.to(head.weight.dtype) @ head.weight.T).float()
        return transform(z if head.bias is None else z + head.bias.float(), head)


def _grad_logits(z: torch.Tensor, lse: torch.Tensor, y: torch.Tensor, head: Parts) -> torch.Tensor:
    """d nll / d (h Wᵀ): softmax minus one-hot, through the soft cap and the scale. z is overwritten."""
    slope = None
    if head.softcap is not None:
        slope = 1.0 - (z / head.softcap) ** 2
    g = z.sub_(lse[:, None]).exp_()
    g[torch.arange(len(y), device=y.device), y] -= 1.0
    if slope is not None:
        g *= slope
    return g.mul_(head.scale) if head.scale != 1.0 else g


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, head: Parts) -> torch.Tensor:
        n = h.shape[0]
        nll = torch.empty(n, dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        step = chunk_rows(weight.shape[0], n)
        for a in range(0, n, step):
            b = min(a + step, n)
            z = logits(h[a:b], head)  # [chunk, V]
            lse = z.logsumexp(-1)
            nll[a:b] = lse - z.gather(1, y[a:b, None]).squeeze(1)
            if dh is not None:
                g = _grad_logits(z, lse, y[a:b], head)
                with torch.autocast(h.device.type, enabled=False):
                    dh[a:b] = (g.to(weight.dtype) @ weight).to(h.dtype)
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
            step = chunk_rows(head.weight.shape[0], len(y))
            for a in range(0, len(y), step):
                z = logits(h[a : a + step], head)
                g = _grad_logits(z, z.logsumexp(-1), y[a : a + step], head) * grad[a : a + step, None]
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
