"""STM: train only on tokens that the instruct model finds likely enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from guidetune.objectives.token_weights import TokenBatch, TokenWeights
from guidetune.registry import method

if TYPE_CHECKING:
    import torch


@method(kind="token_weights", name="stm", paper="2501.14315", summary="Keep only tokens whose perplexity under the instruct model is low.")
class Stm(TokenWeights):
    """w_t = 1 if exp(-log q_t) ≤ max_perplexity else 0; mean over the kept tokens (arXiv 2501.14315)."""

    max_perplexity: float = Field(2.5, gt=0, description="Largest token perplexity kept; 2.5 keeps confidence of 0.4 and more.")
    teacher: str = Field("instruct", description="`instruct`, `base`, or any model.")

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,)

    def weights(self, batch: TokenBatch) -> torch.Tensor:
        return ((-batch.teacher(self.teacher)).exp() <= self.max_perplexity).float()
