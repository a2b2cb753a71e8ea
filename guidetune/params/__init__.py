"""What is trained. Methods are the files beside this one.

A `Params` describes; `attach(model)` gives an `Attached`: the model to run, its trainable tensors, and the way back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from guidetune.registry import Method

if TYPE_CHECKING:
    import torch
    from torch import nn

PROVENANCE = "guidetune.json"


def readable(folder: Path) -> None:
    """Give weight files the rights of ordinary new files: safetensors writes them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


class Params(Method):
    """Contract: `attach` returns an Attached whose model starts as the identity of the model given."""

    # The frozen model may be held in 16 bits; False where the model's own weights train.
    frozen_base: ClassVar[bool] = True
    # Whether `attach` keeps a copy of what it trains (counted by the memory estimate).
    keeps_original: ClassVar[bool] = False

    def prepare(self, model: nn.Module, rows: Any = None) -> None:
        """A pass over data before training, where the method needs one."""

    def attach(self, model: nn.Module, seed: int = 0) -> Attached:
        raise TypeError(f"{type(self).__name__} does not define attach()")


class Attached:
    """A model with its trainable part.

    `model` is what runs; `trainable()` are the tensors the optimiser owns, by stable names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": list(self.trainable().values()), "lr": lr, "weight_decay": weight_decay}]

    def penalty(self) -> torch.Tensor | None:
        """A scalar added to the loss of each optimiser step, or None."""
        return None

    def after_step(self) -> None:
        """Called after each optimiser step (projections, budgets)."""

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The original model, exactly."""
        raise TypeError(f"{type(self).__name__} does not define base()")
        yield

    def fold(self) -> nn.Module:
        """The trained model as a plain transformers model; the attached model must not be used afterwards."""
        raise TypeError(f"{type(self).__name__} does not define fold()")

    def delta(self) -> dict[str, torch.Tensor]:
        """trained − original in fp32, by parameter name of the plain model; only tensors that may differ."""
        raise TypeError(f"{type(self).__name__} does not define delta()")

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the trained part (safetensors and its configuration) into `folder`.

        `state`: the whole model's weights, where the attached model holds only shards of them.
        """
        raise TypeError(f"{type(self).__name__} does not define save()")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote back into the attached model."""
        raise TypeError(f"{type(self).__name__} does not define load()")
