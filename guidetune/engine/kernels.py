"""Other people's GPU kernels for the layers that transformers runs: torch.compile and Liger.

Neither helps the hand-written stack on CPUs, so both are refused there. Compiling pays from about a thousand steps on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from torch import nn

from guidetune.errors import BadInput
from guidetune.models.architecture import plain


def check_kernels(kernels: str, device: str) -> None:
    """Raises BadInput when the kernels asked for cannot run here."""
    if kernels == "torch":
        return
    if not device.startswith("cuda"):
        raise BadInput(f"tune.kernels: {kernels} needs a CUDA GPU, and this run is on {device}; leave it out")
    if kernels == "liger" and find_spec("liger_kernel") is None:
        raise BadInput("tune.kernels: liger needs the package liger-kernel, which is not installed: pip install liger-kernel")


@contextmanager
def chosen(model: nn.Module, kernels: str) -> Iterator[None]:
    """Run the model's decoder layers through `kernels` ("torch", "compile" or "liger") inside the block.

    compile: each decoder layer with dynamic shapes, so that micro-batches of other lengths do not compile again.
    liger: fused norms, rotary positions and gated MLPs (arXiv 2410.10989); never its loss, which knows no token weights.

    Raises:
        BadInput: see `check_kernels`.
    """
    inner = plain(model)
    check_kernels(kernels, next(inner.parameters()).device.type)
    layers = []
    if kernels == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(inner, fused_linear_cross_entropy=False, cross_entropy=False)
    elif kernels == "compile":
        layers = [m for m in inner.modules() if isinstance(m, nn.Module) and hasattr(m, "self_attn") and hasattr(m, "mlp")]
        for layer in layers:
            layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
