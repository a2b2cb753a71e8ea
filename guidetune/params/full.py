"""Full fine-tuning: every parameter, or those whose names match a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from guidetune.errors import BadInput
from guidetune.params import Attached, Params, readable
from guidetune.registry import method

if TYPE_CHECKING:
    import torch
    from torch import nn


@method(kind="params", name="full", summary="Full fine-tuning of all parameters, or of those whose names match.")
class Full(Params):
    """Trains the model's own weights in fp32. The graft of the result is tuned − base (Shadow-FT, arXiv 2505.12716)."""

    frozen_base: ClassVar[bool] = False
    include: str = Field(".*", description="Regular expression; parameters whose name contains a match train.")

    @field_validator("include")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    def attach(self, model: nn.Module, seed: int = 0) -> Attached:
        pattern = re.compile(self.include)
        chosen = 0
        for name, p in model.named_parameters():
            p.requires_grad_(bool(pattern.search(name)))
            chosen += p.requires_grad
            if p.requires_grad and p.dtype.itemsize < 4:
                raise BadInput(f"full: {name} is held in {p.dtype}; full fine-tuning needs float32 weights (tune.dtype: float32)")
        if not chosen:
            raise BadInput(f"full: include = {self.include!r} matches no parameter of {type(model).__name__}")
        return FullAttached(model)


class FullAttached(Attached):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._original = {name: p.detach().clone() for name, p in self.trainable().items()}

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        import torch

        live = self.trainable()
        trained = {name: p.detach().clone() for name, p in live.items()}
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(self._original[name])
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for name, p in live.items():
                    p.copy_(trained[name])

    def fold(self) -> nn.Module:
        return self.model

    def delta(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().float() - self._original[name].float() for name, p in self.trainable().items()}

    def save(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        self.model.save_pretrained(str(folder), state_dict=state)
        readable(folder)

    def load(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        saved = dict(AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).named_parameters())
        with torch.no_grad():
            for name, p in self.trainable().items():
                p.copy_(saved[name])
