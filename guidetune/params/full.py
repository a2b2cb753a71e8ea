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
    """Trains the model's own weights in fp32. The graft of the result is tuned − base (Shadow-FT, arXiv 2505.12716).

    A parameter trains when one of `trainable` is found in its name and none of `freeze` is; a tied tensor goes by all its names.
    Frozen parameters cost no weight gradient, and layers below the lowest trained one no backward pass at all.
    Examples: `trainable: ["layers\\.(30|31)\\.mlp"]` (the last layers' MLPs), `trainable: [norm]`, `freeze: [embed_tokens]`.
    """

    frozen_base: ClassVar[bool] = False
    keeps_original: ClassVar[bool] = True
    trainable: list[str] = Field([".*"], min_length=1, description="Regular expressions; parameters whose name contains a match train.")
    freeze: list[str] = Field([], description="Regular expressions; what they match stays frozen, whatever `trainable` says.")

    @field_validator("trainable", "freeze", mode="after")
    @classmethod
    def _compiles(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    def attach(self, model: nn.Module, seed: int = 0) -> Attached:
        """Mark what trains; nothing is wrapped.

        Raises:
            BadInput: a pattern matches no parameter, nothing is left to train, or a weight to train is held in 16 bits.
        """
        aliases: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(p), []).append(name)
        everything = [name for names in aliases.values() for name in names]
        kind = type(model).__name__
        for option, patterns in (("trainable", self.trainable), ("freeze", self.freeze)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in everything):
                    some = ", ".join(everything[:1] + everything[-1:])
                    raise BadInput(f"full: {option}: {pattern!r} matches no parameter of {kind}; its names are like {some}")

        def matched(patterns: list[str], names: list[str]) -> bool:
            return any(re.search(pattern, name) for pattern in patterns for name in names)

        for name, p in model.named_parameters():
            names = aliases[id(p)]
            p.requires_grad_(matched(self.trainable, names) and not matched(self.freeze, names))
            if p.requires_grad and p.dtype.itemsize < 4:
                raise BadInput(f"full: {name} is held in {p.dtype}; full fine-tuning needs float32 weights (tune.dtype: float32)")
        if not any(p.requires_grad for p in model.parameters()):
            raise BadInput(f"full: trainable = {self.trainable} without freeze = {self.freeze} leaves no parameter of {kind} to train")
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
