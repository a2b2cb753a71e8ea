"""Gradient checkpointing: keep each layer's input only, and compute the layer again in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from guidetune.models.architecture import plain


@contextmanager
def recomputed(model: nn.Module, on: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block. Same results; activations of one layer and the inputs of all.

    Layers below the lowest trainable one still have no backward pass: transformers makes the embeddings' output require a
    gradient, which only re-entrant checkpointing needs, and that is undone here.
    """
    if not on:
        yield
        return
    inner = plain(model)
    with warnings.catch_warnings():
        # the name changed in transformers 5; both are there until 6
        warnings.simplefilter("ignore", FutureWarning)
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.disable_input_require_grads()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            inner.gradient_checkpointing_disable()
