"""Linear layers in 8 bits for passes without gradients on the CPU.

With one scale per output channel c of W and one per token t of x:

    y[t, c] = s_x[t] · s_w[c] · Σ_k q(x[t, k] / s_x[t]) · q(W[c, k] / s_w[c])

in 8-bit products with 32-bit sums. A scale per token keeps one outlying token from coarsening all others in its batch, and keeps
documents nearly independent of their neighbours. Embeddings, norms and the output head stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from guidetune.models.quantized import ENGINE


class Int8Linear(nn.Module):
    """x [..., in] in any float dtype → [..., out] in the same."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()  # [out, in]
        scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        quantized = torch.quantize_per_channel(weight, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        try:
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = before
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float()  # [T, in]
        scale = rows.abs().amax(-1, keepdim=True).clamp_min_(1e-12)
        y = torch.ops.quantized.linear_dynamic(rows / scale, self._packed, False).mul_(scale)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def to_int8(model: nn.Module) -> nn.Module:
    """Replace the linear layers of the backbone in place, one at a time."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, Int8Linear(child))
    return model
