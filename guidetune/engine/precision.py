"""Which precision the frozen weights are held in."""

from __future__ import annotations

import torch

from guidetune.threads import processor_flags

# Below this size a step is not dominated by its matrix products, and 16-bit weights were measured to gain nothing.
SMALL = 20_000_000


def has_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    if device.startswith("mps"):
        return False
    return bool(processor_flags() & {"avx512_bf16", "amx_bf16"})


def frozen_dtype(asked: str, parameters: int, device: str) -> str:
    """`auto` → bfloat16 for models that gain from it, else float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if parameters >= SMALL and has_bfloat16(device) else "float32"
